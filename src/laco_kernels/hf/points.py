"""Where an encoder's tokens are compressed, by what, and how they lie on their way there."""

from __future__ import annotations

import contextlib
import inspect
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from laco_kernels.errors import complaint
from laco_kernels.geometry import Cascade, Windows, integer
from laco_kernels.nn import COMPRESSORS, Compressor, build_compressor
from laco_kernels.nn.compressors import check_options, find_compressor
from laco_kernels.ops.checks import LAYOUTS, check_choice

if TYPE_CHECKING:
    from collections.abc import Sequence

Grid = tuple[int, int]


class CompressionConfig:
    """Mixin for the config of a compressed encoder.

    ``compression`` is a dictionary: ``layer`` (tokens are merged after it, counted from 1), ``compressor``, ``ratio``,
    ``layout`` and the compressor's own ``options``. With several points ``layer`` and ``ratio`` are lists.
    """

    model_type: ClassVar[str]
    prefix_tokens: ClassVar[int]
    compression: Any
    hidden_size: int
    num_hidden_layers: int
    image_size: int | list[int] | tuple[int, ...]
    patch_size: int | list[int] | tuple[int, ...]
    _attn_implementation: str | None


FIXED_OPTIONS = ("in_dim", "out_dim", "ratio", "place", "prefix_tokens", "pad")


def points_of(config: Any) -> list[tuple[int, int]]:
    """Return the layer and the ratio of every point of ``config.compression``, in the order in which tokens meet them.

    Raises:
        TypeError: if an entry has the wrong type.
        ValueError: if there is no compression, an entry is missing, unknown or out of range, or layers do not ascend.
    """
    compression = config.compression
    wanted = ("layer", "compressor", "ratio", "layout", "options")
    if not isinstance(compression, dict) or set(compression) != set(wanted):
        given = f"a {type(config).__name__} with compression={compression!r}"
        remedy = "Build the model with laco_kernels.hf.compress"
        raise ValueError(complaint("config", given, f"a dictionary of {', '.join(wanted)}", remedy))
    layers, ratios = as_list(compression["layer"]), as_list(compression["ratio"])
    check_count("ratio", ratios, len(layers))
    points = [(integer("layer", layer, 1), integer("ratio", ratio, 2)) for layer, ratio in zip(layers, ratios, strict=True)]
    before = 0
    for layer, _ in points:
        if layer > config.num_hidden_layers:
            expected = f"1 to {config.num_hidden_layers}, the layers of this encoder"
            remedy = f"Pass layer={config.num_hidden_layers} to compress behind the encoder"
            raise ValueError(complaint("layer", layer, expected, remedy))
        if layer <= before:
            raise ValueError(complaint("layers", layers, "layers in ascending order", "Merge once behind a layer"))
        before = layer
    if not points:
        raise ValueError(complaint("layers", layers, "at least one layer", "Pass for instance layers=[6, 18]"))
    return points


def as_list(value: Any) -> list[Any]:
    """Return a list or tuple as a list, anything else as a list of it."""
    return list(value) if isinstance(value, (list, tuple)) else [value]


