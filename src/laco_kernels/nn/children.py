"""Child modules by way of the fused operators, wherever nothing but their product would run.

An operator takes a linear layer's weight and bias, and so passes over what else has been put on the layer: an adapter,
quantisation, offloading, a hook. Where there is any of that the layers themselves are called.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from laco_kernels import reference
from laco_kernels.geometry import Windows
from laco_kernels.ops import patch_merge, strided_conv, strided_conv_gelu


def is_plain(linear: nn.Module) -> bool:
    """Return whether ``linear`` does nothing but multiply: no adapter, quantisation, offloading or hook has been put on it."""
    hooks = (linear._forward_hooks, linear._forward_pre_hooks, linear._backward_hooks, linear._backward_pre_hooks)
    return type(linear) is nn.Linear and "forward" not in vars(linear) and not any(hooks)


def merge(linear: nn.Module, x: torch.Tensor, windows: Windows, layout: str = "raster") -> torch.Tensor:
    """``W S(x) + b``: ``linear`` over windows, ``[B, P + N, C] -> [B, N', out]``; prefix tokens are dropped."""
    if not is_plain(linear):
        return linear(reference.space_to_depth(x, windows, layout))
    return strided_conv(x, linear.weight, linear.bias, **_options(windows, layout))  # type: ignore[arg-type]


def linear_gelu(linear: nn.Module, x: torch.Tensor, windows: Windows, layout: str = "raster") -> torch.Tensor:
    """``gelu(W S(x) + b)``, as :func:`merge`."""
    if not is_plain(linear):
        return F.gelu(merge(linear, x, windows, layout))
    return strided_conv_gelu(x, linear.weight, linear.bias, **_options(windows, layout))  # type: ignore[arg-type]


def _options(windows: Windows, layout: str) -> dict[str, Any]:
    return {
        "grid": windows.grid,
        "kernel_size": windows.ratio,
        "prefix_tokens": windows.prefix_tokens,
        "pad": windows.pad,
        "layout": layout,
    }


def mlp(linear1: nn.Module, linear2: nn.Module, x: torch.Tensor, windows: Windows, layout: str = "raster") -> torch.Tensor:
    """``W2 gelu(W1 S(x) + b1) + b2`` over windows without prefix tokens, ``[B, N, C] -> [B, N', out]``."""
    if windows.ratio == 1 or not (is_plain(linear1) and is_plain(linear2)):
        return linear2(linear_gelu(linear1, x, windows, layout))
    return patch_merge(
        x,
        linear1.weight,  # type: ignore[arg-type]
        linear1.bias,  # type: ignore[arg-type]
        linear2.weight,  # type: ignore[arg-type]
        linear2.bias,  # type: ignore[arg-type]
        grid=windows.grid,
        ratio=windows.ratio,
        residual="none",
        pad=windows.pad,
        layout=layout,
    )


def merged_mlp(linear1: nn.Module, linear2: nn.Module, merged: torch.Tensor, windows: Windows) -> torch.Tensor:
    """:func:`mlp` of windows that lie side by side already, ``[B, N', r * r * C] -> [B, N', out]``.

    What came out of a space-to-depth and a norm is, seen as ``r * r`` tokens a window, a sequence in block order.
    """
    (height, width), r = windows.out_grid, windows.ratio
    complete = Windows((height * r, width * r), r)
    tokens = merged.reshape(merged.shape[0], complete.num_patches, merged.shape[2] // r**2)
    return mlp(linear1, linear2, tokens, complete, "block")
