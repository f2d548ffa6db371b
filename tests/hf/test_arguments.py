"""Which layer is meant, and what is refused."""

from fractions import Fraction

import accelerate
import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import CLIPConfig, CLIPModel, CLIPVisionModel, CLIPVisionModelWithProjection, ViTConfig

import laco_kernels as lk
from laco_kernels.hf.compress import layer_at

from .encoders import SIZES, stock


def test_depth_names_a_layer():
    encoder = stock("clip")
    for options, layer in [({}, 1), ({"depth": 0.5}, 2), ({"depth": Fraction(3, 4)}, 3), ({"depth": 1}, 4), ({"layer": 2}, 2)]:
        assert lk.hf.compress(encoder, **options).config.compression["layer"] == layer


def test_depths_of_the_paper():
    depths = (Fraction(1, 12), Fraction(1, 6), Fraction(1, 4), Fraction(1, 2), Fraction(1))
    assert [layer_at(depth, 24) for depth in depths] == [2, 4, 6, 12, 24]
    assert [layer_at(depth, 27) for depth in depths] == [2, 5, 7, 14, 27]
    assert [layer_at(float(depth), 24) for depth in depths] == [2, 4, 6, 12, 24]


REFUSALS = [
    ({"layer": 0}, ValueError, "layer: got 0, expected an integer of at least 1"),
    ({"layer": 5}, ValueError, "layer: got 5, expected 1 to 4, the layers of this encoder.*layer=4"),
    ({"layer": 1.0}, TypeError, r"layer: got 1\.0, expected an integer"),
    ({"layer": True}, TypeError, "layer: got True"),
    ({"depth": 0}, ValueError, r"depth: got 0, expected a fraction in \(0, 1\]"),
    ({"depth": 1.5}, ValueError, r"depth: got 1\.5"),
    ({"depth": float("nan")}, ValueError, "depth: got nan"),
    ({"depth": "1/4"}, TypeError, "depth: got '1/4', expected a number"),
    ({"depth": 0.5, "layer": 2}, ValueError, r"depth, layer, layers: got depth=0\.5 together with layer=2, expected one"),
    ({"ratio": 1}, ValueError, "ratio: got 1, expected an integer of at least 2"),
    ({"ratio": 2.5}, TypeError, r"ratio: got 2\.5"),
    ({"layout": "nchw"}, ValueError, "layout: got 'nchw', expected one of 'raster', 'block'"),
    ({"compressor": "magic"}, ValueError, "compressor: got 'magic', expected one of laco, "),
    ({"residual": "sum"}, ValueError, "residual: got 'sum'"),
    ({"out_dim": 16}, TypeError, "out_dim: got 16, expected no value"),
    ({"hiden_dim": 16}, TypeError, "options: got hiden_dim, expected some of residual, hidden_dim, norm.*'hidden_dim'"),
]


@pytest.mark.parametrize(("options", "error", "message"), REFUSALS)
def test_it_refuses(options, error, message):
    with pytest.raises(error, match=message):
        lk.hf.compress(stock("clip"), **options)


def test_it_refuses_to_compress_twice():
    with pytest.raises(ValueError, match=r"encoder: got a laco_.* that merges after layer 1, expected one that is not"):
        lk.hf.compress(lk.hf.compress(stock("clip")))
    with pytest.raises(ValueError, match="compressed yet"):
        lk.hf.compress(lk.hf.compress(stock("clip")).config)


def test_it_refuses_an_encoder_with_adapters():
    encoder = stock("clip")
    encoder.add_adapter(LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"encoder: got a .* with changed parameters.*Merge or remove adapters"):
        lk.hf.compress(encoder)


def test_a_larger_model_says_where_its_tower_is():
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = CLIPModel(CLIPConfig(text_config=sizes, vision_config=sizes | {"image_size": 8, "patch_size": 4}))
    with pytest.raises(TypeError, match=r"encoder: got a model of type 'clip'.*model\.vision_model"):
        lk.hf.compress(model)
    assert isinstance(lk.hf.compress(model.vision_model), lk.hf.LacoCLIPVisionModel)


def test_it_refuses_other_things():
    with pytest.raises(TypeError, match=r"encoder: got a model of type 'vit', expected one of Aimv2VisionModel, Siglip"):
        lk.hf.compress(ViTConfig())
    with pytest.raises(
        TypeError, match=r"encoder: got Linear, expected a model \(Aimv2VisionModel, .*before torch\.compile, and out of PEFT"
    ):
        lk.hf.compress(torch.nn.Linear(1, 1))


def test_a_model_around_the_supported_one_is_refused():
    model = CLIPVisionModelWithProjection(stock("clip").config)
    with pytest.raises(TypeError, match=r"got a CLIPVisionModelWithProjection, expected one of Aimv2.*model\.vision_model"):
        lk.hf.compress(model)


def test_an_offloaded_encoder_is_refused():
    encoder = stock("clip")
    accelerate.cpu_offload(encoder, execution_device="cpu")
    with pytest.raises(ValueError, match=r"encoder: got an offloaded CLIPVisionModel.*before accelerate dispatches"):
        lk.hf.compress(encoder)


def test_numbers_of_other_libraries_are_taken(tmp_path):
    model = lk.hf.compress(stock("clip"), depth=np.float32(0.5), hidden_dim=np.int64(8), ratio=np.int32(2))
    assert model.config.compression["layer"] == 2
    model.save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="zero_init_last: got 'no'"):
        lk.hf.compress(stock("clip"), zero_init_last="no")


COMPRESSION = {"layer": 2, "compressor": "laco", "ratio": 2, "layout": "block", "options": {}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": 0}, "layer: got 0"),
        ({"layer": -1}, "layer: got -1"),
        ({"layer": 5}, "layer: got 5, expected 1 to 4"),
        ({"compressor": "magic"}, "compressor: got 'magic'"),
        ({"layout": "nchw"}, "layout: got 'nchw'"),
        ({"ratio": 1}, "ratio: got 1"),
        ({"depth": 1}, "config: got a LacoCLIPVisionConfig with compression"),
    ],
)
def test_a_config_is_looked_at_before_a_model_is_built(change, message):
    config = lk.hf.LacoCLIPVisionConfig(**SIZES, image_size=56, compression=COMPRESSION | change)
    with pytest.raises(ValueError, match=message):
        lk.hf.LacoCLIPVisionModel(config)


def test_a_subclass_may_do_something_else_and_is_refused():
    class Mine(CLIPVisionModel):
        pass

    with pytest.raises(TypeError, match="encoder: got a Mine, expected one of"):
        lk.hf.compress(Mine(stock("clip").config))


def test_a_config_decides_the_dtype_and_modules_keep_their_mode():
    config = stock("clip").config
    config.dtype = torch.bfloat16
    assert lk.hf.compress(config).dtype == torch.bfloat16
    encoder = stock("clip").train()
    encoder.embeddings.eval()
    model = lk.hf.compress(encoder)
    assert model.training
    assert not model.embeddings.training
