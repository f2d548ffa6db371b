"""Average pooling, with or without an MLP behind it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from laco_kernels import reference
from laco_kernels.geometry import integer
from laco_kernels.nn.compressors.base import Compressor


class AvgPool(Compressor):
    """The mean of every window; with ``hidden_dim`` followed by Linear, GELU, Linear (STF's ablation).

    Inside an encoder it is LaCo's residual alone, without parameters. Windows at the edge of a grid that ``ratio`` does not
    divide average their real tokens.

    Args:
        in_dim, out_dim, ratio, place, prefix_tokens, residual: those of :class:`Compressor`.
        hidden_dim: width of the MLP; none unless given, or unless ``out_dim`` differs from ``in_dim``: then ``out_dim``.
    """

    places = ("behind", "inside")
    reads_blocks = True
    fits_any_grid = True

    def __init__(
        self, in_dim: int, out_dim: int | None = None, ratio: int = 2, *, hidden_dim: int | None = None, **common: Any
    ):
        super().__init__(in_dim, out_dim, ratio, **common)
        if hidden_dim is None and self.out_dim != self.in_dim:
            hidden_dim = self.out_dim
        self.mlp = None
        if hidden_dim is not None:
            hidden = integer("hidden_dim", hidden_dim, 1)
            self.mlp = nn.Sequential(nn.Linear(self.in_dim, hidden), nn.GELU(), nn.Linear(hidden, self.out_dim))

    def compress(self, patches: torch.Tensor, grid: tuple[int, int], layout: str) -> torch.Tensor:
        """Pool ``[B, N, in_dim]`` into ``[B, N', out_dim]``."""
        pooled = reference.residual(patches, self.windows(grid), "mean", layout)
        return pooled if self.mlp is None else self.mlp(pooled)
