"""How many tokens an image becomes between the pixels and an LLM, and on which grid they lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from laco_kernels.errors import complaint
from laco_kernels.geometry import integer
from laco_kernels.hf.compress import stock_class
from laco_kernels.hf.encoders import FAMILIES
from laco_kernels.hf.points import CompressionConfig, Grid, as_list, grid_of, points_of, sides

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import LlavaForConditionalGeneration

    from laco_kernels.nn import Compressor


@dataclass(frozen=True)
class ImageTokens:
    """What an image becomes in a LLaVA-style model.

    Args:
        image_size: height and width in pixels.
        patches: the image in patches.
        tokens: what the LLM reads of it, hence placeholders in a prompt.
    """

    image_size: Grid
    patches: Grid
    tokens: int


def prefix_tokens_of(config: Any) -> int:
    """Return how many class tokens come before the patches in an encoder, compressed or not."""
    if isinstance(config, CompressionConfig):
        return config.prefix_tokens
    return FAMILIES[stock_class("vision", config)][0].prefix_tokens


def state_number(config: Any, layer: int, argument: str = "vision_feature_layer") -> int:
    """Return which of ``hidden_states`` a ``vision_feature_layer`` means, counted from 0, the embeddings.

    Raises:
        TypeError: if it is no integer.
        ValueError: if the encoder has no such state, or the state lies in front of a merge.
    """
    depth = config.num_hidden_layers
    number = layer + depth + 1 if isinstance(layer, int) and layer < 0 else layer
    expected = f"{-depth - 1} to {depth}, as the encoder has {depth} layers"
    if number != integer(argument, number, -depth) or not 0 <= number <= depth:
        raise ValueError(complaint(argument, layer, expected, "Pass -1 for the last layer"))
    deepest = points_of(config)[-1][0] if isinstance(config, CompressionConfig) else 0
    if number < deepest:
        given = f"{layer}, the tokens in front of the merge after layer {deepest}"
        remedy = f"Merge earlier, or pass {depth if deepest == depth else deepest}, or -1 for the last layer"
        raise ValueError(complaint(argument, given, f"a layer from {deepest} to {depth}", remedy))
    return number


def patches_at(config: Any, merges: Iterable[Compressor], height: int, width: int, state: int) -> tuple[int, Grid | None]:
    """Return the patch tokens in ``hidden_states[state]`` for images of ``height x width`` pixels, and their grid.

    Args:
        config: the encoder's.
        merges: the compressors inside it, in order.
        height, width: of the image.
        state: from 0, the embeddings.
    """
    patches = grid_of(config, height, width)
    grid: Grid | None = patches
    count = patches[0] * patches[1]
    layers = [layer for layer, _ in points_of(config)] if isinstance(config, CompressionConfig) else []
    for layer, merge in zip(layers, merges, strict=True):
        if layer <= state:
            # Those that leave no grid count tokens as such; a row of them is a grid to them.
            count = merge.num_output_patches((1, count) if grid is None else grid)
            grid = None if grid is None else merge.out_grid(grid)
    return count, grid


def image_tokens(model: LlavaForConditionalGeneration) -> ImageTokens:
    """Return what an image of the size that its encoder is made for becomes in ``model``, a stock LLaVA or one of ours.

    Raises:
        TypeError: its encoder is none that this package knows.
        ValueError: it reads layers with different numbers of tokens.
    """
    config, tower = model.config, model.model.vision_tower
    vision = config.vision_config
    prefix = prefix_tokens_of(vision)
    height, width = sides(vision.image_size)
    states = [state_number(vision, layer) for layer in as_list(config.vision_feature_layer)]
    count, grid = patches_at(vision, getattr(tower, "merges", ()), height, width, states[0])
    projector = model.model.multi_modal_projector
    if hasattr(projector, "compressor"):
        tokens = projector.compressor.num_output_tokens(grid)
    else:
        tokens = prefix + count - (config.vision_feature_select_strategy == "default")
    return ImageTokens((height, width), grid_of(vision, height, width), tokens)
