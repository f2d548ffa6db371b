"""Make a vision encoder faster without changing what it computes: :func:`optimize` and :func:`restore`."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import GELUTanh, QuickGELUActivation
from transformers.models.aimv2.modeling_aimv2 import Aimv2MLP
from transformers.models.siglip.modeling_siglip import SiglipMLP

from laco_kernels.errors import complaint
from laco_kernels.hf import fused, fused_embeddings
from laco_kernels.hf.encoders import FAMILIES
from laco_kernels.hf.graphs import GraphedForward, is_sharded
from laco_kernels.hf.mixins import CompressedEncoder
from laco_kernels.hf.points import route_of, sides
from laco_kernels.kernels import select

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

KEPT, OWN_FORWARD = "_laco_optimization", "_laco_own_forward"  # where an encoder keeps what was done to it, and what it had


@dataclass(frozen=True)
class Part:
    """One kind of change: how many modules it concerns, and why it does nothing, where it does nothing."""

    name: str
    count: int
    inactive: str | None = None

    def __str__(self) -> str:
        """Return it as a line."""
        return f"{self.name}: {self.count}" + (f", inactive: {self.inactive}" if self.inactive else "")


@dataclass(frozen=True)
class Report:
    """What :func:`optimize` did."""

    parts: tuple[Part, ...]

    def __str__(self) -> str:
        """Return it as lines."""
        return "\n".join(map(str, self.parts))


@dataclass(frozen=True)
class Settings:
    """What :func:`optimize` was asked for."""

    fuse: bool
    graphs: bool
    compile: bool
    impl: str | None
    max_bytes: int
    batch_sizes: tuple[int, ...]
    clone: bool


class CompiledForward:
    """A forward pass through ``torch.compile``, whose copies compile that of the copied model."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward
        self.compiled = torch.compile(forward)
        self.__signature__ = inspect.signature(forward)  # by which the Trainer picks its columns

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle without compiled code, which holds on to the model it was compiled from."""
        return {"forward": self.forward}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Undo :meth:`__getstate__`."""
        self.__init__(**state)  # type: ignore[misc]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it."""
        return self.compiled(*args, **kwargs)


def optimize(
    encoder: PreTrainedModel,
    *,
    fuse: bool = True,
    graphs: bool = False,
    compile: bool = False,
    impl: str | None = None,
    max_bytes: int = 4 * 2**30,
    batch_sizes: Sequence[int] = (),
    clone: bool = True,
) -> Report:
    """Make ``encoder`` faster in place: fewer passes over memory, fewer launches, the same numbers.

    Parameters, their names, hooks, outputs and gradients stay what they are; :func:`restore` undoes it. Each change looks
    at every call whether it applies, and leaves the stock code to run where it does not: on a CPU, under an adapter, beneath
    a hook on a module that it would pass over, on so few tokens that launches are all that counts (there CUDA graphs help).

    Args:
        encoder: an ``Aimv2VisionModel``, ``SiglipVisionModel``, ``InternVLVisionModel`` or ``CLIPVisionModel``, stock or
            compressed. Optimise before wrapping it in DDP or sharding it by FSDP2.
        fuse: residual sum, LayerScale and norm in one pass, RMSNorm in one pass; queries, keys and values as one product,
            also SwiGLU's two; SwiGLU's and CLIP's activation in one pass; the patch embedding as one product, which in a
            compressed encoder makes the tokens window by window; without gradients SigLIP's activation inside the product
            before it.
        graphs: replay the forward pass as a CUDA graph, captured for each shape, in evaluation mode and without gradients.
        compile: run the forward pass through ``torch.compile``, by its own defaults; with ``graphs`` that is captured.
        impl: the kernels' implementation, as for the operators: ``None`` is the measured choice, and only that may leave a
            fusion inactive.
        max_bytes: bound on the memory that graphs hold; those used least recently are dropped.
        batch_sizes: with ``graphs``, pad batches to the next larger of these sizes.
        clone: with ``graphs``, return copies; without them an output is overwritten by the next call.

    Returns:
        What was changed, how often, and what of it is inactive here and why; ``print`` it.

    Raises:
        TypeError: ``encoder`` is no model, or one without layers of a known family.
        ValueError: an option is out of range; ``encoder`` is sharded or offloaded, holds a model that was optimised by itself,
            or is part of one that was.
        RuntimeError: ``impl`` cannot run here.
    """
    settings = Settings(fuse, graphs, compile, impl, max_bytes, tuple(batch_sizes), clone)
    _check(encoder, settings)
    if settings_of(encoder) != settings:
        restore(encoder)
        if fuse:
            _fuse(encoder, impl)
        _wrap_forward(encoder, settings)
        encoder.__dict__[KEPT] = settings
    for pack in _packs(encoder):
        pack.lay_together()  # again, where they were moved, copied or replaced since
    return _report(encoder, settings)


