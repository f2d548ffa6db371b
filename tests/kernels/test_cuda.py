"""``impl="cuda"``: on a GPU the kernels for it; elsewhere those for Hopper and for Ampere on an emulated one."""

import pytest
import torch

import laco_kernels as lk
from laco_kernels import testing
from laco_kernels.errors import UnsupportedError
from laco_kernels.kernels import cuda, cuda_products, select
from laco_kernels.ops.cost import Traffic
from laco_kernels.testing import Case
from tests.csrc.emulator import build
from tests.csrc.problems import HOPPER, tiles_of
from tests.gpu import small_cases, test_cuda_kernels
from tests.kernels import emulated

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.skipif(DEVICE == "cpu" and build.GCC is None, reason="needs g++ to build the emulated GPU"),
]
BF16 = torch.bfloat16
DTYPES = (BF16, torch.float16)
CAPABILITIES = ((9, 0), (8, 6)) if DEVICE == "cpu" else (None,)  # None: the GPU's own


@pytest.fixture(autouse=True, scope="module", params=CAPABILITIES, ids=str)
def capability(request):
    with pytest.MonkeyPatch.context() as patch:
        if request.param is not None:
            emulated.emulate(patch, request.param)
        yield request.param or torch.cuda.get_device_capability()


def check(case, inputs=None, *, dtype=BF16):
    """Hold output and gradients to the promise."""
    inputs = case.inputs(dtype, DEVICE) if inputs is None else inputs
    assert not [row for row in testing.check_case(case, "cuda", dtype, DEVICE, inputs) if not row.ok]


def merge(batch=2, channels=16, hidden=24, **options):
    return Case("patch_merge", {"batch": batch, "channels": channels, "hidden": hidden}, {"grid": (4, 6), **options})


