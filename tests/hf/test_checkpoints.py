"""Saving, reloading, and reading the checkpoints of stock models, alone or inside larger ones."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Aimv2Config,
    Aimv2Model,
    AutoConfig,
    AutoModel,
    CLIPConfig,
    CLIPModel,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    SiglipConfig,
    SiglipModel,
)

import laco_kernels as lk

from .encoders import SIZES, STOCK, compressed, pixels, stock
from .test_compress import merge_keys

every_family = pytest.mark.parametrize("family", STOCK)
VISION = SIZES | {"image_size": 56}
TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2}


def composite(name):
    """A model that contains a vision encoder, as published checkpoints do; and its tower."""
    qwen = Qwen2Config(**TEXT, num_key_value_heads=2)
    if name == "clip":
        model = CLIPModel(CLIPConfig(text_config=TEXT | TOKENS, vision_config=VISION))
    elif name == "siglip":
        model = SiglipModel(SiglipConfig(text_config=TEXT | TOKENS, vision_config=VISION))
    elif name == "aimv2":
        model = Aimv2Model(Aimv2Config(text_config=TEXT | TOKENS, vision_config=VISION))
    elif name == "internvl":
        model = InternVLForConditionalGeneration(InternVLConfig(text_config=qwen, vision_config=VISION))
        return model, model.model.vision_tower
    else:
        config = LlavaConfig(text_config=qwen, vision_config=STOCK["clip"].config_class(**VISION))
        model = LlavaForConditionalGeneration(config)
        return model, model.model.vision_tower
    return model, model.vision_model


@every_family
def test_save_and_reload_are_bit_equal(family, tmp_path):
    model = compressed(stock(family), layer=3, residual="channel_group", norm="rms_norm", hidden_dim=24, layout="raster")
    model.save_pretrained(tmp_path)
    reloaded = AutoModel.from_pretrained(tmp_path, dtype=torch.float64)
    assert type(reloaded) is type(model)
    assert reloaded.config.compression == model.config.compression
    assert reloaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in reloaded.state_dict().items())
    for parameter in reloaded.parameters():
        parameter.data = parameter.data.clone()  # sums are rounded differently where memory is aligned differently
    assert torch.equal(reloaded(pixels()).last_hidden_state, model(pixels()).last_hidden_state)
    assert type(AutoConfig.from_pretrained(tmp_path)) is type(model.config)
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())


@every_family
def test_a_stock_checkpoint_lacks_exactly_the_merge(family, tmp_path):
    encoder = stock(family, dtype=torch.float32)
    encoder.save_pretrained(tmp_path)
    model = lk.hf.compress(encoder, layer=2)
    loaded, info = type(model).from_pretrained(tmp_path, config=model.config, output_loading_info=True)
    assert set(info["missing_keys"]) == merge_keys(loaded, 1)
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in encoder.state_dict().items())
    assert loaded.merges[0].layer.linear2.weight.abs().sum() == 0
    assert 0 < loaded.merges[0].layer.linear1.weight.std() < 0.03


@every_family
def test_compress_reads_a_folder(family, tmp_path):
    encoder = stock(family, dtype=torch.float32)
    encoder.save_pretrained(tmp_path)
    for source in (tmp_path, str(tmp_path)):
        model = lk.hf.compress(source, depth=0.5)
        assert model.config.compression["layer"] == 2
        expected = lk.hf.compress(encoder, depth=0.5)(pixels(dtype=torch.float32)).last_hidden_state
        assert torch.equal(model(pixels(dtype=torch.float32)).last_hidden_state, expected)


@pytest.mark.parametrize("name", ["clip", "siglip", "aimv2", "internvl", "llava"])
def test_compress_finds_the_encoder_in_a_larger_checkpoint(name, tmp_path):
    whole, tower = composite(name)
    whole.eval().save_pretrained(tmp_path)
    model = lk.hf.compress(str(tmp_path), depth=0.5)
    images = pixels(dtype=torch.float32)
    expected = lk.hf.compress(tower, depth=0.5)(images).last_hidden_state
    assert torch.equal(model(images).last_hidden_state, expected)


def test_compress_reads_clip_keys_as_the_hub_has_them(tmp_path):
    """Published CLIP and LLaVA-style towers have the prefix ``vision_model.`` on every key."""
    encoder = stock("clip", dtype=torch.float32)
    encoder.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({f"vision_model.{name}": t for name, t in weights.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    model = lk.hf.compress(tmp_path)
    expected = lk.hf.compress(encoder)(pixels(dtype=torch.float32)).last_hidden_state
    assert torch.equal(model(pixels(dtype=torch.float32)).last_hidden_state, expected)


def test_a_compressed_tower_lives_in_llava(tmp_path):
    whole, tower = composite("llava")
    whole.eval()
    compressed_tower = compressed(tower, layer=2)
    config = LlavaConfig(text_config=whole.config.text_config, vision_config=compressed_tower.config, vision_feature_layer=-1)
    model = LlavaForConditionalGeneration(config).eval()
    assert isinstance(model.model.vision_tower, lk.hf.LacoCLIPVisionModel)
    model.model.vision_tower = compressed_tower
    model.save_pretrained(tmp_path)
    reloaded = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    images = pixels(dtype=torch.float32)
    features = [m.model.get_image_features(images, vision_feature_layer=-1).pooler_output for m in (model, reloaded)]
    assert features[0][0].shape[0] == 4
    for one, other in zip(*features, strict=True):
        assert torch.equal(one, other)


def test_an_incomplete_checkpoint_is_refused(tmp_path):
    stock("siglip", dtype=torch.float32).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["encoder.layers.2.mlp.fc1.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks or misshapes encoder\.layers\.2\.mlp\.fc1\.weight, expected all weights"):
        lk.hf.compress(tmp_path)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match=r"encoder: got .*, expected a folder with config\.json and model\.safetensors"):
        lk.hf.compress(tmp_path)
    stock("clip").config.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"expected a folder with config\.json and model\.safetensors"):
        lk.hf.compress(tmp_path)


def test_a_damaged_weight_file_is_refused(tmp_path):
    stock("clip", dtype=torch.float32).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(RuntimeError, match=r"encoder: got .*, expected a folder with config\.json and model\.safetensors"):
        lk.hf.compress(tmp_path)


def test_a_pickled_checkpoint_is_refused(tmp_path):
    encoder = stock("clip")
    encoder.config.save_pretrained(tmp_path)
    torch.save(encoder.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(RuntimeError, match="convert a pickled checkpoint to safetensors"):
        lk.hf.compress(tmp_path)


def test_a_hub_name_without_a_network_is_refused():
    with pytest.raises(RuntimeError, match=r"encoder: got 'google/siglip-base-patch16-224'.*hub name with a network"):
        lk.hf.compress("google/siglip-base-patch16-224")


def test_a_config_without_compression_is_refused():
    with pytest.raises(
        ValueError, match=r"config: got a LacoCLIPVisionConfig with compression=None.*laco_kernels\.hf\.compress"
    ):
        lk.hf.LacoCLIPVisionModel(lk.hf.LacoCLIPVisionConfig(**VISION))
