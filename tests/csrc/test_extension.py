"""The CUDA extension without a GPU: built, imported, refusing, its schedule, and what the compiler made of the kernels."""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).parents[2]
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
pytestmark = [
    pytest.mark.xdist_group("csrc"),  # built once, not once a worker
    pytest.mark.skipif(NVCC is None, reason="needs nvcc to build the CUDA extension"),
]
TILES = {"128x256": (128, 256), "192x128": (192, 128)}
KERNELS = 6  # of each tile and type: no activation, erf and tanh with and without saving, residual
TYPES = ("BF16", "F16")


def setup(folder, **env):
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(folder), "--build-temp", str(folder / "objects")]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def extension(tmp_path_factory):
    folder = tmp_path_factory.mktemp("extension")
    done = setup(folder, LACO_BUILD_CUDA="1")
    assert done.returncode == 0, done.stderr
    assert "laco_kernels: built" in done.stderr
    (library,) = folder.rglob("_cuda*.so")
    spec = spec_from_file_location("laco_kernels._cuda", library)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_build_says_what_it_did_not_do(tmp_path):
    done = setup(tmp_path, LACO_BUILD_CUDA="0")
    assert done.returncode == 0
    assert "no CUDA extension: LACO_BUILD_CUDA=0" in done.stderr
    done = setup(tmp_path, LACO_BUILD_CUDA="yes")
    assert done.returncode == 1
    assert "LACO_BUILD_CUDA: got 'yes', expected one of auto, 0, 1. Leave it out for 'auto'." in done.stderr
    assert "LACO_CUDA_ARCHS: got '80', expected one of 90a" in setup(tmp_path, LACO_CUDA_ARCHS="80").stderr
    assert not list(tmp_path.rglob("_cuda*"))


def test_a_broken_compiler_stops_only_who_asked_for_the_extension(tmp_path):
    broken = tmp_path / "bin" / "nvcc"
    broken.parent.mkdir()
    broken.write_text("#!/bin/sh\necho it is broken; exit 1\n")
    broken.chmod(0o755)
    path = f"{broken.parent}:{os.environ['PATH']}"
    done = setup(tmp_path, LACO_BUILD_CUDA="auto", PATH=path)
    assert done.returncode == 0, done.stderr
    assert "it is broken" in done.stderr
    assert "Installing without impl='cuda'" in done.stderr
    done = setup(tmp_path, LACO_BUILD_CUDA="1", PATH=path)
    assert done.returncode == 1
    assert "LACO_BUILD_CUDA: got '1', expected the CUDA extension to build" in done.stderr


def test_it_links_neither_torch_nor_the_driver(extension):
    needed = subprocess.run(["ldd", extension.__file__], capture_output=True, text=True, check=True).stdout
    assert not re.search("torch|libcuda|cudart", needed), needed


PASSING = {"sources": [64], "batch": 2, "height": 4, "width": 4, "stride_b": 1024, "stride_t": 64, "channels": 64}
PASSING |= {"weight": 64, "n": 64, "out": 64}
RESIDUAL = {"residual": 64, "residual_stride_b": 4096, "residual_stride_t": 64, "residual_height": 8, "residual_width": 8}
REFUSALS = [
    ({"sources": []}, "there must be 1 to 8 sources"),
    ({"sources": [64] * 9}, "there must be 1 to 8 sources"),
    ({"batch": -1}, "sizes must be positive"),
    ({"height": 0}, "sizes must be positive"),
    ({"element": 2}, "element must be 0 or 1"),
    ({"side": 0}, "windows must be 1 to 8 tokens wide"),
    ({"side": 9}, "windows must be 1 to 8 tokens wide"),
    ({**RESIDUAL, "residual_side": 9}, "windows must be 1 to 8 tokens wide"),
    ({"batch": 2**26, "stride_b": 2048}, "too many rows for 32-bit row numbers"),
    ({"channels": 60}, "channels, n and strides must be multiples of 8"),
    ({"n": 60}, "channels, n and strides must be multiples of 8"),
    ({"stride_t": 68}, "channels, n and strides must be multiples of 8"),
    ({"stride_b": 0}, "tokens or images overlap"),
    ({"stride_t": 32}, "tokens or images overlap"),
    ({"activation": 3}, "activation must be 0, 1 or 2"),
    ({"pre": 64}, "there is nothing to save"),
    ({"bias": 66}, "pointers must be 16-byte aligned"),
    ({"sources": [72]}, "pointers must be 16-byte aligned"),
    ({"out_prefix": 1}, "an output with prefix tokens needs a residual"),
    ({**RESIDUAL, "activation": 1}, "the residual comes without an activation"),
    ({**RESIDUAL, "residual_side": 3}, "the residual's windows must be the output's rows"),
    ({**RESIDUAL, "residual_height": 9}, "the residual's windows must be the output's rows"),
    ({**RESIDUAL, "residual_stride_b": 64}, "tokens or images of the residual overlap"),
    ({**RESIDUAL, "residual_stride_b": 8192, "residual_block": True}, "a residual in block order must be contiguous"),
]


