"""Backward passes as cuBLAS products between fused pointwise passes, for every implementation that has none of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from laco_kernels.kernels import pointwise
from laco_kernels.kernels.common import GATHER, RESIDUAL, activated, collected, column_sum, gathered, outer

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from laco_kernels.geometry import Windows


def patch_merge_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    pre: torch.Tensor,
    weight1: torch.Tensor,
    weight2: torch.Tensor,
    needs: Sequence[bool],
    *,
    windows: Windows,
    residual_kind: str,
    approximate: str,
    layout: str,
) -> list[torch.Tensor | None]:
    """See :func:`laco_kernels.reference.patch_merge_backward`."""
    prefix = windows.prefix_tokens
    g = grad[:, prefix:]
    dx = dweight1 = dbias1 = dweight2 = dbias2 = None
    act = activated(pre, approximate) if needs[3] and not any(needs[:3]) else None
    if any(needs[:3]):
        dpre, dbias1, act = pointwise.gelu_backward(g @ weight2, pre, approximate, with_sums=needs[2], with_act=needs[3])
        if needs[1]:
            dweight1 = outer(dpre, gathered(x, windows, layout))
        if needs[0]:
            if layout == "block" and not prefix and residual_kind == "none":
                dx = (dpre @ weight1).view(x.shape)
            else:
                dx = x.new_empty(x.shape)
                if prefix:
                    dx[:, :prefix] = grad[:, :prefix]
                pointwise.join(dpre @ weight1, grad, windows, GATHER[layout], RESIDUAL[residual_kind], dx)
    if act is not None:
        dweight2 = outer(g, act)
    if needs[4]:
        dbias2 = column_sum(g)
    return [dx, dweight1, dbias1, dweight2, dbias2]


gelu_mlp_backward = patch_merge_backward  # of a merge of one token a window, without a residual


def strided_conv_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    needs: Sequence[bool],
    *,
    windows: Windows,
    layout: str,
) -> list[torch.Tensor | None]:
    """See :func:`laco_kernels.reference.strided_conv_backward`."""
    dx = None
    if needs[0]:
        dmerged = grad @ weight
        if layout == "block" and not windows.prefix_tokens:
            dx = dmerged.view(x.shape)
        else:
            dx = x.new_empty(x.shape)
            dx[:, : windows.prefix_tokens].zero_()
            pointwise.join(dmerged, grad, windows, GATHER[layout], RESIDUAL["none"], dx)
    dweight = outer(grad, gathered(x, windows, layout)) if needs[1] else None
    return [dx, dweight, column_sum(grad) if needs[2] else None]


def strided_conv_gelu_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    pre: torch.Tensor,
    weight: torch.Tensor,
    needs: Sequence[bool],
    *,
    windows: Windows,
    layout: str,
    approximate: str,
) -> list[torch.Tensor | None]:
    """See :func:`laco_kernels.reference.strided_conv_gelu_backward`."""
    dpre, dbias, _ = pointwise.gelu_backward(grad, pre, approximate, with_sums=needs[2])
    dx, dweight, _ = strided_conv_backward(dpre, x, weight, [*needs[:2], False], windows=windows, layout=layout)
    return [dx, dweight, dbias]


def multi_block_linear_gelu_backward(
    grad: torch.Tensor,
    xs: Sequence[torch.Tensor],
    pre: torch.Tensor,
    weight: torch.Tensor,
    needs: Sequence[bool],
    *,
    prefix_tokens: int,
    approximate: str,
) -> list[torch.Tensor | None]:
    """See :func:`laco_kernels.reference.multi_block_linear_gelu_backward`."""
    dpre, dbias, _ = pointwise.gelu_backward(grad, pre, approximate, with_sums=needs[-1])
    channels = xs[0].shape[2]
    dxs: list[torch.Tensor | None] = []
    for i, x in enumerate(xs):
        dx = None
        if needs[i]:
            dx = x.new_empty(x.shape)
            dx[:, :prefix_tokens].zero_()
            dx[:, prefix_tokens:] = dpre @ weight[:, i * channels : (i + 1) * channels]
        dxs.append(dx)
    dweight = outer(dpre, collected(xs, prefix_tokens)) if needs[-2] else None
    return [*dxs, dweight, dbias]
