"""Gemma 3's pooling projector."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from laco_kernels import reference
from laco_kernels.nn.compressors.base import Compressor
from laco_kernels.ops import checks


class GemmaRMSNorm(nn.Module):
    """Gemma's RMSNorm, whose weight is kept as its distance ``w`` from one: ``y = (1 + w) x / sqrt(mean(x^2) + eps)``.

    ``[..., C] -> [..., C]`` in the dtype of ``x``; computed in float32, or in float64 for float64, as ``1 + w`` would lose a
    small ``w`` in half precision.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(dim))

    def reset_parameters(self) -> None:
        """Start as a norm without weight."""
        nn.init.zeros_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise ``[..., C]``."""
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(wide), self.weight.shape, 1 + self.weight.to(wide), self.eps).to(x.dtype)

    def extra_repr(self) -> str:
        """Width and ``eps``."""
        return f"{self.weight.shape[0]}, eps={self.eps}"


class Gemma3(Compressor):
    """Gemma 3: ``y = W norm(mean of the window)``, Gemma's RMSNorm and one matrix ``[D, C]``. ``[B, N, C] -> [B, N', D]``.

    Gemma 3 itself keeps the matrix transposed, ``[C, D]``. A grid that ``ratio`` does not divide goes to ``ceil``, and windows
    at its edge average their real tokens.

    Args:
        in_dim, out_dim, ratio, place, prefix_tokens, residual: those of :class:`Compressor`; ``pad`` changes nothing here.
        eps: that of the norm.
    """

    places = ("behind", "inside")
    reads_blocks = True
    fits_any_grid = True

    def __init__(self, in_dim: int, out_dim: int | None = None, ratio: int = 2, *, eps: float = 1e-6, **common: Any) -> None:
        super().__init__(in_dim, out_dim, ratio, **common)
        self.norm = GemmaRMSNorm(self.in_dim, checks.check_positive("eps", eps))
        self.linear = nn.Linear(self.in_dim, self.out_dim, bias=False)

    def compress(self, patches: torch.Tensor, grid: tuple[int, int], layout: str) -> torch.Tensor:
        """Pool ``[B, N, in_dim]`` into ``[B, N', out_dim]``."""
        return self.linear(self.norm(reference.residual(patches, self.windows(grid), "mean", layout)))
