"""``impl="cuda"`` forward and backward on random shapes, options, gaps and, emulated, in random orders of events."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from laco_kernels import testing
from laco_kernels.testing import Case
from tests.csrc.emulator import build
from tests.kernels import emulated

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.skipif(DEVICE == "cpu" and build.GCC is None, reason="needs g++ to build the emulated GPU"),
]
DTYPES = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True, scope="module")
def _kernels():
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            emulated.emulate(patch)
        yield


@st.composite
def layouts(draw, tensor):
    """The same values with gaps that the copy engine can follow, NaN in them."""
    gap, more, skip = (draw(st.integers(0, 2)) for _ in range(3))
    batch, tokens, channels = tensor.shape
    around = tensor.new_full((batch, tokens + more + skip, channels + 8 * gap), float("nan"))
    return around[:, skip : skip + tokens, :channels].copy_(tensor)


SIDES = st.one_of(st.integers(2, 3), st.integers(2, 8))  # of a window
BATCHES, WIDTHS, PREFIXES = st.integers(0, 3), st.integers(1, 20).map(lambda n: 8 * n), st.integers(0, 5)
APPROXIMATE = st.sampled_from(["none", "tanh"])


def check_anywhere(data, case):
    dtype = data.draw(st.sampled_from(DTYPES))
    inputs = case.inputs(dtype, DEVICE, seed=data.draw(st.integers(0, 999)))
    strides = data.draw(st.integers(0, 999))
    for name in inputs:
        if name == "x":
            inputs[name] = data.draw(layouts(inputs[name]))
        elif name.startswith("xs") and strides % 2:  # all blocks alike
            whole = inputs[name].new_full((*inputs[name].shape[:2], inputs[name].shape[2] + 8), float("nan"))
            inputs[name] = whole[..., :-8].copy_(inputs[name])
    if DEVICE == "cpu":
        emulated.choose(
            data.draw(st.integers(0, 999)), data.draw(st.sampled_from([(9, 0), (8, 6)])), data.draw(st.integers(1, 4))
        )
    assert not [row for row in testing.check_case(case, "cuda", dtype, DEVICE, inputs, draws=2) if not row.ok]


@given(st.data())
def test_patch_merge_anywhere(data):
    layout = data.draw(st.sampled_from(["raster", "block"]))
    pad = layout == "raster" and data.draw(st.booleans())
    ratio = data.draw(SIDES)
    side = st.integers(1, 9) if pad else st.integers(1, 9 // ratio).map(lambda n: ratio * n)
    residual, prefix = data.draw(st.sampled_from(["mean", "channel_group", "none"])), data.draw(PREFIXES)
    sizes = {"batch": data.draw(BATCHES), "channels": data.draw(WIDTHS), "hidden": data.draw(WIDTHS)}
    options = {"layout": layout, "pad": pad, "ratio": ratio, "residual": residual, "prefix_tokens": prefix}
    grid = data.draw(side), data.draw(side)
    check_anywhere(data, Case("patch_merge", sizes, {"grid": grid, "approximate": data.draw(APPROXIMATE), **options}))


@given(st.data())
def test_strided_convolutions_anywhere(data):
    sizes = {"batch": data.draw(BATCHES), "channels": data.draw(WIDTHS), "out": data.draw(WIDTHS)}
    layout, size = data.draw(st.sampled_from(["raster", "block"])), data.draw(st.just(1) | SIDES)
    side = st.integers(1, 9) if layout == "raster" else st.integers(1, max(1, 9 // size)).map(lambda n: size * n)
    options = {"kernel_size": size, "pad": True, "prefix_tokens": data.draw(PREFIXES), "layout": layout}
    op = data.draw(st.sampled_from(["strided_conv", "strided_conv_gelu"]))
    if op == "strided_conv_gelu":
        options["approximate"] = data.draw(APPROXIMATE)
    check_anywhere(data, Case(op, sizes, {"grid": (data.draw(side), data.draw(side)), **options}))


@given(st.data())
def test_multi_block_linear_gelu_anywhere(data):
    prefix = data.draw(PREFIXES)
    sizes = {"batch": data.draw(BATCHES), "tokens": prefix + data.draw(st.integers(0, 12)), "channels": data.draw(WIDTHS)}
    sizes |= {"blocks": data.draw(st.integers(1, 8)), "out": data.draw(WIDTHS)}
    options = {"prefix_tokens": prefix, "approximate": data.draw(APPROXIMATE)}
    check_anywhere(data, Case("multi_block_linear_gelu", sizes, options))
