"""Patched connectors in use: hooked, adapted, quantised, wrapped and compiled by code that knows nothing of them."""

import copy

import accelerate
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.activations import ACT2FN

import laco_kernels as lk
from tests.hf.multimodal import MODELS, built, connectors_of, features_of, inputs
from tests.hf.optimised import classes
from tests.hf.test_patch import CALLS, Calls

families = pytest.mark.parametrize("family", list(MODELS))


def made(family, dtype=torch.float32):
    """The first connector of a family, and an input."""
    return connectors_of(family, built(family, dtype))[0], features_of(family, dtype)[0]


def counted(module, *given, **named):
    """Return the output, and how often operators were called."""
    with Calls() as calls:
        y = module(*given, **named)
    return y, sum(calls.laco.values())


class Quantised(torch.Tensor):
    """Stands for a weight that a linear layer can multiply by and our operators cannot read."""


def hooked(module, name):
    module.get_submodule(name).register_forward_hook(lambda _, __, output: output * 2)


def adapted(module, name):
    layer = module.get_submodule(name)
    if isinstance(layer, nn.Linear):
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, nn.Sequential(layer, nn.Tanh()))


def wrapped(module, name):
    part = module.get_submodule(name)
    stock = part.forward
    part.forward = lambda x: stock(x) * 2


def quantised(module, name):
    layer = module.get_submodule(name)
    if isinstance(layer, nn.Linear):
        layer.weight = nn.Parameter((layer.weight.detach() * 2).as_subclass(Quantised))


@pytest.mark.parametrize("change", [hooked, adapted, wrapped, quantised])
@families
def test_what_is_changed_inside_is_not_passed_over(family, change):
    names = [name for name, _ in made(family)[0].named_modules() if name]
    stopped = 0
    for name in names:
        results = []
        for patched in (False, True):
            module, x = made(family)
            if patched:
                (before,) = lk.hf.patch(module).replaced
                assert before.inactive is None
            change(module, name)
            y, calls = counted(module, x)
            results.append(y.as_subclass(torch.Tensor))
            if patched:
                (after,) = lk.hf.patch(module).replaced
                if after.inactive:
                    stopped += 1
                    assert not calls
                else:
                    assert calls <= sum(count for op, count in CALLS[family].items() if "backward" not in op)
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    assert stopped == {hooked: OBSTACLES, wrapped: OBSTACLES, adapted: PRODUCTS, quantised: PRODUCTS}[change][family]


# Children that the operators pass over, norms not among them, and linear layers.
OBSTACLES = {
    "internvl": 3,
    "qwen2_vl": 4,
    "qwen2_5_vl": 4,
    "qwen3_vl": 3,
    "idefics3": 2,
    "smolvlm": 2,
    "llama4": 4,
    "gemma3": 1,
    "llava": 3,
}
PRODUCTS = {
    "internvl": 2,
    "qwen2_vl": 2,
    "qwen2_5_vl": 2,
    "qwen3_vl": 2,
    "idefics3": 1,
    "smolvlm": 1,
    "llama4": 2,
    "gemma3": 0,
    "llava": 2,
}


def test_a_watched_norm_is_called_and_the_products_are_fused():
    module, x = made("qwen2_5_vl")
    lk.hf.patch(module)
    seen = []
    module.ln_q.register_forward_hook(lambda *_: seen.append(1))
    with Calls() as calls:
        module(x)
    assert calls.laco == {"patch_merge": 1}
    assert seen


@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh", "silu", "quick_gelu", "relu"])
def test_the_activation_decides(activation):
    results = []
    for patched in (False, True):
        module, x = made("llava", torch.float64)
        module.act = ACT2FN[activation]
        if patched:
            (part,) = lk.hf.patch(module).replaced
            assert (part.inactive is None) == activation.startswith("gelu")
        y, calls = counted(module, x)
        assert calls == (patched and activation.startswith("gelu"))
        results.append(y)
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_widths_that_four_does_not_divide_stay_stock():
    module, _ = made("llava")
    module.linear_1 = nn.Linear(18, 32)
    (part,) = lk.hf.patch(module).replaced
    assert part.inactive == "18 channels, which 4 does not divide"
    assert counted(module, torch.randn(2, 5, 18))[1] == 0


