"""What a compressor inside a frozen encoder leaves of its final features: ``laco bench kept``.

The yardstick is the full-resolution encoder: the final features of its patches, averaged over each window. A compressed encoder
whose feature of a window points the same way has kept what the layers behind the compressor, and whoever reads them, know how
to use. Compressors are untrained; what training makes of them is another question.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from laco_kernels import reference
from laco_kernels.bench.environment import environment
from laco_kernels.errors import complaint
from laco_kernels.geometry import Windows, integer
from laco_kernels.hf.compress import compress, layer_at
from laco_kernels.hf.points import sides
from laco_kernels.nn import COMPRESSORS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from fractions import Fraction

    from transformers import PreTrainedModel

    from laco_kernels.hf.mixins import CompressedEncoder
    from laco_kernels.nn import Compressor

#: Whether the mean of each window is added to what a compressor returns. ``drawn``: it is, and the last map of the compressor,
#: which otherwise starts at zero where there is a residual, is drawn as well.
ON, OFF, DRAWN, NONE = "on", "off", "on*", "-"


@dataclass(frozen=True)
class Cosine:
    """Cosines of images under several draws of a compressor's weights."""

    mean: float
    std: float  # over images and draws
    by_seed: list[float]  # the mean over images of each draw


@dataclass(frozen=True)
class KeptRow:
    """One compressor at one depth."""

    compressor: str
    residual: str  # ON, OFF, DRAWN, or NONE for what has no parameters
    depth: str
    layer: int
    tokens: int  # patch tokens that come out
    windows: Cosine | None  # of an image's windows with the average of theirs at full resolution; None without a grid
    mean_token: Cosine  # of the mean of an image's patch tokens with that at full resolution


@dataclass(frozen=True)
class KeptResult:
    """Everything that one run of ``laco bench kept`` found."""

    encoder: str
    weights: str  # "random", "checkpoint" or "pretrained here"
    accuracy: float | None  # of the encoder pretrained here, on held-out pictures
    device: str
    dtype: str
    ratio: int
    seeds: int
    images: int
    tokens_in: int  # patches of an image
    depths: list[str]
    other_windows: float | None  # cosine of an image's windows with those of another image, at full resolution
    other_mean_token: float | None
    left_out: dict[str, str]  # what cannot stand in this encoder with this ratio, and why
    environment: dict[str, Any]
    rows: list[KeptRow]

    def to_dict(self) -> dict[str, Any]:
        """Return it JSON-ready."""
        return dataclasses.asdict(self)


