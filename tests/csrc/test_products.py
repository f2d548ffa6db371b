"""The products of ``csrc/`` on an emulated GPU, in every tile: random problems in memory full of NaN, and tiles' ends."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.csrc import problems
from tests.csrc.emulator import build
from tests.csrc.problems import RESIDUALS, TYPES, Memory, Tokens, tiles_of

pytestmark = [
    pytest.mark.skipif(build.GCC is None, reason="needs g++ to build the emulated GPU"),
]
WORK = 100_000_000  # multiplications of a random problem's tiles, half a second
TILES = tiles_of("weight_gradient")

SEEDS = st.integers(0, 2**16)
CHANNELS = st.integers(1, 25).map(lambda n: 8 * n)


@pytest.fixture(scope="module")
def emulated():
    modules = build.load()
    modules.emulator.choose(multiprocessors=3)
    return modules.cuda


def check(module, problem, tile):
    error = problem.launch(module, tile=tile)
    assert error is None, error
    problems.assert_right(problem)


def tiles(n):
    return -(-n // 128) * 128


@st.composite
def layouts(draw):
    """How tokens lie in memory."""
    gaps = st.sampled_from([0, 0, 8, 24])
    return {"prefix": draw(st.integers(0, 5)), "gap_t": draw(gaps), "gap_b": draw(gaps)}


@st.composite
def windows(draw, side=None, min_batch=0):
    """Of a batch: side and grid, which windows need not fill."""
    side = side or draw(st.integers(1, 8))
    grid = [max(1, draw(st.integers(1, 8)) * side - draw(st.integers(0, side - 1))) for _ in range(2)]
    return draw(st.integers(min_batch, 3)), side, *grid


@st.composite
def forwards(draw):
    memory = Memory(draw(st.sampled_from(TYPES)), draw(SEEDS))
    batch, side, height, width = draw(windows())
    channels, n, sources = draw(CHANNELS), draw(CHANNELS), draw(st.integers(1, 8))
    x = Tokens.random(memory, batch, height, width, channels, side=side, sources=sources, **draw(layouts()))
    assume(tiles(x.rows) * tiles(n) * x.depth <= WORK)
    kind = draw(st.sampled_from(RESIDUALS))
    options = {"bias": draw(st.booleans()), "kind": kind}
    if kind == "none":
        options["activation"] = draw(st.integers(0, 2))
        options["save_pre"] = bool(options["activation"]) and draw(st.booleans())
        return problems.forward(memory, x, n, **options)
    options["out_prefix"] = draw(st.integers(0, 3))
    options["block"] = block = draw(st.booleans())
    side = draw(st.integers(1, 8))
    height, width = (max(1, rows * side - (0 if block else draw(st.integers(0, side - 1)))) for rows in x.grid)
    shortcut = Tokens.random(memory, batch, height, width, n, side=side, **({} if block else draw(layouts())))
    return problems.forward(memory, x, n, shortcut=shortcut, **options)


@st.composite
def input_gradients(draw):
    memory = Memory(draw(st.sampled_from(TYPES)), draw(SEEDS))
    batch, side, height, width = draw(windows())
    channels, n = draw(CHANNELS), draw(CHANNELS)
    rows = [-(-size // side) for size in (height, width)]
    gradient = Tokens.random(memory, batch, *rows, n, **draw(layouts()))
    if draw(st.booleans()):
        options = {"activation": draw(st.integers(1, 2)), "save_act": draw(st.booleans()), "sums": draw(st.booleans())}
        return problems.input_gradient(memory, gradient, channels, **options)
    assume(tiles(gradient.rows) * tiles(channels) * side**2 * n <= WORK)
    options = {"grid": (height, width), "side": side, "out_prefix": draw(st.integers(0, 3))}
    options["kind"] = kind = draw(st.sampled_from(RESIDUALS))
    if kind != "none":
        options["shortcut"] = Tokens.random(memory, batch, *rows, channels, **draw(layouts()))
    return problems.input_gradient(memory, gradient, channels, **options)


@st.composite
def weight_gradients(draw):
    memory = Memory(draw(st.sampled_from(TYPES)), draw(SEEDS))
    batch, side, height, width = draw(windows())
    channels, n, sources = draw(CHANNELS), draw(CHANNELS), draw(st.integers(1, 8))
    x = Tokens.random(memory, batch, height, width, channels, side=side, sources=sources, **draw(layouts()))
    assume(tiles(n) * tiles(x.depth) * max(32, x.rows) <= WORK)
    return problems.weight_gradient(memory, Tokens.random(memory, batch, *x.grid, n, **draw(layouts())), x)


@given(forwards(), st.sampled_from(tiles_of("forward")))
def test_forward_anywhere(emulated, problem, tile):
    check(emulated, problem, tile)


@given(input_gradients(), st.sampled_from(TILES))
def test_input_gradient_anywhere(emulated, problem, tile):
    check(emulated, problem, tile)


@given(weight_gradients(), st.sampled_from(TILES))
def test_weight_gradient_anywhere(emulated, problem, tile):
    check(emulated, problem, tile)


@pytest.mark.parametrize("tile", tiles_of("forward"))
@pytest.mark.parametrize("dtype", TYPES)
def test_many_tiles(emulated, dtype, tile):
    """More than a group of row tiles, the last of each direction not full."""
    memory = Memory(dtype, 0)
    x = Tokens.random(memory, 2, 43, 26, 40, prefix=1)
    check(emulated, problems.forward(memory, x, 264, activation=1, save_pre=True), tile)
    if tile not in TILES:
        return
    gradient = Tokens.random(memory, 2, 43, 26, 16)
    options = {"activation": 1, "save_act": True, "sums": True}
    check(emulated, problems.input_gradient(memory, gradient, 264, **options), tile)
    gradient = Tokens.random(memory, 2, 3, 3, 1096)
    x = Tokens.random(memory, 2, 5, 6, 72, side=2)
    check(emulated, problems.weight_gradient(memory, gradient, x), tile)


@pytest.mark.parametrize("tile", TILES)
def test_a_weight_gradient_of_no_rows_is_zero(emulated, tile):
    memory = Memory(torch.bfloat16, 0)
    gradient, x = Tokens.random(memory, 0, 2, 2, 8), Tokens.random(memory, 0, 4, 4, 16, side=2)
    problem = problems.weight_gradient(memory, gradient, x)
    check(emulated, problem, tile)
    assert not problem.outputs["out"].any()


@pytest.mark.parametrize("tile", tiles_of("forward"))
def test_infinities_and_nans_stay_in_their_rows_and_columns(emulated, tile):
    memory = Memory(torch.bfloat16, 0)
    x = Tokens.random(memory, 1, 5, 5, 24, side=2)
    x.sources[0][0, 1, 1, 3], x.sources[0][0, 4, 4, 0] = float("nan"), float("inf")  # of windows 0 and 8
    problem = problems.forward(memory, x, 40)
    assert problem.launch(emulated, tile=tile) is None
    got, want = problem.outputs["out"][0], problem.compute(torch.float64)["out"]
    assert torch.equal(got.isfinite(), want.isfinite())
    assert torch.equal(got.isnan(), want.isnan())