@families
def test_hooks_on_the_connector_and_calls_by_name(family):
    module, x = made(family)
    expected = module(x)
    argument = {"internvl": "image_features", "llava": "image_features", "gemma3": "vision_outputs"}.get(family, "x")
    argument = {"idefics3": "image_hidden_states", "smolvlm": "image_hidden_states", "llama4": "encoded_patches"}.get(
        family, argument
    )
    lk.hf.patch(module)
    module.register_forward_hook(lambda _, __, output: output * 2)
    y, calls = counted(module, **{argument: x})
    assert calls == sum(count for op, count in CALLS[family].items() if "backward" not in op) / len(MODELS[family][3])
    torch.testing.assert_close(y, expected * 2, rtol=1e-5, atol=1e-5)
    with pytest.raises(TypeError, match="argument"):
        module(x, another=x)


def test_any_shape_that_the_stock_code_takes():
    module, x = made("llava")
    whole = torch.randn(2, 1 + 64, 16)
    for given in (x[0, 0], x[0], whole[:, 1:], x.unflatten(1, (8, 8)), x[:, ::2], x.transpose(0, 1), x[:0], x[:, :0]):
        lk.hf.unpatch(module)
        expected = module(given)
        lk.hf.patch(module)
        y, calls = counted(module, given)
        assert calls == (given.numel() > 0)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["idefics3", "llama4", "gemma3"])
def test_images_that_have_no_windows_fail_as_before(family):
    module, _ = made(family)
    x = torch.randn(2, 49, 16)
    with pytest.raises(RuntimeError) as stock:
        module(x)
    lk.hf.patch(module)
    with pytest.raises(RuntimeError) as ours:
        module(x)
    assert str(ours.value) == str(stock.value)


def test_dropout_is_the_stock_codes():
    module, x = made("llama4")
    module.mlp.dropout = 0.5
    lk.hf.patch(module)
    assert counted(module, x)[1] == 2
    module.train()
    assert counted(module, x)[1] == 0


@families
def test_transforms_run_the_stock_code(family):
    module, x = made(family, torch.float64)
    expected = torch.func.jvp(module, (x,), (x,))[1]
    rows = torch.func.vmap(module)(x[:, None] if x.dim() == 3 else x[None])
    lk.hf.patch(module)
    torch.testing.assert_close(torch.func.jvp(module, (x,), (x,))[1], expected)
    torch.testing.assert_close(torch.func.vmap(module)(x[:, None] if x.dim() == 3 else x[None]), rows)


def test_a_model_on_another_device_runs_the_stock_code():
    module, x = made("internvl")
    lk.hf.patch(module)
    assert module.to("meta")(x.to("meta")).shape == (2, 16, 32)


LAYERS = {"internvl": "linear_1", "qwen2_vl": "mlp.0", "idefics3": "proj", "llama4": "fc1", "gemma3": "q_proj"}


@pytest.mark.parametrize("first", ["patch", "adapt"])
@pytest.mark.parametrize("family", list(LAYERS))
def test_adapters_train_alike(family, first):
    results = []
    for patched in (False, True):
        model = built(family)
        if patched and first == "patch":
            lk.hf.patch(model, impl="reference")
        torch.manual_seed(7)
        config = LoraConfig(target_modules=[LAYERS[family]], init_lora_weights=False)
        tuned = get_peft_model(model, config)
        if patched and first == "adapt":
            (part,) = lk.hf.patch(tuned, impl="reference").replaced
            assert (part.inactive is None) == (family == "gemma3"), "there the language model is adapted"
        tuned(**inputs(family)).logits.square().sum().backward()
        results.append({name: p.grad for name, p in tuned.named_parameters() if p.requires_grad})
        if patched:
            whole = tuned.merge_and_unload()
            expected = {op: count for op, count in CALLS[family].items() if "backward" not in op}
            with Calls() as calls, torch.no_grad():
                whole.float()(**inputs(family, torch.float32)) if family != "llama4" else whole(**inputs(family))
            assert calls.laco == expected
    plain, ours = results
    assert plain.keys() == ours.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-9, atol=1e-9)


