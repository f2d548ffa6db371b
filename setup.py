"""The optional CUDA extension ``laco_kernels._cuda``; everything static is in pyproject.toml.

``LACO_BUILD_CUDA``: ``auto`` (the default) builds it where nvcc is found and goes on without it where that fails, ``1`` fails,
``0`` leaves it out. ``LACO_CUDA_ARCHS``: ``80``, ``90a`` or both, ``80;90a``, the default: what has kernels (those of 80 run on
8.6, 8.9 and, translated by the driver, on everything newer). It links neither libcuda nor torch.
"""

import functools
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


def content(file):
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if Path(file).is_file() else "is not there"


first_content = functools.cache(content)  # as first looked at


class BuildCuda(build_ext):
    """Compiles every source with nvcc, beside each other, and links them with the CUDA runtime inside.

    An object is kept for as long as its command and the content of the files that nvcc read for it are the same. Times, by
    which ninja goes, say nothing in a tree that was copied or is on another branch.
    """

    def build_extension(self, extension):
        target = Path(self.get_ext_fullpath(extension.name))
        target.unlink(missing_ok=True)  # of an earlier build: where this one fails, it would be installed
        try:
            self.build(target)
        except (ImportError, OSError, RuntimeError) as error:
            target.unlink(missing_ok=True)
            if BUILD == "1":
                sys.exit(f"LACO_BUILD_CUDA: got '1', expected the CUDA extension to build. It did not: {error}.")
            say(f"the CUDA extension did not build: {error}. Installing without impl='cuda'")

    def build(self, target):
        import fcntl  # Windows has none: an installation without impl='cuda'

        import pybind11

        for folder in (OBJECTS, target.parent):
            folder.mkdir(parents=True, exist_ok=True)
        # By the object's name: source, options, system headers and their versions, as pip puts them elsewhere each time.
        headers = [f"-isystem={folder}" for folder in dict.fromkeys([pybind11.get_include(), *self.include_dirs])]
        macros = [MACROS[arch] for arch in ARCHS]
        objects = {f"bindings_{'_'.join(ARCHS)}": (BINDINGS, macros, headers, [pybind11.__version__, sys.version])}
        objects |= {source.name: (source, GENCODE[arch], [], []) for arch in ARCHS for source in KERNELS[arch]}
        compiler = [subprocess.run([NVCC, "--version"], stdout=subprocess.PIPE, text=True).stdout]
        heeded = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "NVCC_CCBIN", "CPATH", "CPLUS_INCLUDE_PATH")
        compiler += [os.environ.get(name, "") for name in heeded]

        def compile_one(name, source, options, headers, versions):
            """Whether there was anything to do."""
            compiled, made, read, log, note = (OBJECTS / f"{name}.{end}" for end in ("o", "part", "d", "log", "command"))
            command = [NVCC, *FLAGS, *options, str(source)]

            def made_of(content):
                """The command, and the files that nvcc has named in a rule for make."""
                files = sorted(read.read_text().partition(":")[2].replace("\\\n", " ").split())
                return "\n".join([shlex.join(command), *compiler, *versions, *(f"{content(file)} {file}" for file in files)])

            if compiled.exists() and read.exists() and note.exists() and note.read_text() == made_of(first_content):
                return False
            said = run([*command, *headers, "-MMD", "-MF", str(read), "-c", "-o", str(made)], lock)
            note.unlink(missing_ok=True)
            log.write_text(said)
            made.replace(compiled)
            # Last, for without it an object is none; and not of what was edited while nvcc read it.
            if made_of(content) == made_of(first_content):
                note.write_text(made_of(first_content))
            return True

        with (OBJECTS / "lock").open("w") as lock, ThreadPoolExecutor(os.cpu_count()) as pool:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two installations write the same objects
            for file in Path("csrc").iterdir():
                first_content(str(file))
            compiled = sum(pool.map(lambda name: compile_one(name, *objects[name]), objects))
            linked = [str(OBJECTS / f"{name}.o") for name in objects]
            run([NVCC, "-shared", "-cudart=static", *linked, "-o", str(target)], lock)
        architectures = " and ".join(f"sm_{arch}" for arch in ARCHS)
        say(f"built {target} for {architectures} with {NVCC}, which compiled {compiled} of {len(objects)} objects")


def run(command, lock):
    """Return what the command prints; say what of it is no account of registers.

    It holds the lock, too: where this process is killed, nvcc goes on writing.
    """
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, pass_fds=[lock.fileno()])
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
