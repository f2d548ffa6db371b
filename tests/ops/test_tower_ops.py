"""The operators inside an encoder as registered torch operators: what they refuse, keep, and become under compilation."""

import weakref
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from laco_kernels import ops
from laco_kernels import reference_tower as reference
from laco_kernels.kernels import select
from laco_kernels.ops.cost import Traffic
from tests.tower import NORM_ARGUMENTS, TowerCase, norm

from .cases import Calls, clones
from .test_backward import LAYOUTS, saved_by

SHAPE = (2, 7, 6)
CASES = [
    norm(*SHAPE),
    norm(*SHAPE, kind="rms", without=("bias", "scale")),
    norm(*SHAPE, eps=1e-3, without=("delta", "scale")),
    TowerCase("gated_silu", SHAPE),
    *[TowerCase("activate", SHAPE, {"activation": name}) for name in ("gelu", "gelu_tanh", "quick_gelu")],
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture(autouse=True)
def _forget_compiled_code():
    torch._dynamo.reset()


def make(case, *, batch=2, dtype=torch.float64, grad=True):
    shape = (batch, *case.shape[1:])
    tensors = TowerCase(case.op, shape, case.options, case.without).inputs(dtype, "cpu").values()
    return [t.requires_grad_(grad) for t in tensors]


def run(case, *tensors, impl=None):
    """Return the outputs of an operator as a tuple."""
    names = ["h"] if len(tensors) == 1 else [name for name in NORM_ARGUMENTS if name not in case.without]
    return tuple(case(dict(zip(names, tensors, strict=True)), impl).values())


def overload(case, suffix=""):
    return getattr(torch.ops.laco, case.op + suffix).default


def raw(case, *tensors, save=True):
    """Return the arguments of the registered operator."""
    if case.op == "gated_silu":
        return *tensors, "reference"
    if case.op == "activate":
        return *tensors, case.options["activation"], "reference"
    given = dict(zip([name for name in NORM_ARGUMENTS if name not in case.without], tensors, strict=True))
    kind, eps = case.options.get("kind", "layer"), case.options.get("eps", 1e-6)
    return *[given.get(name) for name in NORM_ARGUMENTS], tensors[0].dtype, kind, eps, "reference", save


def gradients(case, tensors, grads, call=run):
    tensors = clones(tensors)
    torch.autograd.backward(call(case, *tensors), grads)
    return [t.grad for t in tensors]


def grads_of(case, tensors):
    return [torch.randn_like(y) for y in run(case, *tensors)]


@every_case
def test_opcheck(case):
    torch.library.opcheck(overload(case), raw(case, *make(case)))
    torch.library.opcheck(overload(case), raw(case, *make(case, grad=False), save=False))


@every_case
@pytest.mark.parametrize("frozen", [False, True])
def test_opcheck_of_the_backward_operator(case, frozen):
    tensors = make(case)
    for t in tensors[1:]:
        t.requires_grad_(not frozen)
    with Calls() as spy:
        sum(y.sum() for y in run(case, *tensors)).backward()
    ((func, args, _),) = spy.of(overload(case, "_backward"))
    torch.library.opcheck(func, torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, args))


@every_case
def test_outputs_are_contiguous_and_new(case):
    tensors = [t.detach().transpose(0, -1).contiguous().transpose(0, -1) for t in make(case)]
    outputs = overload(case)(*raw(case, *tensors))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    assert all(o.is_contiguous() for o in outputs)
    assert len({t.untyped_storage().data_ptr() for t in (*outputs, *tensors) if t.numel()}) == len(tensors) + sum(
        o.numel() > 0 for o in outputs
    )


def test_without_a_delta_the_total_is_the_input_itself():
    x, weight = torch.randn(2, 3, 4), torch.randn(4)
    total, normed = ops.add_norm(x, None, weight, kind="rms")
    assert total is x
    assert torch.equal(normed, ops.add_norm(x, torch.zeros_like(x), weight, kind="rms")[1])