def _wrap_forward(encoder: PreTrainedModel, settings: Settings) -> None:
    forward: Callable[..., Any] = encoder.forward
    if settings.compile:
        forward = CompiledForward(forward)
    if settings.graphs:
        bounds: dict[str, Any] = {"max_bytes": settings.max_bytes, "batch_sizes": settings.batch_sizes}
        forward = GraphedForward(encoder, forward, **bounds, clone=settings.clone)
    if settings.compile or settings.graphs:
        if "forward" in encoder.__dict__:
            encoder.__dict__[OWN_FORWARD] = encoder.__dict__["forward"]
        encoder.forward = forward


def restore(encoder: PreTrainedModel) -> None:
    """Undo :func:`optimize`, and free the memory of its graphs; an encoder that is not optimised stays as it is.

    Raises:
        RuntimeError: something else has changed the class of a fused layer since, ``fully_shard`` or a parametrisation, or
            another optimised model was put inside; nothing is undone then.
    """
    if settings_of(encoder) is None:
        return
    if (name := _optimised_inside(encoder)) is not None:
        remedy = f"Restore its {name!r} first"
        raise RuntimeError(complaint("encoder", f"one that holds another optimised model, {name!r}", "no such model", remedy))
    changed = [module for module in encoder.modules() if isinstance(module, fused.Fused)]
    for module in changed:
        if type(module) not in STOCK:
            given = f"a layer that has become a {type(module).__name__} since it was optimised"
            raise RuntimeError(complaint("encoder", given, "layers as optimize left them", "Undo first what came last"))
    settings = encoder.__dict__.pop(KEPT)
    if settings.graphs or settings.compile:
        forward = encoder.__dict__.pop("forward", None)
        if isinstance(forward, GraphedForward):
            forward.release()
        if OWN_FORWARD in encoder.__dict__:
            encoder.__dict__["forward"] = encoder.__dict__.pop(OWN_FORWARD)
    for module in changed:
        for name in ("impl", "pack", "feeds_a_product"):
            module.__dict__.pop(name, None)
        kind: Any = STOCK[type(module)]
        module.__class__ = kind


def settings_of(encoder: nn.Module) -> Settings | None:
    """Return what ``encoder`` was optimised with, if it was."""
    return encoder.__dict__.get(KEPT)


def _optimised_inside(encoder: nn.Module) -> str | None:
    """Return the name of a model inside ``encoder`` that was optimised by itself, if there is one."""
    return next((name for name, module in encoder.named_modules() if name and settings_of(module) is not None), None)


def _check(encoder: Any, settings: Settings) -> None:
    if not isinstance(encoder, PreTrainedModel):
        remedy = "Pass the vision model itself, before torch.compile and before it is wrapped"
        raise TypeError(complaint("encoder", type(encoder).__name__, "a vision model of transformers", remedy))
    if is_sharded(encoder):
        remedy = "Optimise it before fully_shard; CUDA graphs do not go with sharded parameters at all"
        raise ValueError(complaint("encoder", "sharded parameters", "parameters that are in place", remedy))
    known: tuple[Any, ...] = (*FAMILIES, CompressedEncoder)
    if not isinstance(encoder, known):
        names = ", ".join(stock.__name__ for stock in FAMILIES)
        remedy = "Pass the vision tower inside it, such as model.vision_model or model.model.vision_tower"
        raise TypeError(complaint("encoder", f"a {type(encoder).__name__}", f"one of {names}, or a compressed one", remedy))
    if any(hasattr(module, "_hf_hook") for module in encoder.modules()):
        remedy = "Optimise the model before accelerate dispatches or offloads it"
        raise ValueError(
            complaint("encoder", f"an offloaded {type(encoder).__name__}", "one whose weights are in place", remedy)
        )
    if (name := _optimised_inside(encoder)) is not None:
        remedy = f"Call restore on its {name!r}, then optimize only the model around it"
        raise ValueError(complaint("encoder", f"one that holds an optimised model, {name!r}", "at most one of the two", remedy))
    if settings_of(encoder) is None and any(isinstance(module, fused.Fused) for module in encoder.modules()):
        remedy = "Call restore on the model that was optimised, then optimize only one of the two"
        raise ValueError(complaint("encoder", "layers that another model was optimised with", "layers as they were", remedy))
    for size in settings.batch_sizes:
        if not isinstance(size, int) or size < 1:
            raise ValueError(
                complaint("batch_sizes", size, "integers of at least 1", "Pass for instance batch_sizes=(1, 4, 16)")
            )
    if settings.max_bytes < 0:
        raise ValueError(complaint("max_bytes", settings.max_bytes, "at least 0", "Pass for instance max_bytes=4 * 2**30"))
    if settings.impl is not None:
        for op in select.TOWER_OPERATORS:
            select.check(settings.impl, encoder.device, encoder.dtype, op)


def _fuse(encoder: PreTrainedModel, impl: str | None) -> None:
    for module in list(encoder.modules()):
        if type(module) in fused.LAYERS:
            _become(module, fused.LAYERS[type(module)], impl)
            attention, mlp = (getattr(module, name) for name in (module.attention_name, module.mlp_name))
            _pack([attention.q_proj, attention.k_proj, attention.v_proj], impl)
            _fuse_mlp(mlp, impl)
            for name in module.norms:
                getattr(module, name).__dict__["feeds_a_product"] = True
        elif type(module) in fused.NORMS:
            _become(module, fused.NORMS[type(module)], impl)
            module.__dict__.setdefault("feeds_a_product", False)
        elif type(module) is nn.Conv2d and _embeds_patches(module):
            _become(module, fused_embeddings.PatchProduct, impl)
        elif type(module) in fused_embeddings.EMBEDDINGS and module.config.compression["layout"] == "block":
            _become(module, fused_embeddings.EMBEDDINGS[type(module)], impl)


