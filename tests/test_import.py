"""What importing costs, each claim in a fresh interpreter."""

import subprocess
import sys

BLOCK = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
"""


def python(code, blocked=()):
    command = [sys.executable, "-c", BLOCK.format(blocked=tuple(blocked)) + code]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_import_needs_neither_triton_nor_transformers_and_touches_no_gpu():
    code = """
import torch
def refuse(*_, **__): raise AssertionError("CUDA was touched")
torch.cuda.is_available = torch.cuda.device_count = torch.cuda._lazy_init = refuse
import laco_kernels as lk
x = torch.randn(1, 16, 4)
y = lk.nn.PatchMergeLayer(4)(x, (4, 4))
assert y.shape == (1, 4, 4)
assert not torch.cuda.is_initialized()
extras = {"triton", "transformers", "safetensors", "rich", "typer", "matplotlib", "PIL"}
assert not extras & set(sys.modules), extras & set(sys.modules)
"""
    blocked = ("triton", "transformers", "safetensors", "rich", "typer", "matplotlib", "PIL", "accelerate", "peft")
    done = python(code, blocked)
    assert done.returncode == 0, done.stderr


def test_hf_without_transformers_says_what_to_install():
    done = python("import laco_kernels as lk; lk.hf", blocked=("transformers",))
    assert done.returncode == 1
    assert "pip install 'laco_kernels[hf]'" in done.stderr


def test_the_command_line_without_its_extra_says_what_to_install():
    done = python("import laco_kernels.cli", blocked=("typer",))
    assert done.returncode == 1
    assert done.stderr.strip() == "laco needs typer, which is not installed. Run: pip install 'laco_kernels[bench]'"


def test_unknown_attributes_are_errors():
    done = python("import laco_kernels as lk; lk.nonsense")
    assert "module 'laco_kernels' has no attribute 'nonsense'" in done.stderr
