"""What every kernel in every shipped configuration asks of a GPU, found by compiling ahead of time, without one.

``python -m laco_kernels.kernels.resources`` prints the table as JSON, a row a line; ``make resources`` keeps it. It cannot run
where ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from laco_kernels.kernels import pointwise
from laco_kernels.kernels.gathered_gemm import HEAVY, TILES, Tile, gathered_gemm_kernel

SHARED_LIMITS = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes a block may use, by architecture
CLOSE_TO_ONE = ("stride_ac", "stride_wk", "stride_rc", "stride_xc", "stride_gc", "stride_gn")  # contiguous channels

_NOTHING: dict[str, Any] = {
    "SOURCES": 1,
    "GATHER": 0,
    "RATIO": 1,
    "TAPS": 1,
    "HAS_BIAS": False,
    "ACTIVATION": 0,
    "SAVE_PRE": False,
    "DERIVATIVE": False,
    "RESIDUAL": 0,
    "RESIDUAL_GATHER": 0,
    "SCATTER": 0,
    "FLAT": True,
    "PRECISION": "ieee",
    "EVEN_K": True,
    "ACC": tl.float32,
}
GEMM_MODES: dict[str, dict[str, Any]] = {
    "gather raster, bias, GELU, save": {
        "GATHER": 1, "RATIO": 2, "TAPS": 4, "HAS_BIAS": True, "ACTIVATION": 1, "SAVE_PRE": True
    },
    "gather block, bias, tanh GELU": {"GATHER": 2, "RATIO": 2, "TAPS": 4, "HAS_BIAS": True, "ACTIVATION": 2},
    "8 blocks, bias, GELU, save": {"SOURCES": 8, "HAS_BIAS": True, "ACTIVATION": 1, "SAVE_PRE": True},
    "bias, mean residual": {"RATIO": 2, "FLAT": False, "HAS_BIAS": True, "RESIDUAL": 1, "RESIDUAL_GATHER": 1},
    "bias, channel-group residual": {"RATIO": 2, "HAS_BIAS": True, "RESIDUAL": 2, "RESIDUAL_GATHER": 1},
    "dGELU": {"ACTIVATION": 1, "DERIVATIVE": True},
    "scatter, residual gradient": {"RATIO": 2, "SCATTER": 1, "RESIDUAL": 1},
    "gather raster, ragged": {
        "GATHER": 1, "RATIO": 3, "TAPS": 9, "HAS_BIAS": True, "ACTIVATION": 1, "SAVE_PRE": True, "EVEN_K": False
    },
}  # fmt: skip
HEAVY_MODES = ("dGELU", "bias, channel-group residual")
POINTWISE_MODES: dict[str, tuple[str, dict[str, Any]]] = {
    "split, mean residual": (
        "split_kernel", {"RATIO": 2, "GATHER": 1, "WRITE_S": True, "RESIDUAL": 1, "HAS_BIAS": True}
    ),
    "split, channel-group residual": (
        "split_kernel", {"RATIO": 2, "GATHER": 1, "WRITE_S": True, "RESIDUAL": 2, "HAS_BIAS": True}
    ),
    "GELU backward": ("gelu_backward_kernel", {"ACTIVATION": 1, "WRITE_ACT": True}),
    "join, residual gradient": ("join_kernel", {"RATIO": 2, "SCATTER": 1, "RESIDUAL": 1}),
}  # fmt: skip


@dataclass(frozen=True)
class Resources:
    """One compiled kernel."""

    kernel: str
    mode: str
    tile: str
    dtype: str  # "tf32": float32 tensors, products of torch.backends.cuda.matmul.allow_tf32
    arch: int
    registers: int  # a thread
    spilled: int  # bytes a thread, on the stack or in local memory
    shared: int  # bytes a block
    matrix_instruction: str


def variants(arch: int) -> list[tuple[str, str, str, str, int]]:
    """Return everything there is to compile for one architecture, as arguments of :func:`measure`."""
    found = []
    for tile in TILES:
        for dtype in ("fp32", "tf32") if tile.startswith("float") else ("bf16", "fp16"):
            modes = [mode for mode in GEMM_MODES if tile in (HEAVY if mode in HEAVY_MODES else set(TILES) - {"half-heavy"})]
            if dtype == "fp16":  # the same instructions as bfloat16
                modes = modes[:1]
            found += [("gathered_gemm_kernel", mode, tile, dtype, arch) for mode in modes]
    for mode, (kernel, _) in POINTWISE_MODES.items():
        found += [(kernel, mode, "", dtype, arch) for dtype in ("bf16", "fp32")]
    return found


def measure(kernel: str, mode: str, tile_name: str, dtype: str, arch: int) -> Resources:
    """Compile one variant and read its resources."""
    cheap = dtype not in ("fp32", "tf32")
    precision = {"PRECISION": dtype} if dtype == "tf32" else {}
    if kernel == "gathered_gemm_kernel":
        tile = TILES[tile_name]
        shape = {"BM": tile.bm, "BN": tile.bn, "BK": tile.bk, "GROUP_M": tile.group_m}
        constants = {**_NOTHING, **GEMM_MODES[mode], "CHEAP": cheap, **precision, **shape}
        compiled = _compile(gathered_gemm_kernel, dtype.replace("tf32", "fp32"), arch, tile, constants)
    else:
        shape = {"BM": pointwise.ROW_TILE, "BC": pointwise.COLUMN_TILE, "BN": pointwise.COLUMN_TILE}
        constants = {**POINTWISE_MODES[mode][1], "CHEAP": cheap, "ACC": tl.float32, **shape}
        compiled = _compile(getattr(pointwise, kernel), dtype, arch, Tile(0, 0, 0, 4, 3), constants)
    registers, spilled = _resource_usage(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    instruction = next((name for name in ("tcgen05.mma", "wgmma.mma_async", "mma.sync") if name in ptx), "none")
    return Resources(kernel, mode, tile_name, dtype, arch, registers, spilled, compiled.metadata.shared, instruction)


def _compile(kernel: Any, dtype: str, arch: int, tile: Tile, constants: dict[str, Any]) -> Any:
    sources = constants.get("SOURCES", 1)
    signature: dict[str, Any] = {}
    constant: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    aligned = [["tt.divisibility", 16]]
    for i, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr:
            signature[name], constant[(i,)] = "constexpr", constants[name]
        elif name == "p_a":
            signature[name] = ("*" + dtype,) * sources
            attributes |= {(i, j): aligned for j in range(sources)}
        elif name == "stride_ac":
            signature[name] = ("constexpr",) * sources
            constant |= {(i, j): 1 for j in range(sources)}
        elif name in ("stride_ab", "stride_at"):
            signature[name] = ("i32",) * sources
            attributes |= {(i, j): aligned for j in range(sources)}
        elif name in CLOSE_TO_ONE:
            signature[name], constant[(i,)] = "constexpr", 1
        elif name.startswith("p_"):
            signature[name], attributes[(i,)] = "*fp32" if name == "p_partial" else "*" + dtype, aligned
        else:
            signature[name] = "i32"
            if name.startswith("stride") or name in ("N", "channels"):
                attributes[(i,)] = aligned
    source = ASTSource(kernel, signature, constant, attributes)
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "maxnreg": tile.max_registers}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


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


def measure_all(archs: tuple[int, ...] = tuple(SHARED_LIMITS)) -> list[Resources]:
    """Compile every variant for every architecture, two at a time."""
    todo = [variant for arch in archs for variant in variants(arch)]
    with ProcessPoolExecutor(2) as pool:
        return list(pool.map(measure, *zip(*todo, strict=True), chunksize=8))


if __name__ == "__main__":
    found = measure_all(tuple(int(arch) for arch in sys.argv[1:]) or tuple(SHARED_LIMITS))
    rows = ",\n".join(json.dumps(dataclasses.asdict(row)) for row in found)
    print(f'{{"triton": "{triton.__version__}", "rows": [\n{rows}\n]}}')