@every_case
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(case, dynamic):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *t: run(case, *t), backend=counter, fullgraph=True, dynamic=dynamic)
    frames = []
    for batch in (2, 3, 5):
        tensors = make(case, batch=batch)
        assert all(torch.equal(a, b) for a, b in zip(compiled(*tensors), run(case, *tensors), strict=True))
        grads = grads_of(case, tensors)
        got = gradients(case, tensors, grads, lambda _, *t: compiled(*t))
        assert all(torch.equal(a, b) for a, b in zip(got, gradients(case, tensors, grads), strict=True))
        frames.append(counter.frame_count)
    if dynamic:  # the first may count twice, as dynamo traces eps as a variable before it settles for a constant
        assert len(set(frames)) == 1, "another batch size compiled anew"


@pytest.mark.parametrize("case", CASES[1:5:2], ids=str)
def test_compiles_with_inductor(case):
    def call(*tensors):
        return sum(y.cos() for y in run(case, *[2 * t for t in tensors]))

    tensors = make(case)
    compiled = torch.compile(call, backend="inductor", fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(*tensors), call(*tensors), atol=1e-12, rtol=1e-10)
    theirs, ours = (torch.autograd.grad(f(*tensors).sum(), tensors) for f in (compiled, call))
    torch.testing.assert_close(theirs, ours, atol=1e-12, rtol=1e-10)


FORWARD_MODE = r"laco_kernels\.{}: got a forward-mode derivative .* expected reverse mode.*laco_kernels\.reference_tower"


@every_case
def test_forward_mode_is_refused(case):
    tensors = make(case, grad=False)
    for i, t in enumerate(tensors):
        with pytest.raises(RuntimeError, match=FORWARD_MODE.format(case.op)), forward_ad.dual_level():
            run(case, *tensors[:i], forward_ad.make_dual(t, t), *tensors[i + 1 :])


@every_case
def test_second_derivatives_are_refused(case):
    tensors = make(case)
    loss = sum(y.square().sum() for y in run(case, *tensors))
    first = torch.autograd.grad(loss, tensors, create_graph=True)
    with pytest.raises(RuntimeError, match=f"laco::{case.op}: got a second derivative.*laco_kernels.reference_tower"):
        first[-1].sum().backward()


def test_the_reference_has_second_derivatives():
    x, delta, weight, bias, scale = make(CASES[0], batch=1)

    def call(*tensors):
        total, normed, *_ = reference.add_norm_forward(*tensors, kind="layer", eps=1e-6, dtype=torch.float64)
        return total, normed

    assert torch.autograd.gradgradcheck(call, (x, delta, weight, bias, scale), fast_mode=True)


@every_case
@pytest.mark.parametrize(("save", "runs"), [(True, 1), (False, 2)])
def test_selective_checkpointing_saves_the_operator(case, save, runs):
    tensors = make(case)
    options = {"context_fn": lambda: create_selective_checkpoint_contexts([overload(case)])} if save else {}
    with Calls() as spy:
        y = checkpoint(lambda *t: sum(y.sigmoid() for y in run(case, *t)), *tensors, use_reentrant=False, **options)
        y.sum().backward()
    assert len(spy.of(overload(case))) == runs
    plain = clones(tensors)
    sum(y.sigmoid() for y in run(case, *plain)).sum().backward()
    assert all(torch.equal(t.grad, p.grad) for t, p in zip(tensors, plain, strict=True))


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_add_norm_saves_the_total_and_what_is_small(kind, scaled):
    case = norm(*SHAPE, kind=kind, without=() if scaled else ("scale",))
    x, delta, weight, bias, *scale = make(case)
    (total, normed), saved = saved_by(lambda *t: run(case, *t), x, delta, weight, bias, *scale)
    kept = {t.data_ptr(): t for t in saved if t.numel()}
    large = [t for t in kept.values() if t.shape == SHAPE]
    assert {t.data_ptr() for t in large} == {total.data_ptr(), *([delta.data_ptr()] if scaled else [])}
    small = [t.shape for t in kept.values() if t.shape != SHAPE]
    assert sorted(small) == sorted([(6,)] * (1 + scaled) + [SHAPE[:2]] * (1 + (kind == "layer")))
    assert normed.data_ptr() not in kept
    if scaled:  # a frozen LayerScale does not need the delta
        scale[0].requires_grad_(False)
        (total, _), saved = saved_by(lambda *t: run(case, *t), x, delta, weight, bias, *scale)
        assert {t.data_ptr() for t in saved if t.shape == SHAPE} == {total.data_ptr()}


