"""What the public doors add to the reference: refusals, autocast, the choice of an implementation."""

import pytest
import torch
from torch import nn

import laco_kernels as lk
from laco_kernels import reference
from laco_kernels.geometry import Windows

GRID = (4, 6)


def merge_inputs(channels=8, hidden=5, out=8, tokens=24, **kwargs):
    shapes = (2, tokens, channels), (hidden, 4 * channels), (hidden,), (out, hidden), (out,)
    return [torch.randn(shape, **kwargs) for shape in shapes]


def call_merge(x, *weights, **kwargs):
    return lk.patch_merge(x, *weights, **{"grid": GRID, **kwargs})


def call_conv(x, *weights, **kwargs):
    return lk.strided_conv_gelu(x, *weights[:2], **{"grid": GRID, **kwargs})


def call_plain_conv(x, *weights, **kwargs):
    return lk.strided_conv(x, *weights[:2], **{"grid": GRID, **kwargs})


def call_fusion(x, weight, bias, *_, **kwargs):
    return lk.multi_block_linear_gelu([x, x], weight, bias, **kwargs)


def test_patch_merge_runs_the_reference():
    args = merge_inputs(tokens=25)
    expected, _ = reference.patch_merge_forward(
        *args, windows=Windows(GRID, 2, 1), residual_kind="channel_group", approximate="tanh"
    )
    options = {"residual": "channel_group", "approximate": "tanh", "prefix_tokens": 1}
    for impl in (None, "reference"):
        assert torch.equal(call_merge(*args, **options, impl=impl), expected)


def test_strided_conv_gelu_takes_a_conv2d_weight_as_its_docstring_says():
    conv = nn.Conv2d(8, 5, 2, 2)
    x = torch.randn(2, 25, 8)
    y = lk.strided_conv_gelu(x, conv.weight.permute(0, 2, 3, 1).flatten(1), conv.bias, grid=GRID, prefix_tokens=1)
    image = x[:, 1:].transpose(1, 2).unflatten(2, GRID)
    torch.testing.assert_close(y, nn.functional.gelu(conv(image)).flatten(2).transpose(1, 2))


@pytest.mark.parametrize("bias", [True, False])
def test_strided_conv_takes_a_conv2d_weight_as_its_docstring_says(bias):
    conv = nn.Conv2d(8, 5, 3, 3, bias=bias)
    x = torch.randn(2, 25, 8)
    weight = conv.weight.permute(0, 2, 3, 1).flatten(1)
    y = lk.strided_conv(x, weight, conv.bias, grid=GRID, kernel_size=3, prefix_tokens=1, pad=True)
    image = nn.functional.pad(x[:, 1:].transpose(1, 2).unflatten(2, GRID), (0, 0, 0, 2))
    torch.testing.assert_close(y, conv(image).flatten(2).transpose(1, 2))


@pytest.mark.parametrize("call", [call_conv, call_plain_conv])
@pytest.mark.parametrize("prefix", [0, 1])
def test_tokens_in_block_order_are_convolved_where_they_lie(call, prefix):
    x, weight, bias, *_ = merge_inputs(tokens=24 + prefix, dtype=torch.float64)
    block = Windows(GRID, 2, prefix).to_block_order(x)
    expected = call(x, weight, bias, prefix_tokens=prefix)
    torch.testing.assert_close(call(block, weight, bias, prefix_tokens=prefix, layout="block"), expected)
    assert not torch.allclose(call(block, weight, bias, prefix_tokens=prefix), expected)


def test_multi_block_linear_gelu_takes_any_number_of_blocks():
    xs = [torch.randn(2, 7, 4) for _ in range(3)]
    weight = torch.randn(6, 12)
    expected = nn.functional.gelu(torch.cat(xs, -1)[:, 1:] @ weight.t())
    torch.testing.assert_close(lk.multi_block_linear_gelu(xs, weight, None, prefix_tokens=1), expected)


@pytest.mark.parametrize("call", [call_merge, call_conv, call_plain_conv, call_fusion])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_dtype(call, dtype):
    x, weight, bias, *rest = merge_inputs(channels=8)
    if call is call_fusion:
        weight = torch.randn(5, 16)
    lowered = [t.to(dtype) for t in (x, weight, bias, *rest)]
    with torch.autocast("cpu", dtype):
        mixed = call(x.to(dtype), weight, bias, *rest)
        assert call(x, weight, bias, *rest).dtype == dtype
        assert call(*[t.double() for t in (x, weight, bias, *rest)]).dtype == torch.float64
    assert torch.equal(mixed, call(*lowered))


