"""What holds for every compressor. What each computes is tested beside this, against something that others wrote."""

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import laco_kernels as lk
from laco_kernels.geometry import Windows
from laco_kernels.nn.compressors import COMPRESSORS, PLACES, build_compressor

DIM = 8
EXACT = {"rtol": 0, "atol": 1e-10}
# Options that keep a compressor small, or that it needs.
OPTIONS = {
    "mbtf": {"num_blocks": 3, "num_layers": 6},
    "mbtf+stf": {"num_blocks": 3, "num_layers": 6},
    "qformer": {"num_queries": 5, "num_layers": 3, "hidden_dim": 16, "num_heads": 4},
    "c_abstractor": {"grid": (4, 6)},
}
# Those that look at attention have a call of their own, and tests of their own (test_training_free.py).
ON_TOKENS = [name for name, kind in COMPRESSORS.items() if "before" not in kind.places and not kind.reads_attention]
CASES = [(name, place) for name in ON_TOKENS for place in COMPRESSORS[name].places]


def build(name, place=None, dtype=torch.float64, **options):
    """A compressor whose every parameter matters."""
    torch.manual_seed(3)
    ratio = {"ratio": 2} if COMPRESSORS[name].reduces else {}
    compressor = build_compressor(name, **{"in_dim": DIM, "place": place} | ratio | OPTIONS.get(name, {}) | options)
    with torch.no_grad():
        for parameter in compressor.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return compressor.to(dtype)


def tokens(compressor, grid, batch=2, dtype=torch.float64, requires_grad=False):
    """What it reads: a tensor ``[B, P + N, C]``, or a list of them."""
    shape = batch, compressor.prefix_tokens + grid[0] * grid[1], compressor.in_dim
    blocks = [torch.randn(shape, dtype=dtype, requires_grad=requires_grad) for _ in range(compressor.num_blocks)]
    return blocks if compressor.num_blocks > 1 else blocks[0]


def on_all(function, x):
    """Apply ``function`` to the tensor, or to each of the list."""
    return [function(block) for block in x] if isinstance(x, list) else function(x)


def deepest(compressor, x):
    return x[compressor.deepest] if isinstance(x, list) else x


def ratios(name):
    return (2, 3, 4) if COMPRESSORS[name].reduces else (1,)


@pytest.mark.parametrize("prefix_tokens", [0, 2])
@pytest.mark.parametrize(("name", "place"), CASES)
def test_shape_and_count_are_what_it_says(name, place, prefix_tokens):
    for ratio in ratios(name):
        for grid in [(2 * ratio, 3 * ratio), (ratio, ratio), (2 * ratio + 1, 3 * ratio - 1)]:
            odd = any(side % ratio for side in grid)
            pad = odd and not COMPRESSORS[name].fits_any_grid
            compressor = build(name, place, ratio=ratio, prefix_tokens=prefix_tokens, pad=pad)
            y, out_grid = compressor(tokens(compressor, grid), grid)
            assert y.shape == (2, compressor.num_output_tokens(grid), compressor.out_dim)
            assert out_grid == compressor.out_grid(grid)
            if out_grid is not None:
                assert out_grid == Windows(grid, ratio, pad=True).out_grid
                assert y.shape[1] == out_grid[0] * out_grid[1] + (prefix_tokens if place == "inside" else 0)
            assert compressor(tokens(compressor, grid, batch=0), grid)[0].shape == (0, *y.shape[1:])


@pytest.mark.parametrize("name", [name for name, place in CASES if place == "behind" and not COMPRESSORS[name].keeps_width])
def test_it_reaches_the_width_of_the_llm_behind_an_encoder(name):
    compressor = build(name, out_dim=12, prefix_tokens=1)
    assert compressor.place == "behind"
    assert compressor(tokens(compressor, (4, 6)), (4, 6))[0].shape == (2, compressor.num_output_tokens((4, 6)), 12)


@pytest.mark.parametrize(("name", "place"), CASES)
def test_prefix_tokens_pass_through_inside_and_are_dropped_behind(name, place):
    compressor = build(name, place, prefix_tokens=2)
    x = tokens(compressor, (4, 6))
    y, _ = compressor(x, (4, 6))
    z, _ = compressor(on_all(lambda block: torch.cat([block[:, :2] + 1, block[:, 2:]], dim=1), x), (4, 6))
    passed_on = 2 if place == "inside" else 0
    assert torch.equal(y[:, :passed_on], deepest(compressor, x)[:, :passed_on])
    assert torch.equal(y[:, passed_on:], z[:, passed_on:])


