"""The Q-Former of BLIP-2: a fixed number of learned queries asks the whole image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from laco_kernels.geometry import check_grid, integer
from laco_kernels.nn.compressors.attention import MultiHeadAttention, draw_small
from laco_kernels.nn.compressors.base import Compressor

if TYPE_CHECKING:
    from collections.abc import Sequence

EPS = 1e-12  # BERT's


class QFormerLayer(nn.Module):
    """A layer of BERT, norms last, on queries: attention among them, to the image where ``memory_dim`` is given, an MLP.

    ``x = LN(x + attention(x, x))``, ``x = LN(x + attention(x, image))``, ``y = LN(x + W2 gelu(W1 x + b1) + b2)``.
    """

    def __init__(self, dim: int, num_heads: int, memory_dim: int | None) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(dim, num_heads)
        self.attention_norm = nn.LayerNorm(dim, eps=EPS)
        self.crosses = memory_dim is not None
        if self.crosses:
            self.cross_attention = MultiHeadAttention(dim, num_heads, memory_dim)
            self.cross_attention_norm = nn.LayerNorm(dim, eps=EPS)
        self.linear1 = nn.Linear(dim, 4 * dim)
        self.linear2 = nn.Linear(4 * dim, dim)
        self.mlp_norm = nn.LayerNorm(dim, eps=EPS)

    def forward(self, x: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """Transform queries ``x [B, num_queries, dim]`` with a look at ``image [B, N, memory_dim]``."""
        x = self.attention_norm(x + self.attention(x, x, x))
        if self.crosses:
            x = self.cross_attention_norm(x + self.cross_attention(x, image, image))
        return self.mlp_norm(x + self.linear2(F.gelu(self.linear1(x))))


class QFormer(Compressor):
    """Q-Former (BLIP-2): ``num_queries`` learned queries through a BERT, then Linear(``hidden_dim`` -> D).

    The queries are normed, then pass ``num_layers`` layers (:class:`QFormerLayer`), of which the first and every second one
    behind it attend to the image. There are no windows: the budget is ``num_queries`` whatever the grid and ``ratio``, what
    comes out has no grid (``out_grid`` is ``None``), a residual is refused, and ``pad`` changes nothing. No dropout, and the
    text branch of BLIP-2 is left out.

    Args:
        in_dim, out_dim, ratio, place, prefix_tokens, residual, pad: those of :class:`Compressor`.
        num_queries: tokens that come out.
        hidden_dim, num_layers, num_heads: the shape of the BERT; its MLPs are ``4 * hidden_dim`` wide.
    """

    places = ("behind",)
    fits_any_grid = True
    residuals = ("none",)

    def __init__(
        self,
        in_dim: int,
        out_dim: int | None = None,
        ratio: int = 2,
        *,
        num_queries: int = 32,
        hidden_dim: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        **common: Any,
    ):
        super().__init__(in_dim, out_dim, ratio, **common)
        self.num_queries = integer("num_queries", num_queries, 1)
        hidden = integer("hidden_dim", hidden_dim, 1)
        layers = range(integer("num_layers", num_layers, 1))
        self.queries = nn.Parameter(torch.empty(1, self.num_queries, hidden))
        self.query_norm = nn.LayerNorm(hidden, eps=EPS)
        self.layers = nn.ModuleList([QFormerLayer(hidden, num_heads, None if i % 2 else self.in_dim) for i in layers])
        self.linear = nn.Linear(hidden, self.out_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw queries and weights (normal, standard deviation 0.02; biases zero; norms one)."""
        draw_small(self)
        nn.init.normal_(self.queries, std=0.02)

    def out_grid(self, grid: Sequence[int]) -> None:
        """Return ``None``: queries lie nowhere in the image."""
        check_grid(grid)

    def num_output_patches(self, grid: Sequence[int]) -> int:
        """Return ``num_queries``, whatever the grid."""
        check_grid(grid)
        return self.num_queries

    def compress(self, patches: torch.Tensor, grid: tuple[int, int], layout: str) -> torch.Tensor:
        """Compress ``[B, N, in_dim]`` into ``[B, num_queries, out_dim]``."""
        queries = self.query_norm(self.queries).expand(patches.shape[0], -1, -1)
        for layer in self.layers:
            queries = layer(queries, patches)
        return self.linear(queries)
