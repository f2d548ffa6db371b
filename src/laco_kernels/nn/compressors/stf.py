"""STF as a compressor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from laco_kernels.errors import complaint
from laco_kernels.geometry import integer
from laco_kernels.nn.compressors.base import Compressor
from laco_kernels.nn.token_fusion import SpatialTokenFusion

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch


class Stf(Compressor):
    """STF, spatial token fusion: :class:`laco_kernels.nn.SpatialTokenFusion`, ``[B, N, C] -> [B, N' * E, D]``.

    At ``in_dim=1024, out_dim=4096, ratio=2`` the authors' code has 134.24 M parameters, the paper's own figure. The layers
    of the paper's Table 1 have 151.02 M: its first convolution, ``C`` to ``4C`` channels with biases, is 16.78 M, where
    the code places the tokens of a window side by side.

    Args:
        in_dim, out_dim, place, prefix_tokens, residual, pad: those of :class:`Compressor`.
        ratio: side ``k`` of a window; 1, 2, 4 and 8 in the paper. 1 projects every token.
        num_tokens: tokens ``E`` that come out for a window. More than one form no grid, so they stand behind the encoder
            only and have no residual.
        variant: ``"paper"`` or ``"released"``.
    """

    places: ClassVar[tuple[str, ...]] = ("behind", "inside")
    reads_blocks = True

    def __init__(
        self,
        in_dim: int,
        out_dim: int | None = None,
        ratio: int = 2,
        *,
        num_tokens: int = 1,
        variant: str = "paper",
        **common: Any,
    ) -> None:
        super().__init__(in_dim, out_dim, ratio, **common)
        self.num_tokens = integer("num_tokens", num_tokens, 1)
        if self.num_tokens > 1 and (self.place == "inside" or self.residual != "none"):
            expected = "1 inside an encoder" if self.place == "inside" else f"1 with residual={self.residual!r}"
            remedy = "Several tokens a window form no grid; place them behind the encoder, without residual"
            raise ValueError(complaint("num_tokens", self.num_tokens, expected, remedy))
        self.fusion = SpatialTokenFusion(self.in_dim, self.out_dim, self.ratio, self.num_tokens, variant, pad=self.pad)

    def out_grid(self, grid: Sequence[int]) -> tuple[int, int] | None:
        """Return the grid of windows, ``None`` with several tokens a window."""
        windows = self.windows(grid)
        return windows.out_grid if self.num_tokens == 1 else None

    def num_output_patches(self, grid: Sequence[int]) -> int:
        """``N' * E``."""
        return self.fusion.num_output_tokens(grid)

    def compress(self, patches: torch.Tensor, grid: tuple[int, int], layout: str) -> torch.Tensor:
        """Fuse ``[B, N, in_dim]`` into ``[B, N' * E, out_dim]``."""
        return self.fusion(patches, grid, layout=layout)
