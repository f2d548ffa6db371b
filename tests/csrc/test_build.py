"""What setup.py compiles anew, and what it never takes for good, on a small tree with a stand-in for nvcc."""

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

from tests.csrc import fake_nvcc

ROOT = Path(__file__).parents[2]
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
FILES = {
    "bindings.cpp": '#include "plan.h"\n',
    "ampere.cu": '#include "ampere.cuh"\n#include "gelu.cuh"\n',
    "hopper_1.cu": '#include "hopper.cuh"\n',
    "hopper_2.cu": '#include "hopper.cuh"\n',
    # None is like another: gcc takes headers with one content and one time for one file.
    "ampere.cuh": "#pragma once  // ampere\n",
    "hopper.cuh": '#pragma once\n#include "gelu.cuh"\n#include "plan.h"\n',
    "gelu.cuh": "#pragma once  // gelu\n",
    "plan.h": "#pragma once  // plan\n",
}
HOPPER = {"hopper_1.cu", "hopper_2.cu"}
ALL = {"bindings.cpp", "ampere.cu", *HOPPER}


class Tree:
    """A copy of setup.py beside ``csrc`` of its own."""

    def __init__(self, root, nvcc):
        self.root, self.csrc = root, root / "csrc"
        self.path = f"{nvcc.parent}:{os.environ['PATH']}"
        self.library = root / "lib" / "laco_kernels" / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"

    def start(self, *command, **env):
        command = [sys.executable, *(command or ["setup.py"]), "build_ext", "--build-lib", "lib"]
        env = {**os.environ, "PATH": self.path, "LACO_BUILD_CUDA": "1", "LACO_CUDA_ARCHS": "", **env}
        return subprocess.Popen(command, cwd=self.root, env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)

    def fail(self, **env):
        process = self.start(**env)
        said = process.communicate()[1]
        assert process.returncode == 1
        assert not self.library.exists()
        return said

    def calls(self):
        calls = self.root / "calls"
        return set(calls.read_text().split()) if calls.exists() else set()

    def build(self, **env):
        """What was compiled; all that is linked must be as a compiler would make it now."""
        (self.root / "calls").unlink(missing_ok=True)
        process = self.start(**env)
        said = process.communicate()[1]
        assert process.returncode == 0, said
        assert f"compiled {len(self.calls())} of " in said
        self.check(env.get("LACO_CUDA_ARCHS") or "80;90a")
        return self.calls()

    def check(self, archs="80;90a"):
        macros = {"80": "-DLACO_AMPERE", "90a": "-DLACO_HOPPER"}
        options = {"80": "-gencode=arch=compute_80,code=[sm_80,compute_80]", "90a": "-gencode=arch=compute_90a,code=sm_90a"}
        objects = [("bindings.cpp", " ".join(macros[arch] for arch in archs.split(";")))]
        objects += [("ampere.cu", options["80"])] * ("80" in archs)
        objects += [(name, options["90a"]) for name in sorted(HOPPER)] * ("90a" in archs)
        made = [f"{options}\n{fake_nvcc.text(self.csrc / name)}" for name, options in objects]
        assert self.library.read_text() == "".join(made)

    def edit(self, name, text="// edited\n"):
        (self.csrc / name).write_text(FILES.get(name, "") + text)


@pytest.fixture
def fake(tmp_path):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f'#!/bin/sh\nexec {sys.executable} {fake_nvcc.__file__} "$@"\n')
    nvcc.chmod(0o755)
    return nvcc


@pytest.fixture
def tree(tmp_path, fake):
    csrc = tmp_path / "tree" / "csrc"
    csrc.mkdir(parents=True)
    for name, text in FILES.items():
        (csrc / name).write_text(text)
    shutil.copy(ROOT / "setup.py", csrc.parent)
    return Tree(csrc.parent, fake)


def test_a_header_compiles_what_includes_it(tree):
    assert tree.build() == ALL
    assert tree.build() == set()
    including = {"plan.h": {"bindings.cpp", *HOPPER}, "gelu.cuh": {"ampere.cu", *HOPPER}, "ampere.cuh": {"ampere.cu"}}
    for header, sources in including.items():
        tree.edit(header)
        assert tree.build() == sources, header
    tree.edit("hopper_1.cu")
    assert tree.build() == {"hopper_1.cu"}


def test_includes_come_and_go(tree):
    tree.build()
    tree.edit("new.h")
    assert tree.build() == set()
    tree.edit("gelu.cuh", '#include "new.h"\n')
    assert tree.build() == {"ampere.cu", *HOPPER}
    tree.edit("new.h", "// edited again\n")
    assert tree.build() == {"ampere.cu", *HOPPER}
    tree.edit("gelu.cuh", "")
    assert tree.build() == {"ampere.cu", *HOPPER}
    (tree.csrc / "new.h").unlink()
    assert tree.build() == set()


