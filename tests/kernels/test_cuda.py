"""``impl="cuda"``: on a Hopper GPU the kernel; elsewhere what it is told, carried out in plain torch, forward only."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import laco_kernels as lk
from laco_kernels import testing
from laco_kernels.errors import UnsupportedError
from laco_kernels.kernels import cuda, select
from laco_kernels.ops.cost import Traffic
from laco_kernels.testing import Case
from tests.kernels import hopper

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HOPPER = DEVICE == "cuda" and torch.cuda.get_device_capability() == (9, 0)
pytestmark = pytest.mark.skipif(DEVICE == "cuda" and not HOPPER, reason="the GPU is no Hopper")
BF16 = torch.bfloat16
DTYPES = (BF16, torch.float16)


@pytest.fixture(autouse=True, scope="module")
def _kernel():
    with pytest.MonkeyPatch.context() as patch:
        if not HOPPER:
            patch.setattr(cuda, "_launch", lambda _, **problem: hopper.gemm(**problem))
            patch.setattr(select, "_no_hopper_kernels", lambda *_: None)
        yield


def check(case, inputs=None, *, dtype=BF16, backward=HOPPER):
    """Hold output and gradients to the promise; the latter, by the composite, cannot be interpreted in bfloat16."""
    inputs = case.inputs(dtype, DEVICE) if inputs is None else inputs
    if backward:
        assert not [row for row in testing.check_case(case, "cuda", dtype, DEVICE, inputs) if not row.ok]
        return
    with torch.no_grad():
        truth = case({name: tensor.double() for name, tensor in inputs.items()}, "reference")
        eager, actual = case(inputs, "reference"), case(inputs, "cuda")
    error, budget, ok = testing.compare(actual, eager, truth, [])
    assert ok, (error, budget)


def merge(batch=2, channels=16, hidden=24, **options):
    return Case("patch_merge", {"batch": batch, "channels": channels, "hidden": hidden}, {"grid": (4, 6), **options})


ABLE = [
    *[testing.CASES[i] for i in (0, 1, 2, 4, 5, 7, 8, 9, 10, 11, 12, 13, 14, 15, 17, 19, 20, 21)],
    merge(residual="none", prefix_tokens=1),
    merge(batch=1, residual="none", prefix_tokens=1),
    merge(layout="block", prefix_tokens=3),
    merge(layout="block", residual="none"),
    merge(grid=(1, 1), pad=True),
    merge(channels=200, hidden=136, grid=(5, 3), pad=True),
    merge(ratio=3, grid=(5, 4), pad=True, prefix_tokens=1),
    merge(ratio=3, grid=(6, 3), layout="block"),
    merge(ratio=4, grid=(4, 8), layout="block", prefix_tokens=2, residual="none"),
    merge(ratio=8, grid=(9, 3), pad=True),
    Case("multi_block_linear_gelu", {"batch": 2, "tokens": 3, "channels": 8, "blocks": 2, "out": 8}, {"prefix_tokens": 3}),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ABLE, ids=str)
def test_cases(case, dtype):
    assert testing.refusal(case, "cuda", dtype, DEVICE) is None
    check(case, dtype=dtype)


def test_biases_may_be_missing_or_have_gaps():
    inputs = merge().inputs(BF16, DEVICE)
    x, weight1, bias1, weight2, _ = inputs.values()
    gaps = torch.full((48,), float("nan"), dtype=BF16, device=DEVICE)[::2].copy_(bias1)
    with torch.no_grad():
        plain = lk.patch_merge(x, weight1, bias1, weight2, None, grid=(4, 6), impl="cuda")
        assert torch.equal(lk.patch_merge(x, weight1, gaps, weight2, None, grid=(4, 6), impl="cuda"), plain)
        zeros = torch.zeros(16, dtype=BF16, device=DEVICE)
        assert torch.equal(lk.patch_merge(x, weight1, bias1, weight2, zeros, grid=(4, 6), impl="cuda"), plain)


@st.composite
def layouts(draw, tensor):
    """The same values with gaps that the copy engine can follow, NaN in them."""
    gap, more, skip = (draw(st.integers(0, 2)) for _ in range(3))
    batch, tokens, channels = tensor.shape
    around = tensor.new_full((batch, tokens + more + skip, channels + 8 * gap), float("nan"))
    return around[:, skip : skip + tokens, :channels].copy_(tensor)


BATCHES, WIDTHS, PREFIXES = st.integers(0, 3), st.integers(1, 20).map(lambda n: 8 * n), st.integers(0, 5)
APPROXIMATE = st.sampled_from(["none", "tanh"])


def check_anywhere(data, case):
    inputs = case.inputs(data.draw(st.sampled_from(DTYPES)), DEVICE, seed=data.draw(st.integers(0, 999)))
    strides = data.draw(st.integers(0, 999))
    for name in inputs:
        if name == "x":
            inputs[name] = data.draw(layouts(inputs[name]))
        elif name.startswith("xs") and strides % 2:  # all blocks alike
            whole = inputs[name].new_full((*inputs[name].shape[:2], inputs[name].shape[2] + 8), float("nan"))
            inputs[name] = whole[..., :-8].copy_(inputs[name])
    check(case, inputs, backward=False)  # for each shape it would compile Triton kernels anew


@given(st.data())
def test_patch_merge_anywhere(data):
    layout = data.draw(st.sampled_from(["raster", "block"]))
    pad = layout == "raster" and data.draw(st.booleans())
    ratio = data.draw(st.integers(2, 4))
    side = st.integers(1, 9) if pad else st.integers(1, 3).map(lambda n: ratio * n)
    residual, prefix = data.draw(st.sampled_from(["mean", "none"])), data.draw(PREFIXES)
    sizes = {"batch": data.draw(BATCHES), "channels": data.draw(WIDTHS), "hidden": data.draw(WIDTHS)}
    options = {"layout": layout, "pad": pad, "ratio": ratio, "residual": residual, "prefix_tokens": prefix}
    grid = data.draw(side), data.draw(side)
    check_anywhere(data, Case("patch_merge", sizes, {"grid": grid, "approximate": data.draw(APPROXIMATE), **options}))


@given(st.data())
def test_strided_convolutions_anywhere(data):
    sizes = {"batch": data.draw(BATCHES), "channels": data.draw(WIDTHS), "out": data.draw(WIDTHS)}
    layout, size = data.draw(st.sampled_from(["raster", "block"])), data.draw(st.integers(1, 4))
    side = st.integers(1, 9) if layout == "raster" else st.integers(1, 4).map(lambda n: size * n)
    options = {"kernel_size": size, "pad": True, "prefix_tokens": data.draw(PREFIXES), "layout": layout}
    op = data.draw(st.sampled_from(["strided_conv", "strided_conv_gelu"]))
    if op == "strided_conv_gelu":
        options["approximate"] = data.draw(APPROXIMATE)
    check_anywhere(data, Case(op, sizes, {"grid": (data.draw(side), data.draw(side)), **options}))


@given(st.data())
def test_multi_block_linear_gelu_anywhere(data):
    prefix = data.draw(PREFIXES)
    sizes = {"batch": data.draw(BATCHES), "tokens": prefix + data.draw(st.integers(0, 12)), "channels": data.draw(WIDTHS)}
    sizes |= {"blocks": data.draw(st.integers(1, 8)), "out": data.draw(WIDTHS)}
    options = {"prefix_tokens": prefix, "approximate": data.draw(APPROXIMATE)}
    check_anywhere(data, Case("multi_block_linear_gelu", sizes, options))


OTHERS = "impl='composite', impl='triton' and the automatic choice have no such limit"
PASSING = {"x": (2, 25, 16), "weight1": (24, 64), "bias1": (24,), "weight2": (16, 24), "bias2": (16,)}


def tensors(**shapes):
    return {name: torch.randn(shape, device=DEVICE).to(BF16) for name, shape in {**PASSING, **shapes}.items()}


def moved(name, change):
    def build():
        found = tensors()
        return {**found, name: change(found[name])}

    return build


def shifted(t):
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


REFUSALS = [
    (tensors, {"residual": "channel_group"}, "residual: got 'channel_group', expected 'mean' or 'none' for impl='cuda'"),
    (lambda: tensors(x=(2, 82, 16), weight1=(24, 1296)), {"grid": (9, 9), "ratio": 9}, "ratio: got 9, expected at most 8"),
    (
        lambda: tensors(x=(2, 25, 12), weight1=(24, 48), weight2=(12, 24), bias2=(12,)),
        {},
        "x: got 12 channels, expected a multiple of 8",
    ),
    (lambda: tensors(weight1=(20, 64), bias1=(20,), weight2=(16, 20)), {}, r"weight1: got \[20, 64\], expected both sides"),
    (moved("x", shifted), {}, r"x: got strides .* at an address that is 2 modulo 16, .* Pass x\.clone"),
    (moved("x", lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)), {}, "x: got strides"),
    (moved("x", lambda t: t[:1].expand(t.shape)), {}, r"x: got strides \(0, 16, 1\)"),
    (moved("x", lambda t: t.repeat(1, 1, 2)[..., ::2]), {}, r"x: got strides \(800, 32, 2\)"),
    (moved("weight2", lambda t: t.t().contiguous().t()), {}, r"weight2: got strides .* Pass weight2\.contiguous\(\)"),
    (moved("weight1", shifted), {}, r"weight1: got an address that is 2 modulo 16"),
    (moved("bias2", shifted), {}, r"bias2: got an address that is 2 modulo 16, .* Pass bias2\.clone\(\)"),
]


@pytest.mark.parametrize(("build", "options", "message"), REFUSALS)
def test_what_it_cannot_do_is_refused_and_done_by_another_where_nobody_asked_for_it(build, options, message, monkeypatch):
    options = {"grid": (4, 6), "prefix_tokens": 1, **options}
    inputs = build()
    with torch.no_grad(), pytest.raises(RuntimeError, match=message) as raised:
        lk.patch_merge(**inputs, **options, impl="cuda")
    assert OTHERS in str(raised.value)
    monkeypatch.setattr(select, "choose", lambda *_: select.Choice("cuda", "for this test"))
    if not HOPPER:  # where the composite is interpreted, and not in bfloat16
        monkeypatch.setattr(cuda, "patch_merge_forward", refuse)
        inputs = {name: tensor.float() for name, tensor in inputs.items()}
    with torch.no_grad():
        assert torch.equal(lk.patch_merge(**inputs, **options), lk.patch_merge(**inputs, **options, impl="composite"))


def refuse(*_, **__):
    raise UnsupportedError


def test_other_operators_refuse_too():
    x = torch.randn(2, 17, 16, device=DEVICE).to(BF16)
    with torch.no_grad():
        for operator in (lk.strided_conv, lk.strided_conv_gelu):
            with pytest.raises(RuntimeError, match="kernel_size: got 16, expected at most 8"):
                operator(x, x.new_zeros(8, 4096), None, grid=(1, 16), kernel_size=16, pad=True, prefix_tokens=1, impl="cuda")
        with pytest.raises(RuntimeError, match="xs: got 9 blocks, expected at most 8"):
            lk.multi_block_linear_gelu([x] * 9, x.new_zeros(8, 144), None, impl="cuda")
        square = x.new_zeros(16, 16)
        with pytest.raises(RuntimeError, match="approximate: got 'sigmoid', expected 'none' or 'tanh' for impl='cuda'"):
            lk.gelu_mlp(x, square, None, square, None, approximate="sigmoid", impl="cuda")
        wide = x.repeat(1, 1, 2)[..., :16]
        with pytest.raises(
            RuntimeError, match=r"xs\[1\]: got strides \(544, 32, 1\), expected \(272, 16, 1\), those of xs\[0\]"
        ):
            lk.multi_block_linear_gelu([x, wide], x.new_zeros(8, 32), None, impl="cuda")


@pytest.mark.parametrize("case", [c for c in testing.LARGE_CASES if c.options.get("approximate") != "sigmoid"], ids=str)
def test_it_moves_as_many_bytes_as_the_triton_kernels(case):
    counts = []
    for impl in ("cuda", "triton"):
        with torch.no_grad(), Traffic(impl) as traffic:
            case(case.inputs(BF16, "meta"), None)
        counts.append((traffic.read, traffic.written))
    assert counts[0] == counts[1]


# bfloat16 has an approximation; in float16 1 + erf(x) cancels to 12 * 2**-24, and a step below the normal numbers is 2**-24.
@pytest.mark.parametrize(("dtype", "relative", "absolute"), [(BF16, 3e-3, 1e-8), (torch.float16, 0.0, 8e-7)], ids=str)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_activations_over_their_whole_range(approximate, dtype, relative, absolute):
    """One weight of one among zeros: the operator is GELU itself, of numbers, NaN and infinities."""
    x = torch.linspace(-12, 12, 4001, device=DEVICE).to(dtype)
    x = torch.cat([x, x.new_tensor([float("nan"), float("inf"), -float("inf")])])
    column = torch.nn.functional.pad(x[None, :, None], (0, 7))
    weight = torch.eye(8, device=DEVICE, dtype=dtype)
    with torch.no_grad():
        y = lk.multi_block_linear_gelu([column], weight, None, approximate=approximate, impl="cuda")[0, :, 0]
        exact = torch.nn.functional.gelu(x.double(), approximate=approximate)
    finite = x.isfinite()
    error = (y.double() - exact)[finite].abs()
    assert (error <= exact[finite].abs() * (torch.finfo(dtype).eps / 2 + relative) + absolute).all()
    assert torch.equal(y.isnan(), exact.isnan())
    assert torch.equal(y.isinf(), exact.isinf())
