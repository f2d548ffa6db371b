"""Optimised encoders in use: moved, saved, hooked, patched, parametrised, transformed by code that knows nothing of it."""

import contextlib
import copy
import gc
import inspect
import warnings
import weakref

import pytest
import torch
from torch import nn

import laco_kernels as lk
from laco_kernels.hf import fusing
from laco_kernels.hf.optimize import settings_of
from tests.hf.encoders import STOCK, pixels
from tests.hf.optimised import classes, features, made, packs_of

families = pytest.mark.parametrize("family", list(STOCK))


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


@families
def test_second_derivatives_are_refused(family):
    model, x = made(family), pixels()
    lk.hf.optimize(model, impl="reference")
    parameters = list(model.encoder.parameters())
    first = torch.autograd.grad(model(x).last_hidden_state.square().sum(), parameters, create_graph=True)
    with pytest.raises(RuntimeError, match="got a second derivative, expected first derivatives only"):
        sum(g.sum() for g in first).backward()


@families
def test_quantised_layers_stay_quantised(family):
    """Behind ``optimize`` those that share a product would be missed, as README says."""
    dynamic = torch.ao.nn.quantized.dynamic.Linear
    counts = []
    for optimised_first in (False, True):
        model = made(family).float()
        if optimised_first:
            lk.hf.optimize(model, impl="reference")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch gives it up for torchao
            model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
        counts.append(sum(isinstance(module, dynamic) for module in model.modules()))
        if not optimised_first:
            lk.hf.optimize(model, impl="reference")
            assert features(model, pixels().float()).isfinite().all()
            assert not packs_of(model)
            assert counts == [sum(isinstance(module, dynamic) for module in model.modules())]
    assert counts[1] == counts[0] - sum(len(pack.members) for pack in packs_of(model))


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


@families
def test_hooks_with_keywords_see_the_call_of_the_stock_code(family):
    def calls(model, name):
        seen = []
        hook = lambda _, args, kwargs: seen.append((len(args), sorted(kwargs), args or tuple(kwargs.values())))  # noqa: E731
        handle = model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)
        features(model, pixels())
        handle.remove()
        return seen

    model, optimised = made(family), made(family)
    lk.hf.optimize(optimised, impl="reference")
    prefix = "encoder.layer.0." if family == "internvl" else "encoder.layers.0."
    for name in [name for name, _ in model.named_modules() if name.startswith(prefix)]:
        for ours, theirs in zip(calls(optimised, name), calls(model, name), strict=True):
            assert ours[:2] == theirs[:2], name
            torch.testing.assert_close(ours[2][0], theirs[2][0], rtol=1e-9, atol=1e-9)


@families
def test_a_hook_sees_the_precision_of_the_stock_code_under_autocast(family):
    """Alone, on any module but the linear layers, whose inputs have autocast's dtype already."""

    def dtypes(model, name):
        seen = []
        first = lambda value: value[0] if isinstance(value, tuple) else value  # noqa: E731

        def hook(_, args, kwargs, output):
            seen.append((first(args or tuple(kwargs.values())).dtype, first(output).dtype))

        handle = model.get_submodule(name).register_forward_hook(hook, with_kwargs=True)
        with torch.autocast("cpu", torch.bfloat16):
            features(model, pixels().float())
        handle.remove()
        return seen

    model, optimised = made(family).float(), made(family).float()
    lk.hf.optimize(optimised, impl="reference")
    prefix = "encoder.layer.0" if family == "internvl" else "encoder.layers.0"
    names = [name for name, module in model.named_modules() if name.startswith(prefix) and type(module) is not nn.Linear]
    assert len(names) > 5
    for name in names:
        assert dtypes(optimised, name) == dtypes(model, name), name


def test_a_block_of_somebody_elses_gets_the_precision_of_the_stock_code_under_autocast():
    class Block(nn.Module):
        def forward(self, x):
            seen.append(x.dtype)
            return x.cumsum(-1)

    class Attention(nn.Module):
        def forward(self, hidden_states, **_):
            seen.append(hidden_states.dtype)
            return hidden_states, None

    results, seen = [], []
    for optimised in (False, True):
        model = made("aimv2").float()
        for layer in model.encoder.layers:
            layer.ffn, layer.attention = Block(), Attention()
        if optimised:
            lk.hf.optimize(model, impl="reference")
        with torch.autocast("cpu", torch.bfloat16):
            results.append(features(model, pixels().float()))
    assert set(seen) == {torch.float32}
    assert len(seen) == 16
    torch.testing.assert_close(*results)