def measure_kept(
    encoder: PreTrainedModel,
    name: str,
    pixel_batches: Sequence[torch.Tensor],
    *,
    depths: Sequence[Fraction],
    ratio: int = 2,
    seeds: int = 3,
    weights: str = "checkpoint",
    accuracy: float | None = None,
    names: Sequence[str] | None = None,
    on_step: Callable[[str, float], None] = lambda *_: None,
) -> KeptResult:
    """Put every compressor that may stand inside into ``encoder``, and compare final features with the stock encoder's.

    Final features are ``last_hidden_state``, which AIMv2 and SigLIP return behind their final norm and CLIP, and InternViT
    where it has none, without. Prefix tokens are left out. Cosines are computed in float64.

    Args:
        encoder: the stock encoder, in evaluation mode, on its device and in its dtype.
        name: its name.
        pixel_batches: batches ``[batch, 3, height, width]`` of one size; every image counts once.
        depths: where to compress; of two that fall on the same layer the first stays.
        ratio: side of the windows, and of a window's share of the tokens where a compressor knows no windows.
        seeds: draws of a compressor's weights, ``torch.manual_seed(0)`` and so on; what has none is run once.
        weights: the encoder's: ``"random"``, ``"checkpoint"`` or ``"pretrained here"``.
        accuracy: of an encoder pretrained here.
        names: which compressors; all that may stand inside unless given.
        on_step: called before every slow step with what it is and how much of the whole is done.

    Raises:
        TypeError, ValueError: ``ratio`` is no integer of at least 2, or ``seeds`` none of at least 1.
        ValueError: no compressor of ``names`` can stand inside this encoder.
    """
    ratio, seeds = integer("ratio", ratio, 2), integer("seeds", seeds, 1)
    first = pixel_batches[0]
    patch_sides = zip(first.shape[-2:], sides(encoder.config.patch_size), strict=True)
    height, width = (side // patch for side, patch in patch_sides)
    windows = Windows((height, width), ratio, pad=True)
    layers = _layers(depths, encoder.config.num_hidden_layers)
    inside = [compressor for compressor, kind in COMPRESSORS.items() if "inside" in kind.places]
    curves, left_out = _curves(encoder, inside if names is None else names, ratio, windows.grid)
    if not curves:
        expected = f"some that can stand inside this encoder: {', '.join(inside)}"
        raise ValueError(complaint("only", ", ".join(left_out), expected, "; ".join(left_out.values())))
    on_step("encoding at full resolution", 0.0)
    whole = [_patches(encoder, batch, windows.num_patches) for batch in pixel_batches]
    pooled = torch.cat([reference.residual(patches, windows, "mean") for patches in whole])
    mean = torch.cat([patches.mean(1, keepdim=True) for patches in whole])
    rows = []
    for i, curve in enumerate(curves):
        for j, (depth, layer) in enumerate(layers.items()):
            on_step(f"{curve.compressor} @{depth}", (i + j / len(layers)) / len(curves))
            outs = [_run(encoder, curve, layer, ratio, pixel_batches, seed) for seed in range(seeds if curve.learns else 1)]
            kept = [_cosines(patches, pooled) for patches, _ in outs] if curve.out_grid == windows.out_grid else None
            rows.append(
                KeptRow(
                    compressor=curve.compressor,
                    residual=curve.residual,
                    depth=depth,
                    layer=layer,
                    tokens=outs[0][0].shape[1],
                    windows=None if kept is None else _summarise(kept),
                    mean_token=_summarise([_cosines(token, mean) for _, token in outs]),
                )
            )
    return KeptResult(
        encoder=name,
        weights=weights,
        accuracy=accuracy,
        device=encoder.device.type,
        dtype=str(encoder.dtype).removeprefix("torch."),
        ratio=ratio,
        seeds=seeds,
        images=len(mean),
        tokens_in=windows.num_patches,
        depths=list(layers),
        other_windows=_others(pooled),
        other_mean_token=_others(mean),
        left_out=left_out,
        environment=environment(encoder.device),
        rows=rows,
    )


@dataclass(frozen=True)
class _Curve:
    """One compressor in one variation."""

    compressor: str
    residual: str
    options: dict[str, Any]
    learns: bool
    out_grid: tuple[int, int] | None


def _curves(
    encoder: PreTrainedModel, names: Sequence[str], ratio: int, grid: tuple[int, int]
) -> tuple[list[_Curve], dict[str, str]]:
    """Return all curves to be measured, and by name why a compressor cannot stand in this encoder."""
    curves, left_out = [], {}
    for name in names:
        kind = COMPRESSORS[name]
        try:
            merge = _compress(encoder, 0, compressor=name, layer=1, ratio=ratio).merges[0]
            for residual, options in _variations(kind, learns=any(True for _ in merge.parameters())):
                made = _compress(encoder, 0, compressor=name, layer=1, ratio=ratio, **options).merges[0]
                curves.append(_Curve(name, residual, options, residual != NONE, made.out_grid(grid)))
        except (TypeError, ValueError) as error:
            left_out[name] = str(error)
    return curves, left_out


def _variations(kind: type[Compressor], *, learns: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield with what options to build a compressor for each of its curves."""
    if not learns:
        yield NONE, {}
        return
    if kind.residuals[0] != "none":
        yield ON, {"residual": True}
        if "zero_init_last" in inspect.signature(kind).parameters:
            yield DRAWN, {"residual": True, "zero_init_last": False}
    yield OFF, {"residual": False}


def _run(
    encoder: PreTrainedModel, curve: _Curve, layer: int, ratio: int, pixel_batches: Sequence[torch.Tensor], seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the final patch features ``[images, N', C]`` of ``encoder`` with a freshly drawn compressor, and their mean."""
    model = _compress(encoder, seed, compressor=curve.compressor, layer=layer, ratio=ratio, **curve.options)
    patches = math.prod(curve.out_grid) if curve.out_grid is not None else None
    features, means = [], []
    for batch in pixel_batches:
        tokens = _patches(model, batch, patches)
        journey = model.merging_layers[-1].journey
        sizes = None if journey is None else journey.sizes  # how many patches each token stands for, where that is counted
        shares = torch.ones_like(tokens[..., :1]) if sizes is None else sizes[:, -tokens.shape[1] :, None].double()
        features.append(tokens)
        means.append((tokens * shares / shares.sum(1, keepdim=True)).sum(1, keepdim=True))
    return torch.cat(features), torch.cat(means)


def _compress(encoder: PreTrainedModel, seed: int, **options: Any) -> CompressedEncoder:
    """Compress ``encoder`` with weights drawn from ``seed``; the caller's random numbers stay as they are."""
    device = encoder.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        return compress(encoder, **options)


@torch.inference_mode()
def _patches(encoder: Any, pixels: torch.Tensor, count: int | None) -> torch.Tensor:
    """Return the last ``count`` tokens of ``last_hidden_state``, all behind the prefix unless given, in float64."""
    tokens = encoder(pixels.to(encoder.device, encoder.dtype)).last_hidden_state
    first = encoder.config.prefix_tokens if count is None else tokens.shape[1] - count
    return tokens[:, first:].double()


def _cosines(features: torch.Tensor, yardstick: torch.Tensor) -> torch.Tensor:
    """Return the cosine of each image, ``[images]``: the mean over its windows, of ``[images, windows, C]``."""
    return F.cosine_similarity(features, yardstick, dim=-1).mean(1)


def _others(features: torch.Tensor) -> float | None:
    """Return the mean cosine of each image's features with those of the next one: what nothing kept would still reach."""
    return float(_cosines(features.roll(1, 0), features).mean()) if len(features) > 1 else None


def _summarise(draws: Sequence[torch.Tensor]) -> Cosine:
    every = torch.stack(list(draws))
    return Cosine(float(every.mean()), float(every.std(correction=0)), every.mean(1).tolist())


def _layers(depths: Sequence[Fraction], count: int) -> dict[str, int]:
    layers: dict[str, int] = {}
    for depth in depths:
        if (layer := layer_at(depth, count)) not in layers.values():
            layers[str(depth)] = layer
    return layers