def test_adapters_of_whole_connectors():
    model = lambda: built("internvl", torch.float32)  # noqa: E731
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["multi_modal_projector"])
    first = model()
    lk.hf.patch(first)
    tuned = get_peft_model(first, config)
    with Calls() as calls:
        tuned(**inputs("internvl", torch.float32))
    assert calls.laco == {"patch_merge": 1}
    later = get_peft_model(model(), config)
    assert len(lk.hf.patch(later).replaced) == 2, "the connector and its copy"
    with Calls() as calls:
        later(**inputs("internvl", torch.float32))
    assert calls.laco == {"patch_merge": 1}


def test_patched_behind_a_compilers_back():
    module, x = made("internvl")
    seen = []

    def backend(graph, _):
        seen.append(any("laco" in str(node.target) for node in graph.graph.nodes))
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    expected = compiled(x)
    lk.hf.patch(compiled)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5)
    assert seen == [False, True]


class Mine(nn.Module):
    """Has no connector."""


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (lambda: "llava", {}, TypeError, r"^model: got str, expected a torch\.nn\.Module\. Pass the model"),
        (lambda: built("llava").config, {}, TypeError, "^model: got LlavaConfig"),
        (
            Mine,
            {},
            ValueError,
            "^model: got a Mine without a connector to replace, expected one that is or contains one of Int",
        ),
        (
            lambda: built("llama4").multi_modal_projector,
            {},
            ValueError,
            r"^model: got .*\(Llama4MultiModalProjector: left as it is, a single product",
        ),
        (lambda: built("llava"), {"impl": "fastest"}, ValueError, "^impl: got 'fastest'"),
        (lambda: built("gemma3"), {"impl": "composite"}, ValueError, "^impl: got 'composite', .* for add_norm"),
        (lambda: built("llava"), {"impl": "cuda"}, RuntimeError, "^impl: got 'cuda'"),
    ],
)
def test_refusals_change_nothing(model, options, error, message):
    given = model()
    before = classes(given) if isinstance(given, nn.Module) else None
    with pytest.raises(error, match=message):
        lk.hf.patch(given, **options)
    assert before is None or classes(given) == before


def test_unpatch_wants_a_module():
    with pytest.raises(TypeError, match=r"^model: got str"):
        lk.hf.unpatch("llava")


def test_what_somebody_else_has_changed_is_left():
    model = built("llava")
    projector = model.model.multi_modal_projector
    projector.__class__ = type("Mine", (type(projector),), {})
    with pytest.raises(ValueError, match=r"Mine.*a subclass of LlavaMultiModalProjector that may compute something else"):
        lk.hf.patch(model)
    model = built("llava")
    accelerate.hooks.add_hook_to_module(model.model.multi_modal_projector, accelerate.hooks.ModelHook())
    with pytest.raises(ValueError, match="a forward of somebody else's; patch before accelerate"):
        lk.hf.patch(model)


def test_what_came_last_is_undone_first():
    for change, undo in (
        (
            lambda m: accelerate.hooks.add_hook_to_module(m, accelerate.hooks.ModelHook()),
            accelerate.hooks.remove_hook_from_module,
        ),
        (
            lambda m: nn.utils.parametrize.register_parametrization(m, "mm_input_projection_weight", nn.Tanh()),
            lambda m: nn.utils.parametrize.remove_parametrizations(m, "mm_input_projection_weight", leave_parametrized=False),
        ),
    ):
        module, x = made("gemma3")
        before = classes(module)
        report = lk.hf.patch(module)
        change(module)
        expected = module(x)
        assert lk.hf.patch(module) == report
        torch.testing.assert_close(module(x), expected)
        with pytest.raises(RuntimeError, match=r"^model: got a connector that has .*Undo first what came last"):
            lk.hf.unpatch(module)
        undo(module)
        lk.hf.unpatch(module)
        assert classes(module) == before


def test_a_copy_of_a_patched_connector_goes_into_a_stock_model():
    module, x = made("llava")
    lk.hf.patch(module)
    twin = copy.deepcopy(module)
    lk.hf.unpatch(module)
    assert isinstance(twin, type(module))
    assert counted(twin, x)[1] == 1
    assert counted(module, x)[1] == 0
