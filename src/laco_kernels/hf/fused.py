"""Layers of stock vision encoders that compute the same with fewer passes over memory.

Each is a subclass of a stock class and takes its place by ``module.__class__ = ...``: parameters, names, hooks and children
stay what they are. Wherever a precondition fails, when it is called, the stock ``forward`` runs: a hook on a module that
would be passed over, an adapter in its place, a device or dtype without a kernel.

What Python does for a layer takes longer than a GPU takes for a small batch, so the operators are called by their ``run_*``,
which skips validation and dispatcher where it can.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from transformers.models.aimv2.modeling_aimv2 import Aimv2Attention, Aimv2EncoderLayer, Aimv2RMSNorm
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPEncoderLayer
from transformers.models.internvl.modeling_internvl import (
    InternVLVisionAttention,
    InternVLVisionLayer,
    InternVLVisionRMSNorm,
)
from transformers.models.siglip.modeling_siglip import SiglipAttention, SiglipEncoderLayer

from laco_kernels.hf import handing_on
from laco_kernels.hf.encoders import (
    LacoAimv2EncoderLayer,
    LacoCLIPEncoderLayer,
    LacoInternVLVisionAttention,
    LacoInternVLVisionLayer,
    LacoSiglipEncoderLayer,
)
from laco_kernels.hf.fused_mlps import MLPS
from laco_kernels.hf.fusing import Fused, implementation, is_plain, know
from laco_kernels.hf.handing_on import is_left_alone
from laco_kernels.hf.packs import Call, running
from laco_kernels.ops.add_norm import run_add_norm
from laco_kernels.ops.checks import is_autocast
from laco_kernels.ops.gelu_mlp import Norm


def fits(x: torch.Tensor, mixed: bool, *vectors: torch.Tensor | None) -> bool:
    """Return whether an operator takes ``x [..., C]`` with these ``[C]``, at least the first, in one dtype or ``mixed``."""
    shape, dtype = x.shape[-1:], x.dtype
    for vector in vectors:
        if vector is not None and (vector.shape != shape or (vector.dtype != dtype and not mixed)):
            return False
    return vectors[0] is not None


class FusedRMSNorm(Fused):
    """Mixin for an RMSNorm in one pass; rounds once, where the stock one rounds three times."""

    weight: torch.Tensor
    variance_epsilon: float

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Normalise ``[..., C]``."""
        impl, mixed = implementation(self, "add_norm", hidden_states, "rms"), is_autocast(hidden_states)
        if impl is None or (mixed and not self._feeds_products()) or not fits(hidden_states, mixed, self.weight):
            return super().forward(hidden_states)
        return run_add_norm(hidden_states, None, self.weight, None, None, "rms", self.variance_epsilon, impl)[1]

    def _feeds_products(self) -> bool:
        """Return whether nothing but products read the output, whose precision the operator lowers under autocast."""
        call = None if torch.compiler.is_compiling() else running.call
        return call is not None and call.feeds is self


class FusedAimv2RMSNorm(FusedRMSNorm, Aimv2RMSNorm):
    """AIMv2's norm in one pass."""

    stock = Aimv2RMSNorm


class FusedInternVLVisionRMSNorm(FusedRMSNorm, InternVLVisionRMSNorm):
    """InternViT's RMSNorm in one pass."""

    stock = InternVLVisionRMSNorm


RMS_NORMS = (Aimv2RMSNorm, InternVLVisionRMSNorm, FusedAimv2RMSNorm, FusedInternVLVisionRMSNorm)