@pytest.mark.parametrize(("name", "place"), [case for case in CASES if COMPRESSORS[case[0]].reads_blocks])
def test_it_reads_tokens_that_lie_window_by_window(name, place):
    for ratio in ratios(name):
        compressor = build(name, place, ratio=ratio, prefix_tokens=1)
        grid = (2 * ratio, 3 * ratio)
        x = tokens(compressor, grid)
        in_blocks = on_all(Windows(grid, ratio, 1).to_block_order, x)
        torch.testing.assert_close(compressor(in_blocks, grid, layout="block"), compressor(x, grid), **EXACT)


@pytest.mark.parametrize(("name", "place"), [case for case in CASES if "mean" in COMPRESSORS[case[0]].residuals])
@pytest.mark.parametrize("pad", [False, True])
def test_the_residual_is_average_pooling(name, place, pad):
    for ratio in ratios(name):
        with_, without = (
            build(name, place, ratio=ratio, prefix_tokens=1, pad=pad, residual=residual, **zero)
            for residual, zero in ((True, {"zero_init_last": False} if name == "laco" else {}), (False, {}))
        )
        without.load_state_dict(with_.state_dict())
        grid = (2 * ratio + 1, 3 * ratio - 1) if pad else (2 * ratio, 3 * ratio)
        x = tokens(with_, grid)
        image = deepest(with_, x)[:, 1:].transpose(1, 2).unflatten(2, grid)
        pooled = F.avg_pool2d(image, ratio, ceil_mode=True).flatten(2).transpose(1, 2)
        passed_on = 1 if place == "inside" else 0
        added = (with_(x, grid)[0] - without(x, grid)[0])[:, passed_on:]
        torch.testing.assert_close(added, pooled, **EXACT)


@pytest.mark.parametrize(("name", "place"), CASES)
def test_every_parameter_and_every_patch_gets_a_gradient(name, place):
    compressor = build(name, place, prefix_tokens=1)
    x = tokens(compressor, (4, 6), requires_grad=True)
    compressor(x, (4, 6))[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in compressor.parameters())
    for block in x if isinstance(x, list) else [x]:
        assert (block.grad[:, 1:].abs().sum(-1) > 0).all()
        assert place == "inside" or not block.grad[:, :1].any()


@pytest.mark.parametrize("name", COMPRESSORS)
def test_it_is_built_without_memory_and_drawn_later(name):
    with torch.device("meta"):
        compressor = build_compressor(name, in_dim=DIM, **OPTIONS.get(name, {}))
    assert all(tensor.is_meta for tensor in compressor.state_dict().values())
    compressor.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in compressor.parameters():
            parameter.fill_(float("nan"))
    compressor.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in compressor.parameters())
    torch.manual_seed(1)
    built = build_compressor(name, in_dim=DIM, **OPTIONS.get(name, {}))
    first = copy.deepcopy(built.state_dict())
    built.reset_parameters()
    for key, value in built.state_dict().items():
        constant = value.unique().numel() == 1  # norms, biases and what starts at zero
        assert torch.equal(value, first[key]) if constant else not torch.equal(value, first[key])


