"""TokenPacker against torch's bilinear interpolation, unfolding and multi-head attention."""

import pytest
import torch
import torch.nn.functional as F

import laco_kernels as lk
from laco_kernels.geometry import Windows
from laco_kernels.nn.compressors import attention
from laco_kernels.nn.compressors.token_packer import HIDDEN_STATES, downsample

from . import yardstick

MODES = [(1, "inside"), (1, "behind"), (4, "behind")]


def image_of(tokens, grid):
    return tokens.transpose(1, 2).reshape(len(tokens), tokens.shape[2], *grid)


def mlp(layers, x):
    return F.linear(F.gelu(F.linear(x, layers[0].weight, layers[0].bias)), layers[2].weight, layers[2].bias)


def normed(norm, x):
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, 1e-6)


def attended(module, queries, keys, values):
    """Attention of ``queries [L, batch, dim]``, as torch computes it."""
    linears = (module.query, module.key, module.value)
    return F.multi_head_attention_forward(
        queries, keys, values, queries.shape[2], module.num_heads,
        torch.cat([linear.weight for linear in linears]), torch.cat([linear.bias for linear in linears]),
        None, None, False, 0.0, module.output.weight, module.output.bias, need_weights=False,
    )[0]  # fmt: skip


def composed(compressor, grid, x):
    """Every window of every image in turn."""
    blocks = [block[:, compressor.prefix_tokens :] for block in (x if isinstance(x, list) else [x])]
    coarse = tuple(side // compressor.ratio for side in grid)
    queries = F.interpolate(image_of(blocks[-1], grid), coarse, mode="bilinear", align_corners=False)
    queries = normed(compressor.query_norm, F.linear(queries.flatten(2).transpose(1, 2), compressor.query.weight))
    keys, values = (
        F.unfold(image_of(normed(norm, mlp(layers, torch.cat(blocks, -1))), grid), compressor.ratio, stride=compressor.ratio)
        for layers, norm in ((compressor.key, compressor.key_norm), (compressor.value, compressor.value_norm))
    )
    rows = []
    for b in range(len(queries)):
        for i in range(queries.shape[1]):
            k, v = (one[b, :, i].reshape(queries.shape[2], -1).t()[:, None] for one in (keys, values))
            rows.append(attended(compressor.attention, queries[b, i][None, None], k, v)[0, 0])
    return mlp(compressor.mlp, torch.stack(rows).reshape(queries.shape))


@pytest.mark.parametrize(("num_blocks", "place"), MODES)
@pytest.mark.parametrize("ratio", [2, 3, 4])
def test_it_is_attention_within_windows(num_blocks, place, ratio):
    grid, prefix = (ratio * 2, ratio * 3), 1
    options = {"in_dim": 8, "num_blocks": num_blocks, "place": place, "num_heads": 4, "hidden_dim": 12}
    out_dim = 8 if place == "inside" else 10
    compressor = lk.nn.build_compressor("token_packer", **options, out_dim=out_dim, ratio=ratio, prefix_tokens=prefix)

    def expected(x):
        y = composed(compressor, grid, x)
        return torch.cat([x[:, :prefix], y], dim=1) if place == "inside" else y

    yardstick.assert_agrees(compressor, grid, expected)


def test_the_residual_is_the_mean_of_the_last_blocks_windows():
    compressor = lk.nn.build_compressor("token_packer", in_dim=8, num_blocks=2, residual=True)

    def expected(x):
        return composed(compressor, (4, 6), x) + F.avg_pool2d(image_of(x[-1], (4, 6)), 2).flatten(2).transpose(1, 2)

    yardstick.assert_agrees(compressor, (4, 6), expected)


@pytest.mark.parametrize("ratio", [2, 3])
def test_tokens_that_lie_window_by_window(ratio):
    grid = (2 * ratio, 3 * ratio)
    compressor, windows = lk.nn.build_compressor("token_packer", in_dim=8, num_blocks=2, ratio=ratio), Windows(grid, ratio)
    yardstick.assert_agrees(
        compressor, grid, lambda x: composed(compressor, grid, [windows.to_raster_order(b) for b in x]), layout="block"
    )


@pytest.mark.parametrize(("ratio", "grid"), [(2, (5, 6)), (2, (3, 5)), (3, (4, 5)), (4, (5, 6))])
def test_padding_is_not_attended_to(ratio, grid):
    compressor = lk.nn.build_compressor("token_packer", in_dim=8, out_dim=6, num_blocks=1, ratio=ratio, pad=True)
    first, last = (ratio - 1) // 2, ratio // 2

    def expected(x):
        keys = normed(compressor.key_norm, mlp(compressor.key, x)).unflatten(1, grid)
        values = normed(compressor.value_norm, mlp(compressor.value, x)).unflatten(1, grid)
        image, rows = x.unflatten(1, grid), []
        for y in range(0, grid[0], ratio):
            for x0 in range(0, grid[1], ratio):
                window = image[:, y : y + ratio, x0 : x0 + ratio]
                central = window[:, first : last + 1, first : last + 1]
                query = (central if central.numel() else window).mean((1, 2))
                query = normed(compressor.query_norm, F.linear(query, compressor.query.weight))
                k, v = (one[:, y : y + ratio, x0 : x0 + ratio].flatten(1, 2).transpose(0, 1) for one in (keys, values))
                rows.append(attended(compressor.attention, query[None], k, v)[0])
        return mlp(compressor.mlp, torch.stack(rows, 1))

    yardstick.assert_agrees(compressor, grid, expected)


def test_more_windows_than_cuda_takes_are_attended_to_in_turn(monkeypatch):
    compressor = lk.nn.build_compressor("token_packer", in_dim=8, num_blocks=1, pad=True)
    x = torch.randn(3, 30, 8)
    whole, _ = compressor(x, (5, 6))
    monkeypatch.setattr(attention, "MAX_BATCH", 5)
    torch.testing.assert_close(compressor(x, (5, 6))[0], whole)
    torch.testing.assert_close(compressor(x[:, :24], (4, 6))[0][:, :3], whole[:, :3])


def test_it_has_token_packers_number_of_parameters():
    with torch.device("meta"):
        compressor = lk.nn.build_compressor("token_packer", in_dim=1024, out_dim=896)
    h, d, m = 1024, 896, 4
    count = sum(p.numel() for p in compressor.parameters())
    assert count == 2 * m * h * h + 7 * h * h + 14 * h + h * d + d * d + 2 * d
    assert round(count / 1e6, 1) == 17.5
    assert compressor.num_blocks == len(HIDDEN_STATES)
    assert compressor.attention.num_heads == 8


def test_empty_batches():
    compressor = lk.nn.build_compressor("token_packer", in_dim=8, num_blocks=1, pad=True)
    assert compressor(torch.zeros(0, 24, 8), (4, 6))[0].shape == (0, 6, 8)
    assert compressor(torch.zeros(0, 15, 8), (3, 5))[0].shape == (0, 6, 8)


@pytest.mark.parametrize(("num_blocks", "place"), MODES)
def test_precision_and_reset(num_blocks, place):
    compressor = lk.nn.build_compressor("token_packer", in_dim=8, num_blocks=num_blocks, place=place, pad=True)
    yardstick.assert_runs_in_low_precision(compressor, (5, 6))
    yardstick.assert_resets(compressor)


def test_compilation():
    yardstick.assert_compiles(lk.nn.build_compressor("token_packer", in_dim=8, num_blocks=2, pad=True), [(4, 6), (5, 7)])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"place": "inside", "num_blocks": 4}, ValueError, "num_blocks: got 4, expected 1, inside an encoder"),
        ({"num_blocks": 0}, ValueError, "num_blocks: got 0"),
        ({"num_heads": 3}, ValueError, "num_heads: got 3, expected a divisor of 8"),
        ({"hidden_dim": 8.0}, TypeError, r"hidden_dim: got 8\.0"),
    ],
)
def test_it_refuses_options(options, error, message):
    with pytest.raises(error, match=message):
        lk.nn.build_compressor("token_packer", in_dim=8, **options)


def test_it_refuses_inputs():
    compressor = lk.nn.build_compressor("token_packer", in_dim=8)
    with pytest.raises(ValueError, match="x: got Tensor, expected a list of 4 tensors"):
        compressor(torch.zeros(2, 24, 8), (4, 6))
    with pytest.raises(ValueError, match="grid: got 5 x 6, expected both sides divisible by 2"):
        compressor([torch.zeros(2, 30, 8)] * 4, (5, 6))


@pytest.mark.parametrize("grid", [(4, 4), (5, 5)])
def test_its_queries_do_not_overflow(grid):
    x = torch.full((1, grid[0] * grid[1], 1), 3e4, dtype=torch.float16)
    assert downsample(x, Windows(grid, 2, pad=True), "raster").isfinite().all()
