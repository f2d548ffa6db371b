import pytest
import torch
import torch.nn.functional as F
from torch import nn

import laco_kernels as lk

GRID = (4, 6)


@pytest.mark.parametrize("residual", ["mean", "channel_group", "none"])
@pytest.mark.parametrize("norm", [None, "layer_norm", "rms_norm"])
@pytest.mark.parametrize("prefix_tokens", [0, 2])
def test_it_computes_what_its_parameters_say(residual, norm, prefix_tokens):
    layer = lk.nn.PatchMergeLayer(
        8, hidden_dim=6, residual=residual, norm=norm, prefix_tokens=prefix_tokens, zero_init_last=False, dtype=torch.float64
    )
    nn.init.normal_(layer.linear1.bias)
    nn.init.normal_(layer.linear2.bias)
    x = torch.randn(2, prefix_tokens + 24, 8, dtype=torch.float64)
    image = x[:, prefix_tokens:].transpose(1, 2).unflatten(2, GRID)
    normed = image if norm is None else layer.norm(image.movedim(1, -1)).movedim(-1, 1)
    unfolded = F.unfold(normed, 2, stride=2).transpose(1, 2)  # (c, dy, dx)
    merged = unfolded.unflatten(2, (8, 4)).transpose(2, 3).flatten(2)
    expected = layer.linear2(F.gelu(layer.linear1(merged)))
    if residual == "mean":
        expected = expected + F.avg_pool2d(image, 2).flatten(2).transpose(1, 2)
    elif residual == "channel_group":
        raw = F.unfold(image, 2, stride=2).transpose(1, 2).unflatten(2, (8, 4)).transpose(2, 3).flatten(2)
        expected = expected + raw.unflatten(2, (8, 4)).mean(-1)
    y = layer(x, GRID)
    torch.testing.assert_close(y[:, prefix_tokens:], expected, rtol=0, atol=1e-12)
    assert torch.equal(y[:, :prefix_tokens], x[:, :prefix_tokens])


def test_an_untrained_layer_with_residual_is_average_pooling():
    x = torch.randn(2, 24, 8)
    image = x.transpose(1, 2).unflatten(2, GRID)
    pooled = F.avg_pool2d(image, 2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(lk.nn.PatchMergeLayer(8)(x, GRID), pooled)
    assert not torch.allclose(lk.nn.PatchMergeLayer(8, zero_init_last=False)(x, GRID), pooled)


def test_without_residual_the_last_map_does_not_start_at_zero():
    assert lk.nn.PatchMergeLayer(8, residual="none").linear2.weight.abs().sum() > 0


def test_every_parameter_gets_a_gradient():
    layer = lk.nn.PatchMergeLayer(8, norm="layer_norm", zero_init_last=False)
    layer(torch.randn(2, 24, 8), GRID).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


def test_it_counts_its_output_tokens():
    layer = lk.nn.PatchMergeLayer(8, ratio=3, prefix_tokens=1, pad=True)
    assert layer.num_output_tokens((7, 9)) == layer(torch.randn(1, 64, 8), (7, 9)).shape[1] == 10
    assert (layer.in_dim, layer.out_dim) == (8, 8)


def test_it_changes_the_width_without_residual():
    layer = lk.nn.PatchMergeLayer(8, hidden_dim=16, out_dim=12, residual="none", bias=False)
    assert layer(torch.randn(2, 24, 8), GRID).shape == (2, 6, 12)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ratio": 1}, ValueError, "ratio: got 1"),
        ({"ratio": 1.5}, TypeError, r"ratio: got 1\.5"),
        ({"hidden_dim": 0}, ValueError, "hidden_dim: got 0"),
        ({"residual": "sum"}, ValueError, "residual: got 'sum'"),
        ({"norm": "batch_norm"}, ValueError, "norm: got 'batch_norm', expected one of 'layer_norm', 'rms_norm'"),
        ({"out_dim": 9}, ValueError, "out_dim: got 9, expected 8.*residual='none'"),
        ({"out_dim": 9, "residual": "none", "prefix_tokens": 1}, ValueError, "out_dim: got 9.*with prefix tokens"),
        ({"residual": "none", "zero_init_last": True}, ValueError, "zero_init_last: got True"),
    ],
)
def test_it_refuses(options, error, message):
    with pytest.raises(error, match=message):
        lk.nn.PatchMergeLayer(8, **options)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_it_compiles_without_a_graph_break(backend, dynamic):
    layer = lk.nn.PatchMergeLayer(8, pad=True, zero_init_last=False)
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend=backend)
    for grid in [(4, 6), (5, 3)]:
        x = torch.randn(2, grid[0] * grid[1], 8)
        torch.testing.assert_close(compiled(x, grid), layer(x, grid))


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize(
    "hook",
    ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook", "register_full_backward_pre_hook"],
)
def test_hooks_on_the_linear_maps_run_and_change_nothing(hook, approximate):
    layer = lk.nn.PatchMergeLayer(8, zero_init_last=False, approximate=approximate, dtype=torch.float64)
    x = torch.randn(2, 24, 8, dtype=torch.float64, requires_grad=True)
    expected, calls = layer(x, GRID), []
    for linear in (layer.linear1, layer.linear2):
        getattr(linear, hook)(lambda *_: calls.append(1))
    y = layer(x, GRID)
    y.sum().backward()
    assert len(calls) == 2
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