def _fuse_mlp(mlp: Any, impl: str | None) -> None:
    if type(mlp) is Aimv2MLP and type(mlp.act_fn) in fused.SILU:
        _pack([mlp.gate_proj, mlp.up_proj], impl)
        _become(mlp, fused.FusedAimv2MLP, impl)
    elif type(getattr(mlp, "activation_fn", None)) is QuickGELUActivation:
        _become(mlp.activation_fn, fused.FusedQuickGELU, impl)
    elif type(mlp) is SiglipMLP and type(mlp.activation_fn) is GELUTanh:
        _become(mlp, fused.FusedSiglipMLP, impl)


def _embeds_patches(conv: nn.Conv2d) -> bool:
    plain = conv.groups == 1 and conv.dilation == (1, 1) and conv.padding in ((0, 0), "valid")
    return plain and conv.stride == conv.kernel_size


def _become(module: nn.Module, kind: type[nn.Module], impl: str | None) -> None:
    module.__class__ = kind
    module.__dict__["impl"] = impl


def _pack(layers: list[nn.Linear], impl: str | None) -> None:
    """Make the layers one :class:`laco_kernels.hf.fused.Pack`, where their parameters allow it."""
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers if layer.bias is not None]
    tensors = [*weights, *biases]
    if (
        any(type(layer) is not nn.Linear for layer in layers)
        or len(biases) not in (0, len(layers))
        or any(type(t) is not nn.Parameter or (t.dtype, t.device) != (weights[0].dtype, weights[0].device) for t in tensors)
        or len(set(map(id, tensors))) != len(tensors)
    ):
        return
    pack = fused.Pack(layers)
    for layer in layers:
        _become(layer, fused.PackedLinear, impl)
        layer.__dict__["pack"] = pack


def _packs(encoder: nn.Module) -> list[fused.Pack]:
    found = {id(module.pack): module.pack for module in encoder.modules() if isinstance(module, fused.PackedLinear)}
    return list(found.values())


def _report(encoder: PreTrainedModel, settings: Settings) -> Report:
    """Count what was done, and look whether it would do something on this device."""
    kinds = [type(module) for module in encoder.modules()]
    parts = []
    on_cpu = None if encoder.device.type == "cuda" else f"needs an NVIDIA GPU, not {encoder.device.type}"
    no_gpu = on_cpu if settings.impl is None else None
    patches = [
        side // patch for side, patch in zip(*map(sides, (encoder.config.image_size, encoder.config.patch_size)), strict=True)
    ]
    tokens = math.prod(patches)
    norm = "rms" if any(issubclass(kind, fused.FusedRMSNorm) for kind in kinds) else "layer"

    def reason(op: str, form: str | None = None) -> str | None:
        if settings.impl is not None:
            return None
        choice = select.choose(op, "forward", encoder.device, encoder.dtype, tokens, form)
        return choice.reason if choice.impl == "reference" else None

    def add(name: str, family: type[nn.Module] | tuple[type[nn.Module], ...], inactive: str | None) -> None:
        count = sum(issubclass(kind, family) for kind in kinds)
        if count:
            parts.append(Part(name, count, inactive))

    add("residual sum, LayerScale and norm in one pass", fused.FusedLayer, reason("add_norm", norm))
    add("RMSNorm in one pass", fused.FusedRMSNorm, reason("add_norm", "rms"))
    add("linear layers that share a product", fused.PackedLinear, no_gpu)
    add("SwiGLU in one product and one pass", fused.FusedAimv2MLP, no_gpu or reason("gated_silu"))
    add("quick GELU in one pass", fused.FusedQuickGELU, reason("activate", "quick_gelu"))
    add("tanh-GELU inside the product before it, in inference", fused.FusedSiglipMLP, on_cpu)
    add("patch embedding as one product", fused_embeddings.PatchProduct, no_gpu)
    add("patches embedded window by window", fused_embeddings.FusedEmbeddings, no_gpu or _raster_order(encoder))
    if settings.compile:
        parts.append(Part("torch.compile", 1))
    if settings.graphs:
        parts.append(Part("CUDA graphs, in inference", 1, on_cpu))
    return Report(tuple(parts))


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


STOCK: dict[type[nn.Module], type[nn.Module]] = {
    **{kind: stock for stock, kind in (fused.LAYERS | fused.NORMS | fused_embeddings.EMBEDDINGS).items()},
    fused.PackedLinear: nn.Linear,
    fused.FusedAimv2MLP: Aimv2MLP,
    fused.FusedQuickGELU: QuickGELUActivation,
    fused.FusedSiglipMLP: SiglipMLP,
    fused_embeddings.PatchProduct: nn.Conv2d,
}
