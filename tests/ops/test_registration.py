"""The operators as registered torch operators: traced, exported, checkpointed, differentiated, counted."""

import weakref
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import laco_kernels as lk
from laco_kernels import reference
from laco_kernels.geometry import Windows
from laco_kernels.kernels import select

BATCH, GRID, PREFIX, CHANNELS, HIDDEN, TOKENS = 2, (3, 5), 1, 6, 5, 16
WINDOWS = Windows(GRID, 2, PREFIX, pad=True)


class Merge:
    name, activations = "patch_merge", 1
    shapes = (HIDDEN, 4 * CHANNELS), (HIDDEN,), (CHANNELS, HIDDEN), (CHANNELS,)

    @staticmethod
    def call(x, *weights, **kwargs):
        return lk.patch_merge(x, *weights, grid=GRID, pad=True, prefix_tokens=PREFIX, **kwargs)

    @staticmethod
    def raw(x, *weights, save=True):
        return *(x, *weights), 2, list(GRID), "mean", "none", PREFIX, True, "raster", "reference", save

    @staticmethod
    def reference(x, *weights):
        return reference.patch_merge_forward(x, *weights, windows=WINDOWS)[0]


class Conv:
    name, activations = "strided_conv_gelu", 1
    shapes = (HIDDEN, 4 * CHANNELS), (HIDDEN,)

    @staticmethod
    def call(x, *weights, **kwargs):
        return lk.strided_conv_gelu(x, *weights, grid=GRID, pad=True, prefix_tokens=PREFIX, **kwargs)

    @staticmethod
    def raw(x, *weights, save=True):
        return *(x, *weights), 2, list(GRID), "none", PREFIX, True, "reference", save

    @staticmethod
    def reference(x, *weights):
        return reference.strided_conv_gelu_forward(x, *weights, windows=WINDOWS)[0]


class Fusion:
    name, activations = "multi_block_linear_gelu", 2
    shapes = (HIDDEN, 2 * CHANNELS), (HIDDEN,)

    @staticmethod
    def call(x1, x2, *weights, **kwargs):
        return lk.multi_block_linear_gelu([x1, x2], *weights, prefix_tokens=PREFIX, **kwargs)

    @staticmethod
    def raw(x1, x2, *weights, save=True):
        return [x1, x2], *weights, PREFIX, "none", "reference", save

    @staticmethod
    def reference(x1, x2, *weights):
        return reference.multi_block_linear_gelu_forward([x1, x2], *weights, prefix_tokens=PREFIX)[0]


CASES = [Merge, Conv, Fusion]
every_op = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def make(case, *, batch=BATCH, dtype=torch.float64, grad=True, frozen=0):
    """Return the tensors of a case, of which the first ``frozen`` need no gradient."""
    shapes = [(batch, TOKENS, CHANNELS)] * case.activations + list(case.shapes)
    return [torch.randn(s, dtype=dtype).requires_grad_(grad and i >= frozen) for i, s in enumerate(shapes)]


def clones(tensors):
    return [t.detach().clone().requires_grad_(t.requires_grad) for t in tensors]


def overload(case, suffix=""):
    return getattr(torch.ops.laco, case.name + suffix).default


def gradients(function, tensors, grad):
    tensors = clones(tensors)
    function(*tensors).backward(grad)
    return [t.grad for t in tensors]


def assert_same_gradients(function, other, tensors, **tolerance):
    """Compare outputs and gradients; the second function is the expected one."""
    y, expected = function(*tensors), other(*tensors)
    torch.testing.assert_close(y, expected, **tolerance)
    grad = torch.randn_like(expected)
    for got, want in zip(gradients(function, tensors, grad), gradients(other, tensors, grad), strict=True):
        torch.testing.assert_close(got, want, **tolerance)