def build_merges(config: Any, device: torch.device | str | None = None) -> list[Compressor]:
    """Build the compressors that ``config.compression`` describes, one a point.

    Raises:
        TypeError: if an entry has the wrong type, or an option is unknown or not the user's to choose.
        ValueError: if there is no compression, an entry is missing, unknown or out of range, a compressor may not stand
            inside an encoder, or images of the config's size cannot be compressed so.
    """
    points = points_of(config)
    name, options = config.compression["compressor"], config.compression["options"]
    kind = find_compressor(name)
    check_choice("layout", config.compression["layout"], LAYOUTS)
    if not isinstance(options, dict):
        raise ValueError(complaint("options", repr(options), "a dictionary, empty for none", "Pass options={}"))
    check_options(kind, options, (*FIXED_OPTIONS, "grid"))
    if "inside" not in kind.places:
        inside = ", ".join(name for name, other in COMPRESSORS.items() if "inside" in other.places)
        remedy = f"It stands {' or '.join(kind.places)} an encoder: lk.nn.build_compressor({name!r}, ...)"
        raise ValueError(complaint("compressor", repr(name), f"one that may stand inside: {inside}", remedy))
    common = {"in_dim": config.hidden_size, "place": "inside", "prefix_tokens": config.prefix_tokens, "pad": True, **options}
    first = grid_of(config, *sides(config.image_size))
    grid: Grid | None = first
    count = math.prod(first)
    merges: list[Compressor] = []
    with contextlib.nullcontext() if device is None else torch.device(device):
        for i, (layer, ratio) in enumerate(points):
            own: dict[str, Any] = {"ratio": ratio}
            if "grid" in inspect.signature(kind).parameters:  # positions of its own are those of the grid that comes to it
                own["grid"] = grid
            if isinstance(options.get("num_tokens"), (list, tuple)):
                check_count("num_tokens", options["num_tokens"], len(points))
                own["num_tokens"] = options["num_tokens"][i]
            merge: Any = build_compressor(name, **{**common, **own})
            left = merge.budget(count) if merge.reads_attention else merge.num_output_patches(grid)
            if left >= count > 1:
                expected = f"fewer than the {count} tokens that come to layer {layer}"
                raise ValueError(complaint("num_tokens", left, expected, "Pass a list, smaller for each point"))
            grid, count = merge.out_grid(grid) if grid is not None else None, left
            merges.append(merge)
    return merges


def check_count(name: str, values: Sequence[Any], count: int) -> None:
    """Raise ValueError unless there is a value for each of ``count`` layers."""
    if len(values) != count:
        expected = f"one for each of the {count} layers"
        raise ValueError(complaint(name, f"{len(values)} of them", expected, "Pass one number for all, or as many as layers"))


@dataclass(frozen=True)
class Route:
    """What the patch tokens of images of one size meet on their way through an encoder.

    Args:
        grids: the grid of the tokens that come to each point; ``None`` where they no longer form one.
        order: the windows that they are ordered by between the embeddings and the last merge that reads windows as they
            lie; ``None`` where raster order stays.
    """

    grids: tuple[Grid | None, ...]
    order: Cascade | None

    def layout(self, point: int) -> str:
        """Return how the tokens lie that come to a point."""
        return "block" if self.order is not None and point < len(self.order.stages) else "raster"


@dataclass
class Journey:
    """The tokens of one forward pass on their way.

    Args:
        route: what they meet.
        sizes: how many patches each token stands for, ``[B, P + N]``, once merging has made that differ.
    """

    route: Route
    sizes: torch.Tensor | None = None


def route_of(config: CompressionConfig, merges: Sequence[Compressor], height: int, width: int) -> Route:
    """Return the route of images of ``height x width`` pixels.

    An odd grid keeps raster order: padding tokens must not enter attention, so there are no complete blocks.
    """
    grid: Grid | None = grid_of(config, height, width)
    grids, stages = [], []
    ordered = config.compression["layout"] == "block"
    for merge in merges:
        grids.append(grid)
        if grid is not None:
            windows = Windows(grid, merge.ratio, config.prefix_tokens, pad=True)
            ordered = ordered and merge.reads_blocks and windows.is_even
            if ordered:
                stages.append(windows)
            ordered = ordered and merge.is_windowwise  # else windows have to come in raster order
            grid = merge.out_grid(grid)
    return Route(tuple(grids), Cascade(tuple(stages)) if stages else None)


def grid_of(config: Any, height: int, width: int) -> Grid:
    """Return an image of ``height x width`` pixels in an encoder's patches."""
    patch_height, patch_width = sides(config.patch_size)
    return height // patch_height, width // patch_width


def sides(size: Any) -> tuple[int, int]:
    """Return an image's or a patch's size as height and width."""
    return (size, size) if isinstance(size, int) else tuple(size)
