"""The specification against independent compositions of other people's functions, in float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import InternVLConfig
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
        actual = reference.patch_merge(
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
@given(st.data(), st.sampled_from(["none", "tanh"]))
def test_strided_conv_gelu_is_conv2d(data, approximate):
    w = data.draw(windows())
    x = data.draw(tokens(w.num_tokens, 4))
    conv = nn.Conv2d(4, 6, w.ratio, w.ratio).double()
    with torch.no_grad():
        expected = as_tokens(F.gelu(conv(as_image(x, w)), approximate=approximate))
        weight = conv.weight.permute(0, 2, 3, 1).flatten(1)
        actual = reference.strided_conv_gelu(x, weight, conv.bias, windows=w, approximate=approximate)
    torch.testing.assert_close(actual, expected, **EXACT)


@given(st.integers(1, 8), st.integers(0, 3), st.integers(0, 2))
def test_multi_block_linear_gelu_is_a_sum_over_blocks(blocks, prefix, batch):
    xs = [random(batch, prefix + 5, 3) for _ in range(blocks)]
    weight, bias = random(4, blocks * 3), random(4)
    total = bias + sum(x[:, prefix:] @ weight[:, 3 * i : 3 * i + 3].t() for i, x in enumerate(xs))
    actual = reference.multi_block_linear_gelu(xs, weight, bias, prefix_tokens=prefix)
    torch.testing.assert_close(actual, F.gelu(total), **EXACT)


@given(windows(ratios=st.integers(2, 4), pad=False), st.sampled_from(["mean", "channel_group", "none"]))
def test_block_layout_gives_what_raster_layout_gives(w, residual):
    x = random(2, w.num_tokens, 4)
    weights = random(5, 4 * w.ratio**2), random(5), random(4, 5), random(4)
    raster = reference.patch_merge(x, *weights, windows=w, residual_kind=residual)
    block = reference.patch_merge(w.to_block_order(x), *weights, windows=w, residual_kind=residual, layout="block")
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
    actual = reference.patch_merge(
        x, linear1.weight, linear1.bias, linear2.weight, linear2.bias, windows=w, residual_kind="none"
    )
    torch.testing.assert_close(actual, projector(shuffled), rtol=0, atol=1e-10)


GRADCHECK = [
    pytest.param(grid, residual, approximate, id=f"{grid[0]}x{grid[1]}-{residual}-{approximate}")
    for grid, residual, approximate in itertools.product([(4, 2), (3, 5)], ["mean", "channel_group", "none"], ["none", "tanh"])
]


@pytest.mark.parametrize(("grid", "residual", "approximate"), GRADCHECK)
def test_gradients_of_patch_merge(grid, residual, approximate):
    w = Windows(grid, 2, prefix_tokens=1, pad=True)
    inputs = [t.requires_grad_() for t in (random(2, w.num_tokens, 2), random(3, 8), random(3), random(2, 3), random(2))]

    def merge(*args):
        return reference.patch_merge(*args, windows=w, residual_kind=residual, approximate=approximate)

    assert torch.autograd.gradcheck(merge, inputs)


def test_gradients_of_the_other_two():
    w = Windows((3, 4), 2, prefix_tokens=1, pad=True)
    conv = [t.requires_grad_() for t in (random(2, w.num_tokens, 2), random(3, 8), random(3))]
    assert torch.autograd.gradcheck(lambda *args: reference.strided_conv_gelu(*args, windows=w), conv)
    fusion = [t.requires_grad_() for t in (random(2, 4, 2), random(2, 4, 2), random(3, 4), random(3))]
    assert torch.autograd.gradcheck(
        lambda a, b, *args: reference.multi_block_linear_gelu([a, b], *args, prefix_tokens=1), fusion
    )