class Calls(TorchDispatchMode):
    """Records every operator that is dispatched, with its arguments and its result."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, result))
        return result

    def of(self, func):
        return [call for call in self.calls if call[0] is func]

    def shapes(self):
        results = [r if isinstance(r, (list, tuple)) else (r,) for _, _, r in self.calls]
        return {tuple(t.shape) for result in results for t in result if isinstance(t, torch.Tensor)}


@pytest.fixture(autouse=True)
def _forget_compiled_code():
    torch._dynamo.reset()


@every_op
@pytest.mark.parametrize("frozen", [False, True])
def test_opcheck(case, frozen):
    tensors = make(case, frozen=case.activations if frozen else 0)
    torch.library.opcheck(overload(case), case.raw(*tensors))


@every_op
def test_opcheck_without_saving(case):
    torch.library.opcheck(overload(case), case.raw(*make(case, grad=False), save=False))


@every_op
@pytest.mark.parametrize("frozen", [False, True])
def test_opcheck_of_the_backward_operator(case, frozen):
    tensors = make(case, frozen=case.activations if frozen else 0)
    with Calls() as spy:
        case.call(*tensors).sum().backward()
    ((func, args, _),) = spy.of(overload(case, "_backward"))
    detached = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, args)
    torch.library.opcheck(func, detached)


@every_op
@pytest.mark.parametrize("biased", [True, False])
def test_gradcheck_through_the_registered_operator(case, biased):
    tensors = make(case, batch=1)

    def call(*tensors):
        if not biased:
            tensors = [None if t.dim() == 1 else t for t in tensors]
        return case.call(*tensors, impl="reference")

    assert torch.autograd.gradcheck(call, tensors, atol=1e-8, rtol=1e-8, fast_mode=not biased)


@every_op
def test_gradients_are_those_of_the_reference(case):
    assert_same_gradients(case.call, case.reference, make(case), atol=1e-12, rtol=1e-10)


@every_op
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(case, dynamic):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(case.call, backend=counter, fullgraph=True, dynamic=dynamic)
    for batch in (2, 3, 5):
        assert_same_gradients(compiled, case.call, make(case, batch=batch), atol=0, rtol=0)
    if dynamic:
        assert counter.frame_count == 1, "another batch size compiled anew"


@every_op
def test_compiles_with_inductor(case):
    compiled = torch.compile(lambda *t: case.call(*[2 * x for x in t]).sin(), backend="inductor", fullgraph=True, dynamic=True)
    eager = lambda *t: case.call(*[2 * x for x in t]).sin()  # noqa: E731
    assert_same_gradients(compiled, eager, make(case), atol=1e-12, rtol=1e-10)


@every_op
def test_exports(case):
    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = torch.nn.ParameterList(make(case)[case.activations :])

        def forward(self, *xs):
            return case.call(*xs, *self.weights)

    module, xs = Module(), make(case, grad=False)[: case.activations]
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(module, tuple(xs), dynamic_shapes=(tuple({0: batch} for _ in xs),))
    assert overload(case) in {node.target for node in program.graph.nodes}
    for n in (2, 7):
        xs = make(case, batch=n, grad=False)[: case.activations]
        assert torch.equal(program.module()(*xs), module(*xs))


@every_op
@pytest.mark.parametrize(("save", "runs"), [(True, 1), (False, 2)])
def test_selective_checkpointing_saves_the_operator(case, save, runs):
    tensors = make(case)
    plain = clones(tensors)
    options = {"context_fn": lambda: create_selective_checkpoint_contexts([overload(case)])} if save else {}
    with Calls() as spy:
        checkpoint(lambda *t: case.call(*t).sigmoid().cos(), *tensors, use_reentrant=False, **options).sum().backward()
    case.call(*plain).sigmoid().cos().sum().backward()
    assert len(spy.of(overload(case))) == runs
    assert len(spy.of(torch.ops.aten.sigmoid.default)) == 2, "the rest is recomputed"
    for t, p in zip(tensors, plain, strict=True):
        assert torch.equal(t.grad, p.grad)


@every_op
def test_second_derivatives_are_refused(case):
    tensors = make(case)
    first = torch.autograd.grad(case.call(*tensors).square().sum(), tensors, create_graph=True)
    with pytest.raises(RuntimeError, match=f"laco::{case.name}: got a second derivative, expected first.*create_graph"):
        first[0].sum().backward()


def dual(case, tensors, i):
    with forward_ad.dual_level():
        return case(*[forward_ad.make_dual(t, t) if i == j else t for j, t in enumerate(tensors)])


def jvp(case, tensors, i):
    return torch.func.jvp(lambda t: case(*tensors[:i], t, *tensors[i + 1 :]), (tensors[i],), (tensors[i],))


FORWARD_MODE = r"laco_kernels\.{}: got a forward-mode derivative .* expected reverse mode.*laco_kernels\.reference"


@every_op
@pytest.mark.parametrize("differentiate", [dual, jvp])
def test_forward_mode_is_refused(case, differentiate):
    tensors = make(case, grad=False)
    for i in range(len(tensors)):
        with pytest.raises(RuntimeError, match=FORWARD_MODE.format(case.name)):
            differentiate(case.call, tensors, i)


@every_op
def test_forward_mode_is_refused_under_compile(case):
    tensors = make(case, grad=False)
    compiled = torch.compile(case.call, backend="aot_eager")
    with pytest.raises(RuntimeError, match=FORWARD_MODE.format(case.name)):
        dual(compiled, tensors, 0)
    compiled = torch.compile(lambda *t: jvp(case.call, t, 0), backend="aot_eager")
    with pytest.raises(RuntimeError, match=FORWARD_MODE.format(case.name)):
        compiled(*tensors)


def test_a_dual_level_without_tangents_changes_nothing():
    tensors = make(Merge, grad=False)
    with forward_ad.dual_level():
        assert torch.equal(Merge.call(*tensors), Merge.call(*tensors))
        torch.testing.assert_close(torch.compile(Merge.call, backend="aot_eager")(*tensors), Merge.call(*tensors))


@every_op
@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_encoder_skips_the_gradient_of_its_tokens(case, frozen, monkeypatch):
    inside = Calls()

    def spying(*args, **kwargs):
        with inside:
            return getattr(reference, f"{case.name}_backward")(*args, **kwargs)

    tensors = make(case, frozen=case.activations if frozen else 0)
    y = case.call(*tensors)
    monkeypatch.setattr(select, "load", lambda *_: SimpleNamespace(**{f"{case.name}_backward": spying}))
    with Calls() as outside:
        y.sum().backward()
    ((_, args, results),) = outside.of(overload(case, "_backward"))
    assert args[-1] == [not frozen] * case.activations + [True] * len(case.shapes)
    shape = tuple(tensors[0].shape)
    assert (shape in inside.shapes() | outside.shapes()) is not frozen
    assert [r.numel() == 0 for r in results] == [frozen] * case.activations + [False] * len(case.shapes)
    assert all((t.grad is None) is not t.requires_grad for t in tensors)


@every_op
@pytest.mark.parametrize("needed", range(4))
def test_one_gradient_alone_is_the_same_as_among_all(case, needed):
    tensors = make(case)
    grad = torch.randn_like(case.call(*tensors))
    every = gradients(case.call, tensors, grad)
    if needed >= len(tensors):
        needed = len(tensors) - 1
    for i, t in enumerate(tensors):
        t.requires_grad_(i == needed)
    alone = gradients(case.call, tensors, grad)
    assert [g is None for g in alone] == [i != needed for i in range(len(tensors))]
    assert torch.equal(alone[needed], every[needed])


def saved_by(function, *tensors):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = function(*tensors)
    return y, saved


@every_op
def test_saves_the_tokens_one_pre_activation_and_the_weights(case):
    tensors = make(case)
    y, saved = saved_by(case.call, *tensors)
    kept = {t.data_ptr() for t in tensors if t.dim() > 1}
    new = [t for t in saved if t.data_ptr() not in kept]
    assert {t.data_ptr() for t in saved} - {t.data_ptr() for t in new} == kept
    assert len(saved) == len(kept) + 1
    rows = TOKENS - PREFIX if case is Fusion else WINDOWS.num_windows
    assert [t.shape for t in new] == [(BATCH, rows, HIDDEN)]
    assert new[0].untyped_storage().nbytes() == new[0].nbytes, "a view keeps something larger alive"
    assert y.data_ptr() != new[0].data_ptr()


@every_op
def test_keeps_nothing_else_alive(case):
    tensors = make(case)
    y = case.call(*tensors)
    kept = weakref.ref(y)
    total = y.sum()
    del y
    assert kept() is None, "the output is kept for backward"
    total.backward()


@every_op
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_saved(case, context):
    tensors = make(case)
    with context(), Calls() as spy:
        y, saved = saved_by(case.call, *tensors)
    ((_, args, (_, pre)),) = spy.of(overload(case))
    assert not saved
    assert args[-1] is False
    assert pre.numel() == 0
    assert not y.requires_grad
    assert torch.equal(y, case.call(*tensors))


@every_op
def test_gradients_of_an_operator_that_did_not_save_are_refused(case):
    with pytest.raises(RuntimeError, match=f"laco::{case.name}: got save=False.*Call laco_kernels.{case.name}"):
        overload(case)(*case.raw(*make(case), save=False))


LAYOUTS = {
    "expanded": lambda g: g[:1, :1, :1].expand_as(g),
    "expanded rows": lambda g: g[:, :1].expand_as(g),
    "sliced": lambda g: torch.cat([g, g], dim=2)[:, :, : g.shape[2]],
    "offset": lambda g: torch.cat([g, g], dim=1)[:, g.shape[1] :],
    "transposed": lambda g: g.transpose(1, 2).contiguous().transpose(1, 2),
    "batch last": lambda g: g.permute(1, 2, 0).contiguous().permute(2, 0, 1),
}


@every_op
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_of_the_gradient_do_not_matter(case, layout, monkeypatch):
    tensors = make(case)
    grad = LAYOUTS[layout](torch.randn_like(case.call(*tensors)))
    assert not grad.is_contiguous()
    dense = gradients(case.call, tensors, grad.clone(memory_format=torch.contiguous_format))
    name, seen = f"{case.name}_backward", []

    def spying(grad, *args, **kwargs):
        seen.append(grad.is_contiguous())
        return getattr(reference, name)(grad, *args, **kwargs)

    y = case.call(*tensors)
    monkeypatch.setattr(select, "load", lambda *_: SimpleNamespace(**{name: spying}))
    y.backward(grad)
    assert seen == [True], "implementations count on contiguous gradients"
    for t, d in zip(tensors, dense, strict=True):
        assert torch.equal(t.grad, d)


@every_op
def test_strides_of_the_tokens_do_not_matter(case):
    tensors = make(case, grad=False)
    weights = tensors[case.activations :]
    sliced = [torch.cat([x, x], dim=1)[:, : x.shape[1]] for x in tensors[: case.activations]]
    turned = [x.transpose(0, 2).contiguous().transpose(0, 2) for x in tensors[: case.activations]]
    expected = case.call(*tensors)
    grad = torch.randn_like(expected)
    for t in tensors:
        t.requires_grad_()
    want = gradients(case.call, tensors, grad)
    for xs in (sliced, turned):
        leaves = [x.detach().requires_grad_() for x in xs]
        fresh = clones(weights)
        y = case.call(*leaves, *fresh)
        torch.testing.assert_close(y, expected)
        y.backward(grad)
        for got, w in zip([*leaves, *fresh], want, strict=True):
            torch.testing.assert_close(got.grad, w)


@every_op
def test_neither_gradients_nor_saved_tensors_are_written_to(case):
    tensors = make(case)
    y, saved = saved_by(case.call, *tensors)
    grad = torch.randn_like(y)
    before = [t.detach().clone() for t in (grad, *saved, *tensors)]
    versions = [t._version for t in (grad, *saved, *tensors)]
    y.backward(grad, retain_graph=True)
    first = [t.grad.clone() for t in tensors]
    y.backward(grad)
    assert all(torch.equal(t, b) for t, b in zip((grad, *saved, *tensors), before, strict=True))
    assert [t._version for t in (grad, *saved, *tensors)] == versions
    for t, f in zip(tensors, first, strict=True):
        assert torch.equal(t.grad, f + f)


@every_op
def test_outputs_are_contiguous_and_new(case):
    tensors = make(case)
    outputs = overload(case)(*case.raw(*tensors))
    assert all(o.is_contiguous() for o in outputs)
    assert len({t.untyped_storage().data_ptr() for t in (*outputs, *tensors)}) == len(outputs) + len(tensors)


WRONG = [
    ("x", lambda x, *rest: (x[:, :-1], *rest), ValueError, {"m": r"x: got 15 tokens, expected 16", "f": r"xs\[1\]: got \["}),
    ("rank", lambda x, *rest: (x[0], *rest), ValueError, {"m": "x: got 2 dimensions", "f": r"xs\[0\]: got 2 dimensions"}),
    ("bias", lambda *t: (*t[:-1], t[-1][1:]), ValueError, {"m": r"bias2?: got \[", "f": r"bias: got \[4\]"}),
    ("dtype", lambda *t: (*t[:-1], t[-1].float()), TypeError, {"m": r"bias2?: got torch\.float32", "f": r"bias: got torch\.f"}),
    (
        "weight",
        lambda *t: [w.t() if w.shape == (HIDDEN, w.shape[-1]) and w.dim() == 2 else w for w in t],
        ValueError,
        {"m": r"weight1?: got .* looks transposed, pass weight1?\.t\(\)", "f": r"weight: got .*\(block, c\).*transposed"},
    ),
]
wrong = pytest.mark.parametrize(("spoil", "error", "messages"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])


def message(case, messages):
    return messages["f" if case is Fusion else "m"]


@every_op
@wrong
def test_the_fake_refuses_what_does_not_fit(case, spoil, error, messages):
    tensors = spoil(*make(case, grad=False))
    with pytest.raises(error, match=message(case, messages)):
        overload(case)(*case.raw(*[t.to("meta") for t in tensors]))
    with FakeTensorMode() as mode, pytest.raises(error, match=message(case, messages)):
        overload(case)(*case.raw(*[mode.from_tensor(t) for t in tensors]))


@every_op
@wrong
@pytest.mark.parametrize("fullgraph", [False, True])
def test_messages_survive_compilation(case, spoil, error, messages, fullgraph):
    tensors = spoil(*make(case, grad=False))
    compiled = torch.compile(case.call, backend="aot_eager", fullgraph=fullgraph, dynamic=False)
    with pytest.raises(Exception, match=message(case, messages)) as caught:  # with fullgraph it is dynamo's
        compiled(*tensors)
    assert fullgraph or type(caught.value) is error


@every_op
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_forward_and_backward(case, dtype):
    tensors = make(case, dtype=torch.float32)
    with torch.autocast("cpu", dtype), Calls() as spy:
        y = case.call(*tensors)
    assert y.dtype == dtype
    y.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in tensors)
    ((_, args, outputs),) = spy.of(overload(case))
    floats = [t for a in args for t in (a if isinstance(a, list) else [a]) if isinstance(t, torch.Tensor)]
    assert {t.dtype for t in (*floats, *outputs)} == {dtype}
    lowered = [t.detach().to(dtype).requires_grad_() for t in tensors]
    z = case.call(*lowered)
    z.float().sum().backward()
    assert torch.equal(y, z)
    for t, low in zip(tensors, lowered, strict=True):
        assert torch.equal(t.grad, low.grad.float())


@every_op
@pytest.mark.parametrize("frozen", [False, True])
def test_flop_formulas_count_what_the_reference_computes(case, frozen):
    counts = []
    for function in (case.call, case.reference):
        tensors = make(case, frozen=case.activations if frozen else 0)
        with FlopCounterMode(display=False) as forward:
            y = function(*tensors)
        with FlopCounterMode(display=False) as backward:
            y.sum().backward()
        counts.append((forward.get_total_flops(), backward.get_total_flops()))
    assert counts[0] == counts[1]
    assert counts[0][0] > 0
    assert counts[0][1] > counts[0][0] * (0.9 if frozen else 1.9)


def test_importing_leaves_distributed_tensors_alone():
    from tests.test_import import python

    done = python("""
import sys, torch, laco_kernels as lk
lk.patch_merge(torch.randn(1, 4, 2), torch.randn(3, 8), None, torch.randn(2, 3), None, grid=(2, 2))
assert "torch.distributed.tensor" not in sys.modules
assert "laco_kernels.ops.sharding" not in sys.modules
import torch.distributed.tensor
lk.patch_merge(torch.randn(1, 4, 2), torch.randn(3, 8), None, torch.randn(2, 3), None, grid=(2, 2))
assert "laco_kernels.ops.sharding" in sys.modules
""")
    assert done.returncode == 0, done.stderr
