"""How kernels inside an encoder get onto a GPU: without looking again for what was compiled, and in few steps."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from laco_kernels.kernels import elementwise, launch, norm

ROOT = Path(__file__).resolve().parents[2]


def test_a_compiled_kernel_is_looked_up_once_and_launched_alike(tmp_path):
    """In a process of its own, where Triton does not interpret; see there what is counted."""
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.kernels.fake_driver"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("passed\n")


@pytest.mark.parametrize(
    ("kernel", "tensors"),
    [
        (norm.add_norm_kernel, 9),
        (norm.add_norm_backward_kernel, 13),
        (elementwise.activation_kernel, 2),
        (elementwise.activation_backward_kernel, 3),
    ],
    ids=["add_norm", "add_norm_backward", "activation", "activation_backward"],
)
def test_tensors_come_first_in_the_signature(kernel, tensors):
    assert [name.startswith("p_") for name in kernel.arg_names] == [i < tensors for i in range(len(kernel.arg_names))]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs the interpreter")
def test_plans_are_kept_by_what_they_were_made_for(monkeypatch):
    x = torch.linspace(-2, 2, 2 * 3 * 8, dtype=torch.float64).view(2, 3, 8)
    expected = elementwise.activate_forward(x, activation="gelu")
    for name, value in (("ROW_TILE", 2), ("COLUMN_TILE", 4)):
        monkeypatch.setattr(elementwise, name, value)
    made = elementwise._plan.cache_info().misses
    assert torch.equal(elementwise.activate_forward(x, activation="gelu"), expected)
    assert torch.equal(elementwise.activate_forward(x.clone(), activation="gelu"), expected)
    assert elementwise._plan.cache_info().misses == made + 1
    assert elementwise._plan.cache_info().maxsize == launch.PLANS
