"""The host logic of ``csrc/``: what it tells Hopper's kernels covers every element once, and is what the driver takes."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import event, example, given, settings
from hypothesis import strategies as st

from tests.csrc import copy_engine
from tests.csrc.copy_engine import CHUNK, NOWHERE
from tests.csrc.emulator import build
from tests.csrc.problems import HOPPER, RESIDUALS, tiles_of

pytestmark = [pytest.mark.skipif(build.GCC is None, reason="needs g++ to build the host logic")]
MANY = settings(max_examples=1000, report_multiple_bugs=False)
CHANNELS = st.integers(1, 20).map(lambda n: 8 * n)
GAPS = st.sampled_from([0, 0, 8, 24])
CHUNKS = 24  # at most, of 64 channels along a row


@pytest.fixture(scope="module")
def cuda():
    return build.load().cuda


class Layout:
    """Tokens [B, H, W, C] at addresses of their own."""

    def __init__(self, draw, number, batch, height, width, channels, side=1, sources=1, dense=False):
        gap_t, gap_b, prefix = (0, 0, 0) if dense else (draw(GAPS), draw(GAPS), draw(st.integers(0, 3)))
        self.shape, self.side, self.stride_t = (batch, height, width, channels), side, channels + gap_t
        self.stride_b = (prefix + height * width) * self.stride_t + gap_b
        self.sources = [(number + i) << 40 for i in range(1, sources + 1)]

    def tokens(self, cuda):
        batch, height, width, channels = self.shape
        return cuda.Tokens(
            sources=self.sources, batch=batch, height=height, width=width, stride_b=self.stride_b, stride_t=self.stride_t,
            side=self.side, channels=channels,
        )  # fmt: skip

    def addresses(self, source):
        batch, height, width, channels = self.shape
        b, t, c = (np.arange(n) for n in (batch, height * width, channels))
        found = source + 2 * ((b[:, None] * self.stride_b + t * self.stride_t)[..., None] + c)
        return found.reshape(self.shape)

    def windows(self):
        """Of each row and each number of it: [rows, sources * taps, channels]."""
        return np.concatenate([space_to_depth(self.addresses(source), self.side) for source in self.sources], 1)

    @property
    def grid(self):
        return [-(-n // self.side) for n in self.shape[1:3]]


def space_to_depth(x, side):
    batch, height, width, channels = x.shape
    x = np.pad(x, ((0, 0), (0, -height % side), (0, -width % side), (0, 0)), constant_values=NOWHERE)
    x = x.reshape(batch, x.shape[1] // side, side, x.shape[2] // side, side, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, side * side, channels)


def from_blocks(x, side):
    """Tokens that lie window by window, in raster order."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // side, width // side, side, side, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height, width, channels)


def padded(x):
    """``[rows, taps, channels] -> [rows, taps * channels]``, each tap's channels filled up to chunks of 64."""
    rows, _, channels = x.shape
    return np.pad(x, ((0, 0), (0, 0), (0, -channels % CHUNK)), constant_values=NOWHERE).reshape(rows, -1)


def matrix(number, *shape):
    """Addresses of a contiguous tensor."""
    return (number << 40) + 2 * np.arange(np.prod(shape, dtype=int)).reshape(shape)


@dataclass(repr=False)
class Case:
    """Arguments of a product, tokens apart; addresses of A and B along the depth, of the outputs, and of what is added.

    What is added to a forward product's rows, and an activation's input, is ``[rows, taps, channels]``; the residual's
    gradient, which is read for every tap of a window, ``[rows, 1, channels]``.
    """

    product: str
    arguments: dict
    tokens: dict
    a: np.ndarray
    b: np.ndarray
    out: np.ndarray
    second: np.ndarray | None = None
    added: np.ndarray | None = None

    def __repr__(self):
        return f"{self.product}({self.arguments}, { {name: vars(of) for name, of in self.tokens.items()} })"