def test_an_empty_batch_gives_an_empty_batch():
    x, *weights = merge_inputs()
    assert call_merge(x[:0], *weights).shape == (0, 6, 8)
    assert call_conv(x[:0], *weights).shape == call_plain_conv(x[:0], *weights).shape == (0, 6, 5)


REFUSALS = [
    ({"ratio": 1}, ValueError, "ratio: got 1, expected an integer of at least 2"),
    ({"ratio": 2.0}, TypeError, r"ratio: got 2\.0, expected an integer"),
    ({"grid": (5, 5), "x": torch.randn(2, 25, 8)}, ValueError, "grid: got 5 x 5, expected both sides divisible by 2.*pad=True"),
    ({"grid": (4, 4)}, ValueError, r"x: got 24 tokens, expected 16 = 0 prefix \+ 4 \* 4 patches"),
    ({"prefix_tokens": 1}, ValueError, r"x: got 24 tokens, expected 25 = 1 prefix \+ 4 \* 6 patches"),
    ({"x": torch.randn(24, 8)}, ValueError, r"x: got 2 dimensions \(24, 8\), expected 3 dimensions"),
    ({"x": torch.randn(2, 8, 4, 6)}, ValueError, r"x: got 4 dimensions.*flatten\(2\)\.transpose"),
    ({"x": torch.ones(2, 24, 8, dtype=torch.long)}, TypeError, r"x: got torch\.int64, expected a floating-point dtype"),
    ({"x": torch.ones(2, 24, 8, dtype=torch.cfloat)}, TypeError, r"x: got torch\.complex64"),
    ({"x": [[1.0]]}, TypeError, r"x: got list, expected a torch\.Tensor"),
    ({"weight1": torch.randn(5, 31)}, ValueError, r"weight1: got \[5, 31\], expected \[out, 32\].*\(dy, dx, c\)"),
    ({"weight1": torch.randn(32, 5)}, ValueError, r"looks transposed, pass weight1\.t\(\)"),
    ({"weight1": torch.randn(5, 8, 2, 2)}, ValueError, r"weight1\.permute\(0, 2, 3, 1\)\.flatten\(1\)"),
    ({"bias1": torch.randn(4)}, ValueError, r"bias1: got \[4\], expected \[5\]"),
    ({"weight2": torch.randn(8, 6)}, ValueError, r"weight2: got \[8, 6\], expected \[out, 5\]"),
    ({"weight2": torch.randn(9, 5), "bias2": None}, ValueError, "weight2: got 9 rows, expected 8 rows.*residual='none'"),
    ({"bias2": torch.randn(8, 1)}, ValueError, r"bias2: got \[8, 1\]"),
    ({"weight1": torch.randn(5, 32, dtype=torch.float64)}, TypeError, r"weight1: got torch\.float64, expected torch\.float32"),
    ({"bias2": torch.empty(8, device="meta")}, ValueError, "bias2: got device meta, expected cpu"),
    ({"residual": "avg"}, ValueError, "residual: got 'avg', expected one of 'mean', 'channel_group', 'none'"),
    ({"approximate": "erf"}, ValueError, "approximate: got 'erf', expected one of 'none', 'tanh'"),
    ({"layout": "nhwc"}, ValueError, "layout: got 'nhwc'"),
    ({"layout": "block", "grid": (3, 8), "pad": True}, ValueError, "layout: got 'block' with a grid of 3 x 8"),
    (
        {"impl": "cutlass"},
        ValueError,
        "impl: got 'cutlass', expected None or one of 'reference', 'composite', 'triton', 'cuda'",
    ),
    ({"impl": "cuda"}, RuntimeError, "impl: got 'cuda'"),
]


@pytest.mark.parametrize(("change", "error", "message"), REFUSALS)
def test_patch_merge_refuses(change, error, message):
    names = ("x", "weight1", "bias1", "weight2", "bias2")
    arguments = {"grid": GRID, **dict(zip(names, merge_inputs(), strict=True)), **change}
    with pytest.raises(error, match=message):
        lk.patch_merge(**arguments)


def test_a_new_width_needs_no_residual_and_no_prefix():
    x, *weights = merge_inputs(out=3)
    assert call_merge(x, *weights, residual="none").shape == (2, 6, 3)
    x, *weights = merge_inputs(out=3, tokens=25)
    with pytest.raises(ValueError, match="Prefix tokens pass through unchanged; drop them first"):
        call_merge(x, *weights, residual="none", prefix_tokens=1)


