"""The specification against independent compositions of other people's functions, in float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import Idefics3Config, InternVLConfig
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector
from transformers.models.internvl.modeling_internvl import InternVLModel, InternVLMultiModalProjector

from laco_kernels import reference
from laco_kernels.geometry import Windows

from .strategies import tokens, windows

EXACT = {"rtol": 0, "atol": 1e-12}


def as_image(x, w):
    """``[B, P + N, C] -> [B, C, H, W]``, zero-padded to complete windows."""
    bottom, right = w.padding
    return F.pad(x[:, w.prefix_tokens :].transpose(1, 2).unflatten(2, w.grid), (0, right, 0, bottom))


def as_tokens(image):
    return image.flatten(2).transpose(1, 2)


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@given(st.data())
def test_space_to_depth_is_pixel_unshuffle_with_other_channel_order(data):
    w = data.draw(windows())
    x = data.draw(tokens(w.num_tokens, 3, min_batch=1))  # torch's pixel_unshuffle leaves an empty batch as it is
    unshuffled = as_tokens(F.pixel_unshuffle(as_image(x, w), w.ratio))  # (c, dy, dx)
    expected = unshuffled.unflatten(2, (3, w.ratio**2)).transpose(2, 3).flatten(2)  # (dy, dx, c)
    assert torch.equal(reference.space_to_depth(x, w), expected)


@given(st.data())
def test_mean_residual_is_average_pooling_over_real_tokens(data):
    w = data.draw(windows())
    x = data.draw(tokens(w.num_tokens, 3))
    image = x[:, w.prefix_tokens :].transpose(1, 2).unflatten(2, w.grid)
    pooled = F.avg_pool2d(image, w.ratio, ceil_mode=True, count_include_pad=False)
    torch.testing.assert_close(reference.residual(x, w, "mean"), as_tokens(pooled), **EXACT)


@given(st.data())
def test_channel_group_residual_averages_consecutive_channels(data):
    w = data.draw(windows())
    x = data.draw(tokens(w.num_tokens, 3))
    merged = reference.space_to_depth(x, w)
    expected = F.avg_pool1d(merged.flatten(0, 1), w.ratio**2).unflatten(0, merged.shape[:2]) if len(x) else merged[..., :3]
    torch.testing.assert_close(reference.residual(x, w, "channel_group"), expected, **EXACT)


@settings(deadline=None)
@given(st.data(), st.sampled_from(["none", "tanh"]), st.sampled_from(["mean", "none"]), st.booleans())
def test_patch_merge_is_conv_gelu_conv_plus_pooling(data, approximate, residual, bias):
    w = data.draw(windows(ratios=st.integers(2, 3)))
    x = data.draw(tokens(w.num_tokens, 4))
    conv1, conv2 = nn.Conv2d(4, 7, w.ratio, w.ratio, bias=bias).double(), nn.Conv2d(7, 4, 1, bias=bias).double()
    with torch.no_grad():
        expected = as_tokens(conv2(F.gelu(conv1(as_image(x, w)), approximate=approximate)))
        if residual == "mean":
            expected += reference.residual(x, w, "mean")
        actual, _ = reference.patch_merge_forward(
            x,
            conv1.weight.permute(0, 2, 3, 1).flatten(1),
            conv1.bias,
            conv2.weight.flatten(1),
            conv2.bias,
            windows=w,
            residual_kind=residual,
            approximate=approximate,
        )
    torch.testing.assert_close(actual[:, w.prefix_tokens :], expected, **EXACT)
    assert torch.equal(actual[:, : w.prefix_tokens], x[:, : w.prefix_tokens])


@settings(deadline=None)
@given(st.data(), st.sampled_from(["none", "tanh"]), st.booleans())
def test_strided_convolutions_are_conv2d(data, approximate, bias):
    w = data.draw(windows())
    x = data.draw(tokens(w.num_tokens, 4))
    conv = nn.Conv2d(4, 6, w.ratio, w.ratio, bias=bias).double()
    with torch.no_grad():
        convolved = conv(as_image(x, w))
        weight = conv.weight.permute(0, 2, 3, 1).flatten(1)
        plain = reference.strided_conv_forward(x, weight, conv.bias, windows=w)
        actual, pre = reference.strided_conv_gelu_forward(x, weight, conv.bias, windows=w, approximate=approximate)
    torch.testing.assert_close(plain, as_tokens(convolved), **EXACT)
    torch.testing.assert_close(pre, as_tokens(convolved), **EXACT)
    torch.testing.assert_close(actual, as_tokens(F.gelu(convolved, approximate=approximate)), **EXACT)


@given(st.integers(1, 8), st.integers(0, 3), st.integers(0, 2))
def test_multi_block_linear_gelu_is_a_sum_over_blocks(blocks, prefix, batch):
    xs = [random(batch, prefix + 5, 3) for _ in range(blocks)]
    weight, bias = random(4, blocks * 3), random(4)
    total = bias + sum(x[:, prefix:] @ weight[:, 3 * i : 3 * i + 3].t() for i, x in enumerate(xs))
    actual, _ = reference.multi_block_linear_gelu_forward(xs, weight, bias, prefix_tokens=prefix)
    torch.testing.assert_close(actual, F.gelu(total), **EXACT)


@given(windows(ratios=st.integers(2, 4), pad=False), st.sampled_from(["mean", "channel_group", "none"]))
def test_block_layout_gives_what_raster_layout_gives(w, residual):
    x = random(2, w.num_tokens, 4)
    weights = random(5, 4 * w.ratio**2), random(5), random(4, 5), random(4)
    raster, _ = reference.patch_merge_forward(x, *weights, windows=w, residual_kind=residual)
    block, _ = reference.patch_merge_forward(w.to_block_order(x), *weights, windows=w, residual_kind=residual, layout="block")
    torch.testing.assert_close(block, raster, **EXACT)


@given(windows(pad=False))
def test_block_layout_convolves_what_raster_layout_does(w):
    x, weight, bias = random(2, w.num_tokens, 4), random(5, 4 * w.ratio**2), random(5)
    for forward in (
        reference.strided_conv_forward,
        lambda *args, **kwargs: reference.strided_conv_gelu_forward(*args, **kwargs)[0],
    ):
        raster = forward(x, weight, bias, windows=w)
        block = forward(w.to_block_order(x), weight, bias, windows=w, layout="block")
        torch.testing.assert_close(block, raster, **EXACT)


def test_block_layout_without_prefix_copies_nothing():
    w = Windows((4, 6), 2)
    x = random(2, w.num_tokens, 4)
    assert reference.space_to_depth(x, w, "block").data_ptr() == x.data_ptr()


def test_patch_merge_is_internvl_pixel_shuffle_and_projector():
    """transformers' own pixel shuffle and projector, square grid; its layer norm is undone by normalising first."""
    w = Windows((6, 6), 2)
    config = InternVLConfig(
        vision_config={"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1},
        text_config={"model_type": "qwen2", "hidden_size": 12, "num_attention_heads": 1},
    )
    projector = InternVLMultiModalProjector(config).double()
    projector.layer_norm.eps = 0.0
    merged = F.layer_norm(random(2, 9, 32), (32,), eps=0.0)
    x = w.to_raster_order(merged.reshape(2, 36, 8))
    shuffled = InternVLModel.pixel_shuffle(None, x.reshape(2, 6, 6, 8), 0.5).flatten(1, 2)
    assert torch.equal(reference.space_to_depth(x, w), shuffled)
    linear1, linear2 = projector.linear_1, projector.linear_2
    actual, _ = reference.patch_merge_forward(
        x, linear1.weight, linear1.bias, linear2.weight, linear2.bias, windows=w, residual_kind="none"
    )
    torch.testing.assert_close(actual, projector(shuffled), rtol=0, atol=1e-10)


@pytest.mark.parametrize("factor", [2, 3])
def test_strided_conv_is_the_connector_of_idefics3(factor):
    w = Windows((6, 6), factor)
    text = {"model_type": "llama", "hidden_size": 12, "num_attention_heads": 1, "num_hidden_layers": 1}
    config = Idefics3Config(vision_config={"hidden_size": 8, "num_attention_heads": 1}, text_config=text, scale_factor=factor)
    connector = Idefics3Connector(config).double()
    (weight,) = connector.parameters()
    x = random(2, 36, 8)
    actual = reference.strided_conv_forward(x, weight, None, windows=w)
    torch.testing.assert_close(actual, connector(x), **EXACT)


GRADIENTS = list(
    itertools.product(
        [((4, 2), "raster"), ((3, 5), "raster"), ((4, 4), "block")], ["mean", "channel_group", "none"], ["none", "tanh"]
    )
)


def check_backward(forward, backward, inputs, tensor_inputs):
    """``backward(grad, pre, needs)`` against autograd through the eager ``forward``, all and one gradient at a time."""
    inputs = [t.requires_grad_() for t in inputs]
    y, pre = forward(*tensor_inputs(inputs))
    grad = torch.randn_like(y)
    expected = torch.autograd.grad(y, inputs, grad)
    actual = backward(grad, pre, [True] * len(inputs))
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, **EXACT)
    for i in range(len(inputs)):
        needs = [i == j for j in range(len(inputs))]
        alone = backward(grad, pre, needs)
        assert [gradient is not None for gradient in alone] == needs
        torch.testing.assert_close(alone[i], expected[i], **EXACT)


