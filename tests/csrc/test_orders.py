"""Every product of ``csrc/`` on the emulated GPU: right, and the same bit by bit, in every order of events."""

import pytest
import torch
import torch.nn.functional as F

from tests.csrc.emulator import build
from tests.csrc.problems import tiles_of

pytestmark = [
    pytest.mark.skipif(build.GCC is None, reason="needs g++ to build the emulated GPU"),
]
SEEDS = 9  # three numbers of multiprocessors
BF16, HALF = torch.bfloat16, torch.float16
ELEMENTS = {BF16: 0, HALF: 1}


@pytest.fixture(scope="module")
def modules():
    return build.load()


def windows(x, side):
    """``[B, H, W, C] -> [rows, side * side, C]``, zero-padded."""
    batch, height, width, channels = x.shape
    x = F.pad(x, (0, 0, 0, -width % side, 0, -height % side))
    x = x.reshape(batch, x.shape[1] // side, side, x.shape[2] // side, side, channels)
    return x.transpose(2, 3).reshape(-1, side * side, channels)


class Case:
    """Random operands of one type, outputs full of NaN, and what these must be."""

    def __init__(self, cuda, dtype):
        self.cuda, self.dtype, self.kept, self.outputs, self.wanted = cuda, dtype, [], [], []

    def random(self, *shape, scale=1.0):
        tensor = (torch.randn(shape) * scale).to(self.dtype)
        self.kept.append(tensor)
        return tensor

    def tokens(self, *sources, side=1):
        batch, height, width, channels = sources[0].shape
        return self.cuda.Tokens(
            sources=[x.data_ptr() for x in sources], batch=batch, height=height, width=width, stride_b=sources[0].stride(0),
            stride_t=sources[0].stride(2), side=side, channels=channels,
        )  # fmt: skip

    def output(self, wanted, prefix=0, dtype=None):
        """Room for ``wanted``, with ``prefix`` lines in front of each image's that stay NaN."""
        shape = (wanted.shape[0], prefix + wanted.shape[1], *wanted.shape[2:])
        tensor = torch.full(shape, float("nan"), dtype=dtype or self.dtype)
        self.outputs.append(tensor)
        self.wanted.append(F.pad(wanted, (0, 0, prefix, 0), value=float("nan")))
        return tensor.data_ptr()

    def launch(self, tile, splits):
        for tensor in self.outputs:
            tensor.fill_(float("nan"))
        options = {**self.problem, "tile": tile, "splits": splits}
        error = getattr(self.cuda, self.product)(element=ELEMENTS[self.dtype], dependent=True, **options)
        assert error is None, error

    def check(self):
        for got, wanted in zip(self.outputs, self.wanted, strict=True):
            assert torch.equal(got.isnan(), wanted.isnan())
            error = (got.double() - wanted).nan_to_num().abs().max()
            assert error <= 2 * torch.finfo(self.dtype).eps * wanted.nan_to_num().abs().max()


def forward(case, *, activation=0, residual=0, prefix=0):
    case.product, n = "forward", 264
    xs = [case.random(10, 9, 6, 72) for _ in range(2)]
    rows = torch.cat([windows(x.double(), 2).flatten(1) for x in xs], 1)
    weight, bias = case.random(n, rows.shape[1], scale=rows.shape[1] ** -0.5), case.random(n)
    pre = rows @ weight.double().T + bias.double()
    out = [pre, F.gelu(pre), F.gelu(pre, approximate="tanh")][activation]
    case.problem = {"x": case.tokens(*xs, side=2), "weight": weight.data_ptr(), "bias": bias.data_ptr(), "n": n}
    if residual:
        tokens = case.random(10, 13, 8, n)
        found, there = windows(tokens.double(), 3), windows(torch.ones_like(tokens).double(), 3)
        mean = found.sum(1) / there.sum(1)
        out = out + (mean if residual == 1 else found.reshape(-1, n, 9).mean(2))
        case.problem |= {"residual": case.tokens(tokens, side=3), "residual_kind": residual, "out_prefix": prefix}
    if activation:
        case.problem |= {"activation": activation, "pre": case.output(pre[None])}
    case.problem["out"] = case.output(out.view(10, -1, n), prefix)


def through_activation(case):
    case.product, n, channels = "input_gradient", 328, 264
    gradient, weight = case.random(2, 1, 75, n), case.random(n, channels, scale=n**-0.5)
    pre = case.random(150, channels)
    before = pre.double().requires_grad_()
    act = F.gelu(before)
    (out,) = torch.autograd.grad(act, before, gradient.double().view(150, n) @ weight.double())
    sums = F.pad(out, (0, 0, 0, 10)).view(-1, 16, channels).sum(1)
    case.problem = {"gradient": case.tokens(gradient), "weight": weight.data_ptr(), "channels": channels, "width": 75}
    case.problem |= {"pre": pre.data_ptr(), "activation": 1, "act": case.output(act.detach()[None])}
    case.problem |= {"out": case.output(out[None]), "sums": case.output(sums[None], dtype=torch.float32)}


def to_tokens(case, residual):
    case.product, n, channels, side = "input_gradient", 328, 72, 2
    gradient, weight = case.random(2, 5, 3, n), case.random(n, 4 * channels, scale=n**-0.5)
    total = case.random(2, 5, 3, channels)
    tokens = torch.zeros(2, 9, 6, channels, dtype=torch.double, requires_grad=True)
    found, there = windows(tokens, side), windows(torch.ones_like(tokens), side)
    rows = gradient.double().view(-1, n) @ weight.double()
    added = found.sum(1) / there.sum(1) if residual == 1 else found.reshape(-1, channels, 4).mean(2)
    value = (found.flatten(1) * rows).sum() + (added * total.double().view(-1, channels)).sum()
    (out,) = torch.autograd.grad(value, tokens)
    case.problem = {"gradient": case.tokens(gradient), "weight": weight.data_ptr(), "channels": channels, "side": side}
    case.problem |= {"height": 9, "width": 6, "out_prefix": 3, "residual_kind": residual}
    case.problem |= {"residual_gradient": case.tokens(total), "out": case.output(out.view(2, -1, channels), 3)}


def weight_gradient(case):
    case.product, n = "weight_gradient", 136
    xs = [case.random(40, 9, 6, 72) for _ in range(2)]
    gradient = case.random(40, 5, 3, n, scale=600**-0.5)
    rows = torch.cat([windows(x.double(), 2).flatten(1) for x in xs], 1)
    out = gradient.double().view(-1, n).T @ rows
    case.problem = {"gradient": case.tokens(gradient), "x": case.tokens(*xs, side=2), "out": case.output(out[None])}


CASES = {
    "forward": (forward, {"activation": 1}),
    "forward_tanh": (forward, {"activation": 2}),
    "forward_mean": (forward, {"residual": 1}),
    "forward_mean_behind_prefix": (forward, {"residual": 1, "prefix": 3}),
    "forward_channel_group": (forward, {"residual": 2, "prefix": 3}),
    "through_activation": (through_activation, {}),
    "to_tokens_mean": (to_tokens, {"residual": 1}),
    "to_tokens_channel_group": (to_tokens, {"residual": 2}),
    "weight_gradient": (weight_gradient, {}),
}
PRODUCTS = {forward: "forward", weight_gradient: "weight_gradient"}
RUNS = [(name, tile, 1) for name, (make, _) in CASES.items() for tile in tiles_of(PRODUCTS.get(make, "input_gradient"))]
SHARING = {"192x128": 2, "192x96": 4, "128x128": 4, "64x128": 2, "64x64": 4}  # blocks that share a tile's depth
RUNS += [(name, tile, splits) for name, (make, _) in CASES.items() if make is forward for tile, splits in SHARING.items()]
RUNS += [("weight_gradient", tile, 2) for tile in SHARING if tile in tiles_of("weight_gradient")]


@pytest.mark.parametrize(("name", "tile", "splits"), RUNS)
def test_the_order_of_events_changes_nothing(modules, name, tile, splits):
    make, options = CASES[name]
    dtype = (BF16, HALF)[list(CASES).index(name) % 2]
    case = Case(modules.cuda, dtype)
    make(case, **options)
    first = None
    for seed in range(SEEDS):
        modules.emulator.choose(seed=seed, multiprocessors=1 + seed % 3)
        case.launch(tile, splits)
        if first is None:
            case.check()
            first = [tensor.clone() for tensor in case.outputs]
        for tensor, expected in zip(case.outputs, first, strict=True):
            assert torch.equal(tensor.view(torch.uint8), expected.view(torch.uint8))
