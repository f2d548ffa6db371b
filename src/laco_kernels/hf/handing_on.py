"""The sum at an encoder layer's end in one pass with the norm that the next layer begins with.

While an encoder runs its layers, one that ends with a residual sum may make the next one's first norm in the same pass. What it
made waits, in this thread and until the encoder returns, for a layer that is given that very sum, unchanged, and whose norm is
still the one it was made for; any other computes its own.
"""

from __future__ import annotations

import threading
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from transformers.models.aimv2.modeling_aimv2 import Aimv2Encoder
from transformers.models.clip.modeling_clip import CLIPEncoder
from transformers.models.internvl.modeling_internvl import InternVLVisionEncoder
from transformers.models.siglip.modeling_siglip import SiglipEncoder
from transformers.utils import output_capturing

from laco_kernels.hf.fusing import Fused, is_called_for_others, is_patched, is_plain, know
from laco_kernels.ops.checks import is_autocast

if TYPE_CHECKING:
    from collections.abc import Iterable


class Waiting(NamedTuple):
    """What one layer has normalised for the next."""

    layer: nn.Module
    norm: nn.Module
    total: torch.Tensor
    normed: torch.Tensor
    parameters: tuple[torch.Tensor | None, ...]
    state: tuple[Any, ...]


class Chain:
    """One call of an encoder: which layer follows which, and what waits for the next."""

    __slots__ = ("following", "waiting")

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        layers = list(layers)
        self.following = {id(layer): after for layer, after in pairwise(layers)}
        self.waiting: Waiting | None = None

    def leave(self, layer: nn.Module, norm: nn.Module, total: torch.Tensor, normed: torch.Tensor) -> None:
        """Have ``normed``, what ``norm`` makes of ``total``, wait for ``layer``."""
        self.waiting = Waiting(layer, norm, total, normed, parameters_of(norm), state_of(norm, total))

    def take(self, layer: nn.Module, norm: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
        """Return what waits for ``layer`` if it is what ``norm`` makes of ``x``; afterwards nothing waits."""
        waiting, self.waiting = self.waiting, None
        if waiting is None or waiting.layer is not layer or waiting.norm is not norm or waiting.total is not x:
            return None
        (weight, bias), then = parameters_of(norm), waiting.parameters
        if weight is not then[0] or bias is not then[1]:
            return None
        return waiting.normed if waiting.state == state_of(norm, x) and is_plain(norm, type(norm)) else None


class Running(threading.local):
    """The encoder that this thread is in, innermost first."""

    chain: Chain | None = None


running = Running()


def parameters_of(norm: Any) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return a norm's weight and its bias, which RMSNorm has none of."""
    found = norm._parameters  # a module's own look-up takes its time
    return found.get("weight"), found.get("bias")


def state_of(norm: Any, x: torch.Tensor) -> tuple[Any, ...]:
    """Return what must not have changed between a norm that was made ahead and its use."""
    versions = [None if t is None or t.is_inference() else t._version for t in (x, *parameters_of(norm))]
    attributes = norm.__dict__
    return versions, attributes.get("eps"), attributes.get("variance_epsilon"), torch.is_grad_enabled(), is_autocast(x)


def notes_outputs() -> bool:
    """Return whether transformers' hooks note anything in this call, as for ``output_hidden_states``."""
    collector = getattr(output_capturing, "_active_collector", None)
    return collector is None or collector.get() is not None


def is_left_alone(layer: Any) -> bool:
    """Return whether nothing comes between this layer and its neighbours: foreign hooks, wrappers, a recomputation."""
    return (
        "forward" not in layer.__dict__
        and layer._compiled_call_impl is None
        and not (layer.training and getattr(layer, "gradient_checkpointing", False))
        and not is_patched(type(layer))
        and not is_called_for_others(layer)
        # What transformers' hooks note may be asked for its gradient, all of it, or be given a hook that changes it.
        and not (layer._forward_hooks and torch.is_grad_enabled() and notes_outputs())
        and not layer._backward_hooks
        and not layer._backward_pre_hooks
        and not torch.nn.modules.module._has_any_global_hook()
    )


class FusedEncoder(Fused):
    """Mixin for the module that calls an encoder's layers one after the other."""

    layers_name = "layers"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layers; arguments and outputs are the stock encoder's."""
        if torch.compiler.is_compiling() or is_patched(type(self)):
            return super().forward(*args, **kwargs)
        outer, running.chain = running.chain, Chain(getattr(self, self.layers_name))
        try:
            return super().forward(*args, **kwargs)
        finally:
            running.chain = outer


class FusedAimv2Encoder(FusedEncoder, Aimv2Encoder):
    """AIMv2's layers."""

    stock = Aimv2Encoder


class FusedSiglipEncoder(FusedEncoder, SiglipEncoder):
    """SigLIP's layers."""

    stock = SiglipEncoder


class FusedCLIPEncoder(FusedEncoder, CLIPEncoder):
    """CLIP's layers."""

    stock = CLIPEncoder


class FusedInternVLVisionEncoder(FusedEncoder, InternVLVisionEncoder):
    """InternViT's layers."""

    stock = InternVLVisionEncoder
    layers_name = "layer"


ENCODERS: dict[type[nn.Module], type[nn.Module]] = {
    Aimv2Encoder: FusedAimv2Encoder,
    SiglipEncoder: FusedSiglipEncoder,
    CLIPEncoder: FusedCLIPEncoder,
    InternVLVisionEncoder: FusedInternVLVisionEncoder,
}

know(*ENCODERS)
