"""Rows of channels: how the kernels inside an encoder see ``[..., C]``."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """Return ``x [..., C]`` as ``[B, T, C]`` with adjacent channels, a view where strides allow it.

    ``T`` is the last dimension but one, so a sequence without its class token is a view, of any batch.
    """
    if x.dim() != 3:
        x = x.flatten(0, -3) if x.dim() > 2 else x[(None,) * (3 - x.dim())]
    return x if x.stride(2) == 1 or x.shape[2] < 2 else x.contiguous()