@pytest.mark.parametrize("case", CASES[2:], ids=str)
def test_without_a_delta_and_for_activations_only_the_input_is_saved(case):
    tensors = make(case)
    _, saved = saved_by(lambda *t: run(case, *t), *tensors)
    assert {t.data_ptr() for t in saved if t.dim() == 3} == {tensors[0].data_ptr()}


@every_case
def test_keeps_nothing_else_alive(case):
    tensors = make(case)
    *_, y = run(case, *tensors)
    kept, loss = weakref.ref(y), y.sum()
    del y, _
    assert kept() is None, "the output is kept for backward"
    loss.backward()


@every_case
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_saved(case, context):
    tensors = make(case)
    with context(), Calls() as spy:
        outputs, saved = saved_by(lambda *t: run(case, *t), *tensors)
    ((_, args, results),) = spy.of(overload(case))
    assert not saved
    assert not any(y.requires_grad for y in outputs)
    if case.op == "add_norm":
        assert args[-1] is False
        assert [r.numel() for r in results[2:]] == [0, 0]
    assert all(torch.equal(a, b) for a, b in zip(outputs, run(case, *tensors), strict=True))


def test_gradients_of_an_operator_that_did_not_save_are_refused():
    with pytest.raises(RuntimeError, match=r"laco::add_norm: got save=False.*Call laco_kernels\.add_norm"):
        torch.ops.laco.add_norm(*raw(CASES[0], *make(CASES[0]), save=False))


@every_case
def test_one_gradient_alone_is_the_same_as_among_all(case):
    tensors = make(case)
    grads = grads_of(case, tensors)
    every = gradients(case, tensors, grads)
    for i in range(len(tensors)):
        for j, t in enumerate(tensors):
            t.requires_grad_(i == j)
        fresh = clones(tensors)
        with Calls() as spy:
            outputs = run(case, *fresh)
            wanted = [(y, g) for y, g in zip(outputs, grads, strict=True) if y.requires_grad]
            torch.autograd.backward(*zip(*wanted, strict=True))
        assert [t.grad is None for t in fresh] == [i != j for j in range(len(tensors))]
        torch.testing.assert_close(fresh[i].grad, every[i], atol=1e-12, rtol=0)
        ((_, _, results),) = spy.of(overload(case, "_backward"))
        results = results if isinstance(results, tuple) else (results,)
        assert [r.numel() > 0 for r in results].count(True) == 1


def test_without_a_scale_one_gradient_serves_both_summands():
    case = norm(*SHAPE, without=("scale",))
    x, delta, *_ = tensors = make(case)
    with Calls() as spy:
        torch.autograd.backward(run(case, *tensors), grads_of(case, tensors))
    ((_, _, (dx, ddelta, *_)),) = spy.of(overload(case, "_backward"))
    assert ddelta.numel() == 0
    assert torch.equal(x.grad, dx)
    assert torch.equal(delta.grad, dx)
    x.grad.zero_()
    assert delta.grad.abs().sum() > 0, "the two gradients share memory"


def test_either_result_alone_has_gradients():
    tensors = make(CASES[0])
    for i in range(2):
        fresh = clones(tensors)
        grad = torch.randn(SHAPE, dtype=torch.float64)
        run(CASES[0], *fresh)[i].backward(grad)
        x, delta, weight, bias, scale = other = clones(tensors)
        total = x + scale * delta
        (total, torch.nn.functional.layer_norm(total, (6,), weight, bias, 1e-6))[i].backward(grad)
        for ours, theirs in zip(fresh, other, strict=True):
            assert (ours.grad is None) is (theirs.grad is None)
            if theirs.grad is not None:
                torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-12, rtol=0)


@every_case
@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_of_gradients_do_not_matter(case, layout, impl):
    tensors = make(case)
    grads = [LAYOUTS[layout](grad) for grad in grads_of(case, tensors)]
    assert not any(grad.is_contiguous() for grad in grads)
    call = lambda _, *t: run(case, *t, impl=impl)  # noqa: E731
    dense = gradients(case, tensors, [g.clone(memory_format=torch.contiguous_format) for g in grads], call)
    for ours, expected in zip(gradients(case, tensors, grads, call), dense, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-12 if impl == "reference" else 0, rtol=0)


