"""MBTF as a compressor, alone and with STF behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from laco_kernels.nn.compressors.base import Compressor
from laco_kernels.nn.compressors.stf import Stf
from laco_kernels.nn.multi_block_fusion import RELEASED_HIDDEN_STATES, MultiBlockTokenFusion, sampled_blocks

if TYPE_CHECKING:
    import torch


def blocks_of(variant: str, num_layers: int, num_blocks: int) -> tuple[int, ...]:
    """Return the numbers of the blocks that MBTF reads, in the order in which it concatenates them.

    In the paper these are evenly spaced. The authors' code reads the deepest block first, and of 24 blocks the last but one
    instead of the last.
    """
    blocks = sampled_blocks(num_layers, num_blocks)
    if variant == "paper":
        return blocks
    if blocks == sampled_blocks(24, 8):
        return tuple(state % (24 + 1) for state in RELEASED_HIDDEN_STATES)
    return blocks[::-1]


class Mbtf(Compressor):
    """MBTF, multi-block token fusion: :class:`laco_kernels.nn.MultiBlockTokenFusion`, ``M`` times ``[B, N, C] -> [B, N, C]``.

    37.75 M parameters at ``in_dim=1024, num_blocks=8``, in both variants. ``forward`` takes the list of the ``M``
    ``hidden_states`` that :attr:`blocks` numbers, in its order. A residual is that of the deepest block.

    Args:
        in_dim, place, prefix_tokens, residual, pad: those of :class:`Compressor`.
        out_dim: ``in_dim``, which MBTF keeps.
        ratio: 1.
        num_blocks: encoder blocks ``M``; 8, 16 and 24 in the paper.
        variant: ``"paper"`` or ``"released"``.
        num_layers: blocks that the encoder has, at least ``num_blocks``. They are sampled evenly; ``"released"`` has the
            deepest first, and reads for 8 of 24 those of the authors' code, 23, 21, 18, ..., 3.
    """

    places = ("behind",)
    reduces = False
    keeps_width = True

    def __init__(
        self,
        in_dim: int,
        out_dim: int | None = None,
        ratio: int = 1,
        *,
        num_blocks: int = 8,
        variant: str = "paper",
        num_layers: int = 24,
        **common: Any,
    ) -> None:
        super().__init__(in_dim, out_dim, ratio, **common)
        self.fusion = MultiBlockTokenFusion(self.in_dim, num_blocks, variant)
        self.num_blocks = self.fusion.num_blocks
        self.blocks = blocks_of(variant, num_layers, self.num_blocks)
        self.deepest = self.blocks.index(max(self.blocks))

    def compress(self, patches: Any, grid: tuple[int, int], layout: str) -> torch.Tensor:
        """Fuse ``num_blocks`` tensors ``[B, N, in_dim]`` into ``[B, N, in_dim]``."""
        return self.fusion(patches if self.num_blocks > 1 else [patches])


class MbtfStf(Stf):
    """MBTF, then STF: ``M`` times ``[B, N, C] -> [B, N, C] -> [B, N' * E, D]``, as the paper has both.

    At ``in_dim=1024, out_dim=4096, num_blocks=8, ratio=2`` the authors' code has 37.75 M + 134.24 M parameters, the paper's
    Table 1 37.75 M + 151.02 M. ``forward`` takes the list of :attr:`blocks`, as :class:`Mbtf`.

    Args:
        in_dim, out_dim, ratio, place, prefix_tokens, residual, pad, num_tokens: those of :class:`Stf`; behind only.
        num_blocks, num_layers: those of :class:`Mbtf`.
        variant: that of both, ``"paper"`` or ``"released"``.
    """

    places = ("behind",)

    def __init__(
        self,
        in_dim: int,
        out_dim: int | None = None,
        ratio: int = 2,
        *,
        num_blocks: int = 8,
        variant: str = "paper",
        num_layers: int = 24,
        **common: Any,
    ) -> None:
        super().__init__(in_dim, out_dim, ratio, variant=variant, **common)
        self.blocks_fusion = MultiBlockTokenFusion(self.in_dim, num_blocks, variant)
        self.num_blocks = self.blocks_fusion.num_blocks
        self.blocks = blocks_of(variant, num_layers, self.num_blocks)
        self.deepest = self.blocks.index(max(self.blocks))

    def compress(self, patches: Any, grid: tuple[int, int], layout: str) -> torch.Tensor:
        """Fuse ``num_blocks`` tensors ``[B, N, in_dim]`` into ``[B, N' * E, out_dim]``."""
        return super().compress(self.blocks_fusion(patches if self.num_blocks > 1 else [patches]), grid, layout)
