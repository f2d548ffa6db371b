"""Make a vision encoder faster without changing what it computes: :func:`optimize` and :func:`restore`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import QuickGELUActivation
from transformers.models.aimv2.modeling_aimv2 import Aimv2MLP

from laco_kernels.errors import complaint
from laco_kernels.hf import fused, fused_embeddings, fused_mlps, handing_on
from laco_kernels.hf.encoders import FAMILIES
from laco_kernels.hf.fusing import Fused
from laco_kernels.hf.graphs import GraphedForward, is_sharded
from laco_kernels.hf.mixins import CompressedEncoder
from laco_kernels.hf.optimize_report import FUSED, STOCK, Report, change_of, make_report
from laco_kernels.hf.packs import Pack, PackedLinear, are_alike
from laco_kernels.kernels import select

KEPT, OWN_FORWARD = "_laco_optimization", "_laco_own_forward"  # where an encoder keeps what was done to it, and what it had
BOUND = 4 * 2**30


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


@dataclass
class Kept:
    """What an encoder, and a shallow copy, which has the same modules, keep of an optimisation."""

    settings: Settings
    undone: bool = False


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
    max_bytes: int = BOUND,
    batch_sizes: Sequence[int] = (),
    clone: bool = True,
) -> Report:
    """Make ``encoder`` faster in place: fewer passes over memory, fewer launches, the same numbers.

    Parameters, their names, hooks, outputs and gradients stay what they are; :func:`restore` undoes it. Each change looks
    at every call whether it applies, and leaves the stock code to run where it does not: on a CPU, under an adapter, beneath
    a hook on a module that it would pass over, where somebody has replaced a stock ``forward``, on so few tokens that launches
    are all that counts (there CUDA graphs help). Under autocast hooks on the linear layers of attention and feed-forward block
    may see inputs in autocast's dtype, to which these are cast in any case.

    Derivatives are first ones: a backward pass through the graph of another (``create_graph=True``) is refused. A feed-forward
    block with GELU makes its input again by running the norm before it once more, so that a norm's parameters that are edited
    through ``.data`` between a forward pass and its backward pass, which autograd cannot see, change the gradient of the next
    linear layer's weight; edited in place under ``torch.no_grad`` they are refused, as ever. Where ``output_hidden_states`` is
    asked for under gradients, a layer's end and the next layer's norm stay two passes, as each state has to have its whole
    gradient.

    Args:
        encoder: an ``Aimv2VisionModel``, ``SiglipVisionModel``, ``InternVLVisionModel`` or ``CLIPVisionModel``, stock or
            compressed. Optimise before wrapping it in DDP or sharding it by FSDP2, and after quantising it by
            ``torch.ao.quantization.quantize_dynamic``, which takes layers by their very class: those that share a product
            here have one of their own, and stay as they are, without a word.
        fuse: residual sum, LayerScale and norm in one pass, also that at a layer's end with the next layer's norm; RMSNorm in
            one pass; queries, keys and values as one product, also SwiGLU's two; SwiGLU's and CLIP's activation in one pass;
            the patch embedding as one product, which in a compressed encoder makes the tokens window by window; without
            gradients SigLIP's activation inside the product before it; with gradients feed-forward blocks with GELU that keep
            neither their activation nor their input for the backward pass.
        graphs: replay the forward pass as a CUDA graph, captured for each shape, in evaluation mode and without gradients.
        compile: run the forward pass through ``torch.compile``, by its own defaults; with ``graphs`` that is captured.
        impl: the kernels' implementation, as for the operators: ``None`` is the measured choice, and only that may leave a
            fusion inactive. Named, it is that of the passes between products, which are torch's own.
        max_bytes: bound on the memory that graphs hold; those not used for long make room, and a shape for which there is none
            runs as it is, with a warning.
        batch_sizes: with ``graphs``, pad batches to the next larger of these sizes.
        clone: with ``graphs``, return copies; without them an output is overwritten by the next call.

    Returns:
        What was changed, how often, on what inputs, what of it is inactive here and why, and what somebody else has changed,
        so that it was left; ``print`` it.

    Raises:
        TypeError: ``encoder`` is no model, or one without layers of a known family; an option is of the wrong type.
        ValueError: an option is out of range; ``encoder`` is sharded or offloaded, holds a model that was optimised by itself,
            or is part of one that was.
        RuntimeError: ``impl`` cannot run here, or new settings need a :func:`restore` that is refused.
    """
    _check_options(fuse=fuse, graphs=graphs, compile=compile, clone=clone)
    _check_graphs(graphs, max_bytes, batch_sizes)
    settings = Settings(fuse, graphs, compile, impl, max_bytes, tuple(batch_sizes), clone)
    _check(encoder, settings)
    if settings_of(encoder) != settings:
        restore(encoder)
        _wrap_forward(encoder, settings)
        encoder.__dict__[KEPT] = Kept(settings)
    if fuse:
        _fuse(encoder, impl)  # also layers that have come since
    for pack in _packs(encoder):
        pack.lay_together()  # again, where they were moved, copied or replaced since
    return make_report(encoder, settings)


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
        RuntimeError: something else has changed the class of a fused layer since, ``fully_shard`` or a parametrisation, has
            wrapped the forward pass, as accelerate does, or another optimised model was put inside; nothing is undone then.
    """
    kept: Kept | None = encoder.__dict__.get(KEPT)
    if kept is None:
        return
    if (name := _optimised_inside(encoder)) is not None:
        remedy = f"Restore its {name!r} first"
        raise RuntimeError(complaint("encoder", f"one that holds another optimised model, {name!r}", "no such model", remedy))
    changed = [] if kept.undone else [module for module in encoder.modules() if isinstance(module, Fused)]
    for module in changed:
        if type(module) not in STOCK:
            given = f"a layer that has become a {type(module).__name__} since it was optimised"
            raise RuntimeError(complaint("encoder", given, "layers as optimize left them", "Undo first what came last"))
    forward = encoder.__dict__.get("forward") if kept.settings.graphs or kept.settings.compile else None
    if forward is not None and not isinstance(forward, (GraphedForward, CompiledForward)):
        given = f"an encoder whose forward has become a {type(forward).__name__} since it was optimised"
        raise RuntimeError(complaint("encoder", given, "its forward as optimize left it", "Undo first what came last"))
    del encoder.__dict__[KEPT]
    kept.undone = True
    if forward is not None:
        del encoder.__dict__["forward"]
        if isinstance(forward, GraphedForward):
            forward.release()
        if OWN_FORWARD in encoder.__dict__:
            encoder.__dict__["forward"] = encoder.__dict__.pop(OWN_FORWARD)
    for module in changed:
        for name in ("impl", "pack"):
            module.__dict__.pop(name, None)
        kind: Any = STOCK[type(module)]
        module.__class__ = kind


