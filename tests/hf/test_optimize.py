"""`hf.optimize` and `hf.restore`: the same numbers, names, hooks and gradients, and nothing left behind."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModel

import laco_kernels as lk
from laco_kernels import testing
from laco_kernels.hf import fused, fusing
from laco_kernels.hf.packs import PackedLinear, running
from laco_kernels.kernels import select
from tests.hf.encoders import STOCK, compressed, pixels, stock
from tests.hf.optimised import classes, features, made, packs_of

FAMILIES = list(STOCK)
families = pytest.mark.parametrize("family", FAMILIES)
kinds = pytest.mark.parametrize("kind", ["stock", "compressed"])
IMPLS = ["reference", "triton"]  # the latter interpreted where there is no GPU


def first_layer(model):
    return next(
        module for module in model.modules() if type(module) in {**fused.LAYERS, **dict.fromkeys(fused.LAYERS.values())}
    )


@pytest.mark.parametrize("impl", IMPLS)
@kinds
@families
def test_outputs_and_gradients_stay(family, kind, impl):
    model, x = made(family, kind), pixels().requires_grad_()
    leaves = [x, *model.parameters()]

    def everything():
        states = model(x, output_hidden_states=True)
        last = states.last_hidden_state
        grad = torch.linspace(-1, 1, last.numel(), dtype=x.dtype).view_as(last)
        gradients = torch.autograd.grad(last, leaves, grad, allow_unused=True)
        return [*states.hidden_states, last, *[g for g in gradients if g is not None]]

    before, expected = classes(model), everything()
    report = lk.hf.optimize(model, impl=impl)
    assert all(part.inactive is None or "inference" in part.name for part in report.parts), str(report)
    assert sum(before[name] is not kind for name, kind in classes(model).items()) >= 4 * 4
    for ours, theirs in zip(everything(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    lk.hf.restore(model)
    assert classes(model) == before
    for ours, theirs in zip(everything(), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_the_measured_choice_is_asked_by_form_and_where_there_may_be_a_backward_pass_in_both_directions(monkeypatch):
    faster = {("add_norm", "rms"), ("gated_silu", None), ("activate", "quick_gelu")}
    asked = set()

    def choose(op, direction, device, dtype, rows, form=None):
        asked.add((op, form, direction))
        return select.Choice("triton" if (op, form) in faster and direction in fast else "reference", "said so")

    monkeypatch.setattr(select, "choose", choose)
    monkeypatch.setattr(fusing, "LEAST", {False: 0, True: 0})
    fast = ("forward",)
    for family, forms in (("aimv2", {("add_norm", "rms"), ("gated_silu", None)}), ("clip", {("add_norm", "layer")})):
        model, x = made(family), pixels()
        report = lk.hf.optimize(model)
        active = {part.name for part in report.parts if part.inactive != "said so"}
        assert ("RMSNorm in one pass" in active) == (family == "aimv2")
        assert ("residual sum, LayerScale and norm in one pass" in active) == (family == "aimv2")
        asked.clear()
        features(model, x)
        assert asked >= {(*form, "forward") for form in forms}
        assert {direction for *_, direction in asked} == {"forward"}
        model(x)
        assert {(*form, "backward") for form in forms} <= asked
    layer = first_layer(model)
    x = torch.zeros(1, 4, 16)
    assert fusing.implementation(layer, "activate", x, "quick_gelu") is None, "backward is slower"
    with torch.no_grad():
        assert fusing.implementation(layer, "activate", x, "quick_gelu") == "triton"
    fast = ("forward", "backward")
    assert fusing.implementation(layer, "activate", x, "quick_gelu") == "triton"
    assert fusing.implementation(layer, "add_norm", x, "layer") is None


@kinds
@families
def test_on_a_processor_the_measured_choice_changes_nothing(family, kind):
    model, x = made(family, kind), pixels()
    expected = features(model, x)
    report = lk.hf.optimize(model, graphs=True)
    assert report.parts
    assert all(part.inactive for part in report.parts)
    assert "GPU" in str(report)
    assert torch.equal(features(model, x), expected)


@families
def test_parameters_stay_what_they_are(family):
    model = made(family)
    before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    assert before.keys() <= model.state_dict().keys()
    keys = list(model.state_dict())
    lk.hf.optimize(model, impl="reference")
    after = dict(model.named_parameters())
    assert list(model.state_dict()) == keys
    assert all(id(after[name]) == number and torch.equal(after[name], value) for name, (number, value) in before.items())
    assert len(packs_of(model)) == (8 if family == "aimv2" else 4)
    assert all(pack.is_together() for pack in packs_of(model))
    # Storages of their own: whoever saves weights takes those that share one for tied, and drops all but one.
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in model.parameters())
    lk.hf.restore(model)
    assert all(torch.equal(after[name], value) for name, (_, value) in before.items())


def test_it_is_idempotent_and_takes_new_settings():
    model = made("aimv2")
    first = lk.hf.optimize(model, impl="reference")
    shape = classes(model)
    assert lk.hf.optimize(model, impl="reference") == first
    assert classes(model) == shape
    assert lk.hf.optimize(model, fuse=False, graphs=True).parts[0].name.startswith("CUDA graphs")
    assert type(first_layer(model)) in fused.LAYERS
    lk.hf.restore(model)
    assert "forward" not in model.__dict__
    lk.hf.restore(model)  # nothing left to do


@families
def test_either_order_with_compress(family):
    x = pixels()
    after = compressed(stock(family), layer=2)
    lk.hf.optimize(after, impl="reference")
    encoder = stock(family)
    lk.hf.optimize(encoder, impl="reference")
    before = compressed(encoder, layer=2)
    assert classes(before) == classes(after)
    torch.testing.assert_close(features(before, x), features(after, x), rtol=1e-12, atol=1e-12)


@families
def test_hooks_see_what_they_always_saw(family):
    model, x = made(family), pixels()
    names = [name for name, module in model.named_modules() if name and not isinstance(module, nn.ModuleList)]

    def watched(chosen):
        seen, handles = {}, []
        for name in chosen:
            hook = lambda _, __, output, name=name: seen.__setitem__(name, output)  # noqa: E731
            handles.append(model.get_submodule(name).register_forward_hook(hook))
        features(model, x)
        for handle in handles:
            handle.remove()
        return {name: output[0] if isinstance(output, tuple) else output for name, output in seen.items()}

    expected = watched(names)
    lk.hf.optimize(model, impl="reference")
    for chosen in (names, *[[name] for name in names if ".0." in name]):
        found = watched(chosen)
        assert found.keys() == {name for name in chosen if name in expected}
        for name, output in found.items():
            if isinstance(output, torch.Tensor):
                torch.testing.assert_close(output, expected[name], rtol=1e-9, atol=1e-9)


@kinds
@families
def test_states_and_attentions_are_recorded(family, kind):
    model, x = made(family, kind, attn_implementation="eager"), pixels()
    with torch.no_grad():
        expected = model(x, output_hidden_states=True, output_attentions=True)
        lk.hf.optimize(model, impl="reference")
        found = model(x, output_hidden_states=True, output_attentions=True)
    for name in ("hidden_states", "attentions"):
        assert len(found[name]) == len(expected[name]) > 0
        for ours, theirs in zip(found[name], expected[name], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@kinds
@families
def test_saved_and_loaded(family, kind, tmp_path):
    model, x = made(family, kind).float(), pixels().float()
    lk.hf.optimize(model, impl="reference")
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(model)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(features(loaded, x), features(model, x), rtol=1e-4, atol=1e-4)
    model.load_state_dict(loaded.state_dict())
    torch.testing.assert_close(features(loaded, x), features(model, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
@families
def test_copies_stand_alone(family, copied):
    model, x = made(family, "compressed"), pixels()
    lk.hf.optimize(model, impl="reference", graphs=True)
    expected = features(model, x)
    twin = copied(model)
    assert classes(twin) == classes(model)
    torch.testing.assert_close(features(twin, x), expected, rtol=1e-12, atol=1e-12)
    assert twin.forward.encoder is twin
    ours = {id(module) for module in twin.modules()}
    assert all(id(member) in ours for m in twin.modules() if type(m) is PackedLinear for member in m.pack.members)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(features(twin, x), expected, rtol=1e-12, atol=1e-12)
    lk.hf.optimize(twin, fuse=False, compile=True)
    assert copied(twin).forward.forward.__self__ is not twin


@families
def test_moved_weights_are_read_where_they_are(family):
    model, x = made(family), pixels()
    lk.hf.optimize(model, impl="reference")
    model.float()
    model.double()  # no longer side by side
    expected = features(made(family).float().double(), x)
    torch.testing.assert_close(features(model, x), expected, rtol=1e-9, atol=1e-9)
    layer = next(m for m in model.modules() if type(m) is PackedLinear)
    layer.weight = nn.Parameter(torch.zeros_like(layer.weight))
    assert not torch.allclose(features(model, x), expected)


@families
def test_gradient_checkpointing(family):
    model, x = made(family), pixels()
    model.train()

    def gradients():
        model.zero_grad()
        model(x).last_hidden_state.square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    lk.hf.optimize(model, impl="reference")
    for ours, theirs in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@kinds
@families
def test_under_autocast_dtypes_stay_and_errors_too(family, kind):
    model, x = made(family, kind), pixels()
    truth = features(model, x)
    model, x = model.float(), x.float()
    with torch.autocast("cpu", torch.bfloat16):
        eager = features(model, x)
        lk.hf.optimize(model, impl="reference")
        ours = features(model, x)
    assert ours.dtype == eager.dtype
    assert testing.compare(ours, eager, truth, [])[2]


@pytest.mark.parametrize("impl", IMPLS)
@families
def test_in_float32_errors_stay(family, impl):
    model, x = made(family, "compressed", hidden_size=64), pixels()
    truth = features(model, x)
    model, x = model.float(), x.float()
    eager = features(model, x)
    lk.hf.optimize(model, impl=impl)
    assert testing.compare(features(model, x), eager, truth, [])[2]


def test_threads_do_not_share_what_waits():
    model = made("siglip")
    lk.hf.optimize(model, impl="reference")
    inputs = [pixels() * (i + 1) for i in range(4)]
    expected = [features(model, x) for x in inputs]
    wrong = []

    def work(i):
        for _ in range(20):
            if not torch.allclose(features(model, inputs[i]), expected[i]) or running.call is not None:
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@kinds
@families
def test_it_compiles_without_a_graph_break(family, kind):
    model, x = made(family, kind, num_hidden_layers=2).float(), pixels().float()
    expected = features(model, x)
    lk.hf.optimize(model, impl="reference")
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(features(compiled, x), expected, rtol=1e-4, atol=1e-4)


def test_compile_by_option():
    model, x = made("siglip", num_hidden_layers=1).float(), pixels().float()
    expected = features(model, x)
    report = lk.hf.optimize(model, impl="reference", compile=True)
    assert any("compile" in part.name for part in report.parts)
    torch.testing.assert_close(features(model, x), expected, rtol=1e-4, atol=1e-4)
    lk.hf.restore(model)
    assert torch.equal(features(model, x), expected)


@families
def test_a_training_run_takes_the_same_course(family):
    courses = {}
    for name, dtype in (("exact", torch.float64), ("eager", torch.float32), ("fused", torch.float32)):
        model, x = made(family, "compressed", num_hidden_layers=2).to(dtype), pixels(batch=4).to(dtype)
        model.train()
        if name == "fused":
            lk.hf.optimize(model, impl="reference")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        target = torch.randn(4, 1, 32, generator=torch.Generator().manual_seed(5)).to(dtype)
        losses = []
        for _ in range(200):
            loss = (model(x).last_hidden_state - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach().double())
        courses[name] = torch.stack(losses)
    exact, eager, fused = courses.values()
    assert exact[-1] < 0.5 * exact[0]
    assert (fused - exact).norm() <= 2 * (eager - exact).norm()


@families
def test_layers_call_the_operators_without_the_dispatcher(family):
    model, x = made(family), pixels()
    lk.hf.optimize(model, impl="reference")
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        features(model, x)
        model(x).last_hidden_state.sum().backward()
    assert not [event.name for event in seen.events() if event.name.startswith("laco::")]


def test_frozen_layers_and_trained_ones_in_one_pack():
    gradients = []
    for optimised in (False, True):
        model, x = made("clip"), pixels()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("k_proj" in name or name.endswith("q_proj.bias"))
        if optimised:
            lk.hf.optimize(model, impl="reference")
        model(x).last_hidden_state.square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, expected in gradients[0].items():
        assert (expected is None) == (gradients[1][name] is None), name
        if expected is not None:
            torch.testing.assert_close(gradients[1][name], expected, rtol=1e-9, atol=1e-9)


def test_what_launches_dominate_is_left_alone(monkeypatch):
    """Where a kernel was measured faster, but the host would not come round to it, unless launches are free."""
    chosen = select.Choice("reference-of-a-gpu", "measured")
    monkeypatch.setattr(select, "choose", lambda *_: chosen)
    monkeypatch.setattr(fusing, "LEAST", {False: 100, True: 200})
    module = fused.FusedRMSNorm()
    module.impl = None

    def taken(size, form):
        return fusing.implementation(module, "add_norm", torch.zeros(size // 4, 4), form) is not None

    with torch.no_grad():
        assert [taken(size, "layer") for size in (96, 100)] == [False, True]
        assert taken(4, "rms"), "its stock code takes seven launches"
        with fusing.launches_are_free():
            with fusing.launches_are_free():
                assert taken(4, "layer")
            assert taken(4, "layer")
        assert not taken(4, "layer")
    assert [taken(size, "layer") for size in (196, 200)] == [False, True]


def test_an_adapter_in_the_place_of_a_layer():
    class Adapter(nn.Module):
        """As PEFT does it: the layer as a child, and something added to what it makes."""

        def __init__(self, base_layer):
            super().__init__()
            self.base_layer = base_layer

        def forward(self, x):
            return self.base_layer(x) + 1

    for name in ("attention.q_proj", "ffn.up_proj", "rms_norm2"):
        model, x = made("aimv2"), pixels()
        parent, child = model.encoder.layers[1], name.rpartition(".")[2]
        parent = parent.get_submodule(name.rpartition(".")[0])
        results = []
        for optimised in (False, True):
            twin = copy.deepcopy(model)
            if optimised:
                lk.hf.optimize(twin, impl="reference")
            parent = twin.encoder.layers[1].get_submodule(name.rpartition(".")[0])
            setattr(parent, child, Adapter(getattr(parent, child)))
            results.append(features(twin, x))
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def whole_clip():
    from transformers import CLIPConfig, CLIPModel

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    return CLIPModel(CLIPConfig(vision_config={**sizes, "image_size": 28, "patch_size": 14}, text_config=sizes))


@pytest.mark.parametrize(
    ("encoder", "options", "error", "name"),
    [
        (lambda: nn.Linear(2, 2), {}, TypeError, "encoder"),
        (lambda: whole_clip(), {}, TypeError, "encoder"),
        (lambda: made("clip"), {"impl": "fastest"}, ValueError, "impl"),
        (lambda: made("clip"), {"impl": "composite"}, ValueError, "impl"),
    ],
)
def test_refusals_change_nothing(encoder, options, error, name):
    model = encoder()
    before = classes(model)
    with pytest.raises(error, match=f"^{name}: got"):
        lk.hf.optimize(model, **options)
    assert classes(model) == before