@pytest.mark.parametrize(("shape", "residual", "approximate"), GRADIENTS)
def test_backward_of_patch_merge_is_its_gradient(shape, residual, approximate):
    grid, layout = shape
    w = Windows(grid, 2, prefix_tokens=1, pad=True)
    options = {"windows": w, "residual_kind": residual, "approximate": approximate, "layout": layout}
    inputs = [random(2, w.num_tokens, 2), random(3, 8), random(3), random(2, 3), random(2)]
    x, weight1, _, weight2, _ = inputs
    check_backward(
        lambda *args: reference.patch_merge_forward(*args, **options),
        lambda grad, pre, needs: reference.patch_merge_backward(grad, x, pre, weight1, weight2, needs, **options),
        inputs,
        lambda tensors: tensors,
    )


@pytest.mark.parametrize(
    ("ratio", "grid", "layout"), [(1, (3, 4), "raster"), (2, (3, 4), "raster"), (3, (3, 4), "raster"), (2, (2, 6), "block")]
)
def test_backward_of_strided_convolutions_is_their_gradient(ratio, grid, layout):
    options = {"windows": Windows(grid, ratio, prefix_tokens=2, pad=True), "layout": layout}
    inputs = [random(2, 14, 2), random(3, 2 * ratio**2), random(3)]
    x, weight, _ = inputs
    check_backward(
        lambda *args: reference.strided_conv_gelu_forward(*args, approximate="tanh", **options),
        lambda grad, pre, needs: reference.strided_conv_gelu_backward(
            grad, x, pre, weight, needs, approximate="tanh", **options
        ),
        inputs,
        lambda tensors: tensors,
    )
    check_backward(
        lambda *args: (reference.strided_conv_forward(*args, **options), None),
        lambda grad, _, needs: reference.strided_conv_backward(grad, x, weight, needs, **options),
        inputs,
        lambda tensors: tensors,
    )


@pytest.mark.parametrize("blocks", [1, 3])
def test_backward_of_multi_block_linear_gelu_is_its_gradient(blocks):
    options = {"prefix_tokens": 1, "approximate": "none"}
    inputs = [*[random(2, 4, 2) for _ in range(blocks)], random(3, 2 * blocks), random(3)]
    *xs, weight, _ = inputs
    check_backward(
        lambda *args: reference.multi_block_linear_gelu_forward(*args, **options),
        lambda grad, pre, needs: reference.multi_block_linear_gelu_backward(grad, xs, pre, weight, needs, **options),
        inputs,
        lambda tensors: (tensors[:blocks], *tensors[blocks:]),
    )


@pytest.mark.parametrize("grid", [(4, 4), (5, 5)])
def test_the_windows_mean_does_not_overflow(grid):
    x = torch.full((1, grid[0] * grid[1], 8), 3e4, dtype=torch.float16)
    mean = reference.residual(x, Windows(grid, 2, pad=True), "mean")
    assert torch.equal(mean, torch.full_like(mean, 3e4))
