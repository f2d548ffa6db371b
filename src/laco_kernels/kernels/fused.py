"""``impl="triton"``: the operators on the gathered GEMM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton

from laco_kernels.kernels import pointwise
from laco_kernels.kernels.common import GATHER, RESIDUAL, activated, collected, column_sum, gathered, outer
from laco_kernels.kernels.gathered_gemm import gathered_gemm, tile_for
from laco_kernels.kernels.launch import accumulator_torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from laco_kernels.geometry import Windows


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
    hidden, out = weight1.shape[0], weight2.shape[0]
    pre = x.new_empty((batch, rows, hidden) if save else (0,))
    act = x.new_empty(batch, rows, hidden)
    gathered_gemm(
        [x],
        weight1,
        act,
        rows=rows,
        prefix=prefix,
        gather=GATHER[layout],
        windows=windows,
        bias=bias1,
        activation=approximate,
        save_pre=pre if save else None,
    )
    y = x.new_empty(batch, prefix + rows, out)
    if prefix:
        y[:, :prefix] = x[:, :prefix]
    gathered_gemm(
        [act],
        weight2,
        y,
        rows=rows,
        windows=windows,
        bias=bias2,
        out_prefix=prefix,
        residual=RESIDUAL[residual_kind],
        residual_of=x,
        residual_prefix=prefix,
        residual_gather=GATHER[layout],
    )
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
    residual_kind: str,
    approximate: str,
    layout: str,
) -> list[torch.Tensor | None]:
    """See :func:`laco_kernels.reference.patch_merge_backward`."""
    batch, rows, hidden = pre.shape
    prefix = windows.prefix_tokens
    g = grad[:, prefix:]
    dx = dweight1 = dbias1 = dweight2 = dbias2 = None
    act = activated(pre, approximate) if needs[3] and not any(needs[:3]) else None
    if any(needs[:3]):
        dpre, act = torch.empty_like(pre), torch.empty_like(pre) if needs[3] else None
        tile = tile_for(batch * rows, hidden, pre.dtype, heavy=True)
        sums = (triton.cdiv(batch * rows, tile.bm), hidden)
        partial = pre.new_empty(sums, dtype=accumulator_torch(pre.dtype)) if needs[2] else None
        gathered_gemm(
            [grad],
            weight2.t(),
            dpre,
            rows=rows,
            prefix=prefix,
            activation=approximate,
            derivative_at=pre,
            act=act,
            partial=partial,
            tile=tile,
        )
        if partial is not None:
            dbias1 = partial.sum(0).to(pre.dtype)
        if needs[1]:
            dweight1 = outer(dpre, gathered(x, windows, layout))
        if needs[0]:
            dx = x.new_empty(x.shape)
            if prefix:
                dx[:, :prefix] = grad[:, :prefix]
            gathered_gemm(
                [dpre],
                weight1.t(),
                dx,
                rows=rows,
                windows=windows,
                residual=RESIDUAL[residual_kind],
                residual_of=grad,
                residual_prefix=prefix,
                out_prefix=prefix,
                scatter=GATHER[layout],
            )
    if act is not None:
        dweight2 = outer(g, act)
    if needs[4]:
        dbias2 = column_sum(g)
    return [dx, dweight1, dbias1, dweight2, dbias2]


# A merge of one token a window, without a residual.
gelu_mlp_forward, gelu_mlp_backward = patch_merge_forward, patch_merge_backward


def strided_conv_forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, windows: Windows, layout: str, **epilogue: Any
) -> torch.Tensor:
    """See :func:`laco_kernels.reference.strided_conv_forward`; ``epilogue`` is what :func:`gathered_gemm` does besides."""
    y = x.new_empty(x.shape[0], windows.num_windows, weight.shape[0])
    gathered_gemm(
        [x],
        weight,
        y,
        rows=windows.num_windows,
        prefix=windows.prefix_tokens,
        gather=GATHER[layout],
        windows=windows,
        bias=bias,
        **epilogue,
    )
    return y


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
        dx = x.new_empty(x.shape)
        dx[:, : windows.prefix_tokens].zero_()
        gathered_gemm(
            [grad],
            weight.t(),
            dx,
            rows=windows.num_windows,
            windows=windows,
            out_prefix=windows.prefix_tokens,
            scatter=GATHER[layout],
        )
    dweight = outer(grad, gathered(x, windows, layout)) if needs[1] else None
    return [dx, dweight, column_sum(grad) if needs[2] else None]


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
    pre = x.new_empty((x.shape[0], windows.num_windows, weight.shape[0]) if save else (0,))
    epilogue = {"activation": approximate, "save_pre": pre if save else None}
    return strided_conv_forward(x, weight, bias, windows=windows, layout=layout, **epilogue), pre


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


def multi_block_linear_gelu_forward(
    xs: Sequence[torch.Tensor],
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    prefix_tokens: int,
    approximate: str,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`laco_kernels.reference.multi_block_linear_gelu_forward`; without ``save`` the pre-activation is empty."""
    batch, tokens, _ = xs[0].shape
    shape = (batch, tokens - prefix_tokens, weight.shape[0])
    y, pre = xs[0].new_empty(shape), xs[0].new_empty(shape if save else (0,))
    gathered_gemm(
        xs,
        weight,
        y,
        rows=tokens - prefix_tokens,
        prefix=prefix_tokens,
        bias=bias,
        activation=approximate,
        save_pre=pre if save else None,
    )
    return y, pre


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
            block = weight[:, i * channels : (i + 1) * channels]
            gathered_gemm([dpre], block.t(), dx, rows=pre.shape[1], out_prefix=prefix_tokens)
        dxs.append(dx)
    dweight = outer(dpre, collected(xs, prefix_tokens)) if needs[-2] else None
    return [*dxs, dweight, dbias]
