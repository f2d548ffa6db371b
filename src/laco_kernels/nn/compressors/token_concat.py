"""Concatenated tokens with an MLP, STF's ablation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from laco_kernels import reference
from laco_kernels.geometry import integer
from laco_kernels.nn.children import merged_mlp
from laco_kernels.nn.compressors.base import Compressor

if TYPE_CHECKING:
    import torch


class TokenConcat(Compressor):
    """The tokens of a window side by side, Linear, GELU, Linear (STF's ablation): ``y = W2 gelu(W1 U(x) + b1) + b2``.

    ``U`` is :func:`torch.nn.functional.pixel_unshuffle`, whose channels are ordered ``(c, dy, dx)``, and so are the columns
    of ``W1 [hidden_dim, C * r * r]``. ``[B, N, C] -> [B, N', D]``.

    Args:
        in_dim, out_dim, ratio, place, prefix_tokens, residual, pad: those of :class:`Compressor`.
        hidden_dim: width of the MLP; ``out_dim`` unless given.
    """

    places = ("behind", "inside")
    reads_blocks = True

    def __init__(
        self, in_dim: int, out_dim: int | None = None, ratio: int = 2, *, hidden_dim: int | None = None, **common: Any
    ) -> None:
        super().__init__(in_dim, out_dim, ratio, **common)
        hidden = self.out_dim if hidden_dim is None else integer("hidden_dim", hidden_dim, 1)
        self.linear1 = nn.Linear(self.ratio**2 * self.in_dim, hidden)
        self.linear2 = nn.Linear(hidden, self.out_dim)

    def compress(self, patches: torch.Tensor, grid: tuple[int, int], layout: str) -> torch.Tensor:
        """Merge ``[B, N, in_dim]`` into ``[B, N', out_dim]``."""
        windows = self.windows(grid)
        merged = reference.space_to_depth(patches, windows, layout)
        channel_major = merged.unflatten(2, (self.ratio**2, self.in_dim)).transpose(2, 3).flatten(2)
        return merged_mlp(self.linear1, self.linear2, channel_major, windows)