class FusedLayer(Fused):
    """Mixin for an encoder layer that takes residual sum, LayerScale and the second norm in one pass."""

    norms: ClassVar[tuple[str, str]] = ("layer_norm1", "layer_norm2")
    attention_name: ClassVar[str] = "self_attn"
    mlp_name: ClassVar[str] = "mlp"
    scales: ClassVar[tuple[str, str] | None] = None
    dropout: nn.Module  # of InternViT

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run the layer on ``[B, tokens, C]``."""
        if torch.compiler.is_compiling():
            return self._run(None, hidden_states, *args, **kwargs)
        outer, running.call = running.call, Call()
        try:
            return self._run(running.call, hidden_states, *args, **kwargs)
        finally:
            running.call = outer

    def _run(self, call: Call | None, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        norm1, norm2 = getattr(self, self.norms[0]), getattr(self, self.norms[1])
        chain = None if call is None else handing_on.running.chain
        normed1 = None if chain is None else chain.take(self, norm1, hidden_states)
        mlp = getattr(self, self.mlp_name)
        is_layer = isinstance(norm2, nn.LayerNorm)
        kind = "layer" if is_layer else "rms"
        impl = implementation(self, "add_norm", hidden_states, kind)
        mixed = is_autocast(hidden_states)
        # Under autocast foreign blocks and hooks get what a norm makes in the precision that it always had.
        if mixed and call is not None and is_plain(norm1, *RMS_NORMS):
            call.feeds = norm1 if is_plain(getattr(self, self.attention_name), *ATTENTIONS) else None
        if impl is None or not self.takes_fused(mixed):
            return super().forward(hidden_states, *args, **kwargs)
        bias = norm2.bias if is_layer else None
        scale1 = scale2 = None
        if self.scales is not None:
            scale1, scale2 = getattr(self, self.scales[0]), getattr(self, self.scales[1])
        if not fits(hidden_states, mixed, norm2.weight, bias, scale1, scale2):
            return super().forward(hidden_states, *args, **kwargs)
        attended = self.attend(norm1(hidden_states) if normed1 is None else normed1, *args, **kwargs)
        if mixed or attended.dtype == hidden_states.dtype:
            eps = norm2.eps if is_layer else norm2.variance_epsilon
            total, normed = run_add_norm(hidden_states, attended, norm2.weight, bias, scale1, kind, eps, impl)
            if call is not None and normed.requires_grad:
                call.normed = normed, normed._version, Norm(total, norm2.weight, bias, kind, eps, impl)
        else:
            total = hidden_states + (attended if scale1 is None else scale1 * attended)
            normed = norm2(total)
        made = mlp(normed)
        if self.scales is not None:
            made = self.dropout(made)
        after: Any = None if chain is None else chain.following.get(id(self))
        if chain is not None and after is not None and self._may_hand_on(after, total, made, scale2, kind):
            norm = getattr(after, after.norms[0])
            bias = norm.bias if is_layer else None
            eps = norm.eps if is_layer else norm.variance_epsilon
            total, normed = run_add_norm(total, made, norm.weight, bias, scale2, kind, eps, impl)
            chain.leave(after, norm, total, normed)
            return total
        return total + made if scale2 is None else torch.addcmul(total, made, scale2)

    def takes_fused(self, mixed: bool) -> bool:
        """Return whether the modules inside are those that the fused forward pass knows."""
        norm = getattr(self, self.norms[1])
        return is_plain(norm, nn.LayerNorm, *RMS_NORMS) and (not mixed or is_plain(getattr(self, self.mlp_name), *MLPS))

    def _may_hand_on(self, after: Any, total: torch.Tensor, made: torch.Tensor, scale: Any, kind: str) -> bool:
        """Return whether the next layer is sure to begin with a norm of this one's result."""
        if type(after) not in FUSED_LAYERS or after.impl != self.impl or getattr(self, "merge", None) is not None:
            return False
        norm, mixed = getattr(after, after.norms[0]), is_autocast(total)
        if not is_plain(norm, nn.LayerNorm, *RMS_NORMS) or kind != ("layer" if isinstance(norm, nn.LayerNorm) else "rms"):
            return False
        parameters = (norm.weight, norm.bias if kind == "layer" else None)
        return (
            (mixed or made.dtype == total.dtype)
            and after.takes_fused(mixed)
            # Under autocast foreign attention gets what a norm makes in the precision that it always had.
            and (not mixed or is_plain(getattr(after, after.attention_name), *ATTENTIONS))
            and all(p is None or (type(p) is nn.Parameter and p.device == total.device) for p in parameters)
            and type(total) is torch.Tensor
            and fits(total, mixed, *parameters, scale)
            and is_left_alone(self)
            and is_left_alone(after)
        )

    def attend(self, normed: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        """Call attention as the stock layer does, which hooks see, and return its first output."""
        attended: torch.Tensor
        attended, _ = getattr(self, self.attention_name)(hidden_states=normed, attention_mask=attention_mask, **kwargs)
        return attended


class FusedAimv2EncoderLayer(FusedLayer, Aimv2EncoderLayer):
    """AIMv2's encoder layer."""

    stock = Aimv2EncoderLayer
    norms = ("rms_norm1", "rms_norm2")
    attention_name = "attention"
    mlp_name = "ffn"


class FusedSiglipEncoderLayer(FusedLayer, SiglipEncoderLayer):
    """SigLIP's encoder layer."""

    stock = SiglipEncoderLayer


class FusedCLIPEncoderLayer(FusedLayer, CLIPEncoderLayer):
    """CLIP's encoder layer."""

    stock = CLIPEncoderLayer


class FusedInternVLVisionLayer(FusedLayer, InternVLVisionLayer):
    """InternViT's encoder layer."""

    stock = InternVLVisionLayer
    norms = ("layernorm_before", "layernorm_after")
    attention_name = "attention"
    scales = ("lambda_1", "lambda_2")

    def attend(self, normed: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Call attention as the stock layer does, which takes no mask, and return its first output."""
        attended: torch.Tensor
        attended, _ = getattr(self, self.attention_name)(normed)
        return attended


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
FUSED_LAYERS = frozenset(LAYERS.values())
NORMS: dict[type[nn.Module], type[nn.Module]] = {
    Aimv2RMSNorm: FusedAimv2RMSNorm,
    InternVLVisionRMSNorm: FusedInternVLVisionRMSNorm,
}
# Under autocast these read a norm's output in nothing but products.
ATTENTIONS = (Aimv2Attention, SiglipAttention, CLIPAttention, InternVLVisionAttention, LacoInternVLVisionAttention)

know(Aimv2EncoderLayer, SiglipEncoderLayer, CLIPEncoderLayer, InternVLVisionLayer)
know(nn.LayerNorm, Aimv2RMSNorm, InternVLVisionRMSNorm, *ATTENTIONS)
