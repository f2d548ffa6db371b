"""Gradients of the registered operators, and what is kept for them."""

import weakref
from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from laco_kernels import reference
from laco_kernels.kernels import select
from laco_kernels.ops.cost import Traffic

from .cases import (
    BATCH,
    CHANNELS,
    HIDDEN,
    PREFIX,
    TOKENS,
    WINDOWS,
    Calls,
    Fusion,
    Merge,
    Mlp,
    assert_same_gradients,
    clones,
    every_activated_op,
    every_op,
    gradients,
    make,
    overload,
)


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
    assert (shape in inside.shapes(tensors[0]) | outside.shapes(tensors[0])) is not frozen
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
def test_saves_the_tokens_the_weights_and_a_pre_activation_where_there_is_one(case):
    tensors = make(case)
    y, saved = saved_by(case.call, *tensors)
    kept = {t.data_ptr() for t in tensors if t.dim() > 1}
    new = [t for t in saved if t.data_ptr() not in kept]
    assert {t.data_ptr() for t in saved} - {t.data_ptr() for t in new} == kept
    assert len(saved) == len(kept) + case.pre
    if not case.pre:
        return
    rows = {Fusion: TOKENS - PREFIX, Mlp: TOKENS}.get(case, WINDOWS.num_windows)
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
    ((_, args, outputs),) = spy.of(overload(case))
    assert not saved
    if case.pre:
        assert args[-1] is False
        assert outputs[1].numel() == 0
    assert not y.requires_grad
    assert torch.equal(y, case.call(*tensors))


@every_activated_op
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
def test_what_was_saved_may_come_back_in_other_strides(case):
    """Hooks that move tensors to the host and back keep values, not strides."""
    for impl in ("reference", "triton", "composite"):
        tensors = make(case, dtype=torch.float32)
        y = case.call(*tensors, impl=impl)
        grad = torch.randn_like(y)
        expected = torch.autograd.grad(y, tensors, grad)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.transpose(0, -1).contiguous().transpose(0, -1)):
            again = case.call(*tensors, impl=impl)
        for got, want in zip(torch.autograd.grad(again, tensors, grad), expected, strict=True):
            torch.testing.assert_close(got, want)


@every_op
def test_autocast_does_not_reach_into_the_operator(case, monkeypatch):
    seen = []

    def spying(name):
        inner = getattr(reference, name)
        return lambda *args, **kwargs: seen.append(torch.is_autocast_enabled("cpu")) or inner(*args, **kwargs)

    names = [f"{case.name}_forward", f"{case.name}_backward"]
    spies = SimpleNamespace(**{name: spying(name) for name in names})
    monkeypatch.setattr(select, "load", lambda *_: spies)
    with torch.autocast("cpu", torch.bfloat16):
        case.call(*make(case, dtype=torch.float32)).sum().backward()
    assert seen == [False, False]


@pytest.mark.parametrize("impl", ["triton", "composite"])
def test_the_second_weight_alone_needs_no_gradient_of_the_hidden_layer(impl):
    tensors = make(Merge, dtype=torch.float32)
    for i, tensor in enumerate(tensors):
        tensor.requires_grad_(i == 3)
    y = Merge.call(*tensors, impl=impl)
    dy = torch.ones_like(y)
    with Traffic(impl) as traffic:
        y.backward(dy)
    rows = BATCH * WINDOWS.num_windows
    pre, grad, weight = rows * HIDDEN, rows * CHANNELS, HIDDEN * CHANNELS
    # GELU again, the gradient without its prefix, one product; nothing of the size of the first weight
    assert (traffic.read, traffic.written) == (4 * (2 * pre + 2 * grad), 4 * (pre + grad + weight))
