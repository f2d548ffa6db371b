"""``impl="cuda"`` on a GPU: every tile, launches that overlap, tokens with gaps, and what compute-sanitizer says."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from laco_kernels import testing
from laco_kernels.kernels import cuda_products, select
from laco_kernels.testing import Case
from tests.csrc.problems import HOPPER as HOPPERS_TILES
from tests.csrc.problems import tiles_of

SANITIZER = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(
        select.unavailable("cuda", torch.device("cuda"), torch.bfloat16) is not None, reason="needs the CUDA extension"
    ),
]
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
ROOT = Path(__file__).parents[2]
DTYPES = (torch.bfloat16, torch.float16)
# (tile, blocks that share a tile's depth); "" is the plan of the extension, 0 its number.
TILES = [("", 0), ("ampere", 1)]
if HOPPER:
    TILES += [(tile, n) for tile, (*_, shares) in HOPPERS_TILES.items() for n in ((1, 2, 4) if shares else (1,))]


@pytest.fixture
def told(monkeypatch):
    """Tell every product besides what it is told."""

    def tell(tile="", splits=0, dependent=False):
        call = cuda_products.call

        def called(extension, product, **problem):
            if tile and tile not in tiles_of(product):  # its gradients are other tiles'
                return call(extension, product, **problem, dependent=dependent)
            able = splits
            if splits > 1:
                x = problem.get("x")
                rows = x and extension.Tokens(**x._asdict())
                depth = 0 if x is None else rows.depth if product == "forward" else rows.rows
                able = splits if depth >= 64 * 4 * splits else 1  # no input gradient's and no short depth is shared
            return call(extension, product, **problem, splits=able, tile=tile, dependent=dependent)

        monkeypatch.setattr(cuda_products, "call", called)

    return tell


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tile", "splits"), TILES)
@pytest.mark.parametrize("case", testing.LARGE_CASES, ids=str)
def test_every_tile_keeps_the_promise(case, tile, splits, dtype, told):
    told(tile, splits)
    assert not [row for row in testing.check_case(case, "cuda", dtype, "cuda") if not row.ok]


@pytest.mark.skipif(not HOPPER, reason="the GPU is no Hopper")
@pytest.mark.parametrize("case", testing.LARGE_CASES, ids=str)
def test_launches_that_overlap_compute_the_same(case, told):
    inputs = case.inputs(torch.bfloat16, "cuda")
    with torch.no_grad():
        grad = torch.randn_like(case(inputs, "cuda"))
    plain = testing.gradients(case, inputs, "cuda", grad)
    told(dependent=True)
    for _ in range(50):
        found = testing.gradients(case, inputs, "cuda", grad)
        assert all(torch.equal(found[name], plain[name]) for name in plain)


@pytest.mark.parametrize("case", testing.LARGE_CASES, ids=str)
def test_it_does_the_papers_shapes(case):
    assert testing.refusal(case, "cuda", torch.bfloat16, "cuda") is None


@pytest.mark.parametrize("layout", ["raster", "block"])
@pytest.mark.parametrize("residual", ["mean", "channel_group", "none"])
@pytest.mark.parametrize("batch", [1, 3, 64])
def test_tokens_with_gaps(batch, residual, layout):
    """Encoder tokens that lie in something wider, with class and register tokens; many tiles."""
    case = Case(
        "patch_merge",
        {"batch": batch, "channels": 1024, "hidden": 1536},
        {"grid": (24, 24), "layout": layout, "residual": residual, "prefix_tokens": 5},
    )
    inputs = case.inputs(torch.bfloat16, "cuda")
    x = inputs["x"]
    inputs["x"] = x.new_full((batch, x.shape[1] + 3, 1024 + 64), float("nan"))[:, 2:-1, 64:].copy_(x)
    assert not [row for row in testing.check_case(case, "cuda", torch.bfloat16, "cuda", inputs) if not row.ok]


@pytest.mark.skipif(SANITIZER is None, reason="needs compute-sanitizer")
@pytest.mark.parametrize("tile", ["", "ampere"])
@pytest.mark.parametrize("tool", ["memcheck", "initcheck", "synccheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool, tile):
    """Every small case, forward and backward. Nothing is allowed: a first finding wants an explanation, not a list."""
    command = [SANITIZER, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "tests.gpu.small_cases", tile]
    # Each tensor in an allocation of its own, so that what lies beside it is not another's.
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=900)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-4000:]
    assert re.search("(ERROR SUMMARY: 0 errors|RACECHECK SUMMARY: 0 hazards)", said), said[-4000:]
    assert re.search(r"^\d+ cases done$", said, re.MULTILINE), said[-4000:]
