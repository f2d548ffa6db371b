"""Any compressor inside an encoder, at one point or several, on all four families."""

import json
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel

import laco_kernels as lk
from laco_kernels.geometry import Cascade, Windows
from laco_kernels.nn import COMPRESSORS

from .encoders import PREFIX, STOCK, pixels, stock

every_family = pytest.mark.parametrize("family", STOCK)
INSIDE = [name for name, kind in COMPRESSORS.items() if "inside" in kind.places]
WINDOWED = [name for name in INSIDE if not COMPRESSORS[name].reads_attention]
EXACT = {"rtol": 0, "atol": 1e-9}

# Every compressor in one family, and one that needs the layer's attention in all.
FAMILIES = tuple(STOCK)
PAIRS = sorted({(FAMILIES[i % 4], name) for i, name in enumerate(INSIDE)} | {(family, "tome") for family in STOCK})
every_pair = pytest.mark.parametrize(("family", "name"), PAIRS)


def compressed(encoder, **options):
    """Compress with compressors whose every parameter matters."""
    torch.manual_seed(3)
    model = lk.hf.compress(encoder, **options)
    with torch.no_grad():
        for merge in model.merges:
            for parameter in merge.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def layers_of(model):
    return model.encoder.layer if hasattr(model.encoder, "layer") else model.encoder.layers


def run_layer(layer, state, bias=None):
    """A stock layer, with ``bias [B, 1, 1, tokens]`` on its attention's logits."""
    if not hasattr(layer, "layernorm_before"):
        return layer(state, attention_mask=bias)
    handle = layer.attention.register_forward_pre_hook(lambda _, args: (*args, bias))
    try:
        return layer(state)
    finally:
        handle.remove()


def final_norm(encoder, state):
    for name in ("rms_norm", "post_layernorm", "layernorm"):
        if hasattr(encoder, name) and "clip_" not in encoder.config.model_type:  # CLIP norms the class token only
            state = getattr(encoder, name)(state)
    return state


def heads_of(encoder, layer, state):
    """The keys of all tokens and the queries, both ``[B, tokens, heads, head_dim]``, by the stock layer's own modules."""
    attention = layer.attention if hasattr(layer, "attention") else layer.self_attn
    norm = next(getattr(layer, name) for name in ("layer_norm1", "rms_norm1", "layernorm_before") if hasattr(layer, name))
    return [project(norm(state)).unflatten(2, (4, -1)) for project in (attention.k_proj, attention.q_proj)]


