"""`hf.optimize`: the sum at a layer's end and the next layer's first norm in one pass, and where each computes its own."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

import laco_kernels as lk
from laco_kernels import testing
from laco_kernels.hf import fused, handing_on
from laco_kernels.ops.add_norm import run_add_norm
from tests.hf.encoders import STOCK, pixels
from tests.hf.optimised import features, made

families = pytest.mark.parametrize("family", list(STOCK))


@pytest.fixture
def passes(monkeypatch):
    """What every pass through a sum or a norm by the operator was: its first norm weight, and whether it made a sum."""
    seen = []

    def spying(x, delta, weight, *rest):
        seen.append((weight, delta is not None))
        return run_add_norm(x, delta, weight, *rest)

    monkeypatch.setattr(fused, "run_add_norm", spying)
    return seen


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, fused.FusedLayer)]


def norms_of(layer):
    return [getattr(layer, name) for name in layer.norms]


def handed(passes, model):
    """Count the first norms of layers that were made in the pass of a sum."""
    firsts = {id(norms_of(layer)[0].weight) for layer in layers_of(model)}
    count = sum(is_sum and id(weight) in firsts for weight, is_sum in passes)
    passes.clear()
    return count


def gradients(model, x):
    model.zero_grad()
    states = model(x, output_hidden_states=True)
    sum((i + 1) * state.square().sum() for i, state in enumerate(states.hidden_states)).backward()
    return [*states.hidden_states, *[p.grad.clone() for p in model.parameters() if p.grad is not None]]


def assert_close(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@families
def test_a_layer_takes_one_pass_less(family, passes):
    model, x = made(family), pixels()
    expected = gradients(model, x)
    report = lk.hf.optimize(model, impl="reference")
    assert {part.count for part in report.parts if part.name.startswith("norm of the next layer")} == {3}
    calls = []
    for layer in layers_of(model):
        norms_of(layer)[0].register_forward_hook(lambda *_: calls.append(1), always_call=True)
    features(model, x)
    assert handed(passes, model) == 0, "a hook waits for the norm"
    assert len(calls) == 4
    for layer in layers_of(model):
        norms_of(layer)[0]._forward_hooks.clear()
    features(model, x)
    assert handed(passes, model) == 3
    assert_close(gradients(model, x), expected)
    assert handed(passes, model) == 0, "a hidden state that is noted may be asked for its gradient"
    with torch.inference_mode():
        model(x)
    assert handed(passes, model) == 3


@families
def test_in_front_of_a_merge_the_layers_hand_on_and_across_it_they_do_not(family, passes):
    model, x = made(family, "compressed"), pixels()
    expected = gradients(model, x)
    lk.hf.optimize(model, impl="reference")
    assert_close(gradients(model, x), expected)
    passes.clear()
    features(model, x)
    assert handed(passes, model) == 2


@families
def test_hidden_states_have_their_whole_gradient(family):
    results = []
    for optimised in (False, True):
        model, x = made(family), pixels()
        if optimised:
            lk.hf.optimize(model, impl="reference")
        found = model(x, output_hidden_states=True)
        results.append(torch.autograd.grad(found.last_hidden_state.square().sum(), found.hidden_states))
    assert_close(*results)


@families
def test_foreign_hooks_on_layers_and_changed_states(family, passes):
    """A hook may return another tensor, or write into the one it sees."""
    for change in (lambda y: y + 1, lambda y: y.detach().add_(1) * 1, lambda y: None):
        model, x = made(family), pixels()

        def hook(module, args, output, change=change):
            return change(output)

        results = []
        for optimised in (False, True):
            if optimised:
                lk.hf.optimize(model, impl="reference")
            layer = (layers_of(model) if optimised else list(stock_layers(model)))[1]
            handle = layer.register_forward_hook(hook)
            results.append(features(model, x))
            handle.remove()
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
        assert handed(passes, model) == 1, "of four layers the second is watched"


def stock_layers(model):
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList))


def test_what_waits_is_taken_by_whom_it_was_made_for_only():
    model = made("siglip")
    lk.hf.optimize(model, impl="reference")
    first, second = layers_of(model)[:2]
    norm = norms_of(second)[0]
    total, normed = torch.randn(2, 3, 32, dtype=torch.float64), torch.randn(2, 3, 32, dtype=torch.float64)

    def taken(change=lambda: None, layer=second, norm=norm, x=total):
        chain = handing_on.Chain([first, second])
        chain.leave(second, norms_of(second)[0], total, normed)
        change()
        found = chain.take(layer, norm, x)
        assert chain.waiting is None
        return found is normed

    assert taken()
    assert not taken(layer=first)
    assert not taken(x=total.clone())
    assert not taken(norm=norms_of(first)[0])
    assert not taken(lambda: total.mul_(2)), "written to"
    assert not taken(lambda: norm.weight.detach().mul_(2)), "other weights"
    assert not taken(lambda: setattr(norm, "eps", 0.5))
    assert not taken(lambda: setattr(norm, "weight", nn.Parameter(torch.ones(32, dtype=torch.float64))))
    with torch.no_grad():
        chain = handing_on.Chain([first, second])
        chain.leave(second, norm, total, normed)
    assert chain.take(second, norm, total) is None, "made without gradients"
    handle = norm.register_forward_hook(lambda *_: None)
    assert not taken()
    handle.remove()
    assert taken()


@families
def test_no_layer_hands_on_what_is_recomputed(family, passes):
    model, x = made(family), pixels()
    model.train()
    expected = gradients(model, x)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    lk.hf.optimize(model, impl="reference")
    model(x)
    assert handed(passes, model) == 0
    assert_close(gradients(model, x), expected)
    assert handed(passes, model) == 0
    model.eval()
    features(model, x)
    assert handed(passes, model) == 3


class Sharded(nn.Parameter):
    """As a parameter whose rows lie in several processes is a class of its own."""


SPOILT = {
    "a norm's own forward": lambda layer: norms_of(layer)[0].__dict__.update(forward=norms_of(layer)[0].forward),
    "a parameter of its own class": lambda layer: setattr(norms_of(layer)[0].weight, "__class__", Sharded),
    "a layer's own forward": lambda layer: layer.__dict__.update(forward=layer.forward),
    "another layer": lambda layer: setattr(layer, "__class__", type("Own", (type(layer),), {})),
    "a backward hook": lambda layer: layer.register_full_backward_hook(lambda *_: None),
    "another implementation": lambda layer: layer.__dict__.update(impl=None),
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_to_a_layer_that_somebody_has_changed_nothing_is_handed_on(spoil, passes):
    model, x = made("siglip"), pixels()
    expected = features(model, x)
    lk.hf.optimize(model, impl="reference")
    spoil(layers_of(model)[2])
    torch.testing.assert_close(features(model, x), expected, rtol=1e-9, atol=1e-9)
    firsts = [norms_of(layer)[0].weight for layer in layers_of(model)]
    assert not any(is_sum and weight is firsts[2] for weight, is_sum in passes)
    assert any(is_sum and weight is firsts[1] for weight, is_sum in passes)


@families
def test_nothing_is_kept_when_the_encoder_returns_or_breaks_off(family, monkeypatch):
    model, x = made(family), pixels()
    lk.hf.optimize(model, impl="reference")
    kept = []

    def noting(self, layer, norm, total, normed):
        kept.extend([weakref.ref(total), weakref.ref(normed)])
        leave(self, layer, norm, total, normed)

    leave = handing_on.Chain.leave
    monkeypatch.setattr(handing_on.Chain, "leave", noting)
    features(model, x)
    gc.collect()
    assert len(kept) == 6
    assert not any(ref() is not None for ref in kept)
    assert handing_on.running.chain is None
    layers_of(model)[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        features(model, x)
    gc.collect()
    assert handing_on.running.chain is None
    assert not any(ref() is not None for ref in kept)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_copies_hand_on_among_their_own_layers(copied, passes):
    model, x = made("internvl"), pixels()
    expected = features(model, x)
    lk.hf.optimize(model, impl="reference")
    twin = copied(model)
    features(model, x)
    assert handed(passes, model) == 3
    torch.testing.assert_close(features(twin, x), expected, rtol=1e-9, atol=1e-9)
    assert handed(passes, twin) == 3
    lk.hf.restore(model)
    assert not [module for module in model.modules() if isinstance(module, handing_on.FusedEncoder)]
    assert torch.equal(features(model, x), expected)


@families
def test_under_autocast_errors_stay(family, passes):
    model, x = made(family), pixels()
    truth = features(model, x)
    model, x = model.float(), x.float()
    with torch.autocast("cpu", torch.bfloat16):
        eager = features(model, x)
        lk.hf.optimize(model, impl="reference")
        ours = features(model, x)
        assert handed(passes, model) == 3
    assert ours.dtype == eager.dtype
    assert testing.compare(ours, eager, truth, [])[2]
