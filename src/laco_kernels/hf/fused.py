"""Layers of stock vision encoders that compute the same with fewer passes over memory.

Each is a subclass of a stock class and takes its place by ``module.__class__ = ...``: parameters, names, hooks and children
stay what they are. Wherever a precondition fails, when it is called, the stock ``forward`` runs: a hook on a module that
would be passed over, an adapter in its place, a device or dtype without a kernel.

What Python does for a layer takes longer than a GPU takes for a small batch, so the operators are called by their ``run_*``,
which skips validation and dispatcher where it can.
"""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils import dlpack
from transformers.activations import GELUTanh, QuickGELUActivation, SiLUActivation
from transformers.models.aimv2.modeling_aimv2 import Aimv2EncoderLayer, Aimv2MLP, Aimv2RMSNorm
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.internvl.modeling_internvl import InternVLVisionLayer, InternVLVisionRMSNorm
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer, SiglipMLP

from laco_kernels.hf.encoders import (
    LacoAimv2EncoderLayer,
    LacoCLIPEncoderLayer,
    LacoInternVLVisionLayer,
    LacoSiglipEncoderLayer,
)
from laco_kernels.kernels import select
from laco_kernels.ops.activation import run_activate, run_gated_silu
from laco_kernels.ops.add_norm import run_add_norm
from laco_kernels.ops.checks import autocast_dtype
from laco_kernels.ops.packed_linear import run_packed_linear

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


# Elements of an input, without and with gradients, below which a launch of ours may cost the host more than its pass saves
# the GPU, where the stock code needs two or three: seen on an H200 at 0.6 million (0.80x), even at 3.6 million, 1.2x at 4.2
# million; in training 0.93x at 4.2 million, 1.06x at 13 million.
LEAST = {False: 2**22, True: 2**23}
_launches = threading.local()


@contextlib.contextmanager
def launches_are_free() -> Iterator[None]:
    """Fuse whatever its size in this thread: what runs here is captured as a CUDA graph, or about to be."""
    _launches.free = True
    try:
        yield
    finally:
        _launches.free = False


def pays(elements: int) -> bool:
    """Return whether a tensor is large enough for one pass instead of two or three to be worth a launch of ours."""
    return torch.compiler.is_compiling() or getattr(_launches, "free", False) or elements >= LEAST[torch.is_grad_enabled()]


class Fused(nn.Module):
    """Mixin for a module whose class was swapped; ``impl`` is what :func:`laco_kernels.hf.optimize` was told."""

    impl: str | None


SMALL_GAINS = ("layer", "quick_gelu")  # forms whose stock code is a few launches


def implementation(module: Fused, op: str, x: torch.Tensor, form: str | None = None) -> str | None:
    """Return the implementation that a fused ``module`` calls ``op`` with on ``x``, or ``None`` for the stock code.

    Where there may be a backward pass it must have been measured faster than the stock one, too.
    """
    if is_transformed():
        return None
    if module.impl is not None:
        return module.impl
    if form in SMALL_GAINS and not pays(x.numel()):
        return None
    ways = ("forward", "backward") if torch.is_grad_enabled() else ("forward",)
    size = autocast_dtype(x), x.numel() // max(x.shape[-1], 1)
    chosen = [select.choose(op, way, x.device, *size, form).impl for way in ways]
    return None if "reference" in chosen else chosen[0]


def is_watched(module: nn.Module) -> bool:
    """Return whether hooks wait for ``module`` to be called, its own or those of all modules."""
    own = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(own) or torch.nn.modules.module._has_any_global_hook()


