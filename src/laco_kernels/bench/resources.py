"""What the kernels ask of a GPU as the operators launch them, found by compiling ahead of time, without one.

The operators run on the meta device, on the widths of the papers' encoders; whatever they launch is compiled by Triton's own
specialisation for each architecture instead of being run. bfloat16 stands for float16, whose instructions are the same. Widths
that are no multiple of 16 are slower and may spill; they are not in the table. ``make resources`` keeps what
``python -m laco_kernels.bench.resources`` prints, JSON with a row a line. It cannot run where kernels are interpreted.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from laco_kernels import ops, testing
from laco_kernels.kernels import passes
from laco_kernels.ops.cost import Traffic

SHARED_LIMITS = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes a block may use, by architecture
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "tf32": torch.float32}
TILE = ("BM", "BN", "BK", "BC")


@dataclass(frozen=True)
class Resources:
    """One compiled kernel."""

    kernel: str
    mode: str  # the constants that are not their kind's nothing
    tile: str
    dtype: str  # "tf32": float32 tensors, products of torch.backends.cuda.matmul.fp32_precision = "tf32"
    arch: int
    registers: int  # a thread
    spilled: int  # bytes a thread, on the stack or in local memory
    shared: int  # bytes a block
    matrix_instruction: str
    contracted: bool  # some float32 product is added to unrounded
    first: str  # the operator and the implementation that launched it first


class _Target:
    """What Triton asks its driver for when it compiles and does not run."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass


def cases() -> list[testing.Case]:
    """Return operators on the papers' shapes at small and large batches, and every option that has code of its own."""
    wanted = []
    for case in testing.LARGE_CASES:
        wanted += [dataclasses.replace(case, sizes={**case.sizes, "batch": batch}) for batch in (1, 64)]
    merge, conv, plain = testing.LARGE_CASES[0], testing.LARGE_CASES[4], testing.LARGE_CASES[6]
    variants: list[tuple[testing.Case, dict[str, Any]]] = [
        (merge, {"residual": "channel_group", "prefix_tokens": 1, "approximate": "tanh"}),
        (merge, {"residual": "channel_group", "layout": "block"}),
        (merge, {"residual": "none", "layout": "block", "prefix_tokens": 1, "approximate": "tanh"}),
        (merge, {"ratio": 3}),
        (merge, {"ratio": 4, "residual": "channel_group"}),
        (conv, {"kernel_size": 1}),
        (conv, {"kernel_size": 3, "approximate": "tanh"}),
        (plain, {"layout": "block"}),
        (plain, {"kernel_size": 3, "pad": True}),
        (plain, {"kernel_size": 4, "pad": True}),
    ]
    return wanted + [dataclasses.replace(case, options={**case.options, **options}) for case, options in variants]


def measure(arch: int, precision: str) -> list[Resources]:
    """Compile all that the operators launch in one precision for one architecture; once a process."""
    driver.set_active(_Target(arch))
    torch.backends.cuda.matmul.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    found: dict[str, Resources] = {}
    label = ""

    def compile_(kernel: Any, programs: tuple[int, ...], arguments: dict[str, Any]) -> None:
        compiled = kernel.warmup(grid=programs, **arguments)
        if compiled.hash in found:
            return
        registers, spilled = _resource_usage(compiled.asm["cubin"])
        ptx = compiled.asm["ptx"]
        instruction = next((name for name in ("tcgen05.mma", "wgmma.mma_async", "mma.sync") if name in ptx), "none")
        tile = "x".join(str(arguments[name]) for name in TILE if name in arguments)
        row = (kernel.fn.__name__, _mode(arguments), tile, precision, arch)
        found[compiled.hash] = Resources(
            *row, registers, spilled, compiled.metadata.shared, instruction, "fma.rn.f32" in ptx, label
        )

    passes.COMPILERS.append(compile_)
    try:
        for impl in ("triton",) if precision == "tf32" else ("triton", "composite"):  # the other kernels take no products
            for case in cases():
                label = f"{case.op} {impl}"
                inputs = {name: tensor.requires_grad_() for name, tensor in case.inputs(DTYPES[precision], "meta").items()}
                with Traffic(impl):
                    y = case(inputs, None)
                    y.backward(torch.empty_like(y))
        if precision != "tf32":
            label = "tower"
            with Traffic("triton"):
                _tower(DTYPES[precision])
    finally:
        passes.COMPILERS.remove(compile_)
    return sorted(found.values(), key=dataclasses.astuple)


def _tower(dtype: torch.dtype) -> None:
    """Run what stands between the products of an encoder layer, at the widths of the four encoders."""

    def draw(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta").requires_grad_()

    for channels in (1024, 1152):
        x, delta, vectors = draw(4, 577, channels), draw(4, 577, channels), [draw(channels) for _ in range(3)]
        for kind, bias, scale in (("rms", None, None), ("layer", vectors[1], None), ("layer", vectors[1], vectors[2])):
            total, normed = ops.add_norm(x, delta, vectors[0], bias, scale=scale, kind=kind)
            torch.autograd.backward([total, normed], [torch.empty_like(total), torch.empty_like(normed)])
        first = ops.add_norm(x, None, vectors[0], vectors[1])[1]
        first.backward(torch.empty_like(first))
    h = draw(4, 577, 5632)
    for y in (ops.gated_silu(h), *(ops.activate(h, activation=name) for name in ("gelu", "gelu_tanh", "quick_gelu"))):
        y.backward(torch.empty_like(y))


def _mode(arguments: dict[str, Any]) -> str:
    """Name the constants that a launch sets, leaving out tile, precision and what is off."""
    left_out = (*TILE, "GROUP_M", "ACC", "CHEAP", "PRECISION", "CHUNK")
    named = {name: value for name, value in arguments.items() if name.isupper() and len(name) > 1 and name not in left_out}
    return " ".join(name if value is True else f"{name}={value}" for name, value in named.items() if value)


def _resource_usage(cubin: bytes) -> tuple[int, int]:
    """Return registers and spilled bytes a thread, as Triton's own cuobjdump reports them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def measure_all(*, gate: bool = False) -> list[Resources]:
    """Compile everything for every architecture, in two processes; for a ``gate`` float32 for one of them only."""
    todo = [(arch, precision) for arch in SHARED_LIMITS for precision in DTYPES if not gate or is_gated(arch, precision)]
    # Each in a process of its own: Triton keeps what it compiled by device, and pretends to have only one.
    with multiprocessing.get_context("spawn").Pool(min(2, os.cpu_count() or 1), maxtasksperchild=1) as pool:
        return [row for rows in pool.starmap(measure, todo, chunksize=1) for row in rows]


def is_gated(arch: int, precision: str) -> bool:
    """Whether every test run compiles this: half precision everywhere, the slow float32 for sm_90."""
    return precision == "bf16" or arch == 90


if __name__ == "__main__":
    table = measure_all(gate="--gate" in sys.argv[1:])
    lines = ",\n".join(json.dumps(dataclasses.asdict(row)) for row in table)
    print(f'{{"triton": "{triton.__version__}", "rows": [\n{lines}\n]}}')
