"""Small encoders of the four families, built like the real ones."""

import torch
from transformers import Aimv2VisionModel, CLIPVisionModel, InternVLVisionModel, SiglipVisionModel

import laco_kernels as lk

STOCK = {
    "aimv2": Aimv2VisionModel,
    "siglip": SiglipVisionModel,
    "internvl": InternVLVisionModel,
    "clip": CLIPVisionModel,
}
PREFIX = {"aimv2": 0, "siglip": 0, "internvl": 1, "clip": 1}
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "patch_size": 14}


def stock(family, side=4, dtype=torch.float64, **changes):
    """A stock encoder for images of ``side x side`` patches, with positions and scales that are not at their initial zero."""
    torch.manual_seed(1)
    cls = STOCK[family]
    config = cls.config_class(**SIZES | {"image_size": side * 14} | changes)
    model = cls(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.to(dtype)


def pixels(side=4, batch=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(batch, 3, side * 14, side * 14, generator=generator, dtype=dtype)


def compressed(encoder, **options):
    """Compress with a merge whose every parameter matters."""
    torch.manual_seed(3)
    model = lk.hf.compress(encoder, **{"zero_init_last": False, **options})
    with torch.no_grad():
        for parameter in model.merges[0].parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model
