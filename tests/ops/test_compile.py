"""The operators traced, compiled and exported, and what is refused there as it is in eager mode."""

from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from laco_kernels.ops import checks

from .cases import CASES, HIDDEN, Fusion, Merge, Mlp, assert_same_gradients, every_op, make, overload


@pytest.fixture(autouse=True)
def _forget_compiled_code():
    torch._dynamo.reset()


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


def wrong(*unless):
    """Every operator with all that it refuses: ``gelu_mlp`` takes tokens as they come, and by itself any dtypes."""
    pairs = [(case, what, *rest) for case in CASES for what, *rest in WRONG if case is not Mlp or what not in unless]
    ids = [f"{what}-{case.name}" for case, what, *_ in pairs]
    return pytest.mark.parametrize(("case", "spoil", "error", "messages"), [(c, *rest) for c, _, *rest in pairs], ids=ids)


def message(case, messages):
    return messages["f" if case is Fusion else "m"]


@wrong("x", "rank", "dtype")
def test_the_fake_refuses_what_does_not_fit(case, spoil, error, messages):
    tensors = spoil(*make(case, grad=False))
    with pytest.raises(error, match=message(case, messages)):
        overload(case)(*case.raw(*[t.to("meta") for t in tensors]))
    with FakeTensorMode() as mode, pytest.raises(error, match=message(case, messages)):
        overload(case)(*case.raw(*[mode.from_tensor(t) for t in tensors]))


@wrong("x", "rank")
@pytest.mark.parametrize("fullgraph", [False, True])
def test_messages_survive_compilation(case, spoil, error, messages, fullgraph):
    tensors = spoil(*make(case, grad=False))
    compiled = torch.compile(case.call, backend="aot_eager", fullgraph=fullgraph, dynamic=False)
    with pytest.raises(Exception, match=message(case, messages)) as caught:  # with fullgraph it is dynamo's
        compiled(*tensors)
    assert fullgraph or type(caught.value) is error


@every_op
def test_compiles_where_there_is_no_autocast(case):
    tensors = [t.to("meta") for t in make(case, grad=False)]
    compiled = torch.compile(case.call, backend="eager", fullgraph=True)
    assert compiled(*tensors).shape == case.call(*tensors).shape


def test_a_device_that_autocast_does_not_know_computes_in_its_own_dtype():
    with pytest.raises(RuntimeError):
        torch.is_autocast_enabled("vulkan")
    tensor = SimpleNamespace(is_meta=False, device=torch.device("vulkan"), dtype=torch.float16)
    assert checks.autocast_dtype(tensor) == torch.float16