@every_case
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_neither_gradients_nor_saved_tensors_are_written_to(case, impl):
    tensors = make(case)
    outputs, saved = saved_by(lambda *t: run(case, *t, impl=impl), *tensors)
    grads = [torch.randn_like(y) for y in outputs]
    watched = [*grads, *saved, *tensors]
    before, versions = [t.detach().clone() for t in watched], [t._version for t in watched]
    torch.autograd.backward(outputs, grads, retain_graph=True)
    first = [t.grad.clone() for t in tensors]
    torch.autograd.backward(outputs, grads)
    assert all(torch.equal(t, b) for t, b in zip(watched, before, strict=True))
    assert [t._version for t in watched] == versions
    assert all(torch.equal(t.grad, f + f) for t, f in zip(tensors, first, strict=True))


@pytest.mark.parametrize(
    ("dtype", "impl"), [(torch.bfloat16, "reference"), (torch.float16, "reference"), (torch.float16, "triton")], ids=str
)
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("stream", [torch.float32, None], ids=["float32 stream", "half stream"])
def test_autocast_keeps_the_stream_and_normalises_into_its_own_dtype(dtype, impl, scaled, stream):
    """The total is torch's own sum, in the widest dtype; the norm is what a linear layer would round it to."""
    case = norm(2, 7, 16, without=() if scaled else ("scale",))
    x, delta, weight, bias, *scale = make(case, dtype=torch.float32)
    x, delta = (t.detach().to(d).requires_grad_() for t, d in ((x, stream or dtype), (delta, dtype)))
    tensors = [x, delta, weight, bias, *scale]

    def stock(x, delta, weight, bias, scale=None):
        total = x + (delta if scale is None else scale * delta)
        return total, torch.nn.functional.layer_norm(total.float(), (16,), weight, bias, 1e-6)

    with torch.autocast("cpu", dtype):
        total, normed = run(case, *tensors, impl=impl)
        sum_, exact = stock(*tensors)
    assert total.dtype == sum_.dtype == (torch.float32 if scaled or stream else dtype)
    torch.testing.assert_close(total, sum_)
    assert normed.dtype == dtype
    torch.testing.assert_close(normed.float(), exact, atol=0, rtol=torch.finfo(dtype).eps)
    other = clones(tensors)
    (total.float().sin() + normed.float().cos()).sum().backward()
    sum_, exact = stock(*other)
    (sum_.float().sin() + exact.to(dtype).float().cos()).sum().backward()
    for ours, theirs in zip(tensors, other, strict=True):
        assert ours.grad.dtype == ours.dtype
        torch.testing.assert_close(ours.grad.float(), theirs.grad.float(), atol=torch.finfo(dtype).eps * 30, rtol=0.02)


@pytest.mark.parametrize("case", CASES[3:], ids=str)
def test_activations_keep_their_dtype_under_autocast(case):
    for dtype in (torch.float32, torch.bfloat16):
        (h,) = make(case, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16):
            (y,) = run(case, h)
        assert y.dtype == dtype
        y.sum().backward()
        assert h.grad.dtype == dtype


@every_case
def test_an_empty_batch_gives_an_empty_batch(case):
    tensors = make(case, batch=0)
    outputs = run(case, *tensors)
    assert all(y.shape == (0, 7, 6) for y in outputs)
    torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
    assert all((t.grad == 0).all() and t.grad.shape == t.shape for t in tensors)


def test_forward_and_backward_are_chosen_apart_and_by_rows(monkeypatch):
    asked = []
    monkeypatch.setattr(select, "choose", lambda *args: asked.append((*args[:2], args[4])) or select.Choice("reference", ""))
    for case in CASES[:5:2]:
        sum(y.sum() for y in run(case, *make(case))).backward()
    assert asked == [
        (op, direction, 14) for op in ("add_norm", "add_norm", "activate") for direction in ("forward", "backward")
    ]


def counted(call):
    with Traffic("triton") as traffic:
        result = call()
    return result, traffic.read, traffic.written