def is_plain(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Return whether ``module`` is of one of these very classes, runs their forward pass, and nothing watches it."""
    return type(module) in kinds and "forward" not in module.__dict__ and not is_watched(module)


def is_transformed() -> bool:
    """Return whether ``torch.func`` or forward mode is at work, for which operators of our own have no rules."""
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


class FusedRMSNorm(Fused):
    """Mixin for an RMSNorm in one pass; rounds once, where the stock one rounds three times."""

    weight: torch.Tensor
    variance_epsilon: float
    feeds_a_product: bool  # which under autocast lowers the precision in any case

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Normalise ``[..., C]``."""
        lowered = torch.is_autocast_enabled(hidden_states.device.type) and not self.feeds_a_product
        impl = None if lowered else implementation(self, "add_norm", hidden_states, "rms")
        if impl is None:
            return super().forward(hidden_states)
        return run_add_norm(hidden_states, None, self.weight, None, None, "rms", self.variance_epsilon, impl)[1]


class FusedAimv2RMSNorm(FusedRMSNorm, Aimv2RMSNorm):
    """AIMv2's norm in one pass."""


class FusedInternVLVisionRMSNorm(FusedRMSNorm, InternVLVisionRMSNorm):
    """InternViT's RMSNorm in one pass."""


RMS_NORMS = (Aimv2RMSNorm, InternVLVisionRMSNorm, FusedAimv2RMSNorm, FusedInternVLVisionRMSNorm)


class Waiting(threading.local):
    """The one product of this thread of which layers have not fetched their share yet.

    One, so that a layer that never comes, replaced or behind an error, costs no more than that, and until the next product.
    """

    # The input, what else must not change until the last share is fetched, and the shares by layer.
    product: tuple[torch.Tensor | None, Any, dict[Any, torch.Tensor]]

    def __init__(self) -> None:
        self.product = NOTHING


NOTHING: tuple[None, None, dict[Any, torch.Tensor]] = (None, None, {})
_waiting = Waiting()


class Pack:
    """Linear layers that are called one after the other on the same input, by code that does not know of each other.

    The first call computes them all; the others are handed their share. Their parameters are tensors of their own to everybody
    else, with storages of their own, but lie behind each other in one piece of memory (:meth:`lay_together`).
    """

    def __init__(self, members: Sequence[nn.Linear]) -> None:
        self.members: list[Any] = list(members)
        self._forget()

    def _forget(self) -> None:
        self.weight: torch.Tensor | None = None  # the members' weights as one, while they lie there
        self.bias: torch.Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle without the memory that a copy's parameters leave."""
        return {"members": self.members}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Undo :meth:`__getstate__`."""
        self.members = state["members"]
        self._forget()

    def lay_together(self) -> None:
        """Move the parameters behind each other, unless they are there; those on the meta device stay without memory."""
        weights, biases = self.parameters()
        if any(type(parameter) is not nn.Parameter or parameter.is_meta for parameter in (*weights, *biases)):
            return
        if len(biases) not in (0, len(weights)) or self.is_together(weights, biases):
            return
        with torch.inference_mode(False):
            self.weight, self.bias = _lay(weights), _lay(biases) if biases else None

    def parameters(self) -> tuple[list[Any], list[Any]]:
        """Return weights, ``None`` where a parametrisation computes one, and biases."""
        tables = [member._parameters for member in self.members]  # a module's own look-up takes its time
        return [table.get("weight") for table in tables], [bias for table in tables if (bias := table.get("bias")) is not None]

    def is_together(self, weights: Sequence[nn.Parameter], biases: Sequence[nn.Parameter]) -> bool:
        """Return whether these are the parameters that :meth:`lay_together` has moved, where it has moved them."""
        return _lie_in(self.weight, weights) and (_lie_in(self.bias, biases) if biases else self.bias is None)

    def product(self, x: torch.Tensor) -> torch.Tensor | None:
        """Return what the layers make of ``x`` side by side, or ``None`` where each has to compute by itself."""
        # A compiler cannot trace addresses, and fuses what comes behind two products by itself.
        compiling = torch.compiler.is_compiling()
        if compiling or is_transformed() or not (x.is_cuda or self.members[0].impl is not None):
            return None
        weights, biases = self.parameters()
        if any(type(parameter) is not nn.Parameter or parameter.device != x.device for parameter in (*weights, *biases)):
            return None
        if not self.is_together(weights, biases):
            return None
        assert self.weight is not None
        return run_packed_linear(x, self.weight, self.bias, weights, biases)

    def share(self, member: PackedLinear, x: torch.Tensor) -> torch.Tensor | None:
        """Return what ``member`` makes of ``x``, or ``None`` where it has to compute it by itself."""
        state = (torch.is_grad_enabled(), None if x.is_inference() else x._version)
        given, before, shares = _waiting.product
        _waiting.product = NOTHING
        if given is not x or before != state or member not in shares:
            if all(member is not own for own in self.members):  # a copy of one
                return None
            y = self.product(x) if member.impl is not None or pays(x.numel()) else None
            if y is None:
                return None
            # Not views to autograd, so that a hook may change one in place.
            outputs = y.unsafe_split_with_sizes([own.out_features for own in self.members], -1)
            shares = dict(zip(self.members, outputs, strict=True))
        mine = shares.pop(member)
        if shares:
            _waiting.product = x, state, shares
        return mine


def _lay(parameters: Sequence[nn.Parameter]) -> torch.Tensor:
    """Copy parameters into one tensor and let each read its rows there, from a storage that is but these."""
    whole = torch.cat([parameter.detach() for parameter in parameters])
    for parameter, rows in zip(parameters, whole.split([len(parameter) for parameter in parameters]), strict=True):
        # Tensors of one storage are taken for tied weights by who saves them, and dropped.
        parameter.data = dlpack.from_dlpack(rows)
    return whole


def _lie_in(whole: torch.Tensor | None, parameters: Sequence[nn.Parameter]) -> bool:
    if whole is None:
        return False
    address, rows, shape = whole.data_ptr(), 0, whole.shape[1:]
    for parameter in parameters:
        if (
            parameter.data_ptr() != address
            or parameter.dtype != whole.dtype
            or parameter.shape[1:] != shape
            or not parameter.is_contiguous()
        ):
            return False
        rows += len(parameter)
        address += parameter.nbytes
    return rows == len(whole)


class PackedLinear(Fused, nn.Linear):
    """One of the linear layers of a :class:`Pack`."""

    pack: Pack

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer to ``[..., C]``."""
        # A compiler's graph has no other thread, but no memory between calls either.
        share = None if torch.compiler.is_compiling() else self.pack.share(self, x)
        return super().forward(x) if share is None else share

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.pack._forget()  # lest the memory that the parameters leave is kept
        return super()._apply(*args, **kwargs)


SILU = (nn.SiLU, SiLUActivation)


class FusedAimv2MLP(Fused, Aimv2MLP):
    """SwiGLU with gate and up in one product and their gating in one pass."""

    gate_proj: PackedLinear
    up_proj: PackedLinear
    down_proj: nn.Linear
    act_fn: nn.Module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the feed-forward block to ``[..., C]``."""
        layers = (self.gate_proj, self.up_proj)
        impl = implementation(self, "gated_silu", x)
        plain = all(is_plain(layer, PackedLinear) for layer in layers) and is_plain(self.act_fn, *SILU)
        h = self.gate_proj.pack.product(x) if plain and impl is not None else None
        if h is None or impl is None:
            return super().forward(x)
        return self.down_proj(run_gated_silu(h, impl))


class FusedQuickGELU(Fused, QuickGELUActivation):
    """CLIP's activation in one pass instead of three."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply it to ``[..., F]``."""
        impl = implementation(self, "activate", x, "quick_gelu")
        return super().forward(x) if impl is None else run_activate(x, "quick_gelu", impl)


class FusedSiglipMLP(Fused, SiglipMLP):
    """The first product with bias and tanh-GELU in its epilogue, where nothing has to be kept for a backward pass."""

    fc1: nn.Linear
    fc2: nn.Linear
    activation_fn: nn.Module

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Apply the feed-forward block to ``[..., C]``."""
        layer = self.fc1
        tensors = (hidden_states, layer.weight, layer.bias)
        if (
            (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
            or torch.is_autocast_enabled(hidden_states.device.type)
            or not hidden_states.is_cuda
            or not is_plain(layer, nn.Linear)
            or not is_plain(self.activation_fn, GELUTanh)
        ):
            return super().forward(hidden_states)
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        # cuBLASLt's epilogue; on what it does not support torch computes the same in two passes.
        made = torch._addmm_activation(layer.bias, rows, layer.weight.t(), use_gelu=True)
        return self.fc2(made.view(*hidden_states.shape[:-1], -1))


class FusedLayer(Fused):
    """Mixin for an encoder layer that takes residual sum, LayerScale and the second norm in one pass."""

    norms: ClassVar[tuple[str, str]] = ("layer_norm1", "layer_norm2")
    attention_name: ClassVar[str] = "self_attn"
    mlp_name: ClassVar[str] = "mlp"
    scales: ClassVar[tuple[str, str] | None] = None
    dropout: nn.Module  # of InternViT

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run the layer on ``[B, tokens, C]``."""
        try:
            return self._run(hidden_states, *args, **kwargs)
        finally:
            if not torch.compiler.is_compiling():
                _waiting.product = NOTHING  # the share of a layer that was replaced, or that an error kept from being called

    def _run(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        norm1, norm2 = (getattr(self, name) for name in self.norms)
        is_layer = isinstance(norm2, nn.LayerNorm)
        kind = "layer" if is_layer else "rms"
        impl = implementation(self, "add_norm", hidden_states, kind)
        if impl is None or not is_plain(norm2, nn.LayerNorm, *RMS_NORMS):
            return super().forward(hidden_states, *args, **kwargs)
        attended = getattr(self, self.attention_name)(norm1(hidden_states), *args, **kwargs)[0]
        scale1, scale2 = (None, None) if self.scales is None else (getattr(self, name) for name in self.scales)
        total, normed = run_add_norm(
            hidden_states,
            attended,
            norm2.weight,
            norm2.bias if is_layer else None,
            scale1,
            kind,
            norm2.eps if is_layer else norm2.variance_epsilon,
            impl,
        )
        made = getattr(self, self.mlp_name)(normed)
        if scale2 is None:
            return total + made
        return torch.addcmul(total, self.dropout(made), scale2)


class FusedAimv2EncoderLayer(FusedLayer, Aimv2EncoderLayer):
    """AIMv2's encoder layer."""

    norms = ("rms_norm1", "rms_norm2")
    attention_name = "attention"
    mlp_name = "ffn"


class FusedSiglipEncoderLayer(FusedLayer, SiglipEncoderLayer):
    """SigLIP's encoder layer."""


class FusedCLIPEncoderLayer(FusedLayer, CLIPEncoderLayer):
    """CLIP's encoder layer."""


class FusedInternVLVisionLayer(FusedLayer, InternVLVisionLayer):
    """InternViT's encoder layer."""

    norms = ("layernorm_before", "layernorm_after")
    attention_name = "attention"
    scales = ("lambda_1", "lambda_2")


# In a merging layer the merge comes behind the fused layer.
class FusedLacoAimv2EncoderLayer(LacoAimv2EncoderLayer, FusedAimv2EncoderLayer):
    """AIMv2's merging layer."""


class FusedLacoSiglipEncoderLayer(LacoSiglipEncoderLayer, FusedSiglipEncoderLayer):
    """SigLIP's merging layer."""


class FusedLacoCLIPEncoderLayer(LacoCLIPEncoderLayer, FusedCLIPEncoderLayer):
    """CLIP's merging layer."""


class FusedLacoInternVLVisionLayer(LacoInternVLVisionLayer, FusedInternVLVisionLayer):
    """InternViT's merging layer."""


LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    Aimv2EncoderLayer: FusedAimv2EncoderLayer,
    SiglipEncoderLayer: FusedSiglipEncoderLayer,
    CLIPEncoderLayer: FusedCLIPEncoderLayer,
    InternVLVisionLayer: FusedInternVLVisionLayer,
    LacoAimv2EncoderLayer: FusedLacoAimv2EncoderLayer,
    LacoSiglipEncoderLayer: FusedLacoSiglipEncoderLayer,
    LacoCLIPEncoderLayer: FusedLacoCLIPEncoderLayer,
    LacoInternVLVisionLayer: FusedLacoInternVLVisionLayer,
}
NORMS: dict[type[nn.Module], type[nn.Module]] = {
    Aimv2RMSNorm: FusedAimv2RMSNorm,
    InternVLVisionRMSNorm: FusedInternVLVisionRMSNorm,
}
