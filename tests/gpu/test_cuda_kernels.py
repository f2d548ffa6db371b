"""``impl="cuda"`` on a GPU: every tile, launches that overlap, tokens with gaps."""

import pytest
import torch

from laco_kernels import testing
from laco_kernels.kernels import cuda_products, select
from laco_kernels.testing import Case
from tests.csrc.problems import HOPPER as HOPPERS_TILES
from tests.csrc.test_build import NVCC
from tests.gpu import small_cases, test_gpu

OLD = torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0)
MISSING = select.unavailable("cuda", torch.device("cuda"), torch.bfloat16)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(OLD, reason="needs compute capability 8.0 (Ampere) or newer"),
    # Where it could have been built, its tests do not pass by being left out.
    pytest.mark.skipif(MISSING is not None and NVCC is None, reason=f"needs the CUDA extension: {MISSING}"),
]
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
DTYPES = (torch.bfloat16, torch.float16)
# tests/kernels/test_cuda.py sees without a GPU that these are done.
CASES = [case for case in testing.LARGE_CASES if case.options.get("approximate", "none") in cuda_products.ACTIVATIONS]
# (tile, blocks that share a tile's depth); "" is the plan of the extension, 0 its number.
TILES = [("", 0), ("ampere", 1)]
if HOPPER:
    TILES += [(tile, n) for tile, (*_, shares) in HOPPERS_TILES.items() for n in ((1, 2, 4) if shares else (1,))]


@pytest.fixture
def told(monkeypatch):
    """Tell every product besides what it is told."""
    call = cuda_products.call

    def tell(tile="", splits=0, dependent=False):
        monkeypatch.setattr(cuda_products, "call", small_cases.telling(call, tile, splits, dependent=dependent))

    return tell


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_tile_keeps_the_promise(case, dtype, told):
    yardstick, wrong = testing.Yardstick(case, dtype, "cuda"), []
    for tile, splits in TILES:
        told(tile, splits)
        wrong += [(tile, splits, row) for row in yardstick.check("cuda") if not row.ok]
    assert not wrong


@pytest.mark.skipif(not HOPPER, reason="the GPU is no Hopper")
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("tile", "splits"), [("", 0), ("64x128", 2)])
def test_launches_that_overlap_compute_the_same(case, tile, splits, told):
    told(tile, splits)
    inputs = case.inputs(torch.bfloat16, "cuda")
    with torch.no_grad():
        grad = torch.randn_like(case(inputs, "cuda"))
    plain = testing.gradients(case, inputs, "cuda", grad)
    told(tile, splits, dependent=True)
    for _ in range(50):
        found = testing.gradients(case, inputs, "cuda", grad)
        assert all(torch.equal(found[name], plain[name]) for name in plain)


AGAIN = (test_gpu.test_a_captured_graph_replays_forward_and_backward, test_gpu.test_two_streams_do_not_disturb_each_other)


@pytest.mark.skipif(not HOPPER, reason="the GPU is no Hopper")
@pytest.mark.parametrize(("tile", "splits", "dependent"), [("", 0, True), ("64x128", 2, False)])
@pytest.mark.parametrize("case", {case.op: case for case in CASES}.values(), ids=str)  # one of each operator
@pytest.mark.parametrize("test", AGAIN, ids=lambda test: test.__name__)
def test_graphs_and_streams_on_other_plans(test, case, tile, splits, dependent, told):
    told(tile, splits, dependent)
    test(case, "cuda")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_does_the_papers_shapes(case):
    assert testing.refusal(case, "cuda", torch.bfloat16, "cuda") is None


WITH_GAPS = [
    Case(
        "patch_merge",
        {"batch": batch, "channels": 1024, "hidden": 1536},
        {"grid": (24, 24), "layout": layout, "residual": residual, "prefix_tokens": 5},
    )
    for batch in (1, 3, 64)
    for residual in ("mean", "channel_group", "none")
    for layout in ("raster", "block")
]


@pytest.mark.parametrize("case", WITH_GAPS, ids=str)
def test_tokens_with_gaps(case):
    """Encoder tokens that lie in something wider, with class and register tokens; many tiles."""
    inputs = case.inputs(torch.bfloat16, "cuda")
    x = inputs["x"]
    inputs["x"] = x.new_full((len(x), x.shape[1] + 3, 1024 + 64), float("nan"))[:, 2:-1, 64:].copy_(x)
    assert not [row for row in testing.check_case(case, "cuda", torch.bfloat16, "cuda", inputs) if not row.ok]