@pytest.mark.parametrize("how", ["bfloat16", "autocast", "autocast of bfloat16 tokens"])
@pytest.mark.parametrize(("name", "place"), CASES)
def test_lower_precision_computes_the_same(name, place, how):
    compressor = build(name, place, prefix_tokens=1)
    x = tokens(compressor, (4, 6))
    expected, _ = compressor(x, (4, 6))
    low = copy.deepcopy(compressor).to(torch.bfloat16 if how == "bfloat16" else torch.float32)
    given = on_all(lambda block: block.to(torch.float32 if how == "autocast" else torch.bfloat16), x)
    with torch.autocast("cpu", torch.bfloat16, enabled=how != "bfloat16"):
        y, _ = low(given, (4, 6))
        for linear in low.modules():  # with a hook on each the layers themselves run, in plain torch
            if type(linear) is nn.Linear:
                linear.register_forward_hook(lambda *_: None)
        plain, _ = low(given, (4, 6))
    assert y.dtype == torch.bfloat16 or how == "autocast"
    budget = 2 * (plain.double() - expected).norm() + torch.finfo(y.dtype).eps * expected.norm()
    assert (y.double() - expected).norm() <= budget
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("name", ON_TOKENS)
def test_it_compiles_without_a_graph_break(name):
    torch.compiler.reset()
    compressor = build(name, COMPRESSORS[name].places[-1], prefix_tokens=1)
    compiled = torch.compile(compressor, fullgraph=True, backend="eager")
    for grid in [(4, 6), (8, 2)]:  # for the second one with symbols for sizes
        x = tokens(compressor, grid)
        y, out_grid = compiled(x, grid)
        torch.testing.assert_close(y, compressor(x, grid)[0], **EXACT)
        assert out_grid == compressor.out_grid(grid)


@pytest.mark.parametrize(("name", "place"), CASES)
def test_what_is_put_on_a_linear_layer_runs(name, place):
    """The operators read weights; with a hook, an adapter or a quantised layer the layers themselves have to be called."""
    compressor = build(name, place)
    x = tokens(compressor, (4, 6))
    expected, _ = compressor(x, (4, 6))
    linears = [module for module in compressor.modules() if type(module) is nn.Linear]
    calls = []
    for linear in linears:
        linear.register_forward_hook(lambda linear, *_: calls.append(linear))
    torch.testing.assert_close(compressor(x, (4, 6))[0], expected, **EXACT)
    assert len(calls) == len(linears)
    assert {id(linear) for linear in calls} == {id(linear) for linear in linears}


# The operator that each runs on; the others have no product behind which something could be fused, or none that reads windows.
OPERATORS = {
    "laco": "patch_merge",
    "pixel_shuffle": "patch_merge",
    "token_concat": "patch_merge",
    "stf": "strided_conv_gelu",
    "mbtf": "multi_block_linear_gelu",
    "mbtf+stf": "strided_conv_gelu",
    "patch_merger": "patch_merge",
    "llama4": "strided_conv_gelu",
    "vila": "patch_merge",
    "idefics3": "strided_conv",
    "mlp2x_gelu": "strided_conv_gelu",
}


