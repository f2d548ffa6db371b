"""What encoders call in place of the public operators: the same in everything that can be seen, without the dispatcher."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.autograd.graph import save_on_cpu
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from laco_kernels import ops
from laco_kernels.ops.activation import run_activate, run_gated_silu
from laco_kernels.ops.add_norm import run_add_norm
from laco_kernels.ops.gelu_mlp import Norm, run_gelu_mlp
from laco_kernels.ops.packed_linear import pack, packed_linear, run_packed_linear
from laco_kernels.reference import gelu
from laco_kernels.testing_tower import NORM_ARGUMENTS, TowerCase, norm

from .cases import Calls, clones
from .test_backward import LAYOUTS, saved_by

SHAPE = (2, 7, 6)
CASES = [
    norm(*SHAPE),
    norm(*SHAPE, kind="rms", without=("bias", "scale")),
    norm(*SHAPE, without=("delta", "scale")),
    TowerCase("gated_silu", SHAPE),
    TowerCase("activate", SHAPE, {"activation": "quick_gelu"}),
    TowerCase("gelu_mlp", SHAPE),
    TowerCase("gelu_mlp", SHAPE, {"approximate": "sigmoid"}),
    TowerCase("packed_linear", SHAPE),
    TowerCase("packed_linear", SHAPE, without=("bias",)),
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def make(case, dtype=torch.float64):
    if case.op == "gelu_mlp":
        return [torch.randn(s, dtype=dtype).requires_grad_() for s in (case.shape, (9, 6), (9,), (6, 9), (6,))]
    if case.op != "packed_linear":
        return [t.requires_grad_() for t in case.inputs(dtype, "cpu").values()]
    x, weights, biases = (torch.randn(shape, dtype=dtype) for shape in (case.shape, (9, 6), (9,)))
    parts = [*weights.split([4, 5]), *([] if case.without else biases.split([4, 5]))]
    return [t.requires_grad_() for t in (x, *parts)]


def public(case, *tensors, impl="reference"):
    if case.op == "packed_linear":
        return (packed_linear(tensors[0], tensors[1:3], tensors[3:]),)
    if case.op == "gelu_mlp":
        return (ops.gelu_mlp(*tensors, **case.options, impl=impl),)
    names = ["h"] if len(tensors) == 1 else [name for name in NORM_ARGUMENTS if name not in case.without]
    return tuple(case(dict(zip(names, tensors, strict=True)), impl).values())


def direct(case, *tensors, impl="reference"):
    if case.op == "gated_silu":
        return (run_gated_silu(*tensors, impl),)
    if case.op == "activate":
        return (run_activate(*tensors, case.options["activation"], impl),)
    if case.op == "gelu_mlp":
        return (run_gelu_mlp(*tensors, case.options.get("approximate", "none"), impl),)
    if case.op == "packed_linear":
        x, weights, biases = tensors[0], tensors[1:3], tensors[3:]
        with torch.no_grad():
            whole = [pack([t.detach() for t in group]) if group else None for group in (weights, biases)]
        return (run_packed_linear(x, *whole, weights, biases),)
    given = dict(zip([name for name in NORM_ARGUMENTS if name not in case.without], tensors, strict=True))
    total, normed = run_add_norm(
        *[given.get(name) for name in NORM_ARGUMENTS], case.options.get("kind", "layer"), case.options.get("eps", 1e-6), impl
    )
    return (normed,) if "delta" in case.without else (total, normed)


def gradients(call, case, tensors, grads, **options):
    tensors = clones(tensors)
    outputs = call(case, *tensors, **options)
    torch.autograd.backward(outputs, grads)
    return [*outputs, *[t.grad for t in tensors]]


def same(ours, theirs):
    return all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("layout", ["contiguous", *LAYOUTS])
@every_case
def test_outputs_and_gradients_are_those_of_the_public_operator(case, layout, impl):
    tensors = make(case)
    grads = [LAYOUTS.get(layout, torch.clone)(torch.randn_like(y)) for y in public(case, *tensors)]
    assert same(*[gradients(call, case, tensors, grads, impl=impl) for call in (direct, public)])
    with torch.no_grad():
        assert same(direct(case, *tensors, impl=impl), public(case, *tensors, impl=impl))
    with torch.inference_mode():
        assert direct(case, *tensors, impl=impl)[0].is_inference()


@every_case
def test_gradcheck(case):
    assert torch.autograd.gradcheck(lambda *t: direct(case, *t), make(case))


@every_case
@pytest.mark.parametrize("grad", [True, False])
def test_the_dispatcher_is_left_out_unless_something_looks(case, grad):
    tensors = make(case)
    with profile(activities=[ProfilerActivity.CPU]) as unseen, torch.set_grad_enabled(grad):
        outputs = direct(case, *tensors)
        if grad:
            sum(y.sum() for y in outputs).backward()
    assert not [event.name for event in unseen.events() if event.name.startswith("laco::")]
    with Calls() as spy, torch.set_grad_enabled(grad):
        outputs = direct(case, *tensors)
        if grad:
            sum(y.sum() for y in outputs).backward()
    assert len(spy.of(getattr(torch.ops.laco, case.op).default)) == 1
    assert len(spy.of(getattr(torch.ops.laco, f"{case.op}_backward").default)) == grad


@every_case
def test_each_gradient_alone(case):
    tensors = make(case)
    grads = [torch.randn_like(y) for y in public(case, *tensors)]
    for chosen in tensors:
        for t in tensors:
            t.requires_grad_(t is chosen)
        found = []
        for call in (direct, public):
            fresh = clones(tensors)
            pairs = [(y, g) for y, g in zip(call(case, *fresh), grads, strict=True) if y.requires_grad]
            torch.autograd.backward(*zip(*pairs, strict=True))
            found.append([t.grad for t in fresh])
        assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(*found, strict=True))


@every_case
def test_the_same_tensors_are_saved_and_may_be_put_aside(case):
    tensors = make(case)
    grads = [torch.randn_like(y) for y in public(case, *tensors)]
    kept = []
    for call in (direct, public):
        _, saved = saved_by(lambda *t, call=call: call(case, *t), *tensors)
        kept.append(sorted(t.shape for t in saved if t.numel()))
    assert kept[0] == kept[1]
    expected = gradients(public, case, tensors, grads)
    with save_on_cpu():
        assert same(gradients(direct, case, tensors, grads), expected)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.clone()):  # weights elsewhere than in forward
        assert same(gradients(direct, case, tensors, grads), expected)


@every_case
def test_a_saved_tensor_that_was_written_to_is_refused(case):
    tensors = make(case)
    y = direct(case, *tensors)[-1]
    with torch.no_grad():
        tensors[1 if case.op in ("packed_linear", "gelu_mlp") else -1].mul_(2)
        if case.op == "add_norm":
            tensors[NORM_ARGUMENTS.index("weight") - ("delta" in case.without)].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("case", [case for case in CASES if case.op != "packed_linear"], ids=str)
@pytest.mark.parametrize("call", [direct, public])
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_the_last_output_may_be_written_in_place(case, call, impl):
    tensors = make(case)
    *_, expected = call(case, *tensors, impl=impl)
    wanted = torch.autograd.grad(expected, tensors, 2 * torch.ones_like(expected), retain_graph=True)
    *_, y = call(case, *tensors, impl=impl)
    assert same([y.mul_(2)], [2 * expected])
    assert same(torch.autograd.grad(y, tensors, torch.ones_like(y)), wanted)


@every_case
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(case, reentrant):
    tensors = make(case)
    grads = [torch.randn_like(y) for y in public(case, *tensors)]

    def call(case, *tensors):
        return checkpoint(lambda *t: direct(case, *t), *tensors, use_reentrant=reentrant)

    assert same(*[gradients(c, case, tensors, grads) for c in (call, public)])


@every_case
def test_second_derivatives_and_forward_mode_are_refused(case):
    tensors = make(case)
    loss = sum(y.square().sum() for y in direct(case, *tensors))
    first = torch.autograd.grad(loss, tensors, create_graph=True)
    with pytest.raises(RuntimeError, match=f"laco::{case.op}: got a second derivative"):
        sum(g.sum() for g in first).backward()
    with pytest.raises(RuntimeError, match="got a forward-mode derivative"), forward_ad.dual_level():
        direct(case, forward_ad.make_dual(tensors[0].detach(), tensors[0].detach()), *tensors[1:])


@every_case
def test_autocast_and_other_dtypes_are_those_of_the_public_operator(case):
    tensors = make(case, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert same(direct(case, *tensors), public(case, *tensors))
    if len(tensors) > 1:
        with pytest.raises(TypeError, match=r"got torch\.float32, expected torch\.bfloat16"):
            direct(case, tensors[0].bfloat16(), *tensors[1:])


def test_what_does_not_fit_is_refused_as_ever():
    x, weight = torch.randn(2, 3, 6), torch.ones(6)
    for arguments, name in (
        ((x, x[:1], weight, None, None), "delta"),
        ((x, None, weight[:5], None, None), "weight"),
        ((x, None, weight, None, weight), "scale"),
        ((x, x, weight, weight[:1], None), "bias"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: got"):
            run_add_norm(*arguments, "layer", 1e-6, "reference")
    matrices = [torch.ones(9, 6), torch.ones(9), torch.ones(6, 9), torch.ones(6)]
    for i, name in enumerate(("weight1", "bias1", "weight2", "bias2")):
        with pytest.raises(ValueError, match=f"^{name}: got"):
            run_gelu_mlp(x, *[m[..., 1:] if i == j else m for j, m in enumerate(matrices)], "none", "reference")
    with pytest.raises(ValueError, match=r"^h: got 5 channels"):
        run_gated_silu(x[..., :5], "reference")
    with pytest.raises(ValueError, match=r"^weights\[0\]: got"):
        run_packed_linear(x, torch.ones(4, 5), None, [torch.ones(4, 5)], [])
    assert run_add_norm(x[:0], None, weight, None, None, "rms", 1e-6, "reference")[1].shape == (0, 3, 6)


def test_a_transform_sees_the_operators():
    x, weight = torch.randn(2, 3, 6), torch.ones(6)
    expected = ops.add_norm(x, None, weight, kind="rms", impl="reference")[1]
    graph = torch.fx.experimental.proxy_tensor.make_fx(
        lambda x: run_add_norm(x, None, weight, None, None, "rms", 1e-6, "reference")[1]
    )(x)
    assert any(node.target is torch.ops.laco.add_norm.default for node in graph.graph.nodes)
    assert torch.equal(graph(x), expected)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_a_feed_forward_block_makes_its_input_again_from_what_the_norm_keeps(kind):
    """The same gradients, also from a norm's input that was put aside, and one tensor less that is kept."""
    tensors, found = [*make(TowerCase("gelu_mlp", SHAPE)), *make(norm(*SHAPE))[2:4]], []
    for recompute in (False, True):
        total, *weights, weight, bias = leaves = clones(tensors)
        norm_of = (weight, bias if kind == "layer" else None, kind, 1e-6, "reference")
        normed = run_add_norm(total, None, *norm_of[:2], None, *norm_of[2:])[1]
        made_by = Norm(total, *norm_of) if recompute else None
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.data_ptr()) or t, torch.clone):
            y = run_gelu_mlp(normed, *weights, "none", "reference", made_by)
        assert (normed.data_ptr() in kept, total.data_ptr() in kept) == (not recompute, recompute)
        y.square().sum().backward()
        found.append([t.grad for t in leaves if t.grad is not None])
    assert same(*found)


