"""What a compressed encoder computes, on all four families."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import laco_kernels as lk
from laco_kernels import reference
from laco_kernels.geometry import Windows

from .encoders import PREFIX, STOCK, compressed, pixels, stock

pytestmark = pytest.mark.parametrize("family", STOCK)
EXACT = {"rtol": 0, "atol": 1e-10}


def by_hand(encoder, model, images, layer, ratio, side):
    """Stock layers, the reference merge in raster order, and stock layers again; then the model's own final norm."""
    path = "encoder.layer" if hasattr(encoder.encoder, "layer") else "encoder.layers"
    layers = encoder.get_submodule(path)
    states = encoder(images, output_hidden_states=True).hidden_states
    merge = model.merges[0]
    windows = Windows((side, side), ratio, model.config.prefix_tokens, pad=True)
    mlp = merge.layer.linear1.weight, merge.layer.linear1.bias, merge.layer.linear2.weight, merge.layer.linear2.bias
    state, _ = reference.patch_merge_forward(states[layer], *mlp, windows=windows, residual_kind=merge.residual)
    for block in layers[layer:]:
        state = block(state) if "internvl" in encoder.config.model_type else block(state, attention_mask=None)
    for name in ("rms_norm", "post_layernorm", "layernorm"):
        if hasattr(encoder, name) and "clip_" not in encoder.config.model_type:  # CLIP norms the class token only
            state = getattr(encoder, name)(state)
    return state


