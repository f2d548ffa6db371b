"""C-Abstractor against feature maps, 1x1 convolutions and channel norms in plain torch."""

import pytest
import torch
import torch.nn.functional as F

import laco_kernels as lk

from . import yardstick


def channel_norm(norm, image):
    """Normalise ``[B, C, H, W]`` over its channels, written out."""
    centred = image - image.mean(1, keepdim=True)
    scaled = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
    return scaled * norm.weight[:, None, None] + norm.bias[:, None, None]


def pointwise(linear, image):
    return F.conv2d(image, linear.weight[..., None, None], linear.bias)


def block(module, image):
    y = F.silu(channel_norm(module.norm1, pointwise(module.conv1, image)))
    y = F.silu(channel_norm(module.norm2, F.conv2d(y, module.conv2.weight, padding=1, groups=y.shape[1])))
    gate = pointwise(module.excite, F.silu(pointwise(module.squeeze, F.adaptive_avg_pool2d(y, 1))))
    y = channel_norm(module.norm3, pointwise(module.conv3, y * gate.sigmoid()))
    if isinstance(module.shortcut, torch.nn.Sequential):
        image = channel_norm(module.shortcut[1], pointwise(module.shortcut[0], image))
    return F.silu(y + image)


def composed(compressor, grid, x):
    image = x[:, compressor.prefix_tokens :].transpose(1, 2).unflatten(2, grid)
    position = compressor.position.transpose(1, 2).unflatten(2, compressor.grid)
    image = image + (position if grid == compressor.grid else F.interpolate(position, size=grid, mode="bicubic"))
    for module in compressor.before:
        image = block(module, image)
    image = F.adaptive_avg_pool2d(image, [-(-side // compressor.ratio) for side in grid])
    for module in compressor.after:
        image = block(module, image)
    y = pointwise(compressor.mlp[2], F.silu(pointwise(compressor.mlp[0], image)))
    return y.flatten(2).transpose(1, 2)


@pytest.mark.parametrize("ratio", [2, 3, 4])
@pytest.mark.parametrize("grid", [(12, 24), (5, 7)])
@pytest.mark.parametrize("hidden_dim", [None, 10])
def test_behind_an_encoder(ratio, grid, hidden_dim):
    options = {"out_dim": 5, "ratio": ratio, "prefix_tokens": 1, "grid": grid, "hidden_dim": hidden_dim}
    compressor = lk.nn.build_compressor("c_abstractor", in_dim=8, **options)
    assert (len(compressor.before), len(compressor.after)) == (3, 3)
    yardstick.assert_agrees(compressor, grid, lambda x: composed(compressor, grid, x))


@pytest.mark.parametrize("grid", [(4, 6), (8, 5)])
def test_other_grids_interpolate_the_position_embedding(grid):
    compressor = lk.nn.build_compressor("c_abstractor", in_dim=8, grid=[6, 6], depth=1)
    yardstick.assert_agrees(compressor, grid, lambda x: composed(compressor, grid, x))


def test_inside_an_encoder_with_a_residual():
    options = {"prefix_tokens": 1, "place": "inside", "depth": 2, "grid": (4, 6)}
    compressor = lk.nn.build_compressor("c_abstractor", in_dim=8, **options, residual=True)

    def expected(x):
        mean = F.avg_pool2d(x[:, 1:].transpose(1, 2).unflatten(2, (4, 6)), 2).flatten(2).transpose(1, 2)
        return torch.cat([x[:, :1], composed(compressor, (4, 6), x) + mean], dim=1)

    yardstick.assert_agrees(compressor, (4, 6), expected)


def test_the_squeeze_is_a_quarter_and_there_are_shortcuts_where_the_width_changes():
    with torch.device("meta"):
        compressor = lk.nn.build_compressor("c_abstractor", in_dim=1152, hidden_dim=1024, out_dim=896, grid=(27, 27))
    assert compressor.position.shape == (1, 729, 1152)
    assert [module.squeeze.out_features for module in compressor.before] == [288, 256, 256]
    blocks = [*compressor.before, *compressor.after]
    assert [isinstance(module.shortcut, torch.nn.Identity) for module in blocks] == [False] + [True] * 5


def test_precision_compilation_and_reset():
    def build():
        return lk.nn.build_compressor("c_abstractor", in_dim=8, out_dim=6, grid=(4, 6))

    yardstick.assert_runs_in_low_precision(build(), (4, 6))
    yardstick.assert_runs_in_low_precision(build(), (5, 6))
    yardstick.assert_resets(build())
    yardstick.assert_compiles(build(), [(4, 6), (5, 7)])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"grid": 24}, TypeError, "grid: got 24, expected"),
        ({"grid": (0, 24)}, ValueError, "grid height: got 0"),
        ({"depth": 0}, ValueError, "depth: got 0"),
        ({"hidden_dim": True}, TypeError, "hidden_dim: got True"),
    ],
)
def test_it_refuses_options(options, error, message):
    with pytest.raises(error, match=message):
        lk.nn.build_compressor("c_abstractor", in_dim=8, **options)


def test_it_refuses_blocks():
    with pytest.raises(ValueError, match="layout: got 'block', expected one of 'raster'"):
        lk.nn.build_compressor("c_abstractor", in_dim=8)(torch.zeros(1, 24, 8), (4, 6), layout="block")
