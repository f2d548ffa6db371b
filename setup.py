"""The optional CUDA extension ``laco_kernels._cuda``; everything static is in pyproject.toml.

``LACO_BUILD_CUDA``: ``auto`` (the default) builds it where nvcc is found and goes on without it where that fails, ``1`` fails,
``0`` leaves it out. ``LACO_CUDA_ARCHS``: ``90a``, the one architecture that has kernels. It links neither libcuda nor torch.
"""

import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = ["csrc/bindings.cpp", "csrc/hopper_128x256.cu", "csrc/hopper_192x128.cu"]
HEADERS = [
    "element.cuh",
    "gelu.cuh",
    "hopper_gemm.cuh",
    "hopper_gemm.h",
    "hopper_launch.cuh",
    "ptx.cuh",
    "schedule.h",
    "wgmma.cuh",
]
FLAGS = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden"]


def say(text):
    """Print at once, to be seen in front of what nvcc prints; pip shows it with ``-v``."""
    print(f"laco_kernels: {text}", file=sys.stderr, flush=True)


def option(name, default, allowed):
    value = os.environ.get(name) or default
    if value not in allowed:
        sys.exit(f"{name}: got {value!r}, expected one of {', '.join(allowed)}. Leave it out for {default!r}.")
    return value


def find_nvcc():
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [str(Path(home, "bin", "nvcc")) for home in homes if home]
    return next(filter(None, map(shutil.which, ["nvcc", *places])), None)


class BuildCuda(build_ext):
    """Compiles every source with nvcc, beside each other, and links them with the CUDA runtime inside."""

    def build_extension(self, extension):
        try:
            self.build(extension)
        except (ImportError, OSError, RuntimeError) as error:
            if BUILD == "1":
                sys.exit(f"LACO_BUILD_CUDA: got '1', expected the CUDA extension to build. It did not: {error}.")
            say(f"the CUDA extension did not build: {error}. Installing without impl='cuda'")

    def build(self, extension):
        import pybind11

        target = Path(self.get_ext_fullpath(extension.name))
        objects = Path(self.build_temp)
        objects.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        gencode = f"-gencode=arch=compute_{ARCH},code=sm_{ARCH}"
        include = [f"-I{folder}" for folder in dict.fromkeys([pybind11.get_include(), *self.include_dirs])]

        def compile_one(source):
            compiled = objects / f"{Path(source).name}.o"
            run([NVCC, *FLAGS, gencode, *include, "-c", source, "-o", str(compiled)])
            return str(compiled)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            compiled = list(pool.map(compile_one, extension.sources))
        run([NVCC, "-shared", "-cudart=static", gencode, *compiled, "-o", str(target)])
        say(f"built {target} for sm_{ARCH} with {NVCC}")


def run(command):
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.stdout.strip() or done.returncode:
        say(f"{shlex.join(command)}\n{done.stdout}")
    if done.returncode:
        raise RuntimeError(f"{command[0]} exited with status {done.returncode}")


BUILD = option("LACO_BUILD_CUDA", "auto", ("auto", "0", "1"))
ARCH = option("LACO_CUDA_ARCHS", "90a", ("90a",))
NVCC = find_nvcc()
if BUILD == "1" and NVCC is None:
    sys.exit("LACO_BUILD_CUDA: got '1', expected nvcc. Put it on the PATH, set CUDA_HOME, or pass LACO_BUILD_CUDA=auto.")
wanted = BUILD != "0" and NVCC is not None
if not wanted:
    say("no CUDA extension: " + ("LACO_BUILD_CUDA=0" if BUILD == "0" else "nvcc was not found"))
extension = Extension("laco_kernels._cuda", SOURCES, depends=[f"csrc/{name}" for name in HEADERS], optional=BUILD == "auto")
setup(ext_modules=[extension] if wanted else [], cmdclass={"build_ext": BuildCuda})