@pytest.mark.parametrize("layout", ["block", "raster"])
@pytest.mark.parametrize(("side", "ratio", "layer"), [(4, 2, 1), (4, 2, 2), (4, 2, 4), (5, 2, 2), (6, 3, 3), (4, 4, 2)])
def test_it_is_stock_layers_around_a_merge(family, layout, side, ratio, layer):
    encoder, images = stock(family, side), pixels(side)
    model = compressed(encoder, layer=layer, ratio=ratio, layout=layout)
    with torch.no_grad():
        actual = model(images).last_hidden_state
        torch.testing.assert_close(actual, by_hand(encoder, model, images, layer, ratio, side), **EXACT)
    windows = -(-side // ratio)
    assert actual.shape == (2, PREFIX[family] + windows**2, 32)


@pytest.mark.parametrize("options", [{"residual": "channel_group"}, {"residual": "none"}, {"norm": "layer_norm"}])
def test_block_layout_equals_raster_layout(family, options):
    encoder, images = stock(family), pixels()
    block = compressed(encoder, **options)
    raster = compressed(encoder, **options, layout="raster")
    raster.load_state_dict(block.state_dict())
    outputs = [
        model.set_attn_implementation("eager") or model(images, output_hidden_states=True, output_attentions=True)
        for model in (block, raster)
    ]
    assert len(outputs[0].hidden_states) == 5
    assert len(outputs[0].attentions) == 4
    for one, other in zip(
        outputs[0].hidden_states + outputs[0].attentions, outputs[1].hidden_states + outputs[1].attentions, strict=True
    ):
        torch.testing.assert_close(one, other, **EXACT)
    torch.testing.assert_close(outputs[0].last_hidden_state, outputs[1].last_hidden_state, **EXACT)


def test_states_before_the_merge_are_those_of_the_stock_encoder(family):
    encoder, images = stock(family), pixels()
    model = compressed(encoder, layer=3)
    expected = encoder(images, output_hidden_states=True).hidden_states
    actual = model(images, output_hidden_states=True).hidden_states
    for i in range(3):
        torch.testing.assert_close(actual[i], expected[i], **EXACT)
    assert [state.shape[1] - PREFIX[family] for state in actual] == [16, 16, 16, 4, 4]


def test_outputs_as_a_tuple(family):
    model = compressed(stock(family))
    images = pixels()
    whole = model(images, output_hidden_states=True)
    parts = model(images, output_hidden_states=True, return_dict=False)
    assert isinstance(parts, tuple)
    torch.testing.assert_close(parts[0], whole.last_hidden_state)
    torch.testing.assert_close(parts[-1][0], whole.hidden_states[0])


def test_it_shares_weights_and_leaves_the_stock_encoder_alone(family):
    encoder, images = stock(family), pixels()
    before = copy.deepcopy(encoder.state_dict())
    expected = encoder(images).last_hidden_state
    model = compressed(encoder)
    assert not model.training
    own = dict(model.named_parameters())
    assert all(own[name] is parameter for name, parameter in encoder.named_parameters())
    assert {name for name in own if name not in dict(encoder.named_parameters())} == merge_keys(model)
    model(images)
    assert torch.equal(encoder(images).last_hidden_state, expected)
    assert all(torch.equal(before[name], tensor) for name, tensor in encoder.state_dict().items())


def merge_keys(model, layer=0):
    path = f"{model.layers_path}.{layer}.merge"
    return {f"{path}.layer.linear{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}


def test_it_keeps_mode_dtype_and_frozen_parameters(family):
    encoder = stock(family, dtype=torch.bfloat16).train().requires_grad_(False)
    encoder.gradient_checkpointing_enable()
    model = lk.hf.compress(encoder)
    assert model.training
    assert model.is_gradient_checkpointing
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == merge_keys(model)


def test_an_untrained_merge_is_average_pooling(family):
    encoder, images = stock(family), pixels()
    model = lk.hf.compress(encoder, layer=2)
    states = encoder(images, output_hidden_states=True).hidden_states
    pooled = reference.residual(states[2], Windows((4, 4), 2, PREFIX[family]), "mean")
    merged = model(images, output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(merged[:, PREFIX[family] :], pooled, **EXACT)


def test_a_config_gives_random_weights(family):
    config = stock(family).config
    torch.manual_seed(0)
    model = lk.hf.compress(config, depth=1)
    assert type(model) is type(lk.hf.compress(stock(family)))
    merge = model.merges[0]
    assert merge.layer.linear1.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert merge.layer.linear2.weight.abs().sum() == 0
    assert model(pixels(dtype=torch.float32)).last_hidden_state.isfinite().all()


@pytest.mark.parametrize("side", [4, 5])
def test_gradient_checkpointing_gives_the_same_gradients(family, side):
    model = compressed(stock(family, side), layer=2).train()
    images = pixels(side)
    gradients = []
    for switch in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        switch()
        model.zero_grad()
        model(images).last_hidden_state.square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert merge_keys(model, 1) <= gradients[0].keys()
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, **EXACT)


def test_a_recomputation_uses_the_image_size_of_its_own_forward(family):
    options = {"interpolate_pos_encoding": True} if family in ("siglip", "clip") else {}
    changes = {"is_native": True} if family == "aimv2" else {}
    model = compressed(stock(family, **changes), layer=2).train()
    wide, tall = torch.randn(1, 3, 42, 126, dtype=torch.float64), torch.randn(1, 3, 126, 42, dtype=torch.float64)
    gradients = []
    for switch in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        switch()
        model.zero_grad()
        output = model(wide, **options).last_hidden_state
        model(tall, **options)
        output.square().sum().backward()
        gradients.append(model.merges[0].layer.linear1.weight.grad.clone())
    torch.testing.assert_close(gradients[1], gradients[0], **EXACT)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementations(family, implementation):
    encoder = stock(family)
    encoder.set_attn_implementation(implementation)
    model = compressed(encoder)
    assert model.config._attn_implementation == implementation
    other = compressed(stock(family))
    torch.testing.assert_close(model(pixels()).last_hidden_state, other(pixels()).last_hidden_state, **EXACT)


@pytest.mark.parametrize("side", [4, 5])
def test_it_compiles_without_a_graph_break(family, side):
    model = compressed(stock(family, side, dtype=torch.float32))
    images = pixels(side, dtype=torch.float32)
    torch._dynamo.reset()
    whole = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(whole(images).last_hidden_state, model(images).last_hidden_state, rtol=1e-4, atol=1e-4)


def test_peft_trains_the_merge_beside_lora(family):
    from peft import LoraConfig, get_peft_model

    model = compressed(stock(family, dtype=torch.float32))
    expected = model(pixels(dtype=torch.float32)).last_hidden_state
    tuned = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["merge"]))
    actual = tuned.get_base_model()(pixels(dtype=torch.float32)).last_hidden_state
    torch.testing.assert_close(actual, expected)
    actual.square().sum().backward()
    trained = {name for name, p in tuned.named_parameters() if p.requires_grad and p.grad is not None}
    assert sum("merge.modules_to_save" in name for name in trained) == 4
    assert all("lora" in name or "merge" in name for name in trained)


def test_autocast_keeps_the_residual_stream(family):
    model = compressed(stock(family, dtype=torch.float32), layer=2)
    x = torch.randn(2, PREFIX[family] + 16, 32)
    with torch.autocast("cpu", torch.bfloat16):
        states = model(pixels(dtype=torch.float32), output_hidden_states=True).hidden_states
        merged, _ = model.merges[0](x, (4, 4))
    assert states[1].dtype == states[2].dtype
    assert merged.dtype == torch.float32
    assert torch.equal(merged[:, : PREFIX[family]], x[:, : PREFIX[family]])
    # Only the MLP is rounded: what it adds to the exact residual is a bfloat16.
    added = (merged - torch.cat([x[:, : PREFIX[family]], reference.residual(x, windows_4x4(family), "mean")], 1)).abs()
    full = (model.merges[0](x, (4, 4))[0] - merged).abs()
    assert full.max() < added.max() * 0.02


