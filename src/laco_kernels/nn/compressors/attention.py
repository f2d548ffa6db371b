"""Multi-head attention as the compressors with queries use it, and how their linear maps start."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from laco_kernels.errors import complaint
from laco_kernels.geometry import integer

#: CUDA launches fused attention with a grid whose side for the batch may have no more thread blocks.
MAX_BATCH = 65535


class MultiHeadAttention(nn.Module):
    """``y = W_o [softmax(q_h k_h^T / sqrt(d)) v_h]_h + b_o``, where ``q = W_q x + b_q``, and ``k`` and ``v`` alike.

    Args:
        dim: width of queries and of what comes out; ``d = dim / num_heads``.
        num_heads: heads ``h``, a divisor of ``dim``.
        memory_dim: width of what keys and values are made of; ``dim`` unless given.

    Raises:
        TypeError, ValueError: ``num_heads`` is no positive integer that divides ``dim``.
    """

    def __init__(self, dim: int, num_heads: int, memory_dim: int | None = None) -> None:
        super().__init__()
        self.num_heads = integer("num_heads", num_heads, 1)
        if dim % self.num_heads:
            expected = f"a divisor of {dim}, the width of the attention"
            raise ValueError(complaint("num_heads", self.num_heads, expected, "Choose another num_heads or hidden_dim"))
        memory_dim = dim if memory_dim is None else memory_dim
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(memory_dim, dim)
        self.value = nn.Linear(memory_dim, dim)
        self.output = nn.Linear(dim, dim)

    def forward(
        self, x: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attend from ``x [B, L, dim]`` to ``keys`` and ``values [B, S, memory_dim]`` where ``mask [B, 1, 1, S]`` is true."""
        q, k, v = self._heads(self.query(x)), self._heads(self.key(keys)), self._heads(self.value(values))
        if q.shape[0] <= MAX_BATCH:
            mixed = F.scaled_dot_product_attention(q, k, v, mask)
        else:
            masks = [None] * -(-q.shape[0] // MAX_BATCH) if mask is None else mask.split(MAX_BATCH)
            parts = zip(q.split(MAX_BATCH), k.split(MAX_BATCH), v.split(MAX_BATCH), masks, strict=True)
            mixed = torch.cat([F.scaled_dot_product_attention(*part) for part in parts])
        return self.output(mixed.transpose(1, 2).flatten(2))

    def _heads(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens.unflatten(2, (self.num_heads, tokens.shape[2] // self.num_heads)).transpose(1, 2)


def draw_small(module: nn.Module) -> None:
    """Draw linear maps below ``module`` from a normal distribution of standard deviation 0.02, biases zero; reset the rest."""
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.normal_(child.weight, std=0.02)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
        elif isinstance(child, nn.LayerNorm):
            child.reset_parameters()