@pytest.mark.parametrize(("family", "name"), [(FAMILIES[i % 4], name) for i, name in enumerate(WINDOWED)])
@pytest.mark.parametrize(("side", "ratio"), [(4, 2), (6, 3), (5, 2), (8, 4)])
def test_it_is_stock_layers_around_the_compressor(family, name, side, ratio):
    encoder, images = stock(family, side), pixels(side)
    model = compressed(encoder, compressor=name, ratio=ratio, layer=2)
    with torch.no_grad():
        states = encoder(images, output_hidden_states=True).hidden_states
        state, grid = model.merges[0](states[2], (side, side))
        assert math.prod(grid) == (-(-side // ratio)) ** 2
        for layer in layers_of(encoder)[2:]:
            state = run_layer(layer, state)
        outputs = model(images, output_hidden_states=True)
        torch.testing.assert_close(outputs.last_hidden_state, final_norm(encoder, state), **EXACT)
        for one, other in zip(outputs.hidden_states[:2], states[:2], strict=True):
            torch.testing.assert_close(one, other, **EXACT)


@every_family
@pytest.mark.parametrize(("side", "ratios"), [(8, [2, 2]), (12, [3, 2]), (6, [2, 2]), (5, [2, 3]), (8, [4, 2])])
def test_several_points(family, side, ratios):
    encoder, images = stock(family, side), pixels(side)
    model = compressed(encoder, layers=[1, 3], ratio=ratios, zero_init_last=False)
    raster = lk.hf.compress(encoder, layers=[1, 3], ratio=ratios, layout="raster")
    raster.load_state_dict(model.state_dict())
    with torch.no_grad():
        state = encoder(images, output_hidden_states=True).hidden_states[1]
        state, grid = model.merges[0](state, (side, side))
        expected = [state]
        for layer in layers_of(encoder)[1:3]:
            state = run_layer(layer, state)
            expected.append(state)
        expected[-1] = model.merges[1](state, grid)[0]
        state = run_layer(layers_of(encoder)[3], expected[-1])
        for one in (model, raster):
            for encode in (one.set_attn_implementation("eager") or one,):
                outputs = encode(images, output_hidden_states=True, output_attentions=True)
                torch.testing.assert_close(outputs.last_hidden_state, final_norm(encoder, state), **EXACT)
                for actual, wanted in zip(outputs.hidden_states[1:4], expected, strict=True):
                    torch.testing.assert_close(actual, wanted, **EXACT)
    for one, other in zip(
        model(images, output_attentions=True).attentions, raster(images, output_attentions=True).attentions, strict=True
    ):
        torch.testing.assert_close(one, other, **EXACT)


@pytest.mark.parametrize(("family", "name"), [(FAMILIES[i % 4], name) for i, name in enumerate(WINDOWED)])
@pytest.mark.parametrize(("grid", "ratios"), [((8, 8), [2, 2]), ((4, 12), [2, 2]), ((12, 6), [3, 2]), ((16, 8), [2, 2, 2])])
def test_block_order_equals_raster_order_at_several_points(family, name, grid, ratios):
    changes = {"is_native": True} if family == "aimv2" else {}
    options = {"interpolate_pos_encoding": True} if family in ("siglip", "clip") else {}
    encoder, layers = stock(family, 8, **changes), [1, 2, 3][: len(ratios)]
    block = compressed(encoder, compressor=name, layers=layers, ratio=ratios)
    raster = lk.hf.compress(encoder, compressor=name, layers=layers, ratio=ratios, layout="raster")
    raster.load_state_dict(block.state_dict())
    images = torch.randn(2, 3, grid[0] * 14, grid[1] * 14, dtype=torch.float64)
    with torch.no_grad():
        outputs = [model(images, output_hidden_states=True, **options) for model in (block, raster)]
    torch.testing.assert_close(outputs[0].last_hidden_state, outputs[1].last_hidden_state, **EXACT)
    for one, other in zip(outputs[0].hidden_states, outputs[1].hidden_states, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


@every_family
def test_tokens_that_stand_for_more_patches_get_more_attention(family):
    encoder, images = stock(family), pixels()
    model = lk.hf.compress(encoder, compressor="tome", layers=[1, 3])
    flat = lk.hf.compress(encoder, compressor="tome", layers=[1, 3], proportional=False)
    with torch.no_grad():
        states = encoder(images, output_hidden_states=True).hidden_states
        keys, _ = heads_of(encoder, layers_of(encoder)[0], states[0])
        state, sizes = model.merges[0].merge_all(states[1], keys)
        assert sizes.max() > 1
        for layer in layers_of(encoder)[1:3]:
            before, bias = state, sizes.log()[:, None, None, :]
            state = run_layer(layer, state, bias)
        keys, _ = heads_of(encoder, layer, before)
        state, sizes = model.merges[1].merge_all(state, keys, sizes)
        state = run_layer(layers_of(encoder)[3], state, sizes.log()[:, None, None, :])
        actual = model(images).last_hidden_state
        torch.testing.assert_close(actual, final_norm(encoder, state), **EXACT)
        assert (flat(images).last_hidden_state - actual).abs().max() > 1e-6
    assert sum(sizes[0].tolist()) == PREFIX[family] + 16


@every_family
@pytest.mark.parametrize("name", ["visionzip", "prumerge_plus"])
def test_scores_come_from_the_layers_own_projections(family, name):
    encoder, images = stock(family), pixels()
    model = lk.hf.compress(encoder, compressor=name, depth=1, num_tokens=5)
    with torch.no_grad():
        states = encoder(images, output_hidden_states=True).hidden_states
        layer = layers_of(encoder)[3]
        keys, queries = heads_of(encoder, layer, states[3])
        query = queries[:, 0] if PREFIX[family] else None
        state, _ = model.merges[0](run_layer(layer, states[3]), (4, 4), keys=keys, query=query)
        torch.testing.assert_close(model(images).last_hidden_state, final_norm(encoder, state), **EXACT)
    assert state.shape[1] == PREFIX[family] + 5
    if PREFIX[family] and name == "visionzip":  # the class token's row of the weights themselves
        encoder.set_attn_implementation("eager")
        weights = encoder(images, output_attentions=True).attentions[3][:, :, 0, 1:]
        best = weights.div(weights.sum(-1, keepdim=True)).mean(1).topk(4).indices.sort(1).values
        dominant = run_layer(layer, states[3])[:, 1:].gather(1, best.unsqueeze(2).expand(-1, -1, 32))
        torch.testing.assert_close(state[:, 1:5], dominant, **EXACT)


@every_pair
def test_it_is_trained_saved_and_reloaded(family, name, tmp_path):
    model = compressed(stock(family, dtype=torch.float32), compressor=name, layers=[1, 2], ratio=[2, 2])
    model.train().gradient_checkpointing_enable()
    images = pixels(dtype=torch.float32)
    model(images).last_hidden_state.square().sum().backward()
    checkpointed = {key: p.grad for key, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_disable()
    model(images).last_hidden_state.square().sum().backward()
    for key, parameter in model.named_parameters():
        assert (parameter.grad is None) == (checkpointed[key] is None)
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, checkpointed[key])
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for merge in model.merges for p in merge.parameters())
    model.eval().save_pretrained(tmp_path)
    reloaded = AutoModel.from_pretrained(tmp_path)
    assert reloaded.config.compression == model.config.compression
    torch.testing.assert_close(reloaded(images).last_hidden_state, model(images).last_hidden_state)
    added = [key for key in model.state_dict() if ".merge." in key]
    assert len(added) == sum(len(merge.state_dict()) for merge in model.merges)
    assert set(model.state_dict()) - set(added) == set(stock(family).state_dict())
    json.dumps(model.config.to_dict()["compression"])


@every_pair
def test_it_is_compiled_whole(family, name):
    model = compressed(stock(family, dtype=torch.float32), compressor=name, layer=2)
    images = pixels(dtype=torch.float32)
    torch._dynamo.reset()
    with torch.no_grad():
        expected = model(images).last_hidden_state
        actual = torch.compile(model, backend="eager", fullgraph=True)(images).last_hidden_state
    torch.testing.assert_close(actual, expected)


@every_pair
def test_optimize_leaves_the_numbers(family, name):
    model = compressed(stock(family), compressor=name, layer=2)
    with torch.no_grad():
        expected = model(pixels()).last_hidden_state
        lk.hf.optimize(model, impl="triton")
        torch.testing.assert_close(model(pixels()).last_hidden_state, expected, rtol=1e-6, atol=1e-6)  # norms in float32
        lk.hf.restore(model)
        torch.testing.assert_close(model(pixels()).last_hidden_state, expected, **EXACT)


@pytest.mark.parametrize("name", WINDOWED)
def test_the_residual_is_a_switch_for_all(name):
    encoder = stock("siglip")
    plain = compressed(encoder, compressor=name, layer=2, residual=False)
    with_residual = lk.hf.compress(encoder, compressor=name, layer=2, residual=True)
    with_residual.load_state_dict(plain.state_dict())
    x = torch.randn(2, 16, 32, dtype=torch.float64)
    pooled = F.avg_pool2d(x.transpose(1, 2).unflatten(2, (4, 4)), 2).flatten(2).transpose(1, 2)
    difference = with_residual.merges[0](x, (4, 4))[0] - plain.merges[0](x, (4, 4))[0]
    torch.testing.assert_close(difference, pooled, **EXACT)


def test_an_order_of_windows_of_windows_is_undone():
    stages = tuple(Windows(grid, ratio, 1) for grid, ratio in (((12, 24), 3), ((4, 8), 2), ((2, 4), 2)))
    order = Cascade(stages)
    tokens = torch.arange(2 * (1 + 12 * 24)).view(2, -1, 1)
    moved = order.to_block_order(tokens)
    assert torch.equal(order.to_raster_order(moved), tokens)
    # All the patches of an outermost window lie together, in it those of one within, and in that those of an innermost one.
    for size, side in ((9, 3), (36, 6), (144, 12)):
        groups = moved[0, 1:, 0].sub(1).view(-1, size)
        rows, columns = groups // 24, groups % 24
        assert ((rows.amax(1) - rows.amin(1)) == side - 1).all()
        assert ((columns.amax(1) - columns.amin(1)) == side - 1).all()


REFUSALS = [
    ({"layers": [3, 1]}, ValueError, r"layers: got \[3, 1\], expected layers in ascending order"),
    ({"layers": [2, 2]}, ValueError, "layers: got"),
    ({"layers": []}, ValueError, r"layers: got \[\], expected at least one layer"),
    ({"layers": 3}, TypeError, "layers: got 3, expected a list of integers"),
    ({"layers": [1, 5]}, ValueError, "layer: got 5, expected 1 to 4"),
    ({"layers": [1, 2], "layer": 3}, ValueError, r"got layer=3 together with layers=\[1, 2\], expected one of them"),
    ({"layers": [1, 2], "ratio": [2]}, ValueError, "ratio: got 1 of them, expected one for each of the 2 layers"),
    ({"layer": 1, "ratio": [2, 2]}, ValueError, "ratio: got 2 of them, expected one for each of the 1 layers"),
    ({"layers": [1, 2], "ratio": [2, 1]}, ValueError, "ratio: got 1, expected an integer of at least 2"),
    ({"compressor": "lacoo"}, ValueError, "compressor: got 'lacoo', expected one of .*Did you mean 'laco'"),
    ({"compressor": "tome", "num_tokens": 17}, ValueError, "num_tokens: got 17, expected at most 16"),
    ({"compressor": "tome", "layers": [1, 2], "num_tokens": 16, "residual": True}, ValueError, "residual: got True"),
    ({"compressor": "tome", "num_tokens": 16}, ValueError, "num_tokens: got 16, expected fewer than the 16 tokens .* layer 1"),
    ({"compressor": "tome", "layers": [1, 3], "num_tokens": 5}, ValueError, "fewer than the 5 tokens that come to layer 3"),
    ({"compressor": "tome", "layers": [1, 3], "num_tokens": [5]}, ValueError, "num_tokens: got 1 of them, expected one for"),
    ({"compressor": "visionzip", "contextual": 3, "layers": [1, 3]}, ValueError, "contextual: got 3, expected at most 1"),
    ({"compressor": "vila", "eps": "x"}, TypeError, "eps: got 'x', expected a number above zero"),
    ({"compressor": "gemma3", "eps": -5.0}, ValueError, r"eps: got -5\.0, expected a number above zero"),
    ({"compressor": "c_abstractor", "grid": (4, 4)}, TypeError, r"grid: got \[4, 4\], expected no value, since the encoder"),
    ({"ratio": torch.tensor([2, 2])}, TypeError, "ratio: got tensor"),
]


@pytest.mark.parametrize(("options", "error", "message"), REFUSALS)
def test_refusals(options, error, message):
    with pytest.raises(error, match=message):
        lk.hf.compress(stock("clip"), **options)


@pytest.mark.parametrize("name", [name for name, kind in COMPRESSORS.items() if "inside" not in kind.places])
def test_what_may_not_stand_inside(name):
    with pytest.raises(
        ValueError, match=rf"compressor: got '{re.escape(name)}'.*expected one that may stand inside: laco.*It stands"
    ):
        lk.hf.compress(stock("clip"), compressor=name)


@every_family
@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_attention_in_proportion_needs_a_bias(family, attention):
    model = lk.hf.compress(stock(family), compressor="tome", layer=1)
    model.config._attn_implementation = attention
    with pytest.raises(RuntimeError, match=rf"attn_implementation: got '{attention}'.*expected one of 'sdpa', 'eager'"):
        model(pixels())
    for options in ({"layer": 1, "proportional": False}, {"depth": 1}):  # no layer behind it that would need one
        model = lk.hf.compress(stock(family), compressor="tome", **options)
        model.config._attn_implementation = attention
        model._check_bias()


def test_scores_by_a_class_token_that_is_not_there():
    with pytest.raises(ValueError, match="scores: got 'cls', expected 'auto' or 'key_norm'"):
        lk.hf.compress(stock("siglip"), compressor="visionzip", scores="cls")


def test_numbers_of_numpy_are_saved(tmp_path):
    eps, flag, layers = np.float32(1e-5), np.bool_(True), [np.int64(1), np.int64(3)]
    model = lk.hf.compress(stock("clip"), compressor="vila", eps=eps, residual=flag, layers=layers)
    model.save_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path).config.compression["options"] == {"eps": float(eps), "residual": True}
    tome = lk.hf.compress(stock("clip"), compressor="tome", num_tokens=[np.int64(8), 5], layers=[1, 3])
    tome.save_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path)(pixels()).last_hidden_state.shape == (2, 6, 32)


@every_family
@pytest.mark.parametrize("name", ["tome", "visionzip", "prumerge_plus"])
def test_half_precision_does_not_overflow(family, name):
    encoder = stock(family, 16, torch.float16, hidden_size=256, intermediate_size=64)
    model = lk.hf.compress(encoder, compressor=name, layer=2, ratio=4)
    with torch.no_grad():
        assert encoder(pixels(16, dtype=torch.float16)).last_hidden_state.isfinite().all()
        assert model(pixels(16, dtype=torch.float16)).last_hidden_state.isfinite().all()


def test_positions_of_a_compressor_are_those_of_the_grid_that_comes_to_it():
    model = lk.hf.compress(stock("siglip", 8), compressor="c_abstractor", layers=[1, 2])
    assert [merge.grid for merge in model.merges] == [(8, 8), (4, 4)]
