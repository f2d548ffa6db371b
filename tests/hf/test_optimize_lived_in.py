"""Optimised encoders in use: moved, saved, hooked, patched, parametrised, transformed by code that knows nothing of it."""

import contextlib
import copy
import gc
import inspect
import weakref

import pytest
import torch
from torch import nn

import laco_kernels as lk
from laco_kernels.hf import fusing
from tests.hf.encoders import pixels
from tests.hf.optimised import classes, features, made, packs_of


def are_together(model):
    return [pack.is_together() for pack in packs_of(model)]


def test_weights_are_read_as_one_until_they_move():
    model, x = made("siglip"), pixels()
    report = lk.hf.optimize(model, impl="reference")
    expected = features(model, x)
    with torch.no_grad():
        for pack in packs_of(model):
            assert pack.weights.tensor.data_ptr() == pack.members[0].weight.data_ptr()
            pack.members[1].weight.mul_(2)  # in place: read where it lies
    changed = features(model, x)
    assert not torch.allclose(changed, expected)
    model.to(torch.float32)
    assert all(pack.weights.tensor is None for pack in packs_of(model)), "the memory that the parameters left is kept"
    model.to(torch.float64)
    assert not any(are_together(model))
    torch.testing.assert_close(features(model, x), changed, rtol=1e-4, atol=1e-4)
    assert lk.hf.optimize(model, impl="reference") == report
    assert all(are_together(model))
    for move in (
        lambda layer: setattr(layer.bias, "data", layer.bias.data + 1),
        lambda layer: setattr(layer.weight, "data", layer.weight.data.t()),  # as long, and where it was
        lambda layer: setattr(layer.weight, "data", layer.weight.data[:16]),
    ):
        twin = copy.deepcopy(model)
        lk.hf.optimize(twin, impl="reference")
        for pack in packs_of(twin):
            move(pack.members[2])
        assert not any(are_together(twin))


def test_savers_find_every_weight(tmp_path):
    accelerate, safetensors = pytest.importorskip("accelerate"), pytest.importorskip("safetensors.torch")
    model = made("siglip").float()
    lk.hf.optimize(model, impl="reference")
    state = model.state_dict()
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.save_model(accelerator.prepare(model), tmp_path)
    safetensors.save_model(model, str(tmp_path / "alone.safetensors"))
    for file in ("model.safetensors", "alone.safetensors"):
        found = safetensors.load_file(tmp_path / file)
        assert found.keys() == state.keys()
        assert all(torch.equal(found[name], value) for name, value in state.items())
    torch.save({"weight": model.encoder.layers[0].self_attn.q_proj.weight}, tmp_path / "one.pt")
    assert (tmp_path / "one.pt").stat().st_size < 2 * 32 * 32 * 4


