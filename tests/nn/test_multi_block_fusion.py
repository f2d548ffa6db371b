import pytest
import torch
import torch.nn.functional as F
from torch import nn

import laco_kernels as lk
from laco_kernels.nn.multi_block_fusion import RELEASED_HIDDEN_STATES

EXACT = {"rtol": 0, "atol": 1e-12}
VARIANTS = ("paper", "released")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("num_blocks", [1, 3, 8])
@pytest.mark.parametrize("prefix_tokens", [0, 2])
def test_it_is_convolutions_of_concatenated_feature_maps(variant, num_blocks, prefix_tokens):
    layer = lk.nn.MultiBlockTokenFusion(4, num_blocks, variant, prefix_tokens=prefix_tokens, dtype=torch.float64)
    xs = [torch.randn(2, prefix_tokens + 6, 4, dtype=torch.float64) for _ in range(num_blocks)]
    maps = torch.cat([x[:, prefix_tokens:].transpose(1, 2).unflatten(2, (2, 3)) for x in xs], dim=1)
    fused = F.gelu(F.conv2d(maps, layer.linear1.weight[..., None, None], layer.linear1.bias))
    fused = F.conv2d(fused, layer.linear2.weight[..., None, None], layer.linear2.bias)
    expected = (F.gelu(fused) if variant == "paper" else fused).flatten(2).transpose(1, 2)
    torch.testing.assert_close(layer(xs), expected, **EXACT)
    torch.testing.assert_close(layer(tuple(xs)), expected, **EXACT)


def test_a_hook_on_the_first_layer_runs_and_changes_nothing():
    layer = lk.nn.MultiBlockTokenFusion(4, 3, prefix_tokens=1, dtype=torch.float64)
    xs, calls = [torch.randn(2, 7, 4, dtype=torch.float64) for _ in range(3)], []
    expected = layer(xs)
    layer.linear1.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(layer(xs), expected, **EXACT)
    assert calls == [1]


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_has_the_papers_widths_and_number_of_parameters(variant):
    layer = lk.nn.MultiBlockTokenFusion(1024, variant=variant, device="meta")
    assert layer.linear1.weight.shape == (4096, 8192)
    assert layer.linear2.weight.shape == (1024, 4096)
    assert sum(p.numel() for p in layer.parameters()) == 37_753_856
    assert (layer.in_dim, layer.out_dim, layer.num_blocks) == (1024, 1024, 8)


@pytest.mark.parametrize("num_blocks", [16, 24])
def test_the_hidden_width_stays_with_more_blocks(num_blocks):
    assert lk.nn.MultiBlockTokenFusion(4, num_blocks).linear1.weight.shape == (16, 4 * num_blocks)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_gets_a_gradient_and_so_do_blocks_that_want_one(variant):
    layer = lk.nn.MultiBlockTokenFusion(4, 3, variant, prefix_tokens=1)
    xs = [torch.randn(2, 7, 4, requires_grad=i != 1) for i in range(3)]
    layer(xs).square().sum().backward()
    parameters = dict(layer.named_parameters())
    assert set(parameters) == {"linear1.weight", "linear1.bias", "linear2.weight", "linear2.bias"}
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters.values())
    assert xs[1].grad is None
    assert all((x.grad[:, 1:].abs().sum(-1) > 0).all() and not x.grad[:, :1].any() for x in (xs[0], xs[2]))


def test_empty_batches_and_autocast():
    layer = lk.nn.MultiBlockTokenFusion(4, 2)
    assert layer([torch.randn(0, 6, 4)] * 2).shape == (0, 6, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer([torch.randn(2, 6, 4)] * 2).dtype == torch.bfloat16


def test_resetting_draws_every_parameter_again():
    layer = lk.nn.MultiBlockTokenFusion(4, 2)
    for parameter in layer.parameters():
        nn.init.constant_(parameter, float("nan"))
    layer.reset_parameters()
    assert all(p.isfinite().all() and p.unique().numel() > 1 for p in layer.parameters())


def test_sampled_blocks_are_evenly_spaced():
    assert lk.nn.sampled_blocks() == lk.nn.sampled_blocks(24, 8) == (3, 6, 9, 12, 15, 18, 21, 24)
    assert lk.nn.sampled_blocks(24, 16) == (2, 3, 5, 6, 8, 9, 11, 12, 14, 15, 17, 18, 20, 21, 23, 24)
    assert lk.nn.sampled_blocks(24, 24) == tuple(range(1, 25))
    assert lk.nn.sampled_blocks(27, 1) == (27,)
    # The authors' code reads the same blocks, the last but one instead of the last, deepest first.
    assert tuple(reversed(RELEASED_HIDDEN_STATES))[:-1] == lk.nn.sampled_blocks()[:-1]
    assert range(25)[RELEASED_HIDDEN_STATES[0]] == 23


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((24, 25), ValueError, "num_blocks: got 25, expected at most num_layers = 24"),
        ((24, 0), ValueError, "num_blocks: got 0"),
        ((0, 1), ValueError, "num_layers: got 0"),
        ((24, 1.5), TypeError, r"num_blocks: got 1\.5"),
    ],
)
def test_sampled_blocks_refuse(arguments, error, message):
    with pytest.raises(error, match=message):
        lk.nn.sampled_blocks(*arguments)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dim": 0}, ValueError, "dim: got 0"),
        ({"num_blocks": True}, TypeError, "num_blocks: got True"),
        ({"num_blocks": 0}, ValueError, "num_blocks: got 0"),
        ({"variant": "new"}, ValueError, "variant: got 'new', expected one of 'paper', 'released'"),
        ({"prefix_tokens": -1}, ValueError, "prefix_tokens: got -1"),
    ],
)
def test_it_refuses_options(options, error, message):
    with pytest.raises(error, match=message):
        lk.nn.MultiBlockTokenFusion(**({"dim": 4} | options))


@pytest.mark.parametrize(
    ("xs", "error", "message"),
    [
        ([torch.zeros(2, 6, 4)] * 3, ValueError, "xs: got 3 blocks, expected num_blocks = 2"),
        ([], ValueError, "xs: got an empty list"),
        (torch.zeros(2, 2, 6, 4), TypeError, "xs: got Tensor"),
        ([torch.zeros(2, 6, 8)] * 2, ValueError, r"xs\[0\]: got 8 channels, expected dim = 4"),
        ([torch.zeros(2, 6, 4), torch.zeros(2, 7, 4)], ValueError, r"xs\[1\]: got \[2, 7, 4\]"),
        ([torch.zeros(2, 6)] * 2, ValueError, r"xs\[0\]: got 2 dimensions"),
        (["x", "y"], TypeError, r"xs\[0\]: got str"),
    ],
)
def test_it_refuses_inputs(xs, error, message):
    with pytest.raises(error, match=message):
        lk.nn.MultiBlockTokenFusion(4, 2)(xs)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_it_compiles_without_a_graph_break(variant, dynamic):
    torch.compiler.reset()  # the recompilations of one forward are counted over all modules
    layer = lk.nn.MultiBlockTokenFusion(4, 3, variant, prefix_tokens=1)
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="eager")
    for tokens in (7, 10):
        xs = [torch.randn(2, tokens, 4) for _ in range(3)]
        torch.testing.assert_close(compiled(xs), layer(xs))
