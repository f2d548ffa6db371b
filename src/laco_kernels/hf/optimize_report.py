"""What :func:`laco_kernels.hf.optimize` did to an encoder, and what it left alone: looked up in the encoder as it is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.activations import QuickGELUActivation
from transformers.models.aimv2.modeling_aimv2 import Aimv2MLP

from laco_kernels.hf import fused, fused_embeddings, fused_mlps, handing_on
from laco_kernels.hf.fusing import LEAST, SMALL_GAINS, Fused, is_patched
from laco_kernels.hf.mixins import CompressedEncoder
from laco_kernels.hf.packs import PackedLinear
from laco_kernels.hf.points import route_of, sides
from laco_kernels.kernels import select

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PreTrainedModel

FUSED: dict[type[nn.Module], type[nn.Module]] = {
    **fused.LAYERS,
    **handing_on.ENCODERS,
    **fused.NORMS,
    **fused_embeddings.EMBEDDINGS,
    nn.Linear: PackedLinear,
    nn.Conv2d: fused_embeddings.PatchProduct,
    **fused_mlps.GELU_MLPS,
    Aimv2MLP: fused_mlps.FusedAimv2MLP,
    QuickGELUActivation: fused_mlps.FusedQuickGELU,
}
STOCK = {kind: stock for stock, kind in FUSED.items()}
COMMON = (nn.Linear, nn.Conv2d)  # whose subclasses are of all kinds


@dataclass(frozen=True)
class Part:
    """One kind of change: how many modules it concerns, on what inputs, and why it does nothing, where it does nothing."""

    name: str
    count: int
    inactive: str | None = None
    only: str | None = None

    def __str__(self) -> str:
        """Return it as a line."""
        only = f", {self.only}" if self.only else ""
        return f"{self.name}: {self.count}{only}" + (f", inactive: {self.inactive}" if self.inactive else "")


@dataclass(frozen=True)
class Left:
    """Modules of one class that somebody else has changed, so that they stay as they are, and why."""

    names: tuple[str, ...]
    kind: str
    reason: str

    def __str__(self) -> str:
        """Return it as a line."""
        more = f" and {len(self.names) - 1} more" if len(self.names) > 1 else ""
        return f"{self.names[0]}{more} ({self.kind}): left as it is, {self.reason}"


@dataclass(frozen=True)
class Report:
    """What :func:`laco_kernels.hf.optimize` did; names are those of ``encoder.named_modules()``."""

    parts: tuple[Part, ...]
    left: tuple[Left, ...] = ()

    def __str__(self) -> str:
        """Return it as lines."""
        return "\n".join(map(str, (*self.parts, *self.left)))


def _has_a_fused_form(module: nn.Module) -> bool:
    return any(isinstance(module, stock) for stock in FUSED if stock not in COMMON)


def change_of(module: nn.Module) -> str | None:
    """Return what somebody has done to a module that has a fused form, or had one, so that it does not run."""
    kind = type(module)
    if isinstance(module, Fused):
        ours, changed = kind, kind not in STOCK
    else:
        ours, changed = FUSED.get(kind, kind), _has_a_fused_form(module) and kind not in FUSED
    if changed:
        return "a class of its own"
    if "forward" in module.__dict__:
        return "with a forward pass of its own"
    stock = getattr(ours, "stock", ours)
    return f"the forward pass of {stock.__name__} was replaced" if is_patched(ours) else None


def _changes(encoder: nn.Module) -> Iterator[tuple[str, nn.Module, str, Sequence[nn.Module]]]:
    """Yield name and module of what was changed, how, and the modules that do nothing for that."""
    for name, module in encoder.named_modules():
        if (isinstance(module, Fused) or _has_a_fused_form(module)) and (change := change_of(module)) is not None:
            yield name, module, change, [module, *(_sharing(module) if isinstance(module, fused.FusedLayer) else ())]
        if isinstance(module, fused.FusedLayer):
            for child, change, idle in _changes_inside(module):
                yield f"{name}.{child}", module.get_submodule(child), change, idle


def _sharing(layer: Any) -> list[PackedLinear]:
    """Return the linear layers of attention that share products, also those inside adapters."""
    return [module for module in getattr(layer, layer.attention_name).modules() if isinstance(module, PackedLinear)]


def _changes_inside(layer: Any) -> Iterator[tuple[str, str, Sequence[nn.Module]]]:
    """Yield what a fused layer calls or passes over and finds changed."""
    norm, attention, mlp = (getattr(layer, name) for name in (layer.norms[1], layer.attention_name, layer.mlp_name))
    change = change_of(norm) if type(norm) in (nn.LayerNorm, *fused.RMS_NORMS) else "not the norm of the stock layer"
    if change is not None:
        yield layer.norms[1], change, [layer]
    if not isinstance(mlp, fused_mlps.MLPS):
        yield layer.mlp_name, "not the feed-forward block of the stock layer", []
    members = _sharing(layer)
    if len(members) != 3 or any(member.pack is not members[0].pack for member in members):
        yield layer.attention_name, "its queries, keys and values are not linear layers alike", members
    elif not members[0].pack.is_together() and not any(p.is_meta for p in attention.parameters()):
        yield layer.attention_name, "the parameters of its queries, keys and values do not lie together", members


def make_report(encoder: PreTrainedModel, settings: Any) -> Report:
    """Count what was done with these settings, and look whether it would do something on this device."""
    parts: list[Part] = []
    grouped: dict[tuple[str, str], list[str]] = {}
    idle: set[int] = set()
    for name, module, change, without in _changes(encoder) if settings.fuse else ():
        names = grouped.setdefault((type(module).__name__, change), [])
        if name not in names:
            names.append(name)
        idle.update(map(id, without))
    blocks = [module for module in encoder.modules() if isinstance(module, fused_mlps.FusedGeluMLP)]
    kinds = [type(module) for module in encoder.modules() if id(module) not in idle]
    on_cpu = None if encoder.device.type == "cuda" else f"needs an NVIDIA GPU, not {encoder.device.type}"
    no_gpu = on_cpu if settings.impl is None else None
    patches = [
        side // patch for side, patch in zip(*map(sides, (encoder.config.image_size, encoder.config.patch_size)), strict=True)
    ]
    tokens = math.prod(patches)
    norm = "rms" if any(issubclass(kind, fused.FusedRMSNorm) for kind in kinds) else "layer"
    large = f"on at least {LEAST[False]:,} elements, {LEAST[True]:,} with gradients"
    large += ", or of any size in a graph" if settings.graphs else ""

    def reason(op: str, form: str | None = None) -> str | None:
        if settings.impl is not None:
            return None
        choice = select.choose(op, "forward", encoder.device, encoder.dtype, tokens, form)
        return choice.reason if choice.impl == "reference" else None

    def add(name: str, family: type[nn.Module], inactive: str | None, *, small: bool = False) -> None:
        count = sum(issubclass(kind, family) for kind in kinds)
        if count:
            only = large if small and settings.impl is None and inactive is None else None
            parts.append(Part(name, count, inactive, only))

    sums = "residual sum, LayerScale and norm in one pass"
    add(sums, fused.FusedLayer, reason("add_norm", norm), small=norm in SMALL_GAINS)
    if pairs := sum(_hands_on(module, idle) for module in encoder.modules()):
        only = large if norm in SMALL_GAINS and settings.impl is None and reason("add_norm", norm) is None else None
        parts.append(Part("norm of the next layer in one pass with the sum before it", pairs, reason("add_norm", norm), only))
    add("RMSNorm in one pass", fused.FusedRMSNorm, reason("add_norm", "rms"))
    add("linear layers that share a product", PackedLinear, no_gpu, small=True)
    add("SwiGLU in one product and one pass", fused_mlps.FusedAimv2MLP, no_gpu or reason("gated_silu"))
    add("quick GELU in one pass", fused_mlps.FusedQuickGELU, reason("activate", "quick_gelu"), small=True)
    add("tanh-GELU inside the product before it, in inference", fused_mlps.FusedSiglipMLP, on_cpu)
    form = next((fused_mlps.APPROXIMATIONS.get(type(module.activation_fn)) for module in blocks), None)
    add(
        "feed-forward block that keeps no activation, in training",
        fused_mlps.FusedGeluMLP,
        reason("gelu_mlp", form),
        small=True,
    )
    add("patch embedding as one product", fused_embeddings.PatchProduct, no_gpu)
    order = no_gpu or _raster_order(encoder)
    add("patches embedded window by window", fused_embeddings.FusedEmbeddings, order, small=True)
    if settings.compile:
        parts.append(Part("torch.compile", 1))
    if settings.graphs:
        parts.append(Part("CUDA graphs, in inference", 1, on_cpu))
    return Report(tuple(parts), tuple(Left(tuple(names), *key) for key, names in grouped.items()))


def _hands_on(encoder: nn.Module, idle: set[int]) -> int:
    """Count the layers that hand the next one its input normalised, where this module calls layers one after the other."""
    if not isinstance(encoder, handing_on.FusedEncoder) or change_of(encoder) is not None:
        return 0
    found = [
        all(isinstance(module, fused.FusedLayer) and id(module) not in idle for module in pair)
        and getattr(pair[0], "merge", None) is None
        for pair in pairwise(getattr(encoder, encoder.layers_name))
    ]
    return sum(found)


def _raster_order(encoder: PreTrainedModel) -> str | None:
    """Return why a compressed encoder does not use block order on images of its own size, where it does not."""
    if not isinstance(encoder, CompressedEncoder):
        return None
    compression, merges = encoder.config.compression, encoder.merges
    route = route_of(encoder.config, merges, *sides(encoder.config.image_size))
    if route.order is not None or route.grids[0] is None:
        return None
    if compression["layout"] == "raster" or not merges[0].reads_blocks:
        return f"compressor={compression['compressor']!r} with layout={compression['layout']!r} keeps raster order"
    height, width = route.grids[0]
    return f"a grid of {height} x {width} keeps raster order"
