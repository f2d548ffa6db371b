"""InternVL's pixel shuffle with its MLP."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from laco_kernels import reference
from laco_kernels.errors import complaint
from laco_kernels.nn.children import merged_mlp
from laco_kernels.nn.compressors.base import Compressor
from laco_kernels.ops import checks

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

VERSIONS = ("v2", "v1")


class PixelShuffle(Compressor):
    """InternVL: ``y = W2 gelu(W1 LN(S(x)) + b1) + b2``, the norm over all ``r * r * C`` channels of a window.

    ``[B, N, C] -> [B, N', D]``; ``W1 [D, r * r * C]``, ``W2 [D, D]``. Published without residual and behind the encoder.

    Args:
        in_dim, out_dim, ratio, place, prefix_tokens, residual, pad: those of :class:`Compressor`.
        ps_version: ``"v2"`` returns the windows in raster order. ``"v1"`` returns them column by column, the transposed
            coarse grid of InternVL's first models, whose configurations still name it; the grid that is returned with
            them is ``(W / r, H / r)`` accordingly. Behind an encoder only: inside it tokens keep raster order.
        eps: that of the norm.
    """

    places = ("behind", "inside")
    reads_blocks = True

    def __init__(
        self,
        in_dim: int,
        out_dim: int | None = None,
        ratio: int = 2,
        *,
        ps_version: str = "v2",
        eps: float = 1e-5,
        **common: Any,
    ) -> None:
        super().__init__(in_dim, out_dim, ratio, **common)
        checks.check_choice("ps_version", ps_version, VERSIONS)
        if ps_version == "v1" and self.place == "inside":
            remedy = "Transposed tokens do not go on through an encoder; pass place='behind'"
            raise ValueError(complaint("ps_version", "'v1'", "'v2', inside an encoder", remedy))
        self.ps_version = ps_version
        merged_dim = self.ratio**2 * self.in_dim
        self.norm = nn.LayerNorm(merged_dim, eps=checks.check_positive("eps", eps))
        self.linear1 = nn.Linear(merged_dim, self.out_dim)
        self.linear2 = nn.Linear(self.out_dim, self.out_dim)

    def out_grid(self, grid: Sequence[int]) -> tuple[int, int]:
        """Return the grid of the tokens as they come out, for ``ps_version="v1"`` the transposed one."""
        height, width = self.windows(grid).out_grid
        return (width, height) if self.ps_version == "v1" else (height, width)

    def compress(self, patches: torch.Tensor, grid: tuple[int, int], layout: str) -> torch.Tensor:
        """Merge ``[B, N, in_dim]`` into ``[B, N', out_dim]``."""
        windows = self.windows(grid)
        merged = self.norm(reference.space_to_depth(patches, windows, layout))
        return self._oriented(merged_mlp(self.linear1, self.linear2, merged, windows), grid)

    def shortcut(self, patches: torch.Tensor, grid: tuple[int, int], layout: str) -> torch.Tensor:
        """Return the mean of every window, ``[B, N', C]``, in the order in which the windows come out."""
        return self._oriented(super().shortcut(patches, grid, layout), grid)

    def _oriented(self, tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        if self.ps_version == "v2":
            return tokens
        return tokens.unflatten(1, self.windows(grid).out_grid).transpose(1, 2).flatten(1, 2)