class Called(TorchDispatchMode):
    """Keeps the names of this library's operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "laco":
            self.names.add(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layout", ["raster", "block"])
@pytest.mark.parametrize("name", OPERATORS)
def test_it_runs_on_the_fused_operators(name, layout):
    compressor = build(name)
    with Called() as called:
        compressor(tokens(compressor, (4, 6)), (4, 6), layout=layout if compressor.reads_blocks else "raster")
    assert OPERATORS[name] in called.names


@pytest.mark.parametrize("name", COMPRESSORS)
def test_it_is_documented_where_it_stands(name):
    kind = COMPRESSORS[name]
    assert set(kind.places) <= set(PLACES)
    documentation = inspect.getdoc(kind)
    for option in inspect.signature(kind).parameters:
        assert option in documentation or option == "common"
    assert repr(build(name))


@pytest.mark.parametrize("name", COMPRESSORS)
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"in_dim": 0}, ValueError, "in_dim: got 0, expected an integer of at least 1"),
        ({"in_dim": 2.5}, TypeError, r"in_dim: got 2\.5"),
        ({"ratio": 0}, ValueError, "ratio: got 0"),
        ({"ratio": 1.5}, TypeError, r"ratio: got 1\.5"),
        ({"prefix_tokens": -1}, ValueError, "prefix_tokens: got -1"),
        ({"pad": 1}, TypeError, "pad: got 1, expected True or False"),
        ({"place": "beside"}, ValueError, r"place: got 'beside', expected .*where \w+ may stand"),
        ({"residual": "sum"}, ValueError, "residual: got 'sum', expected one of"),
        ({"rato": 2}, TypeError, "options: got rato, expected some of .* Did you mean 'ratio'"),
    ],
)
def test_it_refuses_options(name, options, error, message):
    with pytest.raises(error, match=message):
        build_compressor(name, **{"in_dim": DIM} | options)


@pytest.mark.parametrize("name", COMPRESSORS)
def test_it_refuses_places_and_widths_that_do_not_go_together(name):
    kind = COMPRESSORS[name]
    for place in set(PLACES) - set(kind.places):
        with pytest.raises(ValueError, match=f"place: got '{place}'"):
            build_compressor(name, in_dim=DIM, place=place)
    for place in set(kind.places) - {"behind"}:
        with pytest.raises(ValueError, match=rf"out_dim: got 12, expected 8, the same as in_dim, {place} an encoder\."):
            build_compressor(name, in_dim=DIM, out_dim=12, place=place)
    if kind.keeps_width:
        with pytest.raises(ValueError, match=r"out_dim: got 12, expected 8, the same as in_dim, which it keeps"):
            build_compressor(name, in_dim=DIM, out_dim=12, place="behind")
    elif "behind" in kind.places and "mean" in kind.residuals:
        with pytest.raises(ValueError, match="out_dim: got 12, expected 8, the same as in_dim, with residual='mean'"):
            build_compressor(name, in_dim=DIM, out_dim=12, residual=True)
    if not kind.reduces:
        with pytest.raises(ValueError, match=r"ratio: got 2, expected 1\. .* as many tokens as it reads"):
            build_compressor(name, in_dim=DIM, ratio=2)


@pytest.mark.parametrize("name", ON_TOKENS)
def test_it_refuses_inputs(name):
    compressor = build(name, prefix_tokens=1)
    several = compressor.num_blocks > 1
    x = tokens(compressor, (4, 6))
    named = r"x\[0\]" if several else "x"
    for wrong, error, message in [
        (on_all(lambda block: torch.randn(2, 25, 9), x), ValueError, f"{named}: got 9 channels, expected in_dim = 8"),
        (on_all(lambda block: block[:, 1:], x), ValueError, "x: got 24 tokens, expected 25 = 1 prefix .* 4 . 6 patches"),
        (on_all(lambda block: block[0], x), ValueError, f"{named}: got 2 dimensions"),
        (on_all(lambda block: block.long(), x), TypeError, f"{named}: got torch.int64"),
        (x[1:] if several else [x, x], (TypeError, ValueError), r"x: got (\d tensors, expected a list of \d|list)"),
    ]:
        with pytest.raises(error, match=message):
            compressor(wrong, (4, 6))
    with pytest.raises(TypeError, match="grid: got 24"):
        compressor(x, 24)
    layouts = "'raster', 'block'" if compressor.reads_blocks else "'raster'"
    with pytest.raises(ValueError, match=f"layout: got 'rows', expected one of {layouts}"):
        compressor(x, (4, 6), layout="rows")
    if compressor.reads_blocks:
        odd = build(name, pad=True)
        with pytest.raises(ValueError, match="layout: got 'block' with a grid of 3 x 5, expected 'raster'"):
            odd(tokens(odd, (3, 5)), (3, 5), layout="block")
    if not (compressor.fits_any_grid or compressor.ratio == 1):
        for call in (lambda: compressor(x, (3, 8)), lambda: compressor.num_output_tokens((3, 8))):
            with pytest.raises(ValueError, match=r"grid: got 3 x 8, expected both sides divisible by 2.*pad=True"):
                call()


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("pixelshuffle", "Did you mean 'pixel_shuffle'"),
        ("stf+mbtf", "or 'mbtf+stf'"),
        ("avgpool", "Did you mean 'avg_pool'"),
        ("qwen2vl", "Did you mean 'patch_merger'"),
        ("SmolVLM", "Did you mean 'idefics3'."),
        ("LACO", "Did you mean 'laco'."),
        ("MBTF+STF", "Did you mean 'mbtf+stf'."),
        (None, "Pass one of these."),
        ("xyz", "Pass one of these."),
        (["laco"], "Pass one of these."),
    ],
)
def test_an_unknown_name_is_answered_with_the_closest(name, answer):
    with pytest.raises(ValueError, match=r"compressor: got .*, expected one of laco, .*\. (Did you mean|Pass one)") as error:
        lk.nn.build_compressor(name, in_dim=8)
    assert repr(name) in str(error.value)
    assert answer in str(error.value).partition("downsample")[2]


def test_the_width_has_to_be_said():
    with pytest.raises(TypeError, match="in_dim: got nothing, expected the width of the tokens"):
        lk.nn.build_compressor("laco")
