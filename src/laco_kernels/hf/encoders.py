"""The four compressed encoder families, registered with ``AutoConfig`` and ``AutoModel``.

Their stock counterparts add absolute positions once and attend globally without a mask, which is what the block order of
:mod:`laco_kernels.hf.mixins` relies on. An encoder with rotary positions or windowed attention does not belong here.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, ClassVar

import torch
from transformers import (
    Aimv2VisionConfig,
    Aimv2VisionModel,
    AutoConfig,
    AutoModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    InternVLVisionConfig,
    InternVLVisionModel,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.aimv2.modeling_aimv2 import Aimv2EncoderLayer, Aimv2VisionEmbeddings
from transformers.models.clip.modeling_clip import CLIPEncoderLayer, CLIPVisionEmbeddings
from transformers.models.internvl.modeling_internvl import (
    InternVLVisionAttention,
    InternVLVisionEmbeddings,
    InternVLVisionLayer,
)
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer, SiglipVisionEmbeddings

from laco_kernels.hf.mixins import BlockOrderEmbeddings, CompressedEncoder, MergingLayer
from laco_kernels.hf.points import CompressionConfig


class LacoAimv2VisionConfig(CompressionConfig, Aimv2VisionConfig):
    """Config of :class:`LacoAimv2VisionModel`."""

    model_type = "laco_aimv2_vision_model"
    prefix_tokens: ClassVar[int] = 0
    compression: dict[str, Any] | None = None


class LacoAimv2VisionEmbeddings(BlockOrderEmbeddings, Aimv2VisionEmbeddings):
    """AIMv2's embeddings, window by window."""


class LacoAimv2EncoderLayer(MergingLayer, Aimv2EncoderLayer):
    """AIMv2's encoder layer with a merge behind it."""

    attention_name = "attention"
    norm_name = "rms_norm1"


class LacoAimv2VisionModel(CompressedEncoder, Aimv2VisionModel):
    """AIMv2 with its tokens merged inside."""

    config_class = LacoAimv2VisionConfig
    layers_path = "encoder.layers"
    layer_class = LacoAimv2EncoderLayer
    embeddings_class = LacoAimv2VisionEmbeddings
    _no_split_modules: ClassVar = [*Aimv2VisionModel._no_split_modules, "LacoAimv2EncoderLayer"]


class LacoSiglipVisionConfig(CompressionConfig, SiglipVisionConfig):
    """Config of :class:`LacoSiglipVisionModel`."""

    model_type = "laco_siglip_vision_model"
    prefix_tokens: ClassVar[int] = 0
    compression: dict[str, Any] | None = None


class LacoSiglipVisionEmbeddings(BlockOrderEmbeddings, SiglipVisionEmbeddings):
    """SigLIP's embeddings, window by window."""


class LacoSiglipEncoderLayer(MergingLayer, SiglipEncoderLayer):
    """SigLIP's encoder layer with a merge behind it."""


class LacoSiglipVisionModel(CompressedEncoder, SiglipVisionModel):
    """SigLIP with its tokens merged inside."""

    config_class = LacoSiglipVisionConfig
    layers_path = "encoder.layers"
    layer_class = LacoSiglipEncoderLayer
    embeddings_class = LacoSiglipVisionEmbeddings
    _no_split_modules: ClassVar = [*SiglipVisionModel._no_split_modules, "LacoSiglipEncoderLayer"]


class LacoInternVLVisionConfig(CompressionConfig, InternVLVisionConfig):
    """Config of :class:`LacoInternVLVisionModel`."""

    model_type = "laco_internvl_vision"
    prefix_tokens: ClassVar[int] = 1
    compression: dict[str, Any] | None = None


class LacoInternVLVisionEmbeddings(BlockOrderEmbeddings, InternVLVisionEmbeddings):
    """InternViT's embeddings, window by window."""


class LacoInternVLVisionAttention(InternVLVisionAttention):
    """InternViT's attention, whose layer takes no mask, with a bias that travels beside the call."""

    bias: torch.Tensor | None = None  # for a compiler's trace, which cannot follow a context variable

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend among ``[B, P + N, C]``."""
        if attention_mask is None:
            attention_mask = self.bias if torch.compiler.is_compiling() else _current_bias.get()
        return super().forward(hidden_states, attention_mask, **kwargs)


_current_bias: ContextVar[torch.Tensor | None] = ContextVar("current_bias", default=None)


class LacoInternVLVisionLayer(MergingLayer, InternVLVisionLayer):
    """InternViT's encoder layer with a merge behind it."""

    attention_name = "attention"
    norm_name = "layernorm_before"

    def __init__(self, config: LacoInternVLVisionConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.attention = LacoInternVLVisionAttention(config)

    def attend_with_bias(self, bias: torch.Tensor, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run the stock layer with ``bias [B, 1, 1, P + N]`` on attention's logits."""
        self.attention.bias = bias if torch.compiler.is_compiling() else None
        token = None if torch.compiler.is_compiling() else _current_bias.set(bias)
        try:
            return super(MergingLayer, self).forward(hidden_states, *args, **kwargs)
        finally:
            self.attention.bias = None
            if token is not None:
                _current_bias.reset(token)


class LacoInternVLVisionModel(CompressedEncoder, InternVLVisionModel):
    """InternViT with its tokens merged inside."""

    config_class = LacoInternVLVisionConfig
    layers_path = "encoder.layer"
    layer_class = LacoInternVLVisionLayer
    embeddings_class = LacoInternVLVisionEmbeddings
    _no_split_modules: ClassVar = [*InternVLVisionModel._no_split_modules, "LacoInternVLVisionLayer"]


class LacoCLIPVisionConfig(CompressionConfig, CLIPVisionConfig):
    """Config of :class:`LacoCLIPVisionModel`."""

    model_type = "laco_clip_vision_model"
    prefix_tokens: ClassVar[int] = 1
    compression: dict[str, Any] | None = None


class LacoCLIPVisionEmbeddings(BlockOrderEmbeddings, CLIPVisionEmbeddings):
    """CLIP's embeddings, window by window."""


class LacoCLIPEncoderLayer(MergingLayer, CLIPEncoderLayer):
    """CLIP's encoder layer with a merge behind it."""


class LacoCLIPVisionModel(CompressedEncoder, CLIPVisionModel):
    """CLIP with its tokens merged inside."""

    config_class = LacoCLIPVisionConfig
    layers_path = "encoder.layers"
    layer_class = LacoCLIPEncoderLayer
    embeddings_class = LacoCLIPVisionEmbeddings
    _no_split_modules: ClassVar = [*CLIPVisionModel._no_split_modules, "LacoCLIPEncoderLayer"]


FAMILIES: dict[type[PreTrainedModel], tuple[Any, type[CompressedEncoder]]] = {
    Aimv2VisionModel: (LacoAimv2VisionConfig, LacoAimv2VisionModel),
    SiglipVisionModel: (LacoSiglipVisionConfig, LacoSiglipVisionModel),
    InternVLVisionModel: (LacoInternVLVisionConfig, LacoInternVLVisionModel),
    CLIPVisionModel: (LacoCLIPVisionConfig, LacoCLIPVisionModel),
}


def _register() -> None:
    for stock, (config_class, model_class) in FAMILIES.items():
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        AutoModel.register(config_class, model_class, exist_ok=True)
        # transformers renames the keys of old checkpoints by class name; the compressed class reads the same checkpoints.
        renames = get_checkpoint_conversion_mapping(stock.__name__)
        if renames is not None:
            register_checkpoint_conversion_mapping(model_class.__name__, renames, overwrite=True)


_register()