def wrapped_norm(model):
    for layer in model.encoder.layers:
        layer.layer_norm2 = nn.LayerNorm(32, elementwise_affine=False)


def wide_norm(model):
    for layer in model.encoder.layers:
        layer.layer_norm2.float()


@pytest.mark.parametrize("change", [wrapped_norm, wide_norm])
def test_norms_that_the_operator_does_not_take_run_as_they_are(change):
    results = []
    for optimised in (False, True):
        model, x = made("siglip").bfloat16(), pixels().bfloat16()
        change(model)
        if optimised:
            lk.hf.optimize(model, impl="reference")
        results.append(features(model, x))
    ours, theirs = results
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=0.1, atol=0.1)


def test_sums_of_two_precisions_are_those_of_the_stock_code():
    results = []
    for optimised in (False, True):
        model, x = made("aimv2", use_head=False).bfloat16(), pixels().bfloat16()
        layer = model.encoder.layers[0]
        layer.attention.register_forward_hook(lambda _, __, output: (output[0].float(), output[1]))
        for part in (layer.ffn, *model.encoder.layers[1:], model.rms_norm):
            part.float()
        if optimised:
            lk.hf.optimize(model, impl="reference")
        results.append(features(model, x))
    assert results[0].dtype == torch.float32
    torch.testing.assert_close(*results, rtol=0.02, atol=0.02)


def test_a_forward_wrapped_since_is_undone_first():
    model, x = made("siglip"), pixels()
    expected = features(model, x)
    lk.hf.optimize(model, impl="reference", graphs=True)
    own, before = model.forward, classes(model)
    model.forward = lambda *args, **kwargs: own(*args, **kwargs)
    with pytest.raises(RuntimeError, match=r"^encoder: got an encoder whose forward has become a function .* Undo first"):
        lk.hf.restore(model)
    assert classes(model) == before
    torch.testing.assert_close(features(model, x), expected, rtol=1e-9, atol=1e-9)
    model.forward = own
    lk.hf.restore(model)
    assert "forward" not in model.__dict__


@families
@pytest.mark.parametrize("graphs", [False, True])
def test_a_shallow_copy_restores_both(family, graphs):
    model = made(family)
    before, attributes = classes(model), {name: set(module.__dict__) for name, module in model.named_modules()}
    lk.hf.optimize(model, impl="reference", graphs=graphs)
    lk.hf.restore(copy.copy(model))
    assert classes(model) == before
    assert settings_of(model) is None
    assert lk.hf.optimize(model, impl="reference", graphs=graphs).parts
    assert any(isinstance(module, fusing.Fused) for module in model.modules())
    lk.hf.restore(copy.copy(model))
    lk.hf.restore(model)
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == attributes


@families
def test_on_the_meta_device_too(family):
    model = made(family, "compressed").float().to("meta")
    lk.hf.optimize(model, impl="reference")
    assert model(pixels().float().to("meta")).last_hidden_state.shape == (2, 4 + (family in ("clip", "internvl")), 32)


@pytest.mark.parametrize("kind", ["stock", "compressed"])
@families
def test_traced(family, kind):
    model, x = made(family, kind).float().requires_grad_(False), pixels().float()
    model.config.return_dict = False
    lk.hf.optimize(model, impl="reference")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # of transformers
        traced = torch.jit.trace(model, (x,), check_trace=False, strict=False)
    outputs = traced(2 * x)
    first = outputs["last_hidden_state"] if isinstance(outputs, dict) else outputs[0]
    torch.testing.assert_close(first, model(2 * x)[0])


def test_forward_mode_runs_the_stock_block(monkeypatch):
    """On a processor that passes for a GPU: the one fusion of ours that is no operator of ours."""
    model, x = made("siglip", attn_implementation="eager").float().requires_grad_(False), pixels().float()

    def derivative():
        return torch.func.jvp(lambda x: model(x).last_hidden_state, (x,), (x.cos(),))[1]

    expected = derivative()
    lk.hf.optimize(model, impl="reference")
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True))
    with torch.no_grad():
        torch.testing.assert_close(derivative(), expected, rtol=1e-3, atol=1e-3)