ABLE = [
    *[testing.CASES[i] for i in (0, 1, 2, 4, 5, 7, 8, 9, 10, 11, 12, 13, 14, 15, 17, 19, 20, 21)],
    merge(batch=3, grid=(8, 10)),  # rows of several sums
    merge(residual="channel_group"),
    merge(residual="channel_group", ratio=3, grid=(5, 4), pad=True, prefix_tokens=1),
    merge(residual="channel_group", layout="block", prefix_tokens=2),
    merge(residual="channel_group", layout="block"),
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


@pytest.mark.parametrize("case", [*test_cuda_kernels.CASES, *test_cuda_kernels.WITH_GAPS], ids=str)
def test_what_is_tested_on_a_gpu_is_what_it_does(case):
    for dtype in DTYPES:
        assert testing.refusal(case, "cuda", dtype, DEVICE) is None


def test_the_sanitizer_sees_depths_that_are_shared(capability, monkeypatch):
    for tile in ("192x96", "64x64") if capability == (9, 0) else ():
        shared = []
        monkeypatch.setattr(cuda_products, "call", small_cases.telling(lambda *_, **__: None, tile, 2, shared=shared))
        for case in small_cases.CASES:
            inputs = case.inputs(BF16, DEVICE)
            testing.gradients(case, inputs, "cuda", torch.ones_like(case(inputs, "reference")))
        assert ("weight_gradient" in shared) == (tile == "64x64")
        assert shared.count("forward") == 2 * len(small_cases.CASES)


PLANS = [(tile, splits) for tile, (*_, shares) in HOPPER.items() for splits in ((1, 2, 4) if shares else (1,))]


def test_every_tile_does_an_operator(capability, monkeypatch):
    """Asked for as tests on a GPU ask: forward products and gradients, of rows and of depths that blocks can share."""
    case = merge(batch=90, channels=264, hidden=72, residual="channel_group")
    yardstick, call, seen = testing.Yardstick(case, BF16, DEVICE, draws=2), cuda_products.call, set()

    def noted(extension, product, **problem):
        seen.add((product, problem.get("tile", ""), problem.get("splits", 0)))
        return call(extension, product, **problem)

    for tile, splits in PLANS if capability == (9, 0) else [("ampere", 1)]:
        monkeypatch.setattr(cuda_products, "call", small_cases.telling(noted, tile, splits))
        assert not [row for row in yardstick.check("cuda") if not row.ok]
        assert ("forward", tile, splits) in seen
        if tile in tiles_of("weight_gradient"):  # of nine steps
            assert ("weight_gradient", tile, splits if splits < 4 else 1) in seen


@pytest.mark.parametrize("layout", ["raster", "block"])
def test_tokens_with_gaps(layout):
    case = merge(layout=layout, prefix_tokens=1)
    inputs = case.inputs(BF16, DEVICE)
    x = inputs["x"]
    inputs["x"] = x.new_full((*x.shape[:2], x.shape[2] + 8), float("nan"))[..., :-8].copy_(x)
    check(case, inputs)


def test_biases_may_be_missing_or_have_gaps():
    inputs = merge().inputs(BF16, DEVICE)
    x, weight1, bias1, weight2, _ = inputs.values()
    gaps = torch.full((48,), float("nan"), dtype=BF16, device=DEVICE)[::2].copy_(bias1)
    with torch.no_grad():
        plain = lk.patch_merge(x, weight1, bias1, weight2, None, grid=(4, 6), impl="cuda")
        assert torch.equal(lk.patch_merge(x, weight1, gaps, weight2, None, grid=(4, 6), impl="cuda"), plain)
        zeros = torch.zeros(16, dtype=BF16, device=DEVICE)
        assert torch.equal(lk.patch_merge(x, weight1, bias1, weight2, zeros, grid=(4, 6), impl="cuda"), plain)


def test_a_gradient_of_one_token_may_have_any_stride():
    """Those of dimensions of size 1 mean nothing: transposing leaves 1 and 1."""
    case = merge(batch=1, grid=(2, 2))
    inputs = case.inputs(BF16, DEVICE)
    grad = torch.randn(1, 1, 16, device=DEVICE).to(BF16)
    plain = testing.gradients(case, inputs, "cuda", grad)
    found = testing.gradients(case, inputs, "cuda", grad.as_strided(grad.shape, (1, 1, 1)))
    assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_backward_takes_weights_that_another_implementation_took(monkeypatch):
    inputs = {name: tensor.requires_grad_() for name, tensor in merge().inputs(BF16, DEVICE).items()}
    grad = torch.randn(2, 6, 16, device=DEVICE).to(BF16)
    want = torch.autograd.grad(lk.patch_merge(**inputs, grid=(4, 6), impl="reference"), list(inputs.values()), grad)
    for name in ("weight1", "weight2"):
        inputs[name] = inputs[name].detach().t().contiguous().t().requires_grad_()
    choices = {"forward": "reference", "backward": "cuda"}
    monkeypatch.setattr(select, "choose", lambda _, direction, *__: select.Choice(choices[direction], "for this test"))
    found = torch.autograd.grad(lk.patch_merge(**inputs, grid=(4, 6)), list(inputs.values()), grad)
    for got, expected in zip(found, want, strict=True):
        assert (got - expected).norm() <= 0.02 * expected.norm()


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
    if DEVICE == "cpu":  # where the composite is interpreted, and not in bfloat16
        monkeypatch.setattr(cuda, "patch_merge_forward", refuse)
        inputs = {name: tensor.float() for name, tensor in inputs.items()}
    with torch.no_grad():
        assert torch.equal(lk.patch_merge(**inputs, **options), lk.patch_merge(**inputs, **options, impl="composite"))


VAST = [
    ((1, 2**31, 8), None, "x: got 2147483648 tokens an image, expected fewer than 2147483648"),
    ((2, 4, 8), (2**39, 8, 1), r"x: got strides \(549755813888, 8, 1\) .* not too far"),
    ((1, 2**20, 8), (2**43, 2**20, 1), r"x: got strides \(8796093022208, 1048576, 1\) .* not too far"),
]


@pytest.mark.parametrize(("shape", "strides", "message"), VAST)
def test_sizes_that_the_kernels_cannot_count_are_refused_before_they_are_asked(shape, strides, message):
    options = {"device": "meta", "dtype": torch.bfloat16}
    x = torch.empty(shape, **options) if strides is None else torch.empty_strided(shape, strides, **options)
    with pytest.raises(UnsupportedError, match=message):
        cuda_products.strides("x", x, 4)
    with pytest.raises(UnsupportedError, match=r"weight: got \[8, 1073741824\], expected both sides shorter than 1073741824"):
        cuda_products.layer("", torch.empty(8, 2**30, **options), None)


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
