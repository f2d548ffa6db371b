"""What the fused and the composite implementation share: names of layouts, and gradients of weights and biases."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F

from laco_kernels.kernels import elementwise, pointwise
from laco_kernels.kernels.gathered_gemm import BLOCK, CHANNEL_GROUP, MEAN, NO_RESIDUAL, RASTER
from laco_kernels.kernels.launch import accumulator_torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from laco_kernels.geometry import Windows

GATHER = {"raster": RASTER, "block": BLOCK}
RESIDUAL = {"none": NO_RESIDUAL, "mean": MEAN, "channel_group": CHANNEL_GROUP}


def gathered(x: torch.Tensor, windows: Windows, layout: str) -> torch.Tensor:
    """``S(x)`` for a weight gradient: a view in block order, else a copy by one pass."""
    if layout == "block" and not windows.prefix_tokens and x.is_contiguous():
        return x.view(x.shape[0], windows.num_windows, windows.ratio**2 * x.shape[2])
    merged = x.new_empty(x.shape[0], windows.num_windows, windows.ratio**2 * x.shape[2])
    pointwise.split(x, windows, GATHER[layout], merged, NO_RESIDUAL, None, None)
    return merged


def activated(pre: torch.Tensor, approximate: str) -> torch.Tensor:
    """``gelu(pre)``, one pass; torch's own where it is one of torch's."""
    if approximate == "sigmoid":
        return elementwise.activate_forward(pre, activation="quick_gelu")
    return F.gelu(pre, approximate=approximate)


def outer(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Sum over batch and tokens of ``left^T right``."""
    return left.flatten(0, 1).t() @ right.flatten(0, 1)


def collected(xs: Sequence[torch.Tensor], prefix: int) -> torch.Tensor:
    """``[x_1; ...; x_M]`` without the prefix, ``[B, N, M * C]``: a copy by one pass."""
    batch, tokens, channels = xs[0].shape
    out = xs[0].new_empty(batch, tokens - prefix, len(xs) * channels)
    pointwise.collect(xs, prefix, out)
    return out


def column_sum(g: torch.Tensor) -> torch.Tensor:
    """Sum over batch and tokens, accumulated in float32 or better."""
    return g.sum((0, 1), dtype=accumulator_torch(g.dtype)).to(g.dtype)