@pytest.mark.parametrize(("change", "message"), REFUSALS)
def test_bad_problems_are_refused_before_anything_is_launched(extension, change, message):
    assert extension.gemm(**{**PASSING, **change}).startswith(message)


def test_nothing_to_compute_is_no_error(extension):
    assert extension.gemm(**{**PASSING, "batch": 0, "sources": [0]}) is None


def test_without_a_gpu_it_says_so(extension):
    import torch

    if torch.cuda.is_available():
        assert extension.problem() is None
    else:
        assert "CUDA" in extension.problem()
        assert "CUDA" in extension.gemm(**PASSING)


def test_tiles_are_chosen_by_waves(extension):
    assert {name: tile[:2] for name, tile in extension.TILES.items()} == TILES
    chosen = {(9216, 4096): "128x256", (9216, 1024): "192x128", (2304, 4096): "192x128", (36864, 1024): "128x256"}
    assert {shape: extension.choose_tile(*shape, 132) for shape in chosen} == chosen


@given(st.integers(1, 3000), st.integers(1, 600).map(lambda n: 8 * n), st.integers(1, 140))
def test_the_blocks_work_on_every_tile_once(extension, m, n, blocks):
    for name, (bm, bn) in TILES.items():
        found = [tile for block in range(blocks) for tile in extension.schedule(name, m, n, block, blocks)]
        assert Counter(found) == Counter((row, column) for row in range(0, m, bm) for column in range(0, n, bn))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """By tile, what ptxas says and the machine code."""
    folder = tmp_path_factory.mktemp("kernels")
    tool = Path(__import__("triton").__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

    def make(name):
        cubin = folder / f"{name}.cubin"
        arch = "-gencode=arch=compute_90a,code=sm_90a"
        command = [NVCC, "-std=c++17", "-O3", arch, "-Xptxas=-v", "-cubin", f"hopper_{name}.cu", "-o", str(cubin)]
        done = subprocess.run(command, cwd=ROOT / "csrc", capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        code = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True).stdout
        return name, (done.stdout + done.stderr, code.split("Function : ")[1:])

    with ThreadPoolExecutor(2) as pool:
        return dict(pool.map(make, TILES))


@pytest.mark.parametrize("tile", TILES)
def test_nothing_spills_and_nothing_is_serialised(compiled, tile):
    log, _ = compiled[tile]
    assert re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log) == [("0", "0")] * KERNELS * len(TYPES)
    assert not re.search("C75(08|10|11)", log), log
    # Three warpgroups of 168 registers, or four of 128, are what a multiprocessor has; roles then shift them among themselves.
    assert {int(used) for used in re.findall(r"Used (\d+) registers", log)} == {{"128x256": 168, "192x128": 128}[tile]}


@pytest.mark.parametrize("tile", TILES)
def test_the_matrix_units_and_the_copy_engine_do_the_work(compiled, tile):
    _, kernels = compiled[tile]
    width = tile.split("x")[1]
    products = {"BF16": f"HGMMA.64x{width}x16.F32.BF16", "F16": f"HGMMA.64x{width}x16.F32 "}
    found = Counter()
    for kernel in kernels:
        counts = {kind: kernel.count(product) for kind, product in products.items()}
        assert sorted(counts.values()) == [0, 4]  # a slot is 64 deep
        found.update(kind for kind, count in counts.items() if count)
        assert "UTMALDG.4D.IM2COL" in kernel
        assert "UTMASTG" in kernel
        assert not re.search(r"\b(STL|LDL)\b", kernel)
    assert found == dict.fromkeys(TYPES, KERNELS)
