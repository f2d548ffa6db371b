"""The optional CUDA extension ``laco_kernels._cuda``; everything static is in pyproject.toml.

``LACO_BUILD_CUDA``: ``auto`` (the default) builds it where nvcc is found and goes on without it where that fails, ``1`` fails,
``0`` leaves it out. ``LACO_CUDA_ARCHS``: ``80``, ``90a`` or both, ``80;90a``, the default: what has kernels (those of 80 run on
8.6, 8.9 and, translated by the driver, on everything newer). It links neither libcuda nor torch.
"""

import fcntl
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# By architecture: what is compiled for it alone, and how.
KERNELS = {
    "80": sorted(Path("csrc").glob("ampere*.cu")),
    "90a": sorted(Path("csrc").glob("hopper_*.cu")),
}
GENCODE = {
    "80": ["-gencode=arch=compute_80,code=[sm_80,compute_80]"],
    "90a": ["-gencode=arch=compute_90a,code=sm_90a"],
}
MACROS = {"80": "-DLACO_AMPERE", "90a": "-DLACO_HOPPER"}
BINDINGS = Path("csrc/bindings.cpp")
HEADERS = sorted([*Path("csrc").glob("*.h"), *Path("csrc").glob("*.cuh")])
FLAGS = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-v"]
OBJECTS = Path("build/cuda")  # kept, with what the compiler said of each, wherever pip builds the rest


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
        target.unlink(missing_ok=True)  # of an earlier build: where this one fails, it would be installed
        for folder in (OBJECTS, target.parent):
            folder.mkdir(parents=True, exist_ok=True)
        include = [f"-I{folder}" for folder in dict.fromkeys([pybind11.get_include(), *self.include_dirs])]
        flags = [(BINDINGS, [*include, *(MACROS[arch] for arch in ARCHS)])]
        flags += [(source, GENCODE[arch]) for arch in ARCHS for source in KERNELS[arch]]
        # What every object is made of besides its source and its command.
        version = subprocess.run([NVCC, "--version"], stdout=subprocess.PIPE).stdout
        environment = [os.environ.get(f"NVCC_{which}_FLAGS", "").encode() for which in ("PREPEND", "APPEND")]
        shared = [version, *environment, *(header.read_bytes() for header in HEADERS)]

        def compile_one(source, options):
            name = source.name if source != BINDINGS else f"bindings_{'_'.join(ARCHS)}"
            compiled = OBJECTS / f"{name}.o"
            made, note = compiled.with_suffix(".part"), compiled.with_suffix(".command")
            command = [NVCC, *FLAGS, *options, "-c", str(source), "-o", str(made)]
            wanted = f"{hashlib.sha256(bytes(1).join([*shared, source.read_bytes()])).hexdigest()}\n{shlex.join(command)}"
            if not (compiled.exists() and note.exists() and note.read_text() == wanted):
                log = run(command)
                note.unlink(missing_ok=True)
                compiled.with_suffix(".log").write_text(log)
                made.replace(compiled)
                note.write_text(wanted)
            return str(compiled)

        with (OBJECTS / "lock").open("w") as lock, ThreadPoolExecutor(os.cpu_count()) as pool:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two installations write the same objects
            compiled = list(pool.map(lambda pair: compile_one(*pair), flags))
            run([NVCC, "-shared", "-cudart=static", *compiled, "-o", str(target)])
        say(f"built {target} for {' and '.join(f'sm_{arch}' for arch in ARCHS)} with {NVCC}")


def run(command):
    """Return what the command prints; say what of it is no account of registers."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    # ptxas names each function in a line of its own, and continues the account in the next.
    said = [line for line in done.stdout.splitlines() if not re.match(r"ptxas info|\s+\d+ bytes (stack|gmem)", line)]
    if said or done.returncode:
        say("\n".join([shlex.join(command), *said]))
    if done.returncode:
        raise RuntimeError(f"{command[0]} exited with status {done.returncode}")
    return done.stdout


BUILD = option("LACO_BUILD_CUDA", "auto", ("auto", "0", "1"))
ARCHS = option("LACO_CUDA_ARCHS", "80;90a", ("80", "90a", "80;90a")).split(";")
NVCC = find_nvcc()
if BUILD == "1" and NVCC is None:
    sys.exit("LACO_BUILD_CUDA: got '1', expected nvcc. Put it on the PATH, set CUDA_HOME, or pass LACO_BUILD_CUDA=auto.")
wanted = BUILD != "0" and NVCC is not None
if not wanted:
    say("no CUDA extension: " + ("LACO_BUILD_CUDA=0" if BUILD == "0" else "nvcc was not found"))
sources = [str(source) for source in (BINDINGS, *KERNELS["80"], *KERNELS["90a"])]
extension = Extension("laco_kernels._cuda", sources, depends=[str(header) for header in HEADERS], optional=BUILD == "auto")
setup(ext_modules=[extension] if wanted else [], cmdclass={"build_ext": BuildCuda})