def settings_of(encoder: nn.Module) -> Settings | None:
    """Return what ``encoder`` was optimised with, if it was."""
    kept: Kept | None = encoder.__dict__.get(KEPT)
    return None if kept is None or kept.undone else kept.settings


def _optimised_inside(encoder: nn.Module) -> str | None:
    """Return the name of a model inside ``encoder`` that was optimised by itself, if there is one."""
    return next((name for name, module in encoder.named_modules() if name and settings_of(module) is not None), None)


def _check_options(**options: object) -> None:
    for name, value in options.items():
        if not isinstance(value, bool):
            raise TypeError(complaint(name, repr(value), "True or False", f"Pass {name}=True or {name}=False"))


def _check_graphs(graphs: bool, max_bytes: Any, batch_sizes: Any) -> None:
    remedy = f"Pass for instance max_bytes={BOUND}"
    if isinstance(max_bytes, bool) or not isinstance(max_bytes, int):
        raise TypeError(complaint("max_bytes", repr(max_bytes), "an integer", remedy))
    if max_bytes < 0:
        raise ValueError(complaint("max_bytes", max_bytes, "at least 0", remedy))
    remedy = "Pass for instance batch_sizes=(1, 4, 16)"
    if isinstance(batch_sizes, str) or not isinstance(batch_sizes, Sequence):
        raise TypeError(complaint("batch_sizes", repr(batch_sizes), "a tuple or list of integers", remedy))
    for size in batch_sizes:
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(complaint("batch_sizes", repr(size), "integers of at least 1", remedy))
    if len(batch_sizes) and not graphs:
        given = f"{tuple(batch_sizes)} without graphs"
        raise ValueError(complaint("batch_sizes", given, "none, as nothing is captured", "Pass graphs=True with it"))


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
    if settings_of(encoder) is None and any(isinstance(module, Fused) for module in encoder.modules()):
        remedy = "Call restore on the model that was optimised, then optimize only one of the two"
        raise ValueError(complaint("encoder", "layers that another model was optimised with", "layers as they were", remedy))
    if settings.impl is not None:
        for op in select.TOWER_OPERATORS:
            select.check(settings.impl, encoder.device, encoder.dtype, op)


