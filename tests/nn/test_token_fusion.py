import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import laco_kernels as lk
from laco_kernels.geometry import Windows

EXACT = {"rtol": 0, "atol": 1e-12}
VARIANTS = ("paper", "released")


def image_of(x, grid, k, prefix_tokens):
    """``[B, P + N, C] -> [B, C, H, W]``, zero-padded to complete windows."""
    image = x[:, prefix_tokens:].transpose(1, 2).unflatten(2, grid)
    return F.pad(image, (0, -grid[1] % k, 0, -grid[0] % k))


def pieces_of(tokens, num_tokens):
    """Cut each token's channels into consecutive pieces that become tokens."""
    return torch.stack(tokens.chunk(num_tokens, dim=2), dim=2).flatten(1, 2)


def by_hand(layer, x, grid):
    """The layer's output out of a convolution or a pixel_unshuffle, with weights in the order that these want."""
    k, dim, pieces = layer.kernel_size, layer.in_dim, layer.num_tokens
    image = image_of(x, grid, k, layer.prefix_tokens)
    if layer.variant == "paper":
        kernel = layer.linear1.weight.unflatten(1, (k, k, dim)).permute(0, 3, 1, 2)
        fused = F.gelu(F.conv2d(image, kernel, layer.linear1.bias, stride=k)).flatten(2).transpose(1, 2)
        return F.gelu(layer.linear3(F.gelu(layer.linear2(pieces_of(fused, pieces)))))
    unshuffled = F.pixel_unshuffle(image, k).flatten(2).transpose(1, 2)  # (c, dy, dx)
    channel_major = layer.linear1.weight.unflatten(1, (k, k, dim // pieces)).permute(0, 3, 1, 2).flatten(1)
    return layer.linear2(F.gelu(F.linear(pieces_of(unshuffled, pieces), channel_major, layer.linear1.bias)))


CASES = [(k, e, (2 * k, 3 * k), 0) for k, e in itertools.product((1, 2, 3, 4), (1, 2, 4))]
CASES += [(2, 1, (5, 3), 1), (2, 2, (5, 3), 0), (3, 4, (4, 7), 2), (4, 2, (1, 5), 5), (2, 2, (4, 6), 3), (8, 1, (8, 16), 0)]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("kernel_size", "num_tokens", "grid", "prefix_tokens"), CASES)
def test_it_is_convolutions(variant, kernel_size, num_tokens, grid, prefix_tokens):
    dim = 1 if kernel_size == 8 else 4
    odd = any(side % kernel_size for side in grid)
    layer = lk.nn.SpatialTokenFusion(
        dim, 5, kernel_size, num_tokens, variant, prefix_tokens=prefix_tokens, pad=odd, dtype=torch.float64
    )
    x = torch.randn(2, prefix_tokens + grid[0] * grid[1], dim, dtype=torch.float64)
    y = layer(x, grid)
    windows = -(-grid[0] // kernel_size) * -(-grid[1] // kernel_size)
    assert y.shape == (2, windows * num_tokens, 5)
    assert layer.num_output_tokens(grid) == windows * num_tokens
    torch.testing.assert_close(y, by_hand(layer, x, grid), **EXACT)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("num_tokens", [1, 2])
def test_it_reads_tokens_that_lie_window_by_window(variant, num_tokens):
    layer = lk.nn.SpatialTokenFusion(4, 5, 2, num_tokens, variant, prefix_tokens=1, pad=True, dtype=torch.float64)
    x = torch.randn(2, 25, 4, dtype=torch.float64)
    in_blocks = Windows((4, 6), 2, 1).to_block_order(x)
    torch.testing.assert_close(layer(in_blocks, (4, 6), layout="block"), layer(x, (4, 6)), **EXACT)
    with pytest.raises(ValueError, match="layout: got 'rows', expected one of 'raster', 'block'"):
        layer(x, (4, 6), layout="rows")
    with pytest.raises(ValueError, match="layout: got 'block' with a grid of 3 x 8, expected 'raster'"):
        layer(x, (3, 8), layout="block")


@pytest.mark.parametrize("num_tokens", [1, 2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_hooks_on_the_first_layer_run_and_change_nothing(variant, num_tokens):
    layer = lk.nn.SpatialTokenFusion(4, 5, 2, num_tokens, variant, prefix_tokens=1, pad=True, dtype=torch.float64)
    x, calls = torch.randn(2, 16, 4, dtype=torch.float64), []
    expected = layer(x, (3, 5))
    layer.linear1.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(layer(x, (3, 5)), expected, **EXACT)
    assert calls == [1]


def test_only_the_papers_variant_ends_in_a_gelu():
    layers = [lk.nn.SpatialTokenFusion(4, 6, variant=variant) for variant in VARIANTS]
    for layer in layers:
        nn.init.constant_(list(layer.children())[-1].bias, -5.0)
    paper, released = (layer(torch.randn(2, 24, 4), (4, 6)) for layer in layers)
    assert paper.min() > -0.18  # the minimum of the GELU
    assert released.max() < -2


@pytest.mark.parametrize("variant", VARIANTS)
def test_prefix_tokens_do_not_matter(variant):
    layer = lk.nn.SpatialTokenFusion(4, 6, variant=variant, prefix_tokens=2)
    x = torch.randn(2, 26, 4)
    changed = torch.cat([torch.full((2, 2, 4), 7.0), x[:, 2:]], dim=1)
    assert torch.equal(layer(x, (4, 6)), layer(changed, (4, 6)))


def test_the_pieces_of_the_released_variant_are_slices_of_the_channels():
    """Zeroing the upper half of the channels changes the second of two tokens of each window only."""
    layer = lk.nn.SpatialTokenFusion(4, 6, num_tokens=2, variant="released")
    x = torch.randn(1, 24, 4)
    y, z = layer(x, (4, 6)), layer(x * torch.tensor([1.0, 1.0, 0.0, 0.0]), (4, 6))
    assert torch.equal(y[:, 0::2], z[:, 0::2])
    assert (y[:, 1::2] != z[:, 1::2]).any(-1).all()


@pytest.mark.parametrize(("variant", "expected"), [("paper", 151_019_520), ("released", 134_238_208)])
def test_it_has_the_papers_number_of_parameters(variant, expected):
    layer = lk.nn.SpatialTokenFusion(1024, 4096, variant=variant, device="meta")
    assert sum(p.numel() for p in layer.parameters()) == expected
    assert (layer.in_dim, layer.out_dim) == (1024, 4096)


@pytest.mark.parametrize(("num_tokens", "paper", "released"), [(1, 16, 16), (2, 8, 8), (4, 4, 4)])
def test_the_1x1_convolutions_take_one_piece(num_tokens, paper, released):
    assert lk.nn.SpatialTokenFusion(4, 6, num_tokens=num_tokens).linear2.weight.shape == (64, paper)
    layer = lk.nn.SpatialTokenFusion(4, 6, num_tokens=num_tokens, variant="released")
    assert layer.linear1.weight.shape == (64, released)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("num_tokens", [1, 2])
def test_every_parameter_and_every_patch_gets_a_gradient(variant, num_tokens):
    layer = lk.nn.SpatialTokenFusion(4, 6, 2, num_tokens, variant, prefix_tokens=1, pad=True)
    x = torch.randn(2, 16, 4, requires_grad=True)
    layer(x, (3, 5)).square().sum().backward()
    parameters = dict(layer.named_parameters())
    assert set(parameters) == {
        f"linear{i}.{kind}" for i in range(1, len(list(layer.children())) + 1) for kind in ("weight", "bias")
    }
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters.values())
    assert (x.grad[:, 1:].abs().sum(-1) > 0).all()
    assert not x.grad[:, :1].any()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("num_tokens", [1, 2])
def test_unusual_batches(variant, num_tokens):
    layer = lk.nn.SpatialTokenFusion(4, 6, 2, num_tokens, variant)
    assert layer(torch.randn(0, 24, 4), (4, 6)).shape == (0, 6 * num_tokens, 6)
    x = torch.randn(2, 4, 24).transpose(1, 2)
    assert torch.equal(layer(x, (4, 6)), layer(x.contiguous(), (4, 6)))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x, (4, 6)).dtype == torch.bfloat16


@pytest.mark.parametrize("variant", VARIANTS)
def test_resetting_draws_every_parameter_again(variant):
    layer = lk.nn.SpatialTokenFusion(4, 6, variant=variant, device="meta").to_empty(device="cpu")
    for parameter in layer.parameters():
        nn.init.constant_(parameter, float("nan"))
    layer.reset_parameters()
    assert all(p.isfinite().all() and p.unique().numel() > 1 for p in layer.parameters())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"in_dim": 0}, ValueError, "in_dim: got 0"),
        ({"out_dim": 2.5}, TypeError, r"out_dim: got 2\.5"),
        ({"kernel_size": 0}, ValueError, "kernel_size: got 0, expected an integer of at least 1"),
        ({"num_tokens": 0}, ValueError, "num_tokens: got 0"),
        ({"num_tokens": 3}, ValueError, "num_tokens: got 3, expected a divisor of 16, the channels of a window"),
        (
            {"num_tokens": 8, "variant": "released"},
            ValueError,
            "num_tokens: got 8, expected a divisor of 4, the channels of a to",
        ),
        ({"variant": "new"}, ValueError, "variant: got 'new', expected one of 'paper', 'released'"),
        ({"prefix_tokens": -1}, ValueError, "prefix_tokens: got -1"),
    ],
)
def test_it_refuses_options(options, error, message):
    with pytest.raises(error, match=message):
        lk.nn.SpatialTokenFusion(**({"in_dim": 4, "out_dim": 6} | options))


