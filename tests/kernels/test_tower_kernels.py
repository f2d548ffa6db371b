"""The kernels inside an encoder, forward and backward, against their reference: interpreted where there is no GPU."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from laco_kernels import ops, reference_tower
from laco_kernels.kernels import elementwise, norm, select, tower
from laco_kernels.kernels.rows import rows_of
from laco_kernels.testing import gradients as everything
from laco_kernels.testing_tower import CASES, TowerCase
from laco_kernels.testing_tower import norm as norm_case
from tests.tower import broken_promises, grads_like, layouts

from .test_memory import CANARY, Guarded

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
ON_CPU = pytest.mark.skipif(DEVICE == "cuda", reason="needs the interpreter")
every_case = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_case
def test_tower_cases(case, dtype):
    assert not broken_promises(case, "triton", dtype, DEVICE)


SIZES, WIDTHS = st.integers(0, 6), st.integers(1, 80)
SHAPES = st.tuples(st.lists(SIZES, max_size=3), WIDTHS).map(lambda drawn: (*drawn[0], drawn[1]))


def check(data, case):
    dtype = data.draw(st.sampled_from(DTYPES))
    inputs = case.inputs(dtype, DEVICE, seed=data.draw(st.integers(0, 999)))
    grads = grads_like(case(inputs, "reference"), dtype, DEVICE)
    inputs, grads = ({name: data.draw(layouts(t)) for name, t in tensors.items()} for tensors in (inputs, grads))
    assert not broken_promises(case, "triton", dtype, DEVICE, inputs, grads)


@given(st.data())
def test_add_norm_anywhere(data):
    without = data.draw(st.sampled_from([(), ("scale",), ("delta", "scale")]))
    if data.draw(st.booleans()):
        without = (*without, "bias")
    kind, eps = data.draw(st.sampled_from(["layer", "rms"])), data.draw(st.sampled_from([1e-6, 1e-5, 0.1]))
    check(data, norm_case(*data.draw(SHAPES), kind=kind, eps=eps, without=without))


@given(st.data())
def test_activations_anywhere(data):
    op = data.draw(st.sampled_from(["gated_silu", "activate"]))
    options = {} if op == "gated_silu" else {"activation": data.draw(st.sampled_from(["gelu", "gelu_tanh", "quick_gelu"]))}
    check(data, TowerCase(op, data.draw(SHAPES), options))


@ON_CPU
@every_case
def test_many_tiles(case, monkeypatch):
    """Two rows a tile and two or three programs, each with several tiles; columns in tiles of sixteen."""
    tile = norm.row_tile
    monkeypatch.setattr(norm, "row_tile", lambda channels: tile(channels)._replace(bm=2))
    monkeypatch.setattr(norm, "PROGRAMS", 3)
    monkeypatch.setattr(elementwise, "ROW_TILE", 2)
    monkeypatch.setattr(elementwise, "COLUMN_TILE", 16)
    assert not broken_promises(case, "triton", torch.float32, DEVICE)


@pytest.mark.parametrize("channels", [1, 2048, 3200, 8192])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_narrow_and_wide_rows(channels, kind):
    assert not broken_promises(norm_case(2, 3, channels, kind=kind), "triton", torch.float32, DEVICE)


@ON_CPU
@pytest.mark.parametrize("name", ["x", "delta", "h", "dtotal", "dnormed", "dy"])
@pytest.mark.parametrize("dim", [0, 1])
def test_strides_beyond_32_bits(name, dim, tmp_path):
    """The last entry along ``dim`` lies 2**31 elements behind the first; an offset that wraps around finds a zero."""
    case = TowerCase("gated_silu", (3, 3, 8)) if name in ("h", "dy") else norm_case(3, 3, 8, without=("scale",))
    inputs = case.inputs(torch.float16, DEVICE)
    grads = grads_like(case(inputs, "reference"), torch.float16, DEVICE)
    tensors, key = (inputs, name) if name in inputs else (grads, name[1:])
    tensor = tensors[key].transpose(0, dim).contiguous()
    memory = torch.from_file(str(tmp_path / "memory"), shared=True, size=2**32 + 2**10, dtype=tensor.dtype)
    (tmp_path / "memory").unlink()
    strides = (-(-(2**31) // (len(tensor) - 1)), *tensor.stride()[1:])
    tensors[key] = memory.as_strided(tensor.shape, strides, 2**31).copy_(tensor).transpose(0, dim)
    assert rows_of(tensors[key]).data_ptr() == tensors[key].data_ptr()
    assert not broken_promises(case, "triton", tensor.dtype, DEVICE, inputs, grads)


@every_case
def test_nothing_is_read_around_the_inputs(case):
    """Every tensor lies in something larger that is NaN elsewhere; NaN times a masked zero would show."""
    inputs = case.inputs(torch.float32, DEVICE)
    grads = grads_like(case(inputs, "reference"), torch.float32, DEVICE)
    for tensors in (inputs, grads):
        for name, tensor in tensors.items():
            around = tensor.new_full([size + 2 for size in tensor.shape], float("nan"))
            tensors[name] = around[(slice(1, -1),) * tensor.dim()].copy_(tensor)
    assert not broken_promises(case, "triton", torch.float32, DEVICE, inputs, grads)


@every_case
def test_nothing_is_written_outside_the_outputs(case):
    inputs = case.inputs(torch.float32, DEVICE)
    grads = grads_like(case(inputs, "reference"), torch.float32, DEVICE)
    with Guarded() as guard:
        found = everything(case, inputs, "triton", grads)
    assert len(guard.around) > 2
    assert all((margin == CANARY).all() for margin in guard.around)
    expected = everything(case, inputs, "triton", grads)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@ON_CPU
@pytest.mark.parametrize(
    "case",
    [
        norm_case(2, 3, 5),
        norm_case(3, 4, kind="rms"),
        norm_case(2, 2, 3, without=("delta", "scale")),
        norm_case(4, 6, kind="rms", without=("bias", "scale")),
        TowerCase("gated_silu", (2, 3, 4)),
        *[TowerCase("activate", (2, 7), {"activation": name}) for name in ("gelu", "gelu_tanh", "quick_gelu")],
    ],
    ids=str,
)
def test_gradcheck_of_the_real_kernels(case):
    inputs = {name: tensor.requires_grad_() for name, tensor in case.inputs(torch.float64, "cpu").items()}

    def run(*tensors):
        return tuple(case(dict(zip(inputs, tensors, strict=True)), "triton").values())

    assert torch.autograd.gradcheck(run, tuple(inputs.values()), atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_nan_and_infinity_stay_in_their_rows(kind):
    case = norm_case(1, 4, 8, kind=kind)
    inputs = case.inputs(torch.float32, DEVICE)
    inputs["x"][0, 0, 3], inputs["x"][0, 1, 2], inputs["delta"][0, 2, 1] = float("nan"), float("inf"), -float("inf")
    grads = {name: torch.ones_like(y) for name, y in case(inputs, "reference").items()}
    actual, eager = (everything(case, inputs, impl, grads) for impl in ("triton", "reference"))
    assert eager["normed"][0, :3].isnan().any(1).all()
    assert eager["dweight"].isnan().all()
    for name in eager:
        assert torch.equal(actual[name].isnan(), eager[name].isnan()), name
        assert torch.equal(actual[name].isinf(), eager[name].isinf()), name
    assert actual["normed"][0, 3].isfinite().all()
    assert actual["dx"][0, 3].isfinite().all()


ACTIVATIONS = [("gated_silu", {}), *[("activate", {"activation": name}) for name in ("gelu", "gelu_tanh", "quick_gelu")]]


@pytest.mark.parametrize(("op", "options"), ACTIVATIONS, ids=str)
def test_nan_and_infinity_pass_through_activations(op, options):
    case = TowerCase(op, (2, 4), options)
    inputs = case.inputs(torch.float32, DEVICE)
    inputs["h"][0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    grads = {"y": torch.ones(2, 4, device=DEVICE)}
    # On a CPU torch's own float32 GELU makes NaN of infinity, its float64 does not.
    wide = {name: tensor.double() for name, tensor in inputs.items()}
    actual, eager = everything(case, inputs, "triton", grads), everything(case, wide, "reference", {"y": grads["y"].double()})
    for name in eager:
        assert torch.equal(actual[name].isnan(), eager[name].isnan()), name
        assert torch.equal(actual[name].isinf(), eager[name].isinf()), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "options"), ACTIVATIONS, ids=str)
def test_activations_over_their_whole_range(op, options, dtype):
    """From deep in the left tail, where an exponential of the other sign overflows, to where it is the identity."""
    h = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([-300.0, -100.0, 100.0, 300.0])]).to(DEVICE, dtype)
    ones = torch.ones_like(h)
    inputs = {"h": torch.cat([h, ones]) if op == "gated_silu" else h}
    assert not broken_promises(TowerCase(op, h.shape, options), "triton", dtype, DEVICE, inputs, {"y": ones})


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_the_norm_sees_the_rounded_total_and_rounds_once(kind, dtype):
    case = norm_case(4, 64, kind=kind, without=("scale",))
    inputs = case.inputs(dtype, DEVICE)
    outputs = case(inputs, "triton")
    assert torch.equal(outputs["total"], inputs["x"] + inputs["delta"])
    wide = {name: tensor.float() for name, tensor in inputs.items() if name in ("weight", "bias")}
    _, exact = ops.add_norm(outputs["total"].float(), None, wide["weight"], wide["bias"], kind=kind, impl="reference")
    step = torch.finfo(dtype).eps / 2 * (1 + 1e-3)  # half a unit in the last place; float32's own error is far below
    assert ((outputs["normed"].float() - exact).abs() <= step * exact.abs() + torch.finfo(dtype).tiny).all()


@pytest.mark.parametrize("case", [norm_case(9, 70, 24), TowerCase("gated_silu", (9, 33))], ids=str)
def test_runs_are_bitwise_equal(case, monkeypatch):
    monkeypatch.setattr(norm, "PROGRAMS", 5)
    inputs = case.inputs(torch.float32, DEVICE)
    grads = grads_like(case(inputs, "reference"), torch.float32, DEVICE)
    first = everything(case, inputs, "triton", grads)
    for _ in range(3):
        again = everything(case, inputs, "triton", grads)
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_rows_are_views_where_strides_allow_it():
    x = torch.randn(3, 7, 10)
    for view in (
        x,
        x[:, 1:],
        x[1:, ::2],
        x[..., 2:8],
        x[0],
        x[0, 0],
        x[:, :1].expand(-1, 5, -1),
        x[:, :, None],
        x[None, :, 1:],
    ):
        rows = rows_of(view)
        assert rows.data_ptr() == view.data_ptr()
        assert torch.equal(rows.flatten(), view.flatten())
    for copied in (x.transpose(1, 2), x[..., ::2], x.permute(1, 0, 2)[:, :, None].transpose(0, 1).transpose(1, 3)):
        rows = rows_of(copied)
        assert rows.stride(2) == 1
        assert torch.equal(rows.flatten(), copied.flatten())
    assert rows_of(x[:0]).shape == (0, 7, 10)
    assert rows_of(torch.randn(2, 0, 3, 4)).shape == (0, 3, 4)


def test_every_operator_has_both_directions():
    names = {f"{op}_{direction}" for op in select.TOWER_OPERATORS for direction in ("forward", "backward")}
    assert names == set(tower.__all__)
    assert all(hasattr(reference_tower, name) for name in names)
