"""Compiles ``csrc`` and the emulator into one library, which has two modules: ``_cuda`` and ``_emulator``.

A folder among the system's temporary ones keeps libraries and objects by what they were made of; processes wait for each other.
"""

import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, NamedTuple

import laco_kernels

HERE = Path(__file__).parent
BESIDE = Path(laco_kernels.__file__).parents[2] / "csrc"  # the package under test, which need not be this checkout's
CSRC = BESIDE if BESIDE.exists() else HERE.parents[2] / "csrc"
GCC = shutil.which("g++")
MACROS = ["-DLACO_AMPERE", "-DLACO_HOPPER"]
WARNINGS = ["-Wall", "-Wno-unknown-pragmas", "-Wno-psabi"]
FLAGS = ["-std=c++17", "-march=native", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", *MACROS, *WARNINGS]


class Modules(NamedTuple):
    cuda: Any
    emulator: Any


def load(csrc: Path = CSRC) -> Modules:
    """Build what is not built and import it."""
    library = build(csrc)

    def module(name):
        # pybind11 gives out again what it once loaded under the same name, from whatever file.
        spec = spec_from_file_location(f"{library.stem}.{name}", library)
        found = module_from_spec(spec)
        spec.loader.exec_module(found)
        return found

    return Modules(module("_cuda"), module("_emulator"))


def build(csrc: Path = CSRC) -> Path:
    """Return the library made of that ``csrc``."""
    import pybind11

    if GCC is None:
        raise RuntimeError("g++: not found, expected on the PATH to build the emulated GPU. Install it")
    kept = Path(tempfile.gettempdir()) / f"laco_kernels_emulator_{os.getuid()}"
    kept.mkdir(mode=0o700, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, (kept / "lock").open("w") as lock:
        copy = Path(folder) / "csrc"
        shutil.copytree(csrc, copy)
        (copy / "wgmma_plain.cuh").write_text(without_assembly((csrc / "wgmma.cuh").read_text()))
        for overlay in (HERE / "overlay").iterdir():
            shutil.copy(overlay, copy)
        folders = [HERE / "include", HERE / "engine", HERE / "probes", copy]
        includes = [*(f"-I{path}" for path in folders), *(f"-isystem{path}" for path in (pybind11.get_include(), PYTHON))]
        headers = {file.name: file for path in folders for file in path.glob("*.*h")}
        flags = [*FLAGS, *includes]
        machine = [sys.version, platform.node(), pybind11.__version__, *FLAGS]

        def compile_one(unit):
            # Optimising what pybind11 makes of the modules takes half of the time.
            level = "-O0" if "PYBIND11_MODULE" in unit.read_text() else "-O2"
            compiled = kept / f"{digest([*machine, level, unit.name, *texts(unit, headers)])}.o"
            if not compiled.exists():
                new = Path(folder) / compiled.name
                run([GCC, *flags, level, "-x", "c++", "-c", unit, "-o", new])
                shutil.move(new, compiled)
            return compiled

        fcntl.flock(lock, fcntl.LOCK_EX)
        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(compile_one, sources(copy) + sorted(HERE.glob("*/*.cpp"))))
        library = kept / f"{digest([file.name for file in objects])}.so"
        if not library.exists():
            run([GCC, "-shared", *objects, "-o", Path(folder) / library.name])
            shutil.move(Path(folder) / library.name, library)
        return library


PYTHON = sysconfig.get_path("include")


def sources(csrc: Path) -> list[Path]:
    """What setup.py compiles."""
    return [csrc / "bindings.cpp", *sorted(csrc.glob("ampere*.cu")), *sorted(csrc.glob("hopper_*.cu"))]


def without_assembly(text: str) -> str:
    """Leave out of a header what is, or is written with, an ``asm`` statement."""
    text = re.sub(r"^#(define|undef) LACO_.*?(?<!\\)$", "", text, flags=re.DOTALL | re.MULTILINE)
    return "\n\n".join(part for part in re.split(r"\n\n+", text) if "asm volatile" not in part and "LACO_" not in part)


def texts(unit: Path, headers: dict[str, Path]) -> list[str]:
    """Of a file and of every header that it includes, directly or not."""
    seen, left = {}, [unit]
    while left:
        file = left.pop()
        seen[file.name] = text = file.read_text()
        names = re.findall(r'^#include ["<]([^">]+)[">]', text, re.MULTILINE)
        left += [headers[name] for name in names if name in headers and name not in seen]
    return [seen[name] for name in sorted(seen)]


def digest(parts: list[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def run(command: list) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"g++: {' '.join(map(str, command))}\n{done.stderr}")
