"""The specification: the operators on visual tokens and the residual in plain, differentiable PyTorch.

Written to be read. Everything runs on any device and in any floating dtype (float64 for checks) and computes in the dtype
it is given. Arguments are taken as they are; :mod:`laco_kernels.ops` validates them. Where there is an activation, forward
functions return the output and the pre-activation, whatever ``save`` says of it: here it has been computed anyway.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from collections.abc import Sequence

    from laco_kernels.geometry import Windows


def space_to_depth(x: torch.Tensor, windows: Windows, layout: str = "raster") -> torch.Tensor:
    """``S(x)``: the tokens of each window side by side, ``[B, P + N, C] -> [B, N', r * r * C]``.

    Channels are ordered ``(dy, dx, c)``; padding is zero; prefix tokens are left out. With ``layout="block"`` and no
    prefix this is a view.
    """
    batch, _, channels = x.shape
    patches = x[:, windows.prefix_tokens :]
    if layout == "raster":
        patches = windows.split(patches)
    return patches.reshape(batch, windows.num_windows, windows.ratio**2 * channels)


def residual(x: torch.Tensor, windows: Windows, kind: str, layout: str = "raster") -> torch.Tensor:
    """``R(S(x))``: LaCo's parameter-free residual, ``[B, P + N, C] -> [B, N', C]``.

    ``kind="mean"`` averages the tokens of a window channel by channel; that is ``r x r`` average pooling, and what
    "space-to-channel, then channel averaging" means with DC-AE's channel order. Padding does not count in the average.
    ``kind="channel_group"`` averages ``r * r`` consecutive channels of ``S(x)`` in this library's ``(dy, dx, c)`` order.
    """
    batch, _, channels = x.shape
    area = windows.ratio**2
    merged = space_to_depth(x, windows, layout)
    if kind == "channel_group":
        return merged.reshape(batch, windows.num_windows, channels, area).mean(-1)
    tokens = merged.reshape(batch, windows.num_windows, area, channels)
    if windows.is_even:
        return tokens.mean(2)
    wide = torch.promote_types(x.dtype, torch.float32)  # as mean() sums, so that nothing overflows
    ones = torch.ones(1, windows.num_patches, 1, dtype=wide, device=x.device)
    return (tokens.sum(2, dtype=wide) / windows.split(ones).sum(2)).to(x.dtype)


def gelu(pre: torch.Tensor, approximate: str) -> torch.Tensor:
    """GELU by erf (``"none"``) or by tanh, as torch's own; or ``pre sigmoid(1.702 pre)`` (``"sigmoid"``, CLIP's quick GELU)."""
    if approximate == "sigmoid":
        return pre * torch.sigmoid(1.702 * pre)
    return F.gelu(pre, approximate=approximate)


def gelu_backward(grad: torch.Tensor, pre: torch.Tensor, approximate: str) -> torch.Tensor:
    """``grad * gelu'(pre)``."""
    if approximate == "sigmoid":
        sigma = torch.sigmoid(1.702 * pre)
        return grad * (sigma + 1.702 * pre * sigma * (1 - sigma))
    return torch.ops.aten.gelu_backward(grad, pre, approximate=approximate)


def patch_merge_forward(
    x: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor | None,
    weight2: torch.Tensor,
    bias2: torch.Tensor | None,
    *,
    windows: Windows,
    residual_kind: str = "mean",
    approximate: str = "none",
    layout: str = "raster",
    save: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """LaCo's patch merge layer: ``y = W2 gelu(W1 S(x) + b1) + b2 + R(S(x))``.

    ``x [B, P + N, C]``, ``weight1 [hidden, r * r * C]``, ``weight2 [C_out, hidden]`` ``-> [B, P + N', C_out]`` and the
    pre-activation ``W1 S(x) + b1 [B, N', hidden]``. Prefix tokens pass through unchanged.
    """
    pre = F.linear(space_to_depth(x, windows, layout), weight1, bias1)
    y = F.linear(gelu(pre, approximate), weight2, bias2)
    if residual_kind != "none":
        y = y + residual(x, windows, residual_kind, layout)
    if windows.prefix_tokens:
        y = torch.cat([x[:, : windows.prefix_tokens], y], dim=1)
    return y, pre


def patch_merge_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    pre: torch.Tensor,
    weight1: torch.Tensor,
    weight2: torch.Tensor,
    needs: Sequence[bool],
    *,
    windows: Windows,
    residual_kind: str = "mean",
    approximate: str = "none",
    layout: str = "raster",
) -> list[torch.Tensor | None]:
    """Gradients of x, weight1, bias1, weight2, bias2 where ``needs`` asks for them, else ``None``.

    With ``g = dL/dy``: ``dW2 = g^T gelu(pre)``, ``dpre = (g W2) gelu'(pre)``, ``dW1 = dpre^T S(x)``,
    ``dx = S^T(dpre W1 + R^T g)``, and biases get the sums over tokens.
    """
    g = grad[:, windows.prefix_tokens :]
    dx = dweight1 = dbias1 = dweight2 = dbias2 = None
    if needs[3]:
        dweight2 = _outer(g, gelu(pre, approximate))
    if needs[4]:
        dbias2 = g.sum((0, 1))
    if any(needs[:3]):
        dpre = gelu_backward(g @ weight2, pre, approximate)
        if needs[0]:
            dmerged = dpre @ weight1
            if residual_kind != "none":
                dmerged = dmerged + residual_backward(g, windows, residual_kind)
            dx = _to_tokens(dmerged, grad[:, : windows.prefix_tokens], windows, layout)
        if needs[1]:
            dweight1 = _outer(dpre, space_to_depth(x, windows, layout))
        if needs[2]:
            dbias1 = dpre.sum((0, 1))
    return [dx, dweight1, dbias1, dweight2, dbias2]


