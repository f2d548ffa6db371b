"""The Triton kernels, forward and backward, against the reference: interpreted where there is no GPU."""

import importlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from laco_kernels import testing
from laco_kernels.geometry import Windows
from laco_kernels.kernels import fused, gathered_gemm, select
from laco_kernels.testing import Case

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = ["triton", "composite"]
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
every_impl = pytest.mark.parametrize("impl", IMPLS)


def assert_ok(rows):
    assert not [row for row in rows if not row.ok]


@every_impl
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", testing.CASES, ids=str)
def test_cases(case, impl, dtype):
    rows = testing.check_case(case, impl, dtype, DEVICE)
    assert len(rows) == 1 + len(case.inputs(dtype, DEVICE))
    assert_ok(rows)


@st.composite
def layouts(draw, tensor):
    """The same values elsewhere in memory: contiguous, transposed, a slice of something larger, expanded over the batch."""
    kind = draw(st.sampled_from(["contiguous", "transposed", "sliced", "expanded"]))
    if kind == "transposed":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == "sliced":
        batch, tokens, channels = tensor.shape
        return tensor.new_full((batch, tokens + 3, 2 * channels), float("nan"))[:, 2:-1, ::2].copy_(tensor)
    if kind == "expanded" and len(tensor):
        return tensor[:1].expand(tensor.shape)
    return tensor


def check(data, case, impl):
    dtype = data.draw(st.sampled_from(DTYPES))
    inputs = case.inputs(dtype, DEVICE, seed=data.draw(st.integers(0, 999)))
    for name in inputs:
        if name.startswith("x"):
            inputs[name] = data.draw(layouts(inputs[name]))
    assert_ok(testing.check_case(case, impl, dtype, DEVICE, inputs))


BATCHES, WIDTHS, PREFIXES = st.integers(0, 3), st.integers(1, 40), st.integers(0, 5)
APPROXIMATE = st.sampled_from(["none", "tanh"])


def draw_grid(data, ratio, *, pad):
    side = st.integers(1, 7) if pad else st.integers(1, 3).map(lambda n: n * ratio)
    return data.draw(side), data.draw(side)


@every_impl
@given(st.data())
def test_patch_merge_anywhere(impl, data):
    ratio, layout = data.draw(st.integers(2, 4)), data.draw(st.sampled_from(["raster", "block"]))
    pad = layout == "raster" and data.draw(st.booleans())
    residual, prefix = data.draw(st.sampled_from(["mean", "channel_group", "none"])), data.draw(PREFIXES)
    sizes = {"batch": data.draw(BATCHES), "channels": data.draw(WIDTHS), "hidden": data.draw(WIDTHS)}
    if residual == "none" and not prefix:
        sizes["out"] = data.draw(WIDTHS)
    options = {"ratio": ratio, "layout": layout, "pad": pad, "residual": residual, "prefix_tokens": prefix}
    grid = draw_grid(data, ratio, pad=pad)
    check(data, Case("patch_merge", sizes, {"grid": grid, "approximate": data.draw(APPROXIMATE), **options}), impl)


@every_impl
@given(st.data())
def test_strided_convolutions_anywhere(impl, data):
    ratio, layout = data.draw(st.integers(1, 4)), data.draw(st.sampled_from(["raster", "block"]))
    pad = layout == "raster" and data.draw(st.booleans())
    sizes = {"batch": data.draw(BATCHES), "channels": data.draw(WIDTHS), "out": data.draw(WIDTHS)}
    options = {"kernel_size": ratio, "pad": pad, "prefix_tokens": data.draw(PREFIXES), "layout": layout}
    op = data.draw(st.sampled_from(["strided_conv", "strided_conv_gelu"]))
    if op == "strided_conv_gelu":
        options["approximate"] = data.draw(APPROXIMATE)
    check(data, Case(op, sizes, {"grid": draw_grid(data, ratio, pad=pad), **options}), impl)


