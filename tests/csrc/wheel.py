"""What whoever installs gets: a wheel built in isolation from the source distribution. ``make test-wheel`` runs it.

Not among the tests that ``make test`` finds: it asks the package registry for what builds the wheel, and compiles all kernels.
"""

import os
import re
import subprocess
import sys
import sysconfig
import zipfile

import pytest

from tests.csrc.test_build import NVCC, ROOT, pack

EXTENSION = f"laco_kernels/_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
LIMIT = 600  # seconds, on two cores


def pip(*arguments, **env):
    env = {**os.environ, "LACO_CUDA_ARCHS": "", **env}
    env.pop("PYTHONPATH", None)
    command = [sys.executable, "-m", "pip", *arguments]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stdout
    return done.stdout


def build(folder, **env):
    """The wheel's name, the files in it, the folder it is installed to, and what was said."""
    said = pip("wheel", "--verbose", "--no-cache-dir", "--no-deps", f"--wheel-dir={folder}", str(pack(folder)), **env)
    (wheel,) = folder.glob("*.whl")
    pip("install", "--no-deps", f"--target={folder / 'installed'}", str(wheel))
    with zipfile.ZipFile(wheel) as packed:
        return wheel.name, set(packed.namelist()), folder / "installed", said


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    if NVCC is None:
        pytest.skip("needs nvcc")
    return build(tmp_path_factory.mktemp("wheel"), LACO_BUILD_CUDA="1")


def run(folder, code):
    """Print what it prints, with the wheel and without a GPU."""
    env = {**os.environ, "PYTHONPATH": str(folder), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_it_has_every_file_of_the_package_and_the_extension(built):
    _, names, *_ = built
    package = ROOT / "src" / "laco_kernels"
    files = {path.relative_to(ROOT / "src").as_posix() for path in package.rglob("*") if path.is_file()}
    files = {file for file in files if "__pycache__" not in file and not file.endswith(".so")}
    assert {name for name in names if name.startswith("laco_kernels/")} == files | {EXTENSION}


def test_it_links_neither_torch_nor_cublas_nor_the_driver(built):
    _, _, folder, _ = built
    needed = subprocess.run(["ldd", folder / EXTENSION], capture_output=True, text=True, check=True).stdout
    assert "libc.so" in needed
    assert not re.search("torch|cublas|libcuda|cudart", needed), needed


def test_it_imports_without_a_gpu(built):
    _, _, folder, _ = built
    code = "import laco_kernels; from laco_kernels import _cuda; print(laco_kernels.__file__, *_cuda.ARCHITECTURES)"
    assert run(folder, code) == [str(folder / "laco_kernels" / "__init__.py"), "80", "90a"]


def test_without_the_kernels_it_is_for_every_python_and_says_so(tmp_path):
    wheel, names, folder, said = build(tmp_path, LACO_BUILD_CUDA="0")
    assert wheel.endswith("-py3-none-any.whl")
    assert not [name for name in names if name.endswith(".so")]
    assert "laco_kernels: no CUDA extension: LACO_BUILD_CUDA=0" in said
    code = "import laco_kernels, importlib.util as u; print(laco_kernels.__file__, u.find_spec('laco_kernels._cuda'))"
    assert run(folder, code) == [str(folder / "laco_kernels" / "__init__.py"), "None"]
