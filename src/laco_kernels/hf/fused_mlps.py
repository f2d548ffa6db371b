"""Feed-forward blocks of stock vision encoders that compute the same with fewer passes, and keep less for the backward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.activations import GELUActivation, GELUTanh, QuickGELUActivation, SiLUActivation
from transformers.models.aimv2.modeling_aimv2 import Aimv2MLP
from transformers.models.clip.modeling_clip import CLIPMLP
from transformers.models.internvl.modeling_internvl import InternVLVisionMLP
from transformers.models.siglip.modeling_siglip import SiglipMLP

from laco_kernels.hf.fusing import Fused, implementation, is_patched, is_plain, is_transformed, know
from laco_kernels.hf.packs import PackedLinear, running
from laco_kernels.ops.activation import run_activate, run_gated_silu
from laco_kernels.ops.checks import is_autocast
from laco_kernels.ops.gelu_mlp import run_gelu_mlp
from laco_kernels.ops.library import needs_saving

if TYPE_CHECKING:
    from laco_kernels.ops.gelu_mlp import Norm

SILU = (nn.SiLU, SiLUActivation)


class FusedAimv2MLP(Fused, Aimv2MLP):
    """SwiGLU with gate and up in one product and their gating in one pass."""

    stock = Aimv2MLP
    gate_proj: PackedLinear
    up_proj: PackedLinear
    down_proj: nn.Linear
    act_fn: nn.Module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the feed-forward block to ``[..., C]``."""
        impl = implementation(self, "gated_silu", x)
        h = self.gate_proj.pack.product(x) if impl is not None and self._is_known() else None
        if h is None or impl is None:
            return super().forward(x)
        return self.down_proj(run_gated_silu(h, impl))

    def _is_known(self) -> bool:
        """Return whether the layers passed over are those of the pack, in its order, and compute what they always did."""
        gate, up = self.gate_proj, self.up_proj
        if not is_plain(gate, PackedLinear) or not is_plain(up, PackedLinear) or not is_plain(self.act_fn, *SILU):
            return False
        return gate.pack.members == [gate, up]


class FusedQuickGELU(Fused, QuickGELUActivation):
    """CLIP's activation in one pass instead of three."""

    stock = QuickGELUActivation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply it to ``[..., F]``."""
        impl = implementation(self, "activate", x, "quick_gelu")
        return super().forward(x) if impl is None else run_activate(x, "quick_gelu", impl)


# What GELU is in these, as lk.gelu_mlp calls it.
APPROXIMATIONS: dict[type[nn.Module], str] = {
    GELUActivation: "none",
    GELUTanh: "tanh",
    QuickGELUActivation: "sigmoid",
    FusedQuickGELU: "sigmoid",
}
# Inside an encoder the name of an implementation is that of the passes between products, which are cuBLAS's. A product of ours
# is for where it was measured faster.
BETWEEN_PRODUCTS = {"triton": "composite"}


class FusedGeluMLP(Fused):
    """Mixin for a feed-forward block with GELU.

    Where a backward pass may follow it is one operator, which keeps the pre-activation, no activation, and what the norm
    before it keeps in place of its input. Without one, tanh-GELU is in the epilogue of the first product; else what is left
    to gain is in the products, so that only a measured choice runs the operator there.
    """

    fc1: nn.Linear
    fc2: nn.Linear
    activation_fn: nn.Module

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Apply the feed-forward block to ``[..., C]``."""
        made = self._at_once(hidden_states)
        return super().forward(hidden_states) if made is None else made

    def _at_once(self, x: torch.Tensor) -> torch.Tensor | None:
        children = self._modules  # a module's own look-up takes its time
        activation: Any = children.get("activation_fn")
        approximate = APPROXIMATIONS.get(type(activation))
        has_epilogue = approximate == "tanh" and x.is_cuda
        if approximate is None or (self.impl is not None and not has_epilogue and not torch.is_grad_enabled()):
            return None
        first: Any = children["fc1"]
        second: Any = children["fc2"]
        if (
            is_transformed()
            or is_patched(type(self))
            or not is_plain(first, nn.Linear)
            or not is_plain(activation, type(activation))
        ):
            return None
        mixed = is_autocast(x)
        if has_epilogue and not mixed and first.bias is not None and not needs_saving((x, first.weight, first.bias)):
            rows = x.reshape(-1, x.shape[-1])
            # cuBLASLt's epilogue; on what it does not support torch computes the same in two passes.
            made = torch._addmm_activation(first.bias, rows, first.weight.t(), use_gelu=True)
            return second(made.view(*x.shape[:-1], -1))
        if not is_plain(second, nn.Linear):
            return None
        parameters = (first.weight, first.bias, second.weight, second.bias)
        if self.impl is not None and not needs_saving((x, *parameters)):
            return None
        for parameter in parameters:
            if parameter is not None and (type(parameter) is not nn.Parameter or (parameter.dtype != x.dtype and not mixed)):
                return None
        named = self.impl
        impl = implementation(self, "gelu_mlp", x, approximate) if named is None else BETWEEN_PRODUCTS.get(named, named)
        return None if impl is None else run_gelu_mlp(x, *parameters, approximate, impl, _norm_of(x))


def _norm_of(x: torch.Tensor) -> Norm | None:
    """Return the norm that made ``x`` in this call of an encoder layer, where it is known and nobody has written to ``x``."""
    call = None if torch.compiler.is_compiling() else running.call
    if call is None or call.normed is None or x.is_inference():
        return None
    normed, version, norm = call.normed
    return norm if normed is x and version == x._version else None


class FusedSiglipMLP(FusedGeluMLP, SiglipMLP):
    """SigLIP's feed-forward block."""

    stock = SiglipMLP


class FusedInternVLVisionMLP(FusedGeluMLP, InternVLVisionMLP):
    """InternViT's feed-forward block."""

    stock = InternVLVisionMLP


class FusedCLIPMLP(FusedGeluMLP, CLIPMLP):
    """CLIP's feed-forward block."""

    stock = CLIPMLP


GELU_MLPS: dict[type[nn.Module], type[nn.Module]] = {
    SiglipMLP: FusedSiglipMLP,
    InternVLVisionMLP: FusedInternVLVisionMLP,
    CLIPMLP: FusedCLIPMLP,
}
MLPS = (Aimv2MLP, FusedAimv2MLP, *GELU_MLPS, *GELU_MLPS.values())

know(Aimv2MLP, *GELU_MLPS, *SILU, GELUActivation, GELUTanh, QuickGELUActivation)
