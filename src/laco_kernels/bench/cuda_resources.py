"""Registers and shared memory of the compiled CUDA kernels, read out of the extension without a GPU.

``make resources`` keeps what ``python -m laco_kernels.bench.cuda_resources`` prints, JSON with a kernel a line.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import triton

ELEMENTS = ("bfloat16", "float16")
PRODUCTS = ("forward", "input_gradient", "weight_gradient")
ACTIVATIONS = ("none", "erf", "tanh")
# Values of template arguments in a kernel's mangled name: numbers, booleans and enumerators.
ARGUMENT = re.compile(r"L(?:[ib]|N\w*?\d(?:Element|Product|Activation)E)(\d+)E")


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel: what it computes and what it takes."""

    tile: str  # "128x256", ... of Hopper, or "ampere"
    element: str
    product: str
    activation: str
    copied: bool  # the copy engine also brings what is added, or gone back through
    split: bool  # the blocks of a cluster share a tile's depth
    registers: int  # a thread, at the launch
    spilled: int  # bytes a thread
    shared_bytes: int  # a block
    code: str  # the machine code

    @property
    def name(self) -> str:
        """Say in a word which of all kernels it is."""
        words = [self.tile, self.element, self.product, self.activation, "copied" * self.copied, "split" * self.split]
        return " ".join(filter(None, words))


def kernels(library: str | Path) -> dict[str, Kernel]:
    """Return the kernels in a compiled extension by name."""
    usage = {}
    for function, line in re.findall(r"Function (\w+):\n\s*(.*)", _tool("--dump-resource-usage", library)):
        usage[function] = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", line)}
    found = {}
    for part in disassembled(library).split("Function : ")[1:]:
        function, code = part.split("\n", 1)
        kernel = _describe(function, usage[function], code)
        found[kernel.name] = kernel
    return found


def disassembled(binary: str | Path) -> str:
    """Return the machine code of everything in a compiled file."""
    return _tool("-sass", binary)


def _describe(function: str, usage: dict[str, int], code: str) -> Kernel:
    values = [int(value) for value in ARGUMENT.findall(function)]
    registers, spilled = usage["REG"], usage["STACK"] + usage["LOCAL"]
    if "hopper_gemm_kernel" in function:
        bn, stages, consumers, _, element, product, activation, copied, split = values
        bm = 64 * consumers
        shared = 1024 + stages * (bm + bn) * 128 + consumers * 16384 + 16 * stages
        tile = f"{bm}x{bn}"
    elif "6ampere11gemm_kernel" in function:
        names = [name.title().replace("_", "") for name in PRODUCTS]
        product = next(i for i, name in enumerate(names) if f"{name}Product" in function)
        element, activation, copied, split = (*values, 0, 0, 0)[:4]
        tile, shared = "ampere", 3 * 2 * 128 * 32 * 2  # slots of two operands
    else:
        raise ValueError(f"function: got {function!r}, expected a kernel of csrc/. Describe it here")
    words = ELEMENTS[element], PRODUCTS[product], ACTIVATIONS[activation]
    return Kernel(tile, *words, bool(copied), bool(split), registers, spilled, shared, code)


def _tool(option: str, library: str | Path) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([str(tool), option, str(library)], capture_output=True, text=True, check=True).stdout


def table(library: str | Path) -> list[dict[str, object]]:
    """Return a row a kernel: its name, registers, spilled and shared bytes."""
    return [
        {"kernel": name, "registers": kernel.registers, "spilled": kernel.spilled, "shared_bytes": kernel.shared_bytes}
        for name, kernel in sorted(kernels(library).items())
    ]


if __name__ == "__main__":
    lines = ",\n".join(json.dumps(row) for row in table(str(importlib.import_module("laco_kernels._cuda").__file__)))
    print(f'{{"kernels": [\n{lines}\n]}}')
