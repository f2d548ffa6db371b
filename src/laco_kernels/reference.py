"""The specification: the three operators and the residual in plain, differentiable PyTorch.

Written to be read. Everything runs on any device and in any floating dtype (float64 for checks) and computes in the dtype
it is given. Arguments are taken as they are; :mod:`laco_kernels.ops` validates them.
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
    ones = torch.ones(1, windows.num_patches, 1, dtype=x.dtype, device=x.device)
    return tokens.sum(2) / windows.split(ones).sum(2)


def patch_merge(
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
) -> torch.Tensor:
    """LaCo's patch merge layer: ``y = W2 gelu(W1 S(x) + b1) + b2 + R(S(x))``.

    ``x [B, P + N, C]``, ``weight1 [hidden, r * r * C]``, ``weight2 [C_out, hidden]`` ``-> [B, P + N', C_out]``. Prefix
    tokens pass through unchanged.
    """
    hidden = F.gelu(F.linear(space_to_depth(x, windows, layout), weight1, bias1), approximate=approximate)
    y = F.linear(hidden, weight2, bias2)
    if residual_kind != "none":
        y = y + residual(x, windows, residual_kind, layout)
    if windows.prefix_tokens:
        y = torch.cat([x[:, : windows.prefix_tokens], y], dim=1)
    return y


def strided_conv_gelu(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, windows: Windows, approximate: str = "none"
) -> torch.Tensor:
    """First half of STF's spatial fusion: ``y = gelu(conv_{k x k, stride k}(x) + b) = gelu(W S(x) + b)``.

    ``x [B, P + N, C]``, ``weight [out, k * k * C]`` ``-> [B, N', out]``. Prefix tokens are dropped.
    """
    return F.gelu(F.linear(space_to_depth(x, windows), weight, bias), approximate=approximate)


def multi_block_linear_gelu(
    xs: Sequence[torch.Tensor],
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    prefix_tokens: int = 0,
    approximate: str = "none",
) -> torch.Tensor:
    """First 1x1 convolution of MBTF's multi-block fusion: ``y = gelu(W [x_1; ...; x_M] + b)``.

    ``M`` outputs ``[B, P + N, C]`` of encoder blocks, ``weight [out, M * C]`` ``-> [B, N, out]``. Prefix tokens are dropped.
    """
    stacked = torch.cat([x[:, prefix_tokens:] for x in xs], dim=-1)
    return F.gelu(F.linear(stacked, weight, bias), approximate=approximate)
