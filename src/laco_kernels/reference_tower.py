"""The specification of the operators inside a vision encoder: residual sum with norm, and activations.

Written to be read, as :mod:`laco_kernels.reference` is: plain, differentiable PyTorch on any device and in any floating
dtype. Statistics of a norm are taken in float32 (in float64 for float64), and what a norm returns is rounded once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from laco_kernels.reference import gelu, gelu_backward

if TYPE_CHECKING:
    from collections.abc import Sequence

GELUS = {"gelu": "none", "gelu_tanh": "tanh", "quick_gelu": "sigmoid"}  # as the operators on visual tokens call them


def add_norm_forward(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    *,
    kind: str,
    eps: float,
    dtype: torch.dtype,
    save: bool = True,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """``total = x + scale * delta`` in the dtype of ``x``, and ``norm(total) * weight + bias`` in ``dtype``.

    ``x``, ``delta`` ``[..., C]``, ``weight``, ``bias``, ``scale`` ``[C]``. Returns the total (``None`` without a delta, where
    it is ``x``), its norm, and for backward the mean (``None`` for ``kind="rms"``) and the reciprocal standard deviation
    ``[...]``. The norm sees the total as it is rounded.
    """
    total = None
    if delta is not None:
        total = x + (delta if scale is None else scale * delta)
        total = x = total.to(x.dtype)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = wide.mean(-1, keepdim=True) if kind == "layer" else None
    centred = wide if mean is None else wide - mean
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    normed = centred * rstd * weight
    if bias is not None:
        normed = normed + bias
    return total, normed.to(dtype), None if mean is None else mean.squeeze(-1), rstd.squeeze(-1)


def add_norm_backward(
    dnormed: torch.Tensor,
    dtotal: torch.Tensor | None,
    total: torch.Tensor,
    delta: torch.Tensor | None,
    mean: torch.Tensor | None,
    rstd: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    needs: Sequence[bool],
) -> list[torch.Tensor | None]:
    """Gradients of x, of a scaled delta, of weight, bias and scale where ``needs`` asks for them, else ``None``.

    With ``h = (total - mean) rstd`` and ``g = weight dnormed``: ``dx = dtotal + rstd (g - mean(g) - h mean(g h))``, where
    ``kind="rms"`` has neither mean; ``ddelta = scale dx``; ``dweight = sum h dnormed``, ``dbias = sum dnormed``,
    ``dscale = sum delta dx``. Without a scale the gradient of delta is ``dx``.
    """
    wide = total.to(rstd.dtype)
    hat = (wide if mean is None else wide - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)
    grad = dnormed.to(rstd.dtype)
    dx = ddelta = dweight = dbias = dscale = None
    if needs[0] or needs[1] or needs[4]:
        g = weight * grad
        inner = g - hat * (g * hat).mean(-1, keepdim=True)
        if mean is not None:
            inner = inner - g.mean(-1, keepdim=True)
        full = rstd.unsqueeze(-1) * inner
        if dtotal is not None:
            full = full + dtotal
        if needs[0]:
            dx = full.to(total.dtype)
        if scale is not None and needs[1]:
            ddelta = (scale * full).to(total.dtype)
        if scale is not None and delta is not None and needs[4]:
            dscale = _sum(full * delta).to(scale.dtype)
    if needs[2]:
        dweight = _sum(grad * hat).to(weight.dtype)
    if needs[3]:
        dbias = _sum(grad).to(weight.dtype)
    return [dx, ddelta, dweight, dbias, dscale]


def _sum(rows: torch.Tensor) -> torch.Tensor:
    """Sum over everything but channels."""
    return rows.reshape(-1, rows.shape[-1]).sum(0)


def gated_silu_forward(h: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up``, where ``h [..., 2 * F]`` is gate and up side by side ``-> [..., F]``."""
    gate, up = h.chunk(2, dim=-1)
    return F.silu(gate) * up


def gated_silu_backward(grad: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """The gradient of ``h``: ``up grad silu'(gate)`` beside ``grad silu(gate)``."""
    gate, up = h.chunk(2, dim=-1)
    return torch.cat([torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)], dim=-1)


def activate_forward(h: torch.Tensor, *, activation: str) -> torch.Tensor:
    """``gelu(h)`` by erf (``"gelu"``) or by tanh (``"gelu_tanh"``), or ``h sigmoid(1.702 h)`` (``"quick_gelu"``)."""
    return gelu(h, GELUS[activation])


def activate_backward(grad: torch.Tensor, h: torch.Tensor, *, activation: str) -> torch.Tensor:
    """The gradient of ``h``."""
    return gelu_backward(grad, h, GELUS[activation])