@every_impl
@given(st.data())
def test_multi_block_linear_gelu_anywhere(impl, data):
    prefix = data.draw(PREFIXES)
    sizes = {
        "batch": data.draw(BATCHES),
        "tokens": prefix + data.draw(st.integers(0, 12)),
        "channels": data.draw(WIDTHS),
        "blocks": data.draw(st.integers(1, 9)),
        "out": data.draw(WIDTHS),
    }
    check(data, Case("multi_block_linear_gelu", sizes, {"prefix_tokens": prefix, "approximate": data.draw(APPROXIMATE)}), impl)


@pytest.mark.skipif(DEVICE == "cuda", reason="too small for a GPU, where LARGE_CASES have many")
@pytest.mark.parametrize("case", testing.CASES, ids=str)
def test_many_tiles_of_rows_and_columns(case, monkeypatch):
    """Tiles smaller than the interpreter's own: most cases have three of rows, in groups of two and one."""
    tile = gathered_gemm.Tile(4, 16, 32, 4, 1, group_m=2)
    for module in (fused, gathered_gemm):
        monkeypatch.setattr(module, "tile_for", lambda *_, **__: tile)
    assert_ok(testing.check_case(case, "triton", torch.float32, DEVICE))


@pytest.mark.skipif(DEVICE == "cuda", reason="addresses a sparse file, on the CPU")
@every_impl
@pytest.mark.parametrize(("name", "dim"), [("x", 0), ("x", 1), ("x", 2), ("weight1", 0)])
@pytest.mark.parametrize("residual", ["mean", "channel_group"])
def test_strides_beyond_32_bits(residual, name, dim, impl, tmp_path):
    """The last entry along ``dim`` lies 2**31 elements behind the first; an offset that wraps around finds a zero."""
    case = Case("patch_merge", {"batch": 3, "channels": 8, "hidden": 5}, {"grid": (4, 2), "residual": residual})
    inputs = case.inputs(torch.float16, DEVICE)
    tensor = inputs[name].transpose(0, dim).contiguous()
    memory = torch.from_file(str(tmp_path / "memory"), shared=True, size=2**32 + 2**10, dtype=tensor.dtype)
    (tmp_path / "memory").unlink()
    strides = (-(-(2**31) // (len(tensor) - 1)), *tensor.stride()[1:])
    inputs[name] = memory.as_strided(tensor.shape, strides, 2**31).copy_(tensor).transpose(0, dim)
    assert_ok(testing.check_case(case, impl, tensor.dtype, DEVICE, inputs))


@every_impl
@pytest.mark.parametrize("case", testing.CASES, ids=str)
def test_nothing_is_read_around_the_inputs(case, impl):
    """Every input is every other element of something larger that is NaN elsewhere; NaN times a masked zero would show."""
    inputs = case.inputs(torch.float32, DEVICE)
    for name, tensor in inputs.items():
        around = tensor.new_full([2 * size + 1 for size in tensor.shape], float("nan"))
        inputs[name] = around[(slice(1, None, 2),) * tensor.dim()].copy_(tensor)
    assert_ok(testing.check_case(case, impl, torch.float32, DEVICE, inputs))


@every_impl
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_blocks_are_summed_before_they_are_rounded(impl, dtype):
    """The first two of three blocks cancel; rounded on the way, their products would leave an error of their own size."""
    case = Case("multi_block_linear_gelu", {"batch": 1, "tokens": 9, "channels": 16, "blocks": 3, "out": 24})
    inputs = case.inputs(dtype, DEVICE)
    inputs["xs[1]"] = -inputs["xs[0]"].mul_(64)
    inputs["weight"][:, 16:32] = inputs["weight"][:, :16]
    with torch.no_grad():
        exact = case({name: tensor.double() for name, tensor in inputs.items()}, "reference")
        error = (case(inputs, impl).double() - exact).abs().max()
    assert error <= 2 * torch.finfo(dtype).eps * exact.abs().max()


GRADCHECK = [
    Case("patch_merge", {"batch": 2, "channels": 3, "hidden": 5}, {"grid": (3, 4), "pad": True, "prefix_tokens": 1}),
    Case("patch_merge", {"batch": 1, "channels": 4, "hidden": 3}, {"grid": (4, 4), "layout": "block", "approximate": "tanh"}),
    Case("patch_merge", {"batch": 1, "channels": 2, "hidden": 4}, {"grid": (3, 3), "ratio": 3, "residual": "channel_group"}),
    Case("strided_conv_gelu", {"batch": 2, "channels": 2, "out": 3}, {"grid": (3, 4), "pad": True, "prefix_tokens": 2}),
    Case("strided_conv_gelu", {"batch": 2, "channels": 2, "out": 3}, {"grid": (2, 4), "layout": "block"}),
    Case("strided_conv", {"batch": 2, "channels": 2, "out": 3}, {"grid": (3, 4), "pad": True, "prefix_tokens": 2}),
    Case("strided_conv", {"batch": 2, "channels": 2, "out": 3}, {"grid": (3, 3), "kernel_size": 3, "layout": "block"}),
    Case("multi_block_linear_gelu", {"batch": 2, "tokens": 3, "channels": 2, "blocks": 3, "out": 4}, {"prefix_tokens": 1}),
]


@pytest.mark.skipif(DEVICE == "cuda", reason="the kernels have no float64 on a GPU; the interpreter has, on the CPU")
@every_impl
@pytest.mark.parametrize("case", GRADCHECK, ids=str)
def test_gradcheck_of_the_real_kernels(case, impl):
    inputs = {name: tensor.requires_grad_() for name, tensor in case.inputs(torch.float64, "cpu").items()}

    def run(*tensors):
        return case(dict(zip(inputs, tensors, strict=True)), impl)

    assert torch.autograd.gradcheck(run, tuple(inputs.values()), fast_mode=True)


@every_impl
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_nan_and_infinity_appear_where_eager_has_them(impl, approximate):
    case = Case("strided_conv_gelu", {"batch": 1, "channels": 4, "out": 4}, {"grid": (4, 8), "approximate": approximate})
    inputs = case.inputs(torch.float32, DEVICE)
    flat = inputs["x"].view(-1)
    flat[0], flat[16], flat[40] = float("nan"), float("inf"), -float("inf")
    with torch.no_grad():
        # On a CPU torch's own float32 GELU makes NaN of infinity, its float64 does not; the composite calls the former.
        wide = inputs if impl == "composite" else {name: tensor.double() for name, tensor in inputs.items()}
        actual, eager = case(inputs, impl), case(wide, "reference")
    assert eager.isnan().any()
    assert torch.equal(actual.isnan(), eager.isnan())
    assert torch.equal(actual.isinf(), eager.isinf())


@every_impl
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_activations_over_their_whole_range(impl, dtype, approximate):
    """One weight of one: the operator is GELU itself, from deep in its left tail to where it is the identity."""
    x = torch.linspace(-12, 12, 4001, device=DEVICE).to(dtype).reshape(1, -1, 1)
    case = Case("multi_block_linear_gelu", {}, {"approximate": approximate})
    inputs = {"xs[0]": x, "weight": x.new_ones(1, 1), "bias": x.new_zeros(1)}
    assert_ok(testing.check_case(case, impl, dtype, DEVICE, inputs))
    with torch.no_grad():
        actual, truth = case(inputs, impl).double(), case({n: t.double() for n, t in inputs.items()}, "reference")
    if dtype == torch.float32:
        return
    # The cheap Phi of half precision, relative to the value itself even in the tail, where torch's own GELU is no better.
    tail = (x.double() > -5.5) & (x.double() < 0)
    relative = torch.finfo(dtype).eps / 2 + 3e-3
    if impl == "triton":
        assert ((actual - truth).abs() <= truth.abs() * relative + torch.finfo(torch.float16).tiny)[tail].all()


def test_gelu_gradient_with_unaligned_columns_is_deterministic():
    case = testing.CASES[1]
    inputs = case.inputs(torch.float32, DEVICE)
    grad = torch.ones_like(case(inputs, "reference"))
    first = testing.gradients(case, inputs, "triton", grad)
    for _ in range(3):
        again = testing.gradients(case, inputs, "triton", grad)
        assert all(torch.equal(first[name], again[name]) for name in first)


class Allocations(TorchDispatchMode):
    """The bytes of every storage that an operator returned."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.sizes += [leaf.untyped_storage().nbytes() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        return out


def largest_allocation(op, impl, *tensors, **options):
    implementation = getattr(importlib.import_module(select.MODULES[impl]), f"{op}_forward")
    with torch.no_grad(), Allocations() as allocations:
        implementation(*tensors, save=False, approximate="none", **options)
    return max(allocations.sizes)


def test_the_fused_operators_allocate_nothing_of_the_size_of_what_they_gather():
    x, weight1, weight2 = torch.randn(6, 42, 24), torch.randn(24, 96), torch.randn(24, 24)
    options = {"windows": Windows((6, 7), 2, pad=True), "residual_kind": "mean", "layout": "raster"}
    merged = 6 * 12 * 4 * 24 * 4
    tensors = [t.to(DEVICE) for t in (x, weight1, weight1[:, 0], weight2, weight2[:, 0])]
    assert largest_allocation("patch_merge", "triton", *tensors, **options) < merged
    assert largest_allocation("patch_merge", "reference", *tensors, **options) >= merged
    xs, weight = [torch.randn(2, 19, 24, device=DEVICE) for _ in range(8)], torch.randn(24, 8 * 24, device=DEVICE)
    stacked = 2 * 18 * 8 * 24 * 4
    assert largest_allocation("multi_block_linear_gelu", "triton", xs, weight, None, prefix_tokens=1) < stacked
    assert largest_allocation("multi_block_linear_gelu", "reference", xs, weight, None, prefix_tokens=1) >= stacked


def test_long_sums_of_float32_are_taken_in_pieces():
    """Equal products, so that rounding errs the same way each time, and the more the longer a sum goes on."""
    x, weight = torch.full((1, 5, 4096), 0.1, device=DEVICE), torch.full((7, 4096), 0.7, device=DEVICE)
    y = x.new_empty(1, 5, 7)
    gathered_gemm.gathered_gemm([x], weight, y, rows=5, tile=gathered_gemm.Tile(16, 16, 16, 4, 2))
    exact = 4096 * x.double()[0, 0, 0] * weight.double()[0, 0]
    error = (y / exact - 1).abs().max().item()
    # A GPU adds the products of a piece one by one, NumPy in pieces of its own; all 4096 one by one would err by 6e-5.
    product, piece = x[0, 0, 0].item() * weight[0, 0].item(), torch.zeros(1)
    for _ in range(gathered_gemm.PIECE):
        piece += product
    within = 0.0 if gathered_gemm.INTERPRETED else abs(piece.item() / (gathered_gemm.PIECE * product) - 1)
    assert error <= within + 4 * torch.finfo(torch.float32).eps


@every_impl
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("tensor", ["y", "dweight"])
def test_an_error_of_four_units_breaks_the_promise(impl, dtype, tensor, monkeypatch):
    """The budget is no wider than what it is for: everything off by four units in the last place is noticed."""
    case = Case("strided_conv_gelu", {"batch": 2, "channels": 24, "out": 100}, {"grid": (4, 6)})
    found = testing.gradients

    def off(case, inputs, which, grad):
        results = found(case, inputs, which, grad)
        if which == impl:
            results[tensor] = (results[tensor].double() * (1 + 4 * torch.finfo(dtype).eps)).to(dtype)
        return results

    monkeypatch.setattr(testing, "gradients", off)
    assert [row.tensor for row in testing.check_case(case, impl, dtype, DEVICE) if not row.ok] == [tensor]


def test_products_of_float32_are_taken_as_torch_takes_them():
    from tests.test_import import python

    done = python("""
import torch
from laco_kernels.kernels.launch import precision
assert precision(torch.float32) == "ieee"
torch.backends.cuda.matmul.fp32_precision = "tf32"
assert (precision(torch.float32), precision(torch.float16)) == ("tf32", "ieee")
torch.backends.cuda.matmul.fp32_precision = "ieee"
assert precision(torch.float32) == "ieee"
torch.backends.cuda.matmul.allow_tf32 = True
assert precision(torch.float32) == "tf32"
""")
    assert done.returncode == 0, done.stderr