def test_bytes_of_a_sum_and_norm_behind_a_class_token():
    """Every large tensor once; a sequence without its class token is read where it lies."""
    rows, channels, item = 3 * 16, 64, 2
    x, delta = (torch.empty(3, tokens, channels, dtype=torch.bfloat16, device="meta") for tokens in (17, 16))
    weight, bias, scale = (torch.empty(channels, dtype=torch.bfloat16, device="meta").requires_grad_() for _ in range(3))
    large, statistic, vector, sums = rows * channels * item, rows * 4, channels * item, channels * 4
    _, read, written = counted(lambda: ops.add_norm(x[:, 1:], delta, weight, kind="rms"))
    assert (read, written) == (2 * large + vector, 2 * large + statistic)
    x, delta = x[:, 1:].requires_grad_(), delta.requires_grad_()
    outputs, read, written = counted(lambda: ops.add_norm(x, delta, weight, bias, scale=scale))
    assert (read, written) == (2 * large + 3 * vector, 2 * large + 2 * statistic)
    grads = [torch.empty_like(y) for y in outputs]
    _, read, written = counted(lambda: torch.autograd.grad(outputs, (x, delta, weight, bias, scale), grads))
    programs = -(-rows // 32)
    # Both gradients, the total and the delta; then the partial sums, and their rounding.
    assert read == (4 * large + 2 * statistic + 2 * vector) + 3 * (programs * sums + sums)
    assert written == (2 * large + 3 * programs * sums) + 3 * (sums + vector)


def test_bytes_of_activations():
    h = torch.empty(3, 5, 64, dtype=torch.bfloat16, device="meta").requires_grad_()
    y, read, written = counted(lambda: ops.gated_silu(h))
    assert (read, written) == (h.nbytes, h.nbytes // 2)
    _, read, written = counted(lambda: torch.autograd.grad(y, h, torch.empty_like(y)))
    assert (read, written) == (h.nbytes * 3 // 2, h.nbytes)
    y, read, written = counted(lambda: ops.activate(h))
    assert (read, written) == (h.nbytes, h.nbytes)


@pytest.fixture
def mesh():
    """Two processes of which this is the first; nothing is communicated."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


@every_case
@pytest.mark.parametrize("split", [True, False])
def test_on_distributed_tensors(case, split, mesh):
    """Batch-sharded activations stay so without communication, and leave the sums of the parameters' gradients to be added."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
    from torch.distributed.tensor.debug import CommDebugMode

    placement, summed = (Shard(0), Partial("sum")) if split else (Replicate(), Replicate())
    tensors = make(case, batch=2)
    for _ in range(2):  # the second time from what DTensor inferred the first time
        spread = [
            DTensor.from_local(t.detach(), mesh, [placement if t.dim() > 1 else Replicate()]).requires_grad_() for t in tensors
        ]
        with CommDebugMode() as comm:
            outputs = run(case, *spread)
            grads = [torch.randn_like(y.to_local()) for y in outputs]
            torch.autograd.backward(outputs, [DTensor.from_local(g, mesh, [placement]) for g in grads])
        assert comm.get_total_counts() == 0
        assert all(y.placements == (placement,) for y in outputs)
        assert all(torch.equal(y.to_local(), z) for y, z in zip(outputs, run(case, *tensors), strict=True))
        for s, expected, t in zip(spread, gradients(case, tensors, grads), tensors, strict=True):
            assert s.grad.placements == (placement if t.dim() > 1 else summed,)
            assert torch.equal(s.grad.to_local(), expected)
        for needed in (0, len(tensors) - 1):  # the same shapes and other needs
            alone = [s.detach().requires_grad_(i == needed) for i, s in enumerate(spread)]
            y = run(case, *alone)[-1]
            y.backward(DTensor.from_local(grads[-1], mesh, [placement]))
            assert [s.grad is None for s in alone] == [i != needed for i in range(len(alone))]


def test_channels_alone_are_not_split(mesh):
    from torch.distributed.tensor import DTensor, Replicate, Shard

    h, weight = (DTensor.from_local(torch.randn(n), mesh, [p]) for n, p in ((3, Shard(0)), (6, Replicate())))
    assert ops.activate(h).placements == (Replicate(),)
    assert ops.add_norm(h, None, weight)[1].placements == (Replicate(),)


def test_implementations_are_asked_for_what_is_needed_only(monkeypatch):
    seen = []

    def spying(*args):
        seen.append(args[-1])
        return reference.add_norm_backward(*args)

    tensors = make(CASES[0])
    for t in tensors[2:]:
        t.requires_grad_(False)
    outputs = run(CASES[0], *tensors)
    monkeypatch.setattr(select, "load", lambda *_: SimpleNamespace(add_norm_backward=spying))
    torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
    assert seen == [[True, True, False, False, False]]
