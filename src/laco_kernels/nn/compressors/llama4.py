"""The pixel-shuffle MLP and the projector of Llama 4."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from laco_kernels.geometry import Windows, integer
from laco_kernels.nn.children import linear_gelu
from laco_kernels.nn.compressors.base import Compressor

if TYPE_CHECKING:
    import torch


class Llama4(Compressor):
    """Llama 4: ``y = W3 gelu(W2 gelu(W1 S(x)))``, three matrices without biases. ``[B, N, C] -> [B, N', D]``.

    ``W1 [hidden_dim, r * r * C]`` and ``W2 [hidden_dim, hidden_dim]`` are the encoder's pixel-shuffle MLP,
    ``W3 [D, hidden_dim]`` is the projector in front of the LLM. Llama 4's own encoder puts its class token last: drop it
    before; ``prefix_tokens`` are first.

    Args:
        in_dim, out_dim, ratio, place, prefix_tokens, residual, pad: those of :class:`Compressor`.
        hidden_dim: ``out_dim`` unless given; 4096 in Llama 4.
    """

    places = ("behind", "inside")
    reads_blocks = True

    def __init__(
        self, in_dim: int, out_dim: int | None = None, ratio: int = 2, *, hidden_dim: int | None = None, **common: Any
    ) -> None:
        super().__init__(in_dim, out_dim, ratio, **common)
        hidden = self.out_dim if hidden_dim is None else integer("hidden_dim", hidden_dim, 1)
        self.linear1 = nn.Linear(self.ratio**2 * self.in_dim, hidden, bias=False)
        self.linear2 = nn.Linear(hidden, hidden, bias=False)
        self.linear3 = nn.Linear(hidden, self.out_dim, bias=False)

    def compress(self, patches: torch.Tensor, grid: tuple[int, int], layout: str) -> torch.Tensor:
        """Merge ``[B, N, in_dim]`` into ``[B, N', out_dim]``."""
        windows = self.windows(grid)
        merged = linear_gelu(self.linear1, patches, windows, layout)
        return self.linear3(linear_gelu(self.linear2, merged, Windows(windows.out_grid, 1)))
