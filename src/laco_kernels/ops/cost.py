"""What the operators cost: floating-point operations, and the bytes that each implementation moves.

A multiply-add counts as two operations; activations, residuals and sums are left out, as ``torch.utils.flop_counter`` does.
Bytes are those of tensors read and written once by each pass, caches apart.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.flop_counter import register_flop_formula

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def product_flops(rows: int, *weights: Sequence[int]) -> int:
    """Operations of ``rows`` rows times each weight ``[out, in]``."""
    return 2 * rows * sum(math.prod(weight) for weight in weights)


def patch_merge_bytes(
    batch: int,
    patches: int,
    windows: int,
    channels: int,
    hidden: int,
    out: int,
    itemsize: int,
    impl: str,
    layout: str = "raster",
) -> int:
    """Bytes that the forward pass of ``patch_merge`` moves without saving for backward.

    All read ``x`` and the weights, write and read the activation, and write ``y``. ``"reference"`` and ``"composite"`` also
    write and read the pre-activation and, in raster layout, ``S(x)``; the reference makes the residual in passes of its own.
    """
    area = -(-patches // windows)
    weights = hidden * area * channels + out * hidden
    x, merged, middle, y = patches * channels, windows * area * channels, windows * hidden, windows * out
    elements = x + 2 * middle + y
    if impl == "triton":
        elements += x  # the residual gathers x again
    else:
        elements += 2 * middle + (2 * merged if layout == "raster" else 0)
        elements += 2 * y if impl == "composite" else merged + 3 * y
    return itemsize * (batch * elements + weights)


def strided_conv_gelu_bytes(batch: int, patches: int, windows: int, channels: int, out: int, itemsize: int, impl: str) -> int:
    """Bytes that the forward pass of ``strided_conv_gelu`` moves: the fused kernel reads ``x`` and writes ``y`` alone."""
    area = -(-patches // windows)
    elements = patches * channels + windows * out
    if impl != "triton":
        elements += 2 * windows * (area * channels + out)
    return itemsize * (batch * elements + out * area * channels)


def multi_block_linear_gelu_bytes(
    batch: int, blocks: int, patches: int, channels: int, out: int, itemsize: int, impl: str
) -> int:
    """Bytes that the forward pass of ``multi_block_linear_gelu`` moves.

    The reference concatenates, the composite sums in float32.
    """
    elements = blocks * patches * channels + patches * out
    extra = 0
    if impl == "reference":
        elements += 2 * (blocks * patches * channels + patches * out)
    elif impl == "composite":
        extra = max(itemsize, 4) * batch * patches * out * 2 * blocks
    return itemsize * (batch * elements + out * blocks * channels) + extra


def _merge(x: Any, weight1: Any, bias1: Any, weight2: Any, *rest: Any, out_shape: Any, **_: Any) -> int:
    prefix = rest[5]
    return product_flops(x[0] * (out_shape[0][1] - prefix), weight1, weight2)


def _merge_backward(grad: Any, x: Any, pre: Any, weight1: Any, weight2: Any, *settings: Any, **_: Any) -> int:
    rows, needs = pre[0] * pre[1], settings[-1]
    hidden_gradient = any(needs[:3])
    return product_flops(rows, weight2) * (hidden_gradient + needs[3]) + product_flops(rows, weight1) * (needs[0] + needs[1])


def _linear(x: Any, weight: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    return product_flops(out_shape[0][0] * out_shape[0][1], weight)


def _conv_backward(grad: Any, x: Any, pre: Any, weight: Any, *settings: Any, **_: Any) -> int:
    needs = settings[-1]
    return product_flops(pre[0] * pre[1], weight) * (needs[0] + needs[1])


def _fusion_backward(grad: Any, xs: Any, pre: Any, weight: Any, *settings: Any, **_: Any) -> int:
    needs, whole, blocks = settings[-1], product_flops(pre[0] * pre[1], weight), len(xs)
    return whole * sum(needs[:blocks]) // blocks + whole * needs[-2]


FORMULAS: dict[str, Callable[..., int]] = {
    "patch_merge": _merge,
    "patch_merge_backward": _merge_backward,
    "strided_conv_gelu": _linear,
    "strided_conv_gelu_backward": _conv_backward,
    "multi_block_linear_gelu": _linear,
    "multi_block_linear_gelu_backward": _fusion_backward,
}
for _name, _formula in FORMULAS.items():
    register_flop_formula(getattr(torch.ops.laco, _name))(_formula)
