"""The connector of Idefics3 and SmolVLM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from laco_kernels.nn.children import merge
from laco_kernels.nn.compressors.base import Compressor

if TYPE_CHECKING:
    import torch


class Idefics3(Compressor):
    """Idefics3 and SmolVLM: ``y = W S(x)``, one matrix ``[D, r * r * C]`` without bias. ``[B, N, C] -> [B, N', D]``.

    Args:
        in_dim, out_dim, ratio, place, prefix_tokens, residual, pad: those of :class:`Compressor`.
    """

    places = ("behind", "inside")
    reads_blocks = True

    def __init__(self, in_dim: int, out_dim: int | None = None, ratio: int = 2, **common: Any) -> None:
        super().__init__(in_dim, out_dim, ratio, **common)
        self.linear = nn.Linear(self.ratio**2 * self.in_dim, self.out_dim, bias=False)

    def compress(self, patches: torch.Tensor, grid: tuple[int, int], layout: str) -> torch.Tensor:
        """Merge ``[B, N, in_dim]`` into ``[B, N', out_dim]``."""
        return merge(self.linear, patches, self.windows(grid), layout)
