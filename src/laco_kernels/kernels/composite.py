"""``impl="composite"``: the operators as cuBLAS products between fused pointwise passes; the safety net."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from laco_kernels.kernels import pointwise
from laco_kernels.kernels.backward import (
    gelu_mlp_backward,
    multi_block_linear_gelu_backward,
    patch_merge_backward,
    strided_conv_backward,
    strided_conv_gelu_backward,
)
from laco_kernels.kernels.common import GATHER, RESIDUAL, activated, collected, gathered

if TYPE_CHECKING:
    from collections.abc import Sequence

    from laco_kernels.geometry import Windows

__all__ = [
    "gelu_mlp_backward",
    "gelu_mlp_forward",
    "multi_block_linear_gelu_backward",
    "multi_block_linear_gelu_forward",
    "patch_merge_backward",
    "patch_merge_forward",
    "strided_conv_backward",
    "strided_conv_forward",
    "strided_conv_gelu_backward",
    "strided_conv_gelu_forward",
]


def patch_merge_forward(
    x: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor | None,
    weight2: torch.Tensor,
    bias2: torch.Tensor | None,
    *,
    windows: Windows,
    residual_kind: str,
    approximate: str,
    layout: str,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`laco_kernels.reference.patch_merge_forward`; without ``save`` the pre-activation is empty."""
    batch, prefix, rows = x.shape[0], windows.prefix_tokens, windows.num_windows
    out = weight2.shape[0]
    is_view = layout == "block" and not prefix and x.is_contiguous()
    shape = (batch, rows, weight1.shape[1])
    merged = x.view(shape) if is_view else x.new_empty(shape)
    has_residual = residual_kind != "none"
    y = x.new_empty((batch, prefix + rows, out) if prefix or has_residual else (0,))
    if prefix:
        y[:, :prefix] = x[:, :prefix]
    if has_residual or not is_view:
        pointwise.split(
            x,
            windows,
            GATHER[layout],
            None if is_view else merged,
            RESIDUAL[residual_kind],
            y if has_residual else None,
            bias2,
        )
    pre = F.linear(merged, weight1, bias1)
    act = activated(pre, approximate)
    if has_residual:
        body = y[:, prefix:]
        if not prefix:
            y.flatten(0, 1).addmm_(act.flatten(0, 1), weight2.t())
        elif y.dtype == torch.float32:  # products by image are up to three times less precise on an H200
            body += F.linear(act, weight2)
        else:
            torch.baddbmm(body, act, weight2.t().expand(batch, -1, -1), out=body)
    elif prefix:
        y[:, prefix:] = F.linear(act, weight2, bias2)
    else:
        y = F.linear(act, weight2, bias2)
    return y, pre if save else x.new_empty(0)


gelu_mlp_forward = patch_merge_forward  # a merge of one token a window, without a residual


def strided_conv_forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, windows: Windows, layout: str
) -> torch.Tensor:
    """See :func:`laco_kernels.reference.strided_conv_forward`."""
    return F.linear(gathered(x, windows, layout), weight, bias)


def strided_conv_gelu_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    windows: Windows,
    layout: str,
    approximate: str,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`laco_kernels.reference.strided_conv_gelu_forward`; without ``save`` the pre-activation is empty."""
    pre = strided_conv_forward(x, weight, bias, windows=windows, layout=layout)
    return F.gelu(pre, approximate=approximate), pre if save else x.new_empty(0)


def multi_block_linear_gelu_forward(
    xs: Sequence[torch.Tensor],
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    prefix_tokens: int,
    approximate: str,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`laco_kernels.reference.multi_block_linear_gelu_forward`; without ``save`` the pre-activation is empty.

    The blocks are copied side by side, ``M`` times one of them for the time of one product, which sums over all of them.
    """
    pre = F.linear(collected(xs, prefix_tokens), weight, bias)
    return F.gelu(pre, approximate=approximate), pre if save else weight.new_empty(0)
