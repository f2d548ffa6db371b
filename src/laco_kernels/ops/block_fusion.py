"""MBTF's first 1x1 convolution over several encoder blocks as one operator."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from laco_kernels import reference
from laco_kernels.errors import complaint
from laco_kernels.geometry import integer
from laco_kernels.kernels.select import choose
from laco_kernels.ops import checks

if TYPE_CHECKING:
    from collections.abc import Sequence


def multi_block_linear_gelu(
    xs: Sequence[torch.Tensor],
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    approximate: str = "none",
    prefix_tokens: int = 0,
    impl: str | None = None,
) -> torch.Tensor:
    r"""Fuse the tokens of ``M`` encoder blocks by one linear map and a GELU (MBTF, multi-block token fusion, first layer).

    .. math:: y = \mathrm{gelu}(W [x_1; \ldots; x_M] + b) = \mathrm{gelu}(\textstyle\sum_m W_m x_m + b)

    Args:
        xs: ``M`` block outputs ``[B, P + N, C]``, all of one shape, dtype and device.
        weight: ``[out, M * C]``, columns ordered block by block as ``xs``.
        bias: ``[out]`` or ``None``.
        approximate: ``"none"`` (erf) or ``"tanh"``, as in :func:`torch.nn.functional.gelu`.
        prefix_tokens: ``P`` tokens before the patches; they are dropped.
        impl: ``None`` for the automatic choice, or ``"reference"``, ``"triton"``, ``"cuda"``, which never fall back.

    Returns:
        ``[B, N, out]``; under autocast in autocast's dtype.

    Raises:
        TypeError: ``xs`` is no sequence of floating-point tensors, mixed dtypes outside autocast.
        ValueError: no blocks, blocks of different shapes, a weight that does not fit, mixed devices, unknown options.
        RuntimeError: ``impl`` names an implementation that cannot run here.
    """
    if isinstance(xs, torch.Tensor) or not isinstance(xs, (list, tuple)):
        remedy = "A stacked tensor [M, B, T, C] becomes one by tensor.unbind(0)"
        raise TypeError(complaint("xs", type(xs).__name__, "a list or tuple of tensors, one for each block", remedy))
    if not xs:
        raise ValueError(complaint("xs", "an empty list", "at least one block output [B, P + N, C]", "Pass hidden_states"))
    prefix_tokens = integer("prefix_tokens", prefix_tokens, 0)
    checks.check_choice("approximate", approximate, checks.APPROXIMATIONS)
    for i, x in enumerate(xs):
        checks.check_tokens(f"xs[{i}]", x)
        if x.shape != xs[0].shape:
            remedy = "Fuse blocks of one encoder that work on the same tokens"
            raise ValueError(complaint(f"xs[{i}]", list(x.shape), f"{list(xs[0].shape)}, the shape of xs[0]", remedy))
    tokens, channels = xs[0].shape[1:]
    if prefix_tokens > tokens:
        remedy = "Count the class and register tokens only"
        raise ValueError(complaint("prefix_tokens", prefix_tokens, f"at most {tokens}, the tokens of a block", remedy))
    checks.check_linear("", weight, bias, (len(xs), channels), "(block, c)")
    checks.check_alike({f"xs[{i}]": x for i, x in enumerate(xs)} | {"weight": weight, "bias": bias})
    choose(impl)
    dtype = checks.autocast_dtype(xs[0])
    return reference.multi_block_linear_gelu(
        [x.to(dtype) for x in xs],
        weight.to(dtype),
        checks.cast(bias, dtype),
        prefix_tokens=prefix_tokens,
        approximate=approximate,
    )