@pytest.mark.parametrize("num_tokens", [1, 2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_it_refuses_inputs(variant, num_tokens):
    layer = lk.nn.SpatialTokenFusion(4, 6, 2, num_tokens, variant)
    with pytest.raises(ValueError, match="x: got 8 channels, expected in_dim = 4"):
        layer(torch.randn(2, 24, 8), (4, 6))
    with pytest.raises(ValueError, match="x: got 4 dimensions"):
        layer(torch.randn(2, 4, 4, 6), (4, 6))
    with pytest.raises(ValueError, match="x: got 25 tokens, expected 24"):
        layer(torch.randn(2, 25, 4), (4, 6))
    with pytest.raises(ValueError, match=r"grid: got 5 x 6, expected both sides divisible by 2.*pad=True"):
        layer(torch.randn(2, 30, 4), (5, 6))
    with pytest.raises(ValueError, match=r"grid: got 5 x 6, expected both sides divisible by 2.*pad=True"):
        layer.num_output_tokens((5, 6))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("num_tokens", [1, 2])
@pytest.mark.parametrize("dynamic", [False, True])
def test_it_compiles_without_a_graph_break(variant, num_tokens, dynamic):
    torch.compiler.reset()  # the recompilations of one forward are counted over all modules
    layer = lk.nn.SpatialTokenFusion(4, 6, 2, num_tokens, variant, prefix_tokens=1, pad=True)
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="eager")
    for grid in [(4, 6), (5, 3)]:
        x = torch.randn(2, 1 + grid[0] * grid[1], 4)
        torch.testing.assert_close(compiled(x, grid), layer(x, grid))
