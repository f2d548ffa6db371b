"""LLaVA with a compressor as its projector, registered with ``AutoConfig`` and ``AutoModelForImageTextToText``.

A model whose tokens are compressed inside the encoder alone needs none of this: it is a stock LLaVA.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaModel,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.utils.generic import can_return_tuple

from laco_kernels.errors import complaint
from laco_kernels.geometry import integer
from laco_kernels.hf.image_tokens import patches_at, prefix_tokens_of, state_number
from laco_kernels.hf.points import FIXED_OPTIONS, CompressionConfig, as_list, build_merges, sides
from laco_kernels.nn import COMPRESSORS, build_compressor
from laco_kernels.nn.compressors import check_options, find_compressor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers.utils import ModelOutput

    from laco_kernels.hf.points import Grid
    from laco_kernels.nn import Compressor


class LacoLlavaConfig(LlavaConfig):
    """Config of :class:`LacoLlavaForConditionalGeneration`.

    ``projector`` is a dictionary: ``compressor`` (one of :data:`laco_kernels.nn.COMPRESSORS` that may stand behind an
    encoder), ``ratio``, and the compressor's own ``options``. ``vision_feature_layer`` names the ``hidden_states`` that it
    reads, a list where it reads several.
    """

    model_type = "laco_llava"
    projector: dict[str, Any] | None = None


class CompressingProjector(nn.Module):
    """A compressor between encoder and LLM: ``[B, P + N, C] -> [B, N', D]``.

    A compressor that keeps the width of its tokens has LLaVA-1.5's two-layer MLP behind it.

    Raises:
        TypeError, ValueError: ``config.projector`` is no description of a compressor that can stand here, or does not fit
            ``config.vision_feature_layer`` or the encoder.
    """

    def __init__(self, config: LacoLlavaConfig) -> None:
        super().__init__()
        vision: Any = config.vision_config
        width = config.text_config.hidden_size
        description: Any = config.projector
        self.compressor = build_projecting(description, vision, width)
        self.mlp: Compressor | None = None
        if self.compressor.keeps_width:
            self.mlp = build_compressor("mlp2x_gelu", in_dim=vision.hidden_size, out_dim=width, place="behind")
        layers = as_list(config.vision_feature_layer)
        if len(layers) != self.compressor.num_blocks:
            expected = f"a list of {self.compressor.num_blocks}, as many as {description['compressor']!r} reads"
            remedy = "Build the model with laco_kernels.hf.build_llava"
            raise ValueError(complaint("vision_feature_layer", config.vision_feature_layer, expected, remedy))
        states = [state_number(vision, layer) for layer in layers]
        merges = build_merges(vision, device="meta") if isinstance(vision, CompressionConfig) else []
        _, grid = patches_at(vision, merges, *sides(vision.image_size), states[0])
        if grid is None:
            given = f"{description['compressor']!r} behind {vision.compression['compressor']!r}, which leaves no grid"
            raise ValueError(complaint("projector", given, "'mlp2x_gelu', which needs none", "Pass projector='mlp2x_gelu'"))
        self.compressor.num_output_tokens(grid)

    def reset_parameters(self) -> None:
        """Draw all weights anew."""
        self.compressor.reset_parameters()
        if self.mlp is not None:
            self.mlp.reset_parameters()

    def forward(self, states: Sequence[torch.Tensor], grid: Grid) -> torch.Tensor:
        """Project the ``hidden_states [B, P + N, C]`` of images of ``grid`` patches to ``[B, N', D]``."""
        tokens, out_grid = self.compressor(states[0] if len(states) == 1 else list(states), grid)
        return tokens if self.mlp is None else self.mlp(tokens, out_grid)[0]


def build_projecting(description: Any, vision: Any, width: int) -> Compressor:
    """Build the compressor that ``description``, a config's ``projector``, means, for tokens of an encoder.

    Args:
        description: a dictionary of ``compressor``, ``ratio`` and ``options``.
        vision: the encoder's config.
        width: that of the LLM.

    Raises:
        TypeError: an entry has the wrong type, or an option is unknown or not the user's to choose.
        ValueError: an entry is missing, unknown or out of range, or the compressor may not stand behind an encoder.
    """
    if not isinstance(description, dict) or set(description) != {"compressor", "ratio", "options"}:
        expected = "a dictionary of compressor, ratio, options"
        remedy = "Build the model with laco_kernels.hf.build_llava"
        raise ValueError(complaint("projector", repr(description), expected, remedy))
    name, options = description["compressor"], description["options"]
    kind = find_compressor(name, "projector")
    if kind.reads_attention or "behind" not in kind.places:
        behind = ", ".join(
            name for name, other in COMPRESSORS.items() if "behind" in other.places and not other.reads_attention
        )
        remedy = f"Pass compressor={name!r} to have it inside the encoder"
        if not kind.reads_attention:
            remedy = "It shrinks the image: let the image processor do that"
        raise ValueError(complaint("projector", repr(name), f"one that reads tokens behind an encoder: {behind}", remedy))
    if not isinstance(options, dict):
        raise ValueError(complaint("options", repr(options), "a dictionary, empty for none", "Pass options={}"))
    check_options(kind, options, FIXED_OPTIONS)
    return build_compressor(
        name,
        in_dim=vision.hidden_size,
        out_dim=vision.hidden_size if kind.keeps_width else width,
        ratio=integer("ratio", description["ratio"], 1),
        place="behind",
        prefix_tokens=prefix_tokens_of(vision),
        pad=True,
        **options,
    )


class LacoLlavaModel(LlavaModel):
    """LLaVA's encoder, a compressor, and the LLM without its head."""

    config_class = LacoLlavaConfig

    def __init__(self, config: LacoLlavaConfig) -> None:
        super().__init__(config)
        # The stock projector reads several layers side by side and may be large: it goes before the other one comes.
        del self.multi_modal_projector
        self.multi_modal_projector: Any = CompressingProjector(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        projector = getattr(self, "multi_modal_projector", None)
        if isinstance(projector, CompressingProjector) and any(module is part for part in projector.modules()):
            projector.reset_parameters()  # leaves alone what a checkpoint had
            parts: list[Any] = list(projector.modules())
            for part in parts:
                part._is_hf_initialized = True
            return
        super()._init_weights(module)

    @can_return_tuple  # type: ignore[untyped-decorator]
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> ModelOutput:
        """Encode images ``[B, 3, height, width]`` and project them: ``pooler_output`` is a list of ``B`` ``[N', D]``.

        Arguments and outputs are the stock model's. Class tokens never reach the LLM, whatever
        ``vision_feature_select_strategy``, and all ``hidden_states`` come back.
        """
        layers = as_list(self.config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer)
        given = {name: value for name, value in kwargs.items() if value is not None}
        outputs = self.vision_tower(pixel_values, output_hidden_states=True, return_dict=True, **given)
        vision, (height, width) = self.config.vision_config, pixel_values.shape[-2:]
        merges = getattr(self.vision_tower, "merges", ())
        _, grid = patches_at(vision, merges, height, width, state_number(vision, layers[0]))
        states = [outputs.hidden_states[state_number(vision, layer)] for layer in layers]
        outputs.pooler_output = list(self.multi_modal_projector(states, grid))
        return outputs


class LacoLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """LLaVA with a compressor as its projector."""

    config_class = LacoLlavaConfig

    def __init__(self, config: LacoLlavaConfig) -> None:
        with torch.device("meta"):
            CompressingProjector(config)  # refuses a wrong config before anything large is built
        # Not the stock constructor, which would build an LLM of its own.
        super(LlavaForConditionalGeneration, self).__init__(config)
        text: Any = config.text_config
        self.model = LacoLlavaModel(config)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()


def _register() -> None:
    AutoConfig.register(LacoLlavaConfig.model_type, LacoLlavaConfig, exist_ok=True)
    AutoModel.register(LacoLlavaConfig, LacoLlavaModel, exist_ok=True)
    AutoModelForImageTextToText.register(LacoLlavaConfig, LacoLlavaForConditionalGeneration, exist_ok=True)
    # transformers renames the keys of old checkpoints by model type and class name; ours read the same checkpoints.
    for stock, own in (("llava", LacoLlavaConfig.model_type), ("LlavaModel", "LacoLlavaModel")):
        renames = get_checkpoint_conversion_mapping(stock)
        if renames is not None:
            register_checkpoint_conversion_mapping(own, renames, overwrite=True)


_register()
