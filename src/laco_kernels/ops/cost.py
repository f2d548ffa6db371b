"""What the operators cost in floating-point operations, told to ``torch.utils.flop_counter``, which cannot look inside.

A multiply-add counts as two operations; activations, residuals and sums are left out, as it does for torch's own operators.
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