def test_hooks_change_outputs_in_place_and_copies_of_a_layer_work_alone():
    results = []
    for optimised in (False, True):
        model, x = made("clip"), pixels().requires_grad_()
        if optimised:
            lk.hf.optimize(model, impl="reference")
        attention = model.encoder.layers[0].self_attn
        attention.q_proj.register_forward_hook(lambda _, __, output: output.mul_(2))
        alone = copy.copy(attention.k_proj)(torch.ones(1, 2, 32, dtype=x.dtype))
        y = model(x).last_hidden_state
        results.append([alone, y, *torch.autograd.grad(y.sum(), x)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_hooks_of_all_modules_see_every_module():
    seen = []
    for optimised in (False, True):
        model, x = made("clip"), pixels()
        if optimised:
            lk.hf.optimize(model, impl="reference")
        calls = []
        handle = nn.modules.module.register_module_forward_hook(lambda *_, calls=calls: calls.append(1))
        try:
            features(model, x)
        finally:
            handle.remove()
        seen.append(len(calls))
    assert seen[0] == seen[1]


def test_a_forward_of_somebody_elses_stays():
    model, x = made("clip"), pixels()
    layer = model.encoder.layers[1]
    layer.layer_norm2.forward = torch.zeros_like
    stock_forward = model.forward
    model.forward = lambda *args, **kwargs: stock_forward(*args, **kwargs)
    mine, expected = model.forward, features(model, x)
    for options in ({}, {"graphs": True}, {"compile": True, "fuse": False}):
        lk.hf.optimize(model, impl="reference", **options)
        assert inspect.signature(model.forward) == inspect.signature(mine)
        if "compile" not in options:
            torch.testing.assert_close(features(model, x), expected, rtol=1e-9, atol=1e-9)
        lk.hf.restore(model)
        assert model.forward is mine


def test_what_came_last_is_undone_first():
    model, x = made("siglip"), pixels()
    expected, before = features(model, x), classes(model)
    lk.hf.optimize(model, impl="reference")
    layer = model.encoder.layers[0].self_attn.q_proj
    nn.utils.parametrizations.weight_norm(layer)
    torch.testing.assert_close(features(model, x), expected, rtol=1e-9, atol=1e-9)
    fused_classes = classes(model)
    with pytest.raises(RuntimeError, match=r"^encoder: got a layer that has become a ParametrizedPackedLinear"):
        lk.hf.restore(model)
    assert classes(model) == fused_classes
    nn.utils.parametrize.remove_parametrizations(layer, "weight")
    lk.hf.restore(model)
    assert classes(model) == before


def test_optimised_in_inference_mode_it_still_trains():
    model, x = made("clip"), pixels()

    def gradients():
        parameters = [p for name, p in model.named_parameters() if "post_layernorm" not in name]  # of the pooled output
        return torch.autograd.grad(model(x).last_hidden_state.sum(), parameters)

    expected = gradients()
    for change in (lambda: lk.hf.optimize(model, impl="reference"), lambda: lk.hf.restore(model)):
        with torch.inference_mode():
            change()
            features(model, x)
        for ours, theirs in zip(gradients(), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_transforms_run_the_stock_layers():
    model, x = made("clip", attn_implementation="eager"), pixels()
    model.requires_grad_(False)
    expected = features(model, x)
    lk.hf.optimize(model, impl="reference")
    one_by_one = torch.func.vmap(lambda image: model(image[None]).last_hidden_state[0])(x)
    torch.testing.assert_close(one_by_one, expected, rtol=1e-9, atol=1e-9)


def replaced(model):
    attention = model.encoder.layers[1].self_attn
    attention.k_proj = nn.Linear(32, 32, dtype=torch.float64)


def failing(model):
    def fail(*_):
        raise InterruptedError

    model.encoder.layers[1].self_attn.k_proj.register_forward_pre_hook(fail)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("change", [replaced, failing])
def test_nothing_waits_for_a_layer_that_does_not_come(change, gradients):
    model, x, inputs = made("clip"), pixels(), []
    lk.hf.optimize(model, impl="reference")
    change(model)
    for layer in model.encoder.layers:
        layer.self_attn.q_proj.register_forward_pre_hook(lambda _, given: inputs.append(weakref.ref(given[0])))
    with torch.set_grad_enabled(gradients), contextlib.suppress(InterruptedError):
        model(x)
    assert len(inputs) == (4 if change is replaced else 2)
    gc.collect()
    assert not any(given() is not None for given in inputs), "an input waits for the next one"


def test_outside_a_layer_every_product_is_its_own():
    model, x = made("clip").float(), torch.randn(2, 3, 32, requires_grad=True)
    lk.hf.optimize(model, impl="reference")
    attention = model.encoder.layers[0].self_attn
    for layer in (attention.k_proj, attention.q_proj):
        layer(x).square().sum().backward()  # each graph once
    with torch.autocast("cpu", torch.bfloat16):
        attention.k_proj(x)
    assert attention.q_proj(x).dtype == torch.float32
    with torch.no_grad():
        attention.k_proj(x)
        attention.q_proj.weight.zero_()
        attention.q_proj.bias.zero_()
        assert not attention.q_proj(x).any()
    given, x = weakref.ref(x), None
    gc.collect()
    assert given() is None, "an input waits"


def changing(model):
    """Let the weights of a layer change just before it is called, in place, as some quantisation does."""

    def halve(layer, _):
        with torch.no_grad():
            layer.weight.mul_(0.5)

    model.encoder.layers[0].self_attn.v_proj.register_forward_pre_hook(halve)


def lowering(model):
    """Let attention compute queries in another precision than keys and values."""
    layer = model.encoder.layers[0].self_attn.q_proj
    forward = layer.forward

    def lower(x):
        with torch.autocast("cpu", torch.bfloat16):
            return forward(x).to(x.dtype)

    layer.forward = lower


@pytest.mark.parametrize("change", [changing, lowering])
def test_inside_a_layer_a_share_is_what_its_layer_would_compute(change):
    results = []
    for optimised in (False, True):
        model, x = made("clip").float(), pixels().float()
        if optimised:
            lk.hf.optimize(model, impl="reference")
        change(model)
        results.append(features(model, x))
    torch.testing.assert_close(*results)


def test_of_two_models_one_inside_the_other_only_one_is_optimised():
    outer, inner = made("siglip"), made("siglip", num_hidden_layers=1)
    outer.teacher = inner
    outer_classes = classes(outer)
    lk.hf.optimize(inner, impl="reference")
    before = classes(outer)
    with pytest.raises(ValueError, match=r"^encoder: got one that holds an optimised model, 'teacher', .* Call restore"):
        lk.hf.optimize(outer, impl="reference")
    assert classes(outer) == before
    lk.hf.restore(outer)  # was not optimised: nothing to undo, inside neither
    assert classes(outer) == before
    lk.hf.restore(inner)
    lk.hf.optimize(outer, impl="reference")
    before = classes(outer)
    with pytest.raises(ValueError, match=r"^encoder: got layers that another model was optimised with, .* Call restore"):
        lk.hf.optimize(inner, impl="reference")
    assert classes(outer) == before
    lk.hf.restore(outer)
    assert classes(outer) == outer_classes


def test_a_model_is_not_restored_around_one_that_was_optimised_by_itself():
    outer, inner = made("siglip"), made("siglip", num_hidden_layers=1)
    lk.hf.optimize(outer, impl="reference")
    lk.hf.optimize(inner, impl="reference")
    outer.teacher = inner
    before = classes(outer)
    with pytest.raises(RuntimeError, match=r"^encoder: got one that holds another optimised model, 'teacher'"):
        lk.hf.restore(outer)
    assert classes(outer) == before
    lk.hf.restore(inner)
    lk.hf.restore(outer)
    assert not any(isinstance(module, fusing.Fused) for module in outer.modules())