# A merge of one token a window, without a residual.
gelu_mlp_forward, gelu_mlp_backward = patch_merge_forward, patch_merge_backward


def residual_backward(g: torch.Tensor, windows: Windows, kind: str) -> torch.Tensor:
    """``R^T g``: ``[B, N', C] -> [B, N', r * r * C]``; what falls on padding is to be dropped."""
    area = windows.ratio**2
    if kind == "channel_group":
        return (g / area).repeat_interleave(area, dim=-1)
    if not windows.is_even:
        ones = torch.ones(1, windows.num_patches, 1, dtype=g.dtype, device=g.device)
        return (g / windows.split(ones).sum(2)).repeat(1, 1, area)
    return (g / area).repeat(1, 1, area)


def _outer(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Sum over batch and tokens of ``left^T right``."""
    return left.flatten(0, 1).t() @ right.flatten(0, 1)


def _to_tokens(merged: torch.Tensor, prefix: torch.Tensor, windows: Windows, layout: str) -> torch.Tensor:
    """Transpose of :func:`space_to_depth`, with ``prefix`` in front."""
    tokens = merged.unflatten(2, (windows.ratio**2, merged.shape[2] // windows.ratio**2))
    patches = windows.join(tokens) if layout == "raster" else tokens.flatten(1, 2)
    return torch.cat([prefix, patches], dim=1) if windows.prefix_tokens else patches


def strided_conv_forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, windows: Windows, layout: str = "raster"
) -> torch.Tensor:
    """Convolution of stride ``k`` with ``k x k`` windows: ``y = conv_{k x k, stride k}(x) + b = W S(x) + b``.

    ``x [B, P + N, C]``, ``weight [out, k * k * C]`` ``-> [B, N', out]``. Prefix tokens are dropped.
    """
    return F.linear(space_to_depth(x, windows, layout), weight, bias)


def strided_conv_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    needs: Sequence[bool],
    *,
    windows: Windows,
    layout: str = "raster",
) -> list[torch.Tensor | None]:
    """Gradients of x, weight and bias where ``needs`` asks for them: ``dx = S^T(g W)``, ``dW = g^T S(x)``, ``g = dL/dy``."""
    no_prefix = grad.new_zeros(grad.shape[0], windows.prefix_tokens, x.shape[2])
    return [
        _to_tokens(grad @ weight, no_prefix, windows, layout) if needs[0] else None,
        _outer(grad, space_to_depth(x, windows, layout)) if needs[1] else None,
        grad.sum((0, 1)) if needs[2] else None,
    ]


def strided_conv_gelu_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    windows: Windows,
    layout: str = "raster",
    approximate: str = "none",
    save: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """First layer of STF's spatial fusion: ``y = gelu(conv_{k x k, stride k}(x) + b) = gelu(W S(x) + b)``.

    Shapes are those of :func:`strided_conv_forward`; the pre-activation has that of the output.
    """
    pre = strided_conv_forward(x, weight, bias, windows=windows, layout=layout)
    return F.gelu(pre, approximate=approximate), pre


def strided_conv_gelu_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    pre: torch.Tensor,
    weight: torch.Tensor,
    needs: Sequence[bool],
    *,
    windows: Windows,
    layout: str = "raster",
    approximate: str = "none",
) -> list[torch.Tensor | None]:
    """Gradients of x, weight and bias where ``needs`` asks for them: those of the convolution, from ``dpre = g gelu'(pre)``."""
    return strided_conv_backward(gelu_backward(grad, pre, approximate), x, weight, needs, windows=windows, layout=layout)


def multi_block_linear_gelu_forward(
    xs: Sequence[torch.Tensor],
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    prefix_tokens: int = 0,
    approximate: str = "none",
    save: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """First 1x1 convolution of MBTF's multi-block fusion: ``y = gelu(W [x_1; ...; x_M] + b)``.

    ``M`` outputs ``[B, P + N, C]`` of encoder blocks, ``weight [out, M * C]`` ``-> [B, N, out]`` and the pre-activation.
    Prefix tokens are dropped.
    """
    stacked = torch.cat([x[:, prefix_tokens:] for x in xs], dim=-1)
    pre = F.linear(stacked, weight, bias)
    return F.gelu(pre, approximate=approximate), pre


def multi_block_linear_gelu_backward(
    grad: torch.Tensor,
    xs: Sequence[torch.Tensor],
    pre: torch.Tensor,
    weight: torch.Tensor,
    needs: Sequence[bool],
    *,
    prefix_tokens: int = 0,
    approximate: str = "none",
) -> list[torch.Tensor | None]:
    """Gradients of the ``M`` blocks, weight and bias where ``needs`` asks for them: ``dx_m = dpre W_m``."""
    dpre = gelu_backward(grad, pre, approximate)
    channels = xs[0].shape[2]
    dxs = [
        F.pad(dpre @ weight[:, i * channels : (i + 1) * channels], (0, 0, prefix_tokens, 0)) if needs[i] else None
        for i in range(len(xs))
    ]
    dweight = torch.cat([_outer(dpre, x[:, prefix_tokens:]) for x in xs], dim=1) if needs[-2] else None
    return [*dxs, dweight, dpre.sum((0, 1)) if needs[-1] else None]