@pytest.mark.parametrize(
    ("xs", "error", "message"),
    [
        ([], ValueError, "xs: got an empty list"),
        (torch.randn(2, 2, 3, 4), TypeError, r"xs: got Tensor, expected a list.*unbind\(0\)"),
        ([torch.randn(2, 3, 4), torch.randn(2, 4, 4)], ValueError, r"xs\[1\]: got \[2, 4, 4\], expected \[2, 3, 4\]"),
        ([torch.randn(2, 3, 4)], ValueError, r"weight: got \[5, 8\], expected \[out, 4\]"),
        ([torch.randn(2, 3, 4), torch.randn(2, 3, 4).double()], TypeError, r"xs\[1\]: got torch\.float64"),
    ],
)
def test_multi_block_linear_gelu_refuses(xs, error, message):
    with pytest.raises(error, match=message):
        lk.multi_block_linear_gelu(xs, torch.randn(5, 8), None)


def test_multi_block_linear_gelu_refuses_a_prefix_longer_than_the_sequence():
    with pytest.raises(ValueError, match="prefix_tokens: got 4, expected at most 3"):
        lk.multi_block_linear_gelu([torch.randn(2, 3, 4)], torch.randn(5, 4), None, prefix_tokens=4)


CONV_REFUSALS = [
    ({"kernel_size": 0}, ValueError, "kernel_size: got 0, expected an integer of at least 1"),
    ({"kernel_size": 2.0}, TypeError, r"kernel_size: got 2\.0, expected an integer"),
    (
        {"kernel_size": 4, "weight": torch.randn(5, 128)},
        ValueError,
        "grid: got 4 x 6, expected both sides divisible by 4.*pad=True",
    ),
    ({"prefix_tokens": 1}, ValueError, r"x: got 24 tokens, expected 25 = 1 prefix \+ 4 \* 6 patches"),
    ({"x": torch.randn(2, 8, 4, 6)}, ValueError, r"x: got 4 dimensions.*flatten\(2\)\.transpose"),
    ({"x": torch.ones(2, 24, 8, dtype=torch.long)}, TypeError, r"x: got torch\.int64, expected a floating-point dtype"),
    ({"weight": torch.randn(32, 5)}, ValueError, r"looks transposed, pass weight\.t\(\)"),
    ({"weight": torch.randn(5, 8, 2, 2)}, ValueError, r"weight\.permute\(0, 2, 3, 1\)\.flatten\(1\)"),
    ({"bias": torch.randn(4)}, ValueError, r"bias: got \[4\], expected \[5\]"),
    ({"bias": torch.randn(5).double()}, TypeError, r"bias: got torch\.float64, expected torch\.float32"),
    ({"weight": torch.empty(5, 32, device="meta")}, ValueError, "weight: got device meta, expected cpu"),
    ({"layout": "nhwc"}, ValueError, "layout: got 'nhwc', expected one of 'raster', 'block'"),
    ({"layout": "block", "grid": (3, 8), "pad": True}, ValueError, "layout: got 'block' with a grid of 3 x 8"),
    ({"impl": "cutlass"}, ValueError, "impl: got 'cutlass', expected None or one of 'reference'"),
    ({"impl": "cuda"}, RuntimeError, "impl: got 'cuda'"),
]


@pytest.mark.parametrize("operator", [lk.strided_conv, lk.strided_conv_gelu])
@pytest.mark.parametrize(("change", "error", "message"), CONV_REFUSALS)
def test_strided_convolutions_refuse(operator, change, error, message):
    with pytest.raises(error, match=message):
        operator(**{"x": torch.randn(2, 24, 8), "weight": torch.randn(5, 32), "bias": None, "grid": GRID, **change})


@pytest.mark.parametrize("operator", [lk.strided_conv, lk.strided_conv_gelu])
def test_strided_convolutions_complete_an_odd_grid_where_they_are_told_to(operator):
    x, weight = torch.randn(2, 24, 8), torch.randn(5, 128)
    assert operator(x, weight, None, grid=GRID, kernel_size=4, pad=True).shape == (2, 2, 5)


def test_strided_conv_gelu_refuses_an_unknown_gelu():
    with pytest.raises(ValueError, match="approximate: got 'erf', expected one of 'none', 'tanh'"):
        call_conv(torch.randn(2, 24, 8), torch.randn(5, 32), None, approximate="erf")
