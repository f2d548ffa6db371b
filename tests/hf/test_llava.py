"""LLaVA-style models: what they compute, what comes back from disk, and what is refused."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    CLIPVisionModelWithProjection,
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
)

import laco_kernels as lk
from laco_kernels.bench import cases, prefill
from laco_kernels.hf.points import sides
from laco_kernels.nn import COMPRESSORS

from .encoders import PREFIX, SIZES, STOCK, pixels, stock
from .llava import LLMS, TEXT, VARIANTS, llava, llm

IMAGE = 310
every_family = pytest.mark.parametrize("family", STOCK)
every_variant = pytest.mark.parametrize("variant", VARIANTS)
every_llm = pytest.mark.parametrize("kind", LLMS)


def prompt(tokens, images=1, batch=2):
    """A question around so many images."""
    words = torch.randint(3, 290, (batch, 5), generator=torch.Generator().manual_seed(7))
    ids = torch.cat([words[:, :2], torch.full((batch, images * tokens), IMAGE), words[:, 2:]], 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def inputs(model, side=4, dtype=torch.float32):
    return prompt(model.config.image_seq_length) | {"pixel_values": pixels(side=side, dtype=dtype)}


@every_llm
@every_variant
@every_family
def test_it_trains_and_comes_back_from_disk(family, variant, kind, tmp_path):
    options, even, odd = VARIANTS[variant]
    side, tokens = (5, odd) if kind == "llama" else (4, even)
    model = llava(family, kind, side, image_token_id=IMAGE, **options)
    assert model.config.image_seq_length == tokens
    given = inputs(model, side)
    model(**given, labels=given["input_ids"]).loss.backward()
    new = [parameter for name, parameter in model.named_parameters() if "projector" in name or ".merge." in name]
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in new)

    model.save_pretrained(tmp_path)
    reloaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert type(reloaded) is type(model)
    ours = set(options) & {"projector"}
    assert type(model) is (lk.hf.LacoLlavaForConditionalGeneration if ours else LlavaForConditionalGeneration)
    assert "auto_map" not in (tmp_path / "config.json").read_text()
    assert reloaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in reloaded.state_dict().items())
    for parameter in reloaded.parameters():
        parameter.data = parameter.data.clone()  # sums are rounded differently where memory is aligned differently
    with torch.no_grad():
        assert torch.equal(reloaded(**given).logits, model(**given).logits)
    written = [m.generate(**given, max_new_tokens=6, do_sample=False) for m in (model, reloaded)]
    assert torch.equal(*written)
    blank = model(**given | {"pixel_values": torch.zeros_like(given["pixel_values"])}).logits
    assert not torch.allclose(blank[:, -1], model(**given).logits[:, -1]), "the image makes no difference"


BEHIND = [name for name, kind in COMPRESSORS.items() if "behind" in kind.places and not kind.reads_attention]
SMALL = {
    "mbtf": {"num_blocks": 2},
    "mbtf+stf": {"num_blocks": 2},
    "qformer": {"num_queries": 9, "hidden_dim": 16, "num_layers": 2, "num_heads": 2},
}


@pytest.mark.parametrize("projector", BEHIND)
def test_every_compressor_can_be_the_projector(projector, tmp_path):
    model = llava("clip", side=5, projector=projector, projector_options=SMALL.get(projector), image_token_id=IMAGE)
    assert model.config.image_seq_length == (9 if COMPRESSORS[projector].reduces else 25)
    given = inputs(model, side=5)
    model(**given, labels=given["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in model.model.multi_modal_projector.parameters())
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(reloaded) is type(model)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in reloaded.state_dict().items())
    torch.testing.assert_close(reloaded(**given).logits, model(**given).logits)


@every_family
def test_mbtf_reads_the_blocks_it_names(family):
    model = llava(family, side=5, projector="mbtf+stf", projector_options={"num_blocks": 3}, dtype=torch.float64)
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector.compressor
    assert model.config.vision_feature_layer == [1, 3, 4]
    states = tower(pixels(side=5), output_hidden_states=True).hidden_states
    side_by_side = torch.cat([states[n][:, PREFIX[family] :] for n in (1, 3, 4)], -1)
    fusion = projector.blocks_fusion
    fused = F.gelu(fusion.linear2(F.gelu(fusion.linear1(side_by_side))))
    expected = projector.fusion(fused, (5, 5))
    features = torch.stack(model.get_image_features(pixels(side=5)).pooler_output)
    assert features.shape == (2, 9, TEXT["hidden_size"])
    torch.testing.assert_close(features, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("variant", ["laco", "stf"])
def test_tokens_take_the_placeholders_in_order(variant):
    options, tokens, _ = VARIANTS[variant]
    model = llava("siglip", image_token_id=IMAGE, dtype=torch.float64, **options)
    given = prompt(tokens, images=2, batch=1)
    images = pixels()
    features = model.get_image_features(images).pooler_output
    embedded = model.get_input_embeddings()(given["input_ids"])
    by_hand = torch.cat([embedded[:, :2], features[0][None], features[1][None], embedded[:, -3:]], 1)
    expected = model(inputs_embeds=by_hand, attention_mask=given["attention_mask"]).logits
    torch.testing.assert_close(model(**given, pixel_values=images).logits, expected, rtol=1e-10, atol=1e-10)


def test_parts_are_the_ones_given():
    tower, text = stock("clip", dtype=torch.float32), llm(tie_word_embeddings=True)
    tower.requires_grad_(False)
    tower.set_attn_implementation("eager")
    text.generation_config.max_new_tokens = 3
    model = lk.hf.build_llava(tower, text, projector="stf", image_token_id=IMAGE)
    assert model.model.vision_tower is tower
    assert model.model.language_model is text.model
    assert model.lm_head.weight is text.get_input_embeddings().weight
    assert tower.config._attn_implementation == "eager"
    assert text.config._attn_implementation == "sdpa"
    assert model.generation_config.max_new_tokens == 3
    assert not any(parameter.requires_grad for parameter in tower.parameters())
    assert all(parameter.requires_grad for parameter in model.model.multi_modal_projector.parameters())
    assert not any(module.training for module in model.modules())
    assert lk.hf.build_llava(tower, text.train(), projector="stf").model.multi_modal_projector.training
    compressed = lk.hf.build_llava(tower, text, depth=0.5).model.vision_tower
    assert compressed.embeddings.patch_embedding.weight is tower.embeddings.patch_embedding.weight
    assert compressed.config._attn_implementation == "eager"


@pytest.mark.parametrize("projector", ["mlp2x_gelu", "pixel_shuffle"])
def test_parts_from_configs_and_folders(projector, tmp_path):
    tower, text = stock("aimv2", dtype=torch.bfloat16), llm("llama").bfloat16()
    tower.save_pretrained(tmp_path / "vision")
    text.save_pretrained(tmp_path / "text")
    lk.hf.compress(tower, depth=0.5).save_pretrained(tmp_path / "compressed")
    model = lk.hf.build_llava(tmp_path / "vision", str(tmp_path / "text"), projector=projector)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    for part, given in ((model.model.vision_tower, tower), (model.model.language_model, text.model)):
        assert all(torch.equal(tensor, given.state_dict()[name]) for name, tensor in part.state_dict().items())
    assert torch.equal(model.lm_head.weight, text.lm_head.weight)
    model = lk.hf.build_llava(tower.config, text.config, projector=projector, dtype=torch.float64)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert lk.hf.build_llava(tower.config, text).dtype == torch.bfloat16
    assert lk.hf.build_llava(tmp_path / "compressed", text).config.image_seq_length == 4


@pytest.mark.parametrize("projector", ["mlp2x_gelu", "mbtf+stf", "qformer"])
def test_a_new_projector_is_drawn_as_its_parts_are(projector, tmp_path):
    """Also where the rest comes from a checkpoint, which lacks it."""
    options = {"qformer": {"num_queries": 3, "hidden_dim": 24, "num_layers": 2, "num_heads": 2}, "mbtf+stf": {"num_blocks": 2}}
    text, tower = llm(), stock("clip", dtype=torch.float32)
    model = lk.hf.build_llava(tower, text, projector=projector, projector_options=options.get(projector))
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert all(0 < p.std() < 0.5 for name, p in model.named_parameters() if "projector" in name and p.dim() == 2)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "projector" not in name}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    loaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {name for name in model.state_dict() if "projector" in name}
    for name, parameter in loaded.named_parameters():
        if "projector" in name and parameter.dim() == 2:
            other = model.get_parameter(name)
            assert 0.5 < parameter.std() / other.std() < 2, name
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_a_published_llava_checkpoint_lacks_exactly_the_projector(tmp_path):
    """Published ones have the keys of older versions of transformers."""
    model = llava("clip", "llama")
    ours = lk.hf.build_llava(model.model.vision_tower.config, model.model.language_model.config, projector="stf")
    model.config.save_pretrained(tmp_path)
    renamed = {"model.language_model": "language_model.model", "lm_head": "language_model.lm_head", "model.": ""}
    weights = {}
    for name, tensor in model.state_dict().items():
        start = next(start for start in renamed if name.startswith(start))
        weights[renamed[start] + name.removeprefix(start)] = tensor.clone()
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    loaded, info = type(ours).from_pretrained(tmp_path, config=ours.config, output_loading_info=True)
    assert {name.partition("projector.")[2].split(".")[0] for name in info["missing_keys"]} == {"compressor"}
    assert all("projector" in name for name in info["unexpected_keys"])
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert torch.equal(
        loaded.model.vision_tower.embeddings.class_embedding, model.model.vision_tower.embeddings.class_embedding
    )


@pytest.mark.parametrize("variant", ["laco", "mbtf+stf"])
def test_gradient_checkpointing_changes_no_gradient(variant):
    model = llava("internvl", image_token_id=IMAGE, **VARIANTS[variant][0]).train()
    given = inputs(model)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(**given, labels=given["input_ids"], use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert any("vision_tower" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_an_adapted_llm_with_its_projector_trained(tmp_path):
    model = llava("clip", projector="mbtf+stf", projector_options={"num_blocks": 2}, image_token_id=IMAGE)
    given = inputs(model)
    before = model(**given).logits.detach()
    lora = LoraConfig(r=2, target_modules=r".*language_model.*q_proj", modules_to_save=["multi_modal_projector"])
    adapted = get_peft_model(copy.deepcopy(model), lora)
    torch.testing.assert_close(adapted(**given).logits, before, rtol=0, atol=0)
    adapted(**given, labels=given["input_ids"]).loss.backward()
    trained = [name for name, parameter in adapted.named_parameters() if parameter.grad is not None]
    assert trained
    assert all("lora_" in name or "multi_modal_projector.modules_to_save" in name for name in trained)
    assert any("blocks_fusion" in name for name in trained)
    adapted.save_pretrained(tmp_path)
    assert any("blocks_fusion" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    assert torch.isfinite(adapted.generate(**given, max_new_tokens=2)).all()


@pytest.mark.parametrize("variant", ["laco", "mbtf+stf"])
def test_a_compiled_model_computes_the_same(variant):
    model = llava("siglip", image_token_id=IMAGE, **VARIANTS[variant][0])
    given = inputs(model)
    with torch.no_grad():
        expected = torch.stack(model.get_image_features(given["pixel_values"]).pooler_output)

        def features(pixel_values):
            return torch.stack(model.get_image_features(pixel_values).pooler_output)

        compiled = torch.compile(features, fullgraph=True, backend="eager")(given["pixel_values"])
    torch.testing.assert_close(compiled, expected)
    model.model.vision_tower = torch.compile(model.model.vision_tower, backend="eager")
    torch.testing.assert_close(torch.stack(model.get_image_features(given["pixel_values"]).pooler_output), expected)


def test_an_optimised_tower_and_a_patched_projector():
    model = llava("clip", depth=0.5, image_token_id=IMAGE)
    given = inputs(model)
    expected = model(**given).logits
    lk.hf.optimize(model.model.vision_tower)
    lk.hf.patch(model)
    torch.testing.assert_close(model(**given).logits, expected)


FULL = [
    # encoder, LLM, options, tokens an image, millions of parameters: the projector's, the whole model's
    ("aimv2-l-336", "qwen2.5-0.5b", {"depth": 0.25}, 144, 1.72, 309.53 + 494.03 + 5.25 + 1.72),
    ("siglip-so400m-384", "qwen2.5-0.5b", {"depth": 0.25}, 196, 1.84, None),
    ("internvit-300m-448", "qwen2.5-0.5b", {"depth": 0.25}, 256, 1.72, None),
    ("clip-l-336", "vicuna-7b", {}, 576, 20.98, 303.5 + 6738.4 + 20.98),
    ("clip-l-336", "vicuna-7b", {"projector": "mbtf+stf"}, 144, 37.75 + 151.02, 303.5 + 6738.4 + 188.8),
    ("clip-l-336", "llama-3.1-8b", {"projector": "mbtf+stf", "projector_options": {"variant": "released"}}, 144, 171.99, None),
    ("clip-l-336", "vicuna-7b", {"projector": "token_packer", "ratio": 3}, 64, None, None),
    ("clip-l-336", "vicuna-7b", {"projector": "qformer"}, 32, None, None),
]


@pytest.mark.parametrize(("vision", "text", "options", "tokens", "projectors", "whole"), FULL)
def test_models_of_the_papers_sizes(vision, text, options, tokens, projectors, whole):
    with torch.device("meta"):
        configs = AutoConfig.from_pretrained(cases.FOLDER / vision), AutoConfig.from_pretrained(prefill.FOLDER / text)
        model = lk.hf.build_llava(*configs, image_token_id=5, **options)
        assert model.config.image_seq_length == tokens
        images = torch.empty(1, 3, *sides(model.config.vision_config.image_size))
        features = model.get_image_features(images).pooler_output
    assert features[0].shape == (tokens, model.config.text_config.hidden_size)
    projector = model.model.multi_modal_projector
    for part, millions in ((projector, projectors), (model, whole)):
        if millions is not None:
            assert sum(parameter.numel() for parameter in part.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)
    if options.get("projector") == "mbtf+stf":
        wanted = [3, 6, 9, 12, 15, 18, 21, 24] if not options.get("projector_options") else [23, 21, 18, 15, 12, 9, 6, 3]
        assert model.config.vision_feature_layer == wanted


def test_which_layer_is_read():
    text = llm().config
    assert lk.hf.build_llava(stock("clip").config, text).config.vision_feature_layer == -2
    assert lk.hf.build_llava(stock("siglip").config, text).config.vision_feature_layer == -1
    assert lk.hf.build_llava(stock("clip").config, text, layer=3).config.vision_feature_layer == -2
    assert lk.hf.build_llava(stock("clip").config, text, layer=4).config.vision_feature_layer == -1
    both = lk.hf.build_llava(stock("clip").config, text, vision_feature_layer=[1, -1]).config
    assert both.vision_feature_layer == [1, -1]
    assert both.vision_feature_select_strategy == "default"
    assert lk.hf.build_llava(stock("siglip").config, text).config.vision_feature_select_strategy == "full"
    layers = lk.hf.build_llava(
        stock("clip", num_hidden_layers=24).config, text, projector="token_packer"
    ).config.vision_feature_layer
    assert layers == [12, 16, 22, 23]


REFUSALS = [
    ({"compressor": "magic"}, ValueError, "compressor: got 'magic', expected one of laco"),
    ({"compressor": "mbtf"}, ValueError, "compressor: got 'mbtf', expected one that may stand inside"),
    ({"depth": 0.5, "layer": 2}, ValueError, r"depth, layer, layers: got depth=0\.5 together with layer=2"),
    ({"depth": 2}, ValueError, "depth: got 2, expected a fraction"),
    ({"projector": "stff"}, ValueError, "projector: got 'stff', expected one of .*Did you mean 'stf'"),
    ({"projector": "tome"}, ValueError, "projector: got 'tome', expected one that reads tokens.*compressor='tome'"),
    ({"projector": "downsample"}, ValueError, "projector: got 'downsample', expected one that reads tokens.*image processor"),
    ({"projector": "stf", "ratio": 0}, ValueError, "ratio: got 0, expected an integer of at least 1"),
    ({"projector": "mbtf", "projector_options": {"ratio": 2}}, ValueError, "ratio: got 2, expected 1"),
    ({"ratio": 2}, ValueError, "ratio: got 2 with projector='mlp2x_gelu' and nothing compressed inside, expected none"),
    ({"depth": 0.5, "projector": "stf"}, ValueError, "projector: got 'stf' behind an encoder that is compressed inside"),
    ({"compressor_options": {"norm": "rms_norm"}}, ValueError, "compressor_options: got .*expected none without a compressor"),
    ({"projector": "stf", "projector_options": {"out_dim": 3}}, TypeError, "out_dim: got 3, expected no value"),
    ({"projector": "stf", "projector_options": {"varient": "paper"}}, TypeError, "options: got varient.*'variant'"),
    ({"projector": "mbtf+stf"}, ValueError, "num_blocks: got 8, expected at most num_layers = 4"),
    ({"layer": 4, "vision_feature_layer": -2}, ValueError, "vision_feature_layer: got -2, the tokens in front of the merge"),
    (
        {"layer": 2, "projector": "mbtf", "projector_options": {"num_blocks": 2}, "vision_feature_layer": [1, 4]},
        ValueError,
        "vision_feature_layer: got 1, the tokens in front of the merge after layer 2, expected a layer from 2 to 4",
    ),
    ({"vision_feature_layer": 5}, ValueError, "vision_feature_layer: got 5, expected -5 to 4"),
    ({"vision_feature_layer": -6}, ValueError, "vision_feature_layer: got -6, expected -5 to 4"),
    ({"vision_feature_layer": 1.5}, TypeError, r"vision_feature_layer: got 1\.5, expected an integer"),
    (
        {"projector": "stf", "vision_feature_layer": [1, 2]},
        ValueError,
        "vision_feature_layer: got .*1, 2.*, expected a list of 1, as many",
    ),
    (
        {"compressor": "tome", "layer": 2, "projector": "stf", "projector_options": {"ratio": 2}},
        ValueError,
        "projector: got 'stf' behind 'tome', which leaves no grid",
    ),
    ({"image_token_id": -3}, ValueError, "image_token_id: got -3"),
]


@pytest.mark.parametrize(("options", "error", "message"), REFUSALS)
def test_it_refuses(options, error, message, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "to_empty", None)  # nothing is made before
    with pytest.raises(error, match=message):
        lk.hf.build_llava(stock("clip", dtype=torch.float32), llm(), **options)


def test_it_refuses_parts_that_it_does_not_know(tmp_path):
    tower, text = stock("clip", dtype=torch.float32), llm()
    for vision, other, error, message in [
        (3, text, TypeError, "vision: got int, expected a model"),
        (text, text, TypeError, "vision: got a model of type 'qwen2', expected one of Aimv2VisionModel"),
        (CLIPVisionModelWithProjection(tower.config), text, TypeError, "vision: got a CLIPVisionModelWithProjection"),
        (lk.hf.compress(tower), text, ValueError, "encoder: got a laco_clip.*, expected one that is not compressed yet"),
        (tower, 3, TypeError, "text: got int, expected a Qwen2ForCausalLM"),
        (tower, GPT2Config(), TypeError, "text: got a model of type 'gpt2', expected a Qwen2ForCausalLM"),
        (tower, text.model, TypeError, "text: got a Qwen2Model, expected .*language head"),
        (tower, copy.deepcopy(text).double(), ValueError, r"dtype: got torch\.float32 for the encoder and torch\.float64"),
        (tower, copy.deepcopy(text).to("meta"), ValueError, "device: got cpu for the encoder and meta for the LLM"),
        (str(tmp_path), text, RuntimeError, "vision: got .*expected a folder with"),
        (tower, str(tmp_path), RuntimeError, "text: got .*expected a folder with"),
    ]:
        with pytest.raises(error, match=message):
            lk.hf.build_llava(vision, other, layer=2)


def test_a_config_that_does_not_fit_is_refused_when_it_is_read(tmp_path):
    llava("clip", projector="mbtf+stf", projector_options={"num_blocks": 2}).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    good = json.loads(path.read_text())
    for changes, message in [
        ({"projector": None}, "projector: got None, expected a dictionary of compressor, ratio, options"),
        ({"vision_feature_layer": -1}, "vision_feature_layer: got -1, expected a list of 2, as many as 'mbtf.stf' reads"),
        ({"projector": good["projector"] | {"compressor": "tome"}}, "projector: got 'tome'"),
        ({"projector": good["projector"] | {"options": []}}, "options: got .*expected a dictionary"),
    ]:
        path.write_text(json.dumps(good | changes))
        with pytest.raises(ValueError, match=message):
            AutoModelForImageTextToText.from_pretrained(tmp_path)
    path.write_text(json.dumps(good))
    assert isinstance(AutoModel.from_pretrained(tmp_path), lk.hf.LacoLlavaModel)


def test_an_image_token_is_set_before_images_are_read():
    model = llava("clip", depth=0.5)
    assert model.config.image_token_id == -1
    with pytest.raises(ValueError, match="tokens: 0, features: 128"):
        model(**inputs(model))


def test_configs_are_left_alone():
    vision, text = STOCK["clip"].config_class(**SIZES, image_size=56), Qwen2Config(**TEXT)
    before = vision.to_dict(), text.to_dict()
    lk.hf.build_llava(vision, text, depth=0.5, dtype=torch.bfloat16)
    lk.hf.build_llava(vision, LlamaConfig(**TEXT), projector="stf")
    assert (vision.to_dict(), text.to_dict()) == before
    assert LlavaConfig(vision_config=vision, text_config=text).vision_config.model_type == "clip_vision_model"