def test_content_decides_and_not_times(tree, fake):
    tree.build()
    before = (tree.csrc / "gelu.cuh").stat()
    tree.edit("gelu.cuh")
    os.utime(tree.csrc / "gelu.cuh", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert tree.build() == {"ampere.cu", *HOPPER}
    shutil.copytree(tree.root, tree.root.with_name("copy"), copy_function=shutil.copyfile)
    assert Tree(tree.root.with_name("copy"), fake).build() == set()


@pytest.mark.parametrize("name", ["NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "NVCC_CCBIN", "FAKE_VERSION"])
def test_another_compiler_or_other_flags_compile_everything(tree, name):
    tree.build()
    assert tree.build(**{name: "another"}) == ALL
    assert tree.build(**{name: "another"}) == set()
    assert tree.build() == ALL


def test_each_architecture_has_its_objects(tree):
    assert tree.build(LACO_CUDA_ARCHS="80") == {"bindings.cpp", "ampere.cu"}
    assert tree.build(LACO_CUDA_ARCHS="80;90a") == {"bindings.cpp", *HOPPER}
    assert tree.build(LACO_CUDA_ARCHS="90a") == {"bindings.cpp"}
    assert tree.build(LACO_CUDA_ARCHS="") == set()  # as left out


def test_system_headers_are_known_by_their_versions(tree):
    """With build isolation pip has pybind11 in another folder each time."""

    def install(folder, version):
        (tree.root / folder / "pybind11").mkdir(parents=True)
        text = f"__version__ = {version!r}\ndef get_include(): return {folder!r}\n"
        (tree.root / folder / "pybind11" / "__init__.py").write_text(text)
        return str(tree.root / folder)

    assert tree.build(PYTHONPATH=install("one", "3.0")) == ALL
    assert tree.build(PYTHONPATH=install("two", "3.0")) == set()
    assert tree.build(PYTHONPATH=install("three", "3.1")) == {"bindings.cpp"}


def test_what_failed_half_way_is_not_taken(tree):
    tree.build()
    tree.edit("gelu.cuh")
    assert "half way" in tree.fail(FAKE_FAIL="hopper_1.cu")
    assert "hopper_1.cu" in tree.build()
    tree.edit("gelu.cuh", "// edited again\n")
    tree.fail(FAKE_FAIL="hopper_1.cu")
    tree.edit("gelu.cuh")  # what the last whole object was made of
    assert "hopper_1.cu" not in tree.build()


def test_a_library_linked_half_way_is_not_installed(tree):
    tree.build()
    process = tree.start(LACO_BUILD_CUDA="auto", FAKE_FAIL="link")
    assert "Installing without impl='cuda'" in process.communicate()[1]
    assert process.returncode == 0
    assert not tree.library.exists()
    assert tree.build() == set()


def test_what_is_edited_while_it_compiles_is_compiled_again(tree):
    process = tree.start(FAKE_EDIT="csrc/ampere.cuh")
    process.communicate()
    assert (tree.csrc / "ampere.cuh").read_text() == "edited\n"
    assert tree.build() == {"ampere.cu"}


def test_what_was_edited_and_put_back_is_compiled_again(tree):
    process = tree.start(FAKE_EDIT="csrc/gelu.cuh")
    process.communicate()
    tree.edit("gelu.cuh", "")
    assert {"ampere.cu", "hopper_1.cu", "hopper_2.cu"} >= tree.build() > set()


def test_the_next_build_waits_for_a_compiler_that_outlived_its_own(tree):
    first = tree.start(FAKE_WAIT="go", LACO_CUDA_ARCHS="80")
    deadline = time.monotonic() + 60
    while not (tree.root / "build" / "cuda" / "ampere.cu.part").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    second = tree.start(LACO_CUDA_ARCHS="80")
    with pytest.raises(subprocess.TimeoutExpired):
        second.wait(2)
    (tree.root / "go").touch()
    assert second.wait(60) == 0
    first.stderr.close()
    second.stderr.close()
    tree.check("80")


def pack(folder):
    """Make the source distribution, unpack it in the folder and say where."""
    command = [sys.executable, "setup.py", "egg_info", "--egg-base", str(folder), "sdist", "--dist-dir", str(folder)]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "LACO_BUILD_CUDA": "0"}, capture_output=True, check=True)
    (archive,) = folder.glob("*.tar.gz")
    subprocess.run(["tar", "-xf", archive, "-C", folder], check=True)
    return folder / archive.name.removesuffix(".tar.gz")


def test_a_source_distribution_has_the_kernels_wherever_it_is_made(tmp_path):
    def names(csrc):
        return {path.name for path in csrc.iterdir()}

    assert names(pack(tmp_path) / "csrc") == names(ROOT / "csrc")


def without_nvcc(tree, *, build):
    code = "import runpy, shutil; shutil.which = lambda *_: None; runpy.run_path('setup.py', run_name='__main__')"
    process = tree.start("-c", code, LACO_BUILD_CUDA=build)
    said = process.communicate()[1]
    assert not tree.library.exists()
    return process.returncode, said


def test_without_nvcc_it_says_so(tree):
    code, said = without_nvcc(tree, build="auto")
    assert code == 0
    assert "laco_kernels: no CUDA extension: nvcc was not found" in said
    code, said = without_nvcc(tree, build="1")
    assert code == 1
    assert "LACO_BUILD_CUDA: got '1', expected nvcc. Put it on the PATH, set CUDA_HOME, or pass LACO_BUILD_CUDA=auto." in said


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
def test_nvcc_names_the_files_that_it_read(tree):
    tree.path = f"{Path(NVCC).parent}:{os.environ['PATH']}"
    objects = tree.root / "build" / "cuda"

    def built():
        process = tree.start(LACO_CUDA_ARCHS="80")
        said = process.communicate()[1]
        assert process.returncode == 0, said
        return said

    assert "compiled 2 of 2 objects" in built()
    assert "csrc/gelu.cuh" in (objects / "ampere.cu.d").read_text()
    tree.edit("gelu.cuh")
    assert "compiled 1 of 2 objects" in built()
    assert "compiled 0 of 2 objects" in built()