def channels_of(taps):
    return CHANNELS if taps * 3 <= CHUNKS else st.integers(1, 8 * (CHUNKS // taps)).map(lambda n: 8 * n)


def sources_of(side):
    return st.sampled_from([n for n in (1, 1, 2, 8) if n * side**2 <= CHUNKS])


@st.composite
def windows(draw):
    side = draw(st.sampled_from([1, 1, 2, 2, 2, 3, 4]))
    height, width = (max(1, draw(st.integers(1, 6)) * side - draw(st.integers(0, side - 1))) for _ in range(2))
    return draw(st.integers(1, 3)), side, height, width


@st.composite
def forwards(draw):
    batch, side, height, width = draw(windows())
    n, sources = draw(CHANNELS), draw(sources_of(side))
    x = Layout(draw, 1, batch, height, width, draw(channels_of(side**2 * sources)), side, sources)
    rows = x.windows()
    weight = matrix(20, n, rows.shape[1], rows.shape[2])
    arguments, tokens, prefix, added = {"weight": 20 << 40, "n": n, "out": 21 << 40}, {"x": x}, 0, None
    arguments["bias"], second = draw(st.sampled_from([0, 24 << 40])), None
    kind = draw(st.sampled_from(RESIDUALS))
    if kind != "none":
        prefix, of, block = draw(st.integers(0, 3)), draw(st.integers(1, 3)), draw(st.booleans())
        size = [max(1, k * of - (0 if block else draw(st.integers(0, of - 1)))) for k in x.grid]
        tokens["residual"] = shortcut = Layout(draw, 30, batch, *size, n, of, dense=block)
        arguments |= {"residual_kind": RESIDUALS.index(kind), "residual_block": block, "out_prefix": prefix}
        places = shortcut.addresses(shortcut.sources[0])
        added = space_to_depth(from_blocks(places, of) if block else places, of)
    elif draw(st.booleans()):
        arguments |= {"activation": 1, "pre": 22 << 40}
        second = matrix(22, len(rows), n)
    per_image = len(rows) // batch
    out = matrix(21, batch, prefix + per_image, n)[:, prefix:].reshape(-1, n)
    return Case("forward", arguments, tokens, rows, weight, out, second, added)


@st.composite
def input_gradients(draw):
    batch, side, height, width = draw(windows())
    channels, n = draw(channels_of(side**2)), draw(CHANNELS)
    rows = [-(-size // side) for size in (height, width)]
    gradient = Layout(draw, 1, batch, *rows, n)
    arguments = {"weight": 20 << 40, "channels": channels, "out": 21 << 40, "height": height, "width": width}
    tokens, second, added = {"gradient": gradient}, None, None
    if side == 1 and draw(st.booleans()):
        arguments |= {"activation": 1, "pre": 30 << 40, "act": 22 << 40, "sums": 23 << 40}
        added, out, second = (matrix(number, batch * height * width, 1, channels) for number in (30, 21, 22))
        second = padded(second)
    else:
        prefix = draw(st.integers(0, 3))
        arguments |= {"side": side, "out_prefix": prefix}
        places = matrix(21, batch, prefix + height * width, channels)[:, prefix:]
        out = space_to_depth(places.reshape(batch, height, width, channels), side)
        arguments["residual_kind"] = draw(st.integers(0, 2))
        if arguments["residual_kind"]:
            tokens["residual_gradient"] = of = Layout(draw, 30, batch, *rows, channels)
            added = of.windows()
    weight = np.moveaxis(matrix(20, n, side * side, channels), 0, 2)  # [taps, channels, n]
    columns = np.pad(weight, ((0, 0), (0, -channels % CHUNK), (0, 0)), constant_values=NOWHERE).reshape(-1, 1, n)
    return Case("input_gradient", arguments, tokens, gradient.windows(), columns, padded(out), second, added)


@st.composite
def weight_gradients(draw):
    batch, side, height, width = draw(windows())
    n, sources = draw(CHANNELS), draw(sources_of(side))
    channels = draw(channels_of(side**2 * sources))
    x = Layout(draw, 1, batch, height, width, channels, side, sources)
    gradient = Layout(draw, 10, batch, *x.grid, n)
    a = gradient.windows()[:, 0].T[:, None]
    b = padded(x.windows()).T[:, None]
    out = padded(matrix(21, n, sources * side**2, channels))
    return Case("weight_gradient", {"out": 21 << 40}, {"gradient": gradient, "x": x}, a, b, out)


def slot(case, told, bm, bn, m0, n0, step):
    if case.product == "forward":
        return copy_engine.forward_slot(told, m0, n0, step)
    if case.product == "input_gradient":
        return copy_engine.input_gradient_slot(told, m0, n0, step, bn)
    return copy_engine.weight_gradient_slot(told, m0, n0, step, bm, bn)


def cut(x, first, length):
    """Lines of [lines, ...], NOWHERE behind the last."""
    found = x[first : first + length]
    return np.pad(found, [(0, length - len(found)), *[(0, 0)] * (x.ndim - 1)], constant_values=NOWHERE)


def check_parts(case, told):
    """What a kernel finds by itself: the bias, the column sums, the residual where the copy engine does not bring it."""
    assert [told[name] for name in ("bias", "sums", "residual_kind")] == [
        case.arguments.get(name, 0) for name in ("bias", "sums", "residual_kind")
    ]
    assert told["has_second"] == ("second" in told) == (case.second is not None)
    if told["residual_kind"]:
        taps = told["residual"]["side"] ** 2
        found = [copy_engine.residual_tokens(told["residual"], np.arange(told["m"]), tap) for tap in range(taps)]
        assert np.array_equal(np.stack(found, 1), case.added)


def check(cuda, case, data):
    """Each tile's operands step by step, what is added to it and where it goes, against where everything lies."""
    arguments = {"element": 0, **case.arguments, **{name: of.tokens(cuda) for name, of in case.tokens.items()}}
    multiprocessors = data.draw(st.integers(1, 8))
    tile, splits = data.draw(st.sampled_from([None, *tiles_of(case.product)[:-1]])), 1
    if tile is None:
        machine = {"multiprocessors": multiprocessors, "pairs": multiprocessors // 2, "quads": multiprocessors // 4}
        plan = getattr(cuda, f"{case.product}_plan")(**arguments, **machine)
        tile, splits = plan["tile"], plan["splits"]
    told = getattr(cuda, f"{case.product}_operands")(**arguments, tile=tile, splits=splits)
    bm, bn, shares = HOPPER[tile]
    able = [k for k in (1, 2, 4) if told["steps"] >= 4 * k] if shares and case.product != "input_gradient" else [1]
    if splits == 1 and len(able) > 1:
        splits = data.draw(st.sampled_from(able))
        told = getattr(cuda, f"{case.product}_operands")(**arguments, tile=tile, splits=splits)
    check_parts(case, told)
    a, b = padded(case.a), padded(case.b)
    order = np.sort(case.out[case.out != NOWHERE])
    count = np.zeros(order.shape, int)
    blocks = range(multiprocessors)
    tiles = [at for block in blocks for at in cuda.schedule(tile, told["m"], told["columns"], block, multiprocessors)]
    for m0, n0 in tiles:
        mine = []
        for rank in range(splits):
            mine += copy_engine.share(told, rank)
            for first in copy_engine.pieces(told, bn, rank):
                if told["copied"]:
                    expected = cut(case.added, m0, bm).transpose(1, 0, 2)[..., n0 + first : n0 + first + CHUNK]
                    assert np.array_equal(copy_engine.added(told, m0, n0 + first)[..., : expected.shape[2]], expected)
                repeated = -first % CHUNK  # columns that the piece before it has, too
                for m in range(m0, m0 + bm, 16):
                    places = copy_engine.written(told, case.product, m, n0 + first)
                    assert np.array_equal(places, cut(cut(case.out, m, 16).T, n0 + first, CHUNK).T)
                    if told["has_second"]:
                        places_too = copy_engine.box(told["second"], n0 + first, m)
                        assert np.array_equal(places_too, cut(cut(case.second, m, 16).T, n0 + first, CHUNK).T)
                    fresh = places[:, repeated:]
                    np.add.at(count, np.searchsorted(order, fresh[fresh != NOWHERE]), 1)
        assert mine == list(range(told["steps"]))
        for step in mine:
            got_a, got_b = slot(case, told, bm, bn, m0, n0, step)
            depth = slice(step * CHUNK, (step + 1) * CHUNK)
            assert np.array_equal(got_a, cut(a, m0, bm)[:, depth])
            assert np.array_equal(got_b, cut(b, n0, bn)[:, depth])
    assert (count == 1).all()


@MANY
@given(forwards(), st.data())
def test_forward(cuda, case, data):
    check(cuda, case, data)


@MANY
@given(input_gradients(), st.data())
def test_input_gradient(cuda, case, data):
    check(cuda, case, data)


@MANY
@given(weight_gradients(), st.data())
def test_weight_gradient(cuda, case, data):
    check(cuda, case, data)


SIZES = st.one_of(
    st.integers(1, 100), st.integers(1, 2**15), st.integers(1, 2**31 - 1), st.integers(20, 30).map(lambda n: 2**n)
)
UNITS = st.one_of(st.integers(1, 600), SIZES).map(lambda n: min(8 * n, 2**31 - 8))
FAR = st.one_of(st.just(0), st.integers(0, 2**20), st.integers(0, 2**44), st.integers(35, 41).map(lambda n: 2**n)).map(
    lambda n: 8 * n
)


@st.composite
def vast(draw, side=None, sources=1, channels=None, batch=None):
    """Arguments of Tokens of any size that a 32-bit number has."""
    batch = batch or draw(st.one_of(st.just(1), SIZES))
    grid = [draw(st.sampled_from([SIZES, st.integers(1, 9), st.integers(2**31 - 9, 2**31 - 1)])) for _ in range(2)]
    height, width = (1 if draw(st.integers(0, 3)) == 0 else draw(sizes) for sizes in grid)
    channels = channels or draw(UNITS)
    stride_t = channels + draw(FAR)
    stride_b = min(height * width * stride_t + draw(FAR), 2**60)
    return {
        "sources": [16] * sources, "batch": batch, "height": height, "width": width, "stride_b": stride_b, "stride_t": stride_t,
        "side": side or draw(st.integers(1, 8)), "channels": channels,
    }  # fmt: skip


def rows_in(tokens):
    side = tokens["side"]
    return tokens["batch"] * -(-tokens["height"] // side) * -(-tokens["width"] // side)


@st.composite
def vast_problems(draw):
    product = draw(st.sampled_from(["forward", "input_gradient", "weight_gradient"]))
    x = draw(vast(sources=draw(st.sampled_from([1, 8]))))
    if product == "forward":
        problem = {"x": x, "weight": 16, "n": draw(UNITS)}
        if draw(st.booleans()):
            shortcut = draw(vast(channels=problem["n"], batch=x["batch"]))
            shortcut["height"], shortcut["width"] = (
                min(-(-x[name] // x["side"]) * shortcut["side"], 2**31 - 1) for name in ("height", "width")
            )
            problem |= {"residual": shortcut, "residual_kind": draw(st.integers(1, 2))}
        return product, problem
    rows = min(rows_in(x) // x["batch"], 2**31 - 1)
    channels = draw(UNITS)
    stride_t = channels + draw(FAR)
    sizes = {"height": 1, "width": rows, "stride_t": stride_t, "stride_b": min(rows * stride_t + draw(FAR), 2**60)}
    gradient = {**x, **sizes, "side": 1, "sources": [16], "channels": channels}
    if product == "weight_gradient":
        return product, {"gradient": gradient, "x": x}
    sizes = {name: x[name] for name in ("side", "height", "width")}
    return product, {"gradient": gradient, "weight": 16, "channels": draw(UNITS), **sizes}


def is_taken_by_the_driver(tensor_map):
    """The limits of cuTensorMapEncodeTiled and cuTensorMapEncodeIm2col."""
    sizes, strides, edges, side = (tensor_map[name] for name in ("sizes", "strides", "box", "side"))
    return (
        tensor_map["base"] % 16 == 0
        and all(0 < n <= 2**32 for n in sizes)
        and all(n % 8 == 0 and 0 < 2 * n < 2**40 for n in strides)
        and all(0 < n <= 256 for n in edges)
        and edges[0] * 2 <= 128  # the swizzle
        and 0 <= side <= 8
        and (len(sizes) < 4 or strides[2] >= sizes[2] * strides[1])  # as the emulated driver has it
    )


TALL = {
    "sources": [16], "batch": 1, "height": 2**31 - 1, "width": 1, "stride_b": 2**34, "stride_t": 8, "side": 2, "channels": 8,
}  # fmt: skip


@MANY
@given(vast_problems(), st.sampled_from(sorted(HOPPER)))
@example(("forward", {"x": TALL, "weight": 16, "n": 8}), "128x128")
@example(("forward", {"x": TALL | {"height": 1, "width": 2**31 - 1}, "weight": 16, "n": 8}), "128x128")
def test_sizes_beyond_32_bits_are_refused_and_all_others_counted_right(cuda, problem, tile):
    product, arguments = problem
    rows, others = rows_in(arguments["x"] if product == "forward" else arguments["gradient"]), {}
    made = {name: cuda.Tokens(**value) if isinstance(value, dict) else value for name, value in arguments.items()}
    try:
        told = getattr(cuda, f"{product}_operands")(element=0, out=16, **made, tile=tile)
    except ValueError as error:
        event(str(error))
        return
    event(f"{product}: described")
    x = arguments.get("x", arguments["gradient"] if product != "forward" else None)
    maps = [*told["sources"], *(told[name] for name in ("other", "out", "second", "added") if name in told)]
    assert all(map(is_taken_by_the_driver, maps))
    taps, chunks = len(x["sources"]) * x["side"] ** 2, -(-x["channels"] // CHUNK)
    if product == "forward":
        others = {"m": rows, "n": arguments["n"], "columns": arguments["n"], "steps": taps * chunks}
    elif product == "weight_gradient":
        others = {"m": arguments["gradient"]["channels"], "columns": CHUNK * taps * chunks, "steps": -(-rows // CHUNK)}
    else:
        columns = arguments["side"] ** 2 * -(-arguments["channels"] // CHUNK) * CHUNK
        others = {"m": rows, "columns": columns, "steps": chunks}
    assert {name: told[name] for name in others} == others