LINEAR = [case for case in CASES if case.op in ("packed_linear", "gelu_mlp")]


def by_torch(case, x, *parameters):
    if case.op == "gelu_mlp":
        weight1, bias1, weight2, bias2 = parameters
        return F.linear(gelu(F.linear(x, weight1, bias1), case.options.get("approximate", "none")), weight2, bias2)
    weights, biases = parameters[:2], parameters[2:] or (None, None)
    return torch.cat([F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)], -1)


@pytest.mark.parametrize("call", [direct, public, "compiled"])
@pytest.mark.parametrize("case", LINEAR, ids=str)
def test_the_input_is_kept_for_the_gradients_of_weights_alone(case, call):
    tensors = make(case)
    weights = (1, 2) if case.op == "packed_linear" else (1,)
    needed = itertools.product([False, True], repeat=len(tensors))
    if call == "compiled":
        torch._dynamo.reset()
        call = torch.compile(public, fullgraph=True, backend="aot_eager", dynamic=False)
        needed = [[i in (0, also) for i in range(len(tensors))] for also in range(len(tensors))]
    for needs in needed:
        ours, theirs = clones(tensors), clones(tensors)
        for t, u, need in zip(ours, theirs, needs, strict=True):
            t.requires_grad_(need), u.requires_grad_(need)
        (y,), saved = saved_by(lambda *t: call(case, *t), *ours)
        kept = any(t.untyped_storage().data_ptr() == ours[0].untyped_storage().data_ptr() for t in saved)
        assert kept is any(needs[i] for i in weights), needs
        if any(needs):
            y.square().sum().backward()
            by_torch(case, *theirs).square().sum().backward()
        for t, u in zip(ours, theirs, strict=True):
            torch.testing.assert_close(t.grad, u.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("impl", ["reference", "composite", "triton"])
@pytest.mark.parametrize("shape", [(6,), (4, 6), (0, 3, 6), SHAPE])
def test_a_feed_forward_block_that_is_frozen_hands_its_gradient_through(shape, impl):
    tensors = make(TowerCase("gelu_mlp", shape))
    (expected,) = torch.autograd.grad(ops.gelu_mlp(*tensors, impl=impl).sum(), tensors[:1])
    x, *frozen = [t.detach() for t in tensors]
    for low in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            (dx,) = torch.autograd.grad(ops.gelu_mlp(x.requires_grad_(), *frozen, impl=impl).sum(), x)
        assert dx.dtype == x.dtype
        assert dx.shape == x.shape
        assert low or torch.equal(dx, expected)


@pytest.mark.parametrize("case", LINEAR, ids=str)
def test_the_backward_operator_without_the_input(case):
    x, *frozen = make(case)
    with Calls() as spy, FlopCounterMode(display=False) as flops:
        public(case, x, *[t.detach() for t in frozen])[0].sum().backward()
    ((func, (grad, kept, *others), _),) = spy.of(getattr(torch.ops.laco, f"{case.op}_backward").default)
    assert kept is None
    torch.library.opcheck(func, torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, (grad, None, *others)))
    assert flops.get_total_flops() == 2 * 2 * x[..., 0].numel() * sum(t.numel() for t in frozen if t.dim() == 2)
