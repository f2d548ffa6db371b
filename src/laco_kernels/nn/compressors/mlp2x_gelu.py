"""LLaVA-1.5's projector, which reduces nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from laco_kernels.nn.children import mlp
from laco_kernels.nn.compressors.base import Compressor

if TYPE_CHECKING:
    import torch


class Mlp2xGelu(Compressor):
    """LLaVA-1.5: ``y = W2 gelu(W1 x + b1) + b2`` for every token, ``[B, N, C] -> [B, N, D]``; what others are compared with.

    ``C D + D + D^2 + D`` parameters, 20.98 M at ``in_dim=1024, out_dim=4096``.

    Args:
        in_dim, out_dim, place, prefix_tokens, residual, pad: those of :class:`Compressor`. The mean of a window of one token
            is the token itself.
        ratio: 1.
    """

    places = ("behind",)
    reduces = False

    def __init__(self, in_dim: int, out_dim: int | None = None, ratio: int = 1, **common: Any) -> None:
        super().__init__(in_dim, out_dim, ratio, **common)
        self.linear1 = nn.Linear(self.in_dim, self.out_dim)
        self.linear2 = nn.Linear(self.out_dim, self.out_dim)

    def compress(self, patches: torch.Tensor, grid: tuple[int, int], layout: str) -> torch.Tensor:
        """Project ``[B, N, in_dim]`` to ``[B, N, out_dim]``."""
        return mlp(self.linear1, self.linear2, patches, self.windows(grid), layout)