def windows_4x4(family):
    return Windows((4, 4), 2, PREFIX[family])


def test_lora_on_the_merge_is_not_passed_by(family):
    from peft import LoraConfig, get_peft_model

    model = compressed(stock(family, dtype=torch.float32))
    images = pixels(dtype=torch.float32)
    expected = model(images).last_hidden_state
    tuned = get_peft_model(model, LoraConfig(target_modules=["linear1", "linear2"])).get_base_model()
    torch.testing.assert_close(tuned(images).last_hidden_state, expected)
    adapters = {name: p for name, p in tuned.named_parameters() if "lora" in name}
    assert len(adapters) == 4
    with torch.no_grad():
        for parameter in adapters.values():
            parameter.fill_(0.1)
    changed = tuned(images).last_hidden_state
    assert (changed - expected).abs().max() > 1e-3
    changed.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapters.values())


def test_offloading_brings_the_merges_weights(family):
    import accelerate

    model = compressed(stock(family, dtype=torch.float32, vision_use_head=False, use_head=False))
    images = pixels(dtype=torch.float32)
    expected = model(images).last_hidden_state
    accelerate.cpu_offload(model, execution_device="cpu")
    assert model.merges[0].layer.linear1.weight.is_meta
    torch.testing.assert_close(model(images).last_hidden_state, expected)


def test_chosen_hidden_states(family):
    encoder, images = stock(family), pixels()
    model = compressed(encoder, layer=2)
    chosen = model(images, output_hidden_states=[0, 1, 3]).hidden_states
    raster = compressed(encoder, layer=2, layout="raster")(images, output_hidden_states=[0, 1, 3]).hidden_states
    # Which layers a list means differs between versions of transformers; the raster layout needs no restoring.
    assert len(chosen) == len(raster)
    assert [state is None for state in chosen] == [state is None for state in raster]
    for one, other in zip(chosen, raster, strict=True):
        if one is not None:
            torch.testing.assert_close(one, other, **EXACT)


@pytest.mark.parametrize("part", ["encoder", "layer"])
def test_a_part_alone_can_be_compiled(family, part):
    options = {"interpolate_pos_encoding": True} if family in ("siglip", "clip") else {}
    model = compressed(stock(family, side=6, **({"is_native": True} if family == "aimv2" else {})), layer=2)
    images = [torch.randn(1, 3, height, width, dtype=torch.float64) for height, width in ((42, 168), (168, 42), (84, 84))]
    with torch.no_grad():
        expected = [model(image, **options).last_hidden_state for image in images]
        torch._dynamo.reset()
        (model.encoder if part == "encoder" else model.merging_layers[0]).compile(backend="eager")
        for image, output in zip(images, expected, strict=True):
            torch.testing.assert_close(model(image, **options).last_hidden_state, output, **EXACT)


def test_threads_with_images_of_different_sizes(family):
    options = {"interpolate_pos_encoding": True} if family in ("siglip", "clip") else {}
    model = compressed(stock(family, **({"is_native": True} if family == "aimv2" else {})), layer=2).eval()
    images = [torch.randn(1, 3, 42, 126, dtype=torch.float64), torch.randn(1, 3, 126, 42, dtype=torch.float64)]
    expected = [model(image, **options).last_hidden_state for image in images]

    def run(i):
        return (model(images[i % 2], **options).last_hidden_state - expected[i % 2]).abs().max().item()

    with ThreadPoolExecutor(4) as pool:
        assert max(pool.map(run, range(60))) < 1e-10


def test_the_encoder_without_the_model_around_it(family):
    model = compressed(stock(family), layer=2)
    tokens = model.embeddings(pixels())
    if hasattr(model, "pre_layrnorm"):
        tokens = model.pre_layrnorm(tokens)
    states = model(pixels(), output_hidden_states=True).hidden_states
    torch.testing.assert_close(model.encoder(tokens)[0], states[-1], **EXACT)


def test_gradient_checkpointing_is_inherited_with_its_arguments(family):
    encoder = stock(family)
    encoder.gradient_checkpointing_enable({"use_reentrant": True})
    model = lk.hf.compress(encoder)
    assert model.merging_layers[0]._gradient_checkpointing_func.keywords == {"use_reentrant": True}


def test_the_merging_layer_is_never_split_over_devices(family):
    model = lk.hf.compress(stock(family))
    assert type(model.merging_layers[0]).__name__ in model._no_split_modules