def _fuse(encoder: PreTrainedModel, impl: str | None) -> None:
    for module in list(encoder.modules()):
        kind = type(module)
        if kind in fused.LAYERS:
            layer: Any = fused.LAYERS[kind]
            _fuse_mlp(getattr(module, layer.mlp_name), impl)
            if _become(module, impl):
                attention = getattr(module, layer.attention_name)
                _pack([getattr(attention, name, None) for name in ("q_proj", "k_proj", "v_proj")], impl)
        elif (
            kind in fused.NORMS
            or kind in handing_on.ENCODERS
            or (kind is nn.Conv2d and _embeds_patches(module))
            or (kind in fused_embeddings.EMBEDDINGS and module.config.compression["layout"] == "block")
        ):
            _become(module, impl)


def _fuse_mlp(mlp: Any, impl: str | None) -> None:
    if type(mlp) is Aimv2MLP and type(mlp.act_fn) in fused_mlps.SILU:
        if _become(mlp, impl):
            _pack([mlp.gate_proj, mlp.up_proj], impl)
        return
    activation: Any = getattr(mlp, "activation_fn", None)
    if type(mlp) in fused_mlps.GELU_MLPS and type(activation) in fused_mlps.APPROXIMATIONS:
        _become(mlp, impl)
    if type(activation) is QuickGELUActivation:
        _become(activation, impl)


def _embeds_patches(conv: Any) -> bool:
    plain: bool = conv.groups == 1 and conv.dilation == (1, 1) and conv.padding in ((0, 0), "valid")
    return plain and conv.stride == conv.kernel_size


def _become(module: nn.Module, impl: str | None) -> bool:
    """Turn a module into its fused class, unless somebody has changed how it runs; return whether that is done."""
    if change_of(module) is not None:
        return False
    kind: Any = FUSED[type(module)]
    module.__class__ = kind
    module.__dict__["impl"] = impl
    return True


def _pack(layers: list[Any], impl: str | None) -> None:
    """Make the layers one :class:`laco_kernels.hf.packs.Pack`, where they are plain linear layers alike."""
    if any(type(layer) is not nn.Linear or change_of(layer) is not None for layer in layers):
        return
    pack = Pack(layers)
    found = pack.parameters()
    if found is None or not are_alike([*found[0], *found[1]]):
        return
    for layer in layers:
        _become(layer, impl)
        layer.__dict__["pack"] = pack


def _packs(encoder: nn.Module) -> list[Pack]:
    found = {id(module.pack): module.pack for module in encoder.modules() if isinstance(module, PackedLinear)}
    return list(found.values())
