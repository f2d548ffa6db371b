"""VILA's downsampling projector."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from laco_kernels import reference
from laco_kernels.nn.children import merged_mlp
from laco_kernels.nn.compressors.base import Compressor
from laco_kernels.ops import checks

if TYPE_CHECKING:
    import torch


class Vila(Compressor):
    """VILA: ``y = W2 gelu(W1 LN(S(x)) + b1) + b2`` on a grid completed with zeros at the bottom and right (27 -> 28).

    ``[B, N, C] -> [B, N', D]``; the norm is over the ``r * r * C`` channels of a window, its padding included. Windows come
    out in raster order; early copies of the authors' code leave the coarse grid transposed.

    Args:
        in_dim, out_dim, ratio, place, prefix_tokens, residual: those of :class:`Compressor`; ``pad`` changes nothing here.
        eps: that of the norm.
    """

    places = ("behind", "inside")
    reads_blocks = True
    fits_any_grid = True

    def __init__(self, in_dim: int, out_dim: int | None = None, ratio: int = 2, *, eps: float = 1e-5, **common: Any) -> None:
        super().__init__(in_dim, out_dim, ratio, **common)
        merged_dim = self.ratio**2 * self.in_dim
        self.norm = nn.LayerNorm(merged_dim, eps=checks.check_positive("eps", eps))
        self.linear1 = nn.Linear(merged_dim, self.out_dim)
        self.linear2 = nn.Linear(self.out_dim, self.out_dim)

    def compress(self, patches: torch.Tensor, grid: tuple[int, int], layout: str) -> torch.Tensor:
        """Merge ``[B, N, in_dim]`` into ``[B, N', out_dim]``."""
        windows = self.windows(grid)
        merged = self.norm(reference.space_to_depth(patches, windows, layout))
        return merged_mlp(self.linear1, self.linear2, merged, windows)
