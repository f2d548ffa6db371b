"""Linear layers that share a product: which weights are read, where they lie, and what is computed for whom."""

import copy
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.profiler import ProfilerActivity, profile

import laco_kernels as lk
from laco_kernels.bench import system
from laco_kernels.hf import packs
from tests.hf.encoders import STOCK, compressed, pixels, stock
from tests.hf.optimised import features, made, packs_of

families = pytest.mark.parametrize("family", list(STOCK))


def are_together(model):
    return [pack.is_together() for pack in packs_of(model)]


@pytest.fixture
def products(monkeypatch):
    """The shape of every input that several layers were multiplied with at once."""
    shapes, product = [], packs.run_packed_linear
    monkeypatch.setattr(packs, "run_packed_linear", lambda x, *others: shapes.append(tuple(x.shape)) or product(x, *others))
    return shapes


def test_encoders_with_the_same_weights_all_share_products(products):
    encoder, x = stock("aimv2"), pixels()
    lk.hf.optimize(encoder, impl="reference")
    other = lk.hf.compress(encoder, layer=2)
    expected = features(other, x)
    lk.hf.optimize(other, impl="reference")
    assert all(are_together(encoder) + are_together(other))
    for model in (encoder, other):
        products.clear()
        features(model, x)
        assert len(products) == 8
    torch.testing.assert_close(features(other, x), expected, rtol=1e-9, atol=1e-9)
    other.float()
    assert all(pack.weights.tensor is None for pack in packs_of(encoder)), "the memory that the parameters left is kept"
    for model in (encoder, other):
        lk.hf.optimize(model, impl="reference")
    assert all(are_together(encoder) + are_together(other))


@pytest.mark.parametrize("training", [False, True])
def test_all_variants_that_are_measured_share_products(training, products):
    encoder, x = stock("siglip", dtype=torch.float32), pixels(dtype=torch.float32)
    modes = ["eager", "fused", "fused+graphs"]
    variants = [system._variants(encoder, layer, modes, "reference", training=training) for layer in (2, 4)]
    for made_at_one_depth in variants:
        for mode, model in made_at_one_depth.items():
            products.clear()
            features(model, x)
            assert len(products) == (0 if mode == "eager" else 4), mode


def prepared(model):
    accelerate = pytest.importorskip("accelerate")
    accelerate.Accelerator(cpu=True).prepare(model)


@pytest.mark.parametrize("move", [lambda m: m.to("cpu"), lambda m: m.double(), prepared])
def test_a_move_that_moves_nothing_changes_nothing(move):
    model = made("siglip")
    lk.hf.optimize(model, impl="reference")
    move(model)
    assert all(are_together(model))


def other_layers(model):
    model.encoder.layers[0].ffn.up_proj = model.encoder.layers[1].ffn.up_proj


def swapped(model):
    mlp, other = model.encoder.layers[0].self_attn, model.encoder.layers[1].self_attn
    mlp.k_proj, other.k_proj = other.k_proj, mlp.k_proj


def twice(layer):
    with torch.no_grad():
        layer.weight.mul_(2)
    return layer


def copied(name):
    def change(model):
        parent, _, child = name.rpartition(".")
        block = model.encoder.layers[0].get_submodule(parent)
        setattr(block, child, twice(copy.deepcopy(getattr(block, child))))

    return change


def merged(model):
    from peft import LoraConfig, get_peft_model

    tuned = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["up_proj"]))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(2)
    tuned.merge_and_unload()


def pruned(model):
    for name in "qkv":
        prune.l1_unstructured(getattr(model.encoder.layers[0].self_attn, f"{name}_proj"), "bias", amount=0.5)


class More(nn.Module):
    def forward(self, x):
        return x + 1


def parametrised(model):
    for name in "qkv":
        parametrize.register_parametrization(getattr(model.encoder.layers[0].self_attn, f"{name}_proj"), "bias", More())


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("aimv2", other_layers),
        ("aimv2", copied("ffn.up_proj")),
        ("aimv2", merged),
        ("siglip", copied("self_attn.k_proj")),
        ("siglip", swapped),
        ("siglip", pruned),
        ("siglip", parametrised),
    ],
)
def test_layers_put_in_later_count(family, change):
    results = []
    for optimised in (False, True):
        model = made(family)
        if optimised:
            lk.hf.optimize(model, impl="reference")
        change(model)
        results.append(features(model, pixels()))
    again = model
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
    lk.hf.optimize(again, impl="reference")
    torch.testing.assert_close(features(again, pixels()), results[0], rtol=1e-9, atol=1e-9)


def test_one_half_precision_layer_is_not_converted():
    model = made("siglip").float()
    lk.hf.optimize(model, impl="reference")
    model.encoder.layers[0].self_attn.q_proj.half()
    report = lk.hf.optimize(model, impl="reference")
    assert model.encoder.layers[0].self_attn.q_proj.weight.dtype == torch.float16
    assert "encoder.layers.0.self_attn (SiglipAttention): left as it is, the parameters of its queries" in str(report)


@pytest.mark.parametrize("compressor", ["tome", "visionzip", "prumerge_plus"])
def test_a_compressor_that_reads_attention_has_computed_no_more_than_it_reads(compressor, products):
    model = lk.hf.compress(stock("clip", side=8), compressor=compressor, layer=2)
    lk.hf.optimize(model, impl="reference")
    layer, rows = model.merging_layers[0], []
    for name in "qkv":
        linear = getattr(layer.self_attn, f"{name}_proj")
        linear.register_forward_hook(lambda _, __, y, name=name: rows.append((name, y.shape[1])))
    x = torch.randn(2, 65, 32, dtype=torch.float64)
    layer.attended(x)
    assert rows == [("k", 65), ("q", 1)]
    assert not products
    features(model, pixels(8))
    assert len(products) == 4, "one for each layer"
    assert packs.running.call is None


@pytest.mark.parametrize("mode", [lambda: torch.autocast("cpu", torch.bfloat16), lambda: torch.device("cpu")])
def test_no_mode_makes_copies_of_weights(mode):
    model, x = made("aimv2").float(), pixels().float()

    def copies():
        with profile(activities=[ProfilerActivity.CPU]) as seen, mode():
            features(model, x)
        return sum(event.name == "aten::cat" for event in seen.events())

    expected = copies()
    lk.hf.optimize(model, impl="reference")
    assert copies() == expected


@pytest.mark.parametrize(("family", "bounds"), [("aimv2", (205, 290)), ("siglip", (155, 250))])
def test_a_layer_enters_few_functions(family, bounds):
    model, x = made(family).float(), torch.randn(2, 16, 32)
    lk.hf.optimize(model, impl="reference")
    for gradients, bound in zip((False, True), bounds, strict=True):
        with torch.set_grad_enabled(gradients):
            model.encoder.layers[0](x, None)
            entered = []
            sys.setprofile(lambda _, event, __, entered=entered: entered.append(event) if event == "call" else None)
            try:
                model.encoder.layers[0](x, None)
            finally:
                sys.setprofile(None)
        assert len(entered) <= bound


def test_tied_queries_and_keys_share_no_memory():
    model = compressed(stock("siglip"), layer=2)
    attention = model.encoder.layers[0].self_attn
    attention.k_proj.weight = attention.q_proj.weight
    expected = features(model, pixels())
    lk.hf.optimize(model, impl="reference")
    assert attention.k_proj.weight is attention.q_proj.weight
    torch.testing.assert_close(features(model, pixels()), expected, rtol=1e-9, atol=1e-9)
