"""Every kernel as the operators launch it on the papers' shapes, compiled for three architectures without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from laco_kernels.kernels.gathered_gemm import HEAVY, TILES, tile_for

RECORDED = Path(__file__).parents[2] / "benchmarks" / "results" / "kernel-resources.json"
LIMITS = {80: 166_912, 90: 232_448, 100: 232_448}
MATRIX = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}


@pytest.fixture(scope="module")
def resources():
    # A process of its own: in this one kernels may be interpreted.
    command = [sys.executable, "-m", "laco_kernels.bench.resources", "--gate"]
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["rows"]


def recorded():
    return json.loads(RECORDED.read_text())["rows"]


def test_everything_compiles_for_every_architecture(resources):
    resources = recorded()  # of all; what is compiled here is held against it below
    tiles = {(row["tile"], row["arch"]) for row in resources if row["kernel"] == "gathered_gemm_kernel"}
    assert tiles == {(f"{tile.bm}x{tile.bn}x{tile.bk}", arch) for tile in TILES.values() for arch in LIMITS}
    kernels = {(row["kernel"], row["arch"]) for row in resources}
    names = ["gathered_gemm_kernel", "split_kernel", "gelu_backward_kernel", "join_kernel", "collect_kernel"]
    names += ["add_norm_kernel", "add_norm_backward_kernel", "activation_kernel", "activation_backward_kernel"]
    assert kernels == {(kernel, arch) for kernel in names for arch in LIMITS}


def test_nothing_spills_and_shared_memory_fits(resources):
    resources = resources + recorded()
    assert not [row for row in resources if row["spilled"]]
    assert not [row for row in resources if row["shared"] > LIMITS[row["arch"]]]
    assert not [row for row in resources if row["registers"] > 255]


def test_half_precision_runs_on_the_matrix_units(resources):
    for row in resources:
        if row["kernel"] == "gathered_gemm_kernel" and row["dtype"] == "bf16":
            assert row["matrix_instruction"] == MATRIX[row["arch"]], row
        if row["kernel"] == "gathered_gemm_kernel" and row["dtype"] == "tf32":
            assert row["matrix_instruction"] != "none", row


def test_norms_round_every_product(resources):
    """A product added to unrounded does not cancel against the mean it went into: rstd would make a gradient of the rest."""
    for row in resources + recorded():
        if row["kernel"].startswith("add_norm"):
            assert not row["contracted"], row


def test_the_recorded_table_is_what_this_makes(resources):
    gated = [row for row in recorded() if row["dtype"] == "bf16" or row["arch"] == 90]
    if json.loads(RECORDED.read_text())["triton"] == triton.__version__:
        assert gated == resources, "run `make resources`"
    named = [{(row["kernel"], row["mode"], row["tile"], row["arch"]) for row in t} for t in (gated, resources)]
    assert named[0] == named[1], "run `make resources`"


def test_heavy_epilogues_get_a_tile_that_holds_them(monkeypatch):
    import torch

    from laco_kernels.kernels import gathered_gemm

    monkeypatch.setattr(gathered_gemm, "INTERPRETED", False)
    for dtype in (torch.float32, torch.bfloat16):
        for rows in (1, 144, 2304, 36864):
            for columns in (64, 1024, 4096):
                assert tile_for(rows, columns, dtype, heavy=True) in [TILES[name] for name in HEAVY]
                assert tile_for(rows, columns, dtype) not in (TILES["half-heavy"], TILES["float-heavy"], TILES["pieces-heavy"])
