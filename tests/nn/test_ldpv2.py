"""LDPv2 against the same thing written with torch's adaptive pooling and convolution."""

import pytest
import torch
import torch.nn.functional as F

import laco_kernels as lk

from . import yardstick


def image_of(tokens, grid):
    return tokens.transpose(1, 2).reshape(len(tokens), tokens.shape[2], *grid)


def composed(compressor, grid, x):
    first, _, second = compressor.mlp
    image = image_of(x[:, compressor.prefix_tokens :], grid)
    image = F.conv2d(
        F.gelu(F.conv2d(image, first.weight[..., None, None], first.bias)), second.weight[..., None, None], second.bias
    )
    pooled = F.adaptive_avg_pool2d(image, [-(-side // compressor.ratio) for side in grid])
    y = pooled + F.conv2d(pooled, compressor.conv.weight, compressor.conv.bias, padding=1, groups=compressor.out_dim)
    return y.flatten(2).transpose(1, 2)


@pytest.mark.parametrize("ratio", [2, 3, 4])
@pytest.mark.parametrize("grid", [(12, 24), (5, 7)])
@pytest.mark.parametrize("prefix_tokens", [0, 2])
def test_behind_an_encoder(ratio, grid, prefix_tokens):
    compressor = lk.nn.build_compressor("ldpv2", in_dim=6, out_dim=10, ratio=ratio, prefix_tokens=prefix_tokens)
    assert (compressor.place, compressor.out_grid(grid)) == ("behind", tuple(-(-side // ratio) for side in grid))
    yardstick.assert_agrees(compressor, grid, lambda x: composed(compressor, grid, x))


@pytest.mark.parametrize("grid", [(4, 6), (5, 7)])
def test_inside_an_encoder_with_a_residual(grid):
    options = {"in_dim": 6, "prefix_tokens": 1, "place": "inside"}
    compressor = lk.nn.build_compressor("ldpv2", **options, residual=True)

    def expected(x):
        mean = F.avg_pool2d(image_of(x[:, 1:], grid), 2, ceil_mode=True, count_include_pad=False)
        return torch.cat([x[:, :1], composed(compressor, grid, x) + mean.flatten(2).transpose(1, 2)], dim=1)

    yardstick.assert_agrees(compressor, grid, expected)


def test_tokens_that_lie_window_by_window():
    compressor, windows = lk.nn.build_compressor("ldpv2", in_dim=6, ratio=2), lk.geometry.Windows((4, 6), 2)
    yardstick.assert_agrees(
        compressor, (4, 6), lambda x: composed(compressor, (4, 6), windows.to_raster_order(x)), layout="block"
    )
    with pytest.raises(ValueError, match="layout: got 'block' with a grid of 5 x 6, expected 'raster' unless 2 divides"):
        compressor(torch.zeros(1, 30, 6), (5, 6), layout="block")


def test_it_has_mobilevlms_number_of_parameters():
    with torch.device("meta"):
        compressor = lk.nn.build_compressor("ldpv2", in_dim=1024, out_dim=896)
    count = sum(p.numel() for p in compressor.parameters())
    assert count == 1024 * 896 + 896 * 896 + 12 * 896
    assert round(count / 1e6, 2) == 1.73


def test_precision_compilation_and_reset():
    compressor = lk.nn.build_compressor("ldpv2", in_dim=6, out_dim=10)
    yardstick.assert_runs_in_low_precision(compressor, (5, 6))
    yardstick.assert_resets(compressor)
    yardstick.assert_compiles(lk.nn.build_compressor("ldpv2", in_dim=6, out_dim=10), [(4, 6), (5, 7)])
