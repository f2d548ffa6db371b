"""LaCo's patch merge layer as a compressor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from laco_kernels.geometry import check_grid
from laco_kernels.nn.compressors.base import Compressor
from laco_kernels.nn.patch_merge import PatchMergeLayer
from laco_kernels.ops.patch_merge import RESIDUALS

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch


class Laco(Compressor):
    """LaCo: ``y = W2 gelu(W1 S(x) + b1) + b2 + R(S(x))``, the windows' average unless ``residual=False``.

    Args:
        in_dim, out_dim, ratio, place, prefix_tokens, pad: those of :class:`Compressor`; ``ratio`` at least 2.
        residual: ``True`` or ``"mean"``, ``"channel_group"``, ``False`` or ``"none"``; on where the width is kept.
        hidden_dim, norm, bias, zero_init_last, approximate: those of :class:`laco_kernels.nn.PatchMergeLayer`.
    """

    places = ("inside", "behind")
    residuals = RESIDUALS
    reads_blocks = True

    def __init__(
        self,
        in_dim: int,
        out_dim: int | None = None,
        ratio: int = 2,
        *,
        residual: bool | str | None = None,
        hidden_dim: int | None = None,
        norm: str | None = None,
        bias: bool = True,
        zero_init_last: bool | None = None,
        approximate: str = "none",
        **common: Any,
    ) -> None:
        residual = out_dim in (None, in_dim) if residual is None else residual
        super().__init__(in_dim, out_dim, ratio, residual=residual, **common)
        passed_on = self.prefix_tokens if self.place == "inside" else 0
        self.layer = PatchMergeLayer(
            in_dim,
            ratio,
            hidden_dim,
            out_dim,
            self.residual,
            norm=norm,
            bias=bias,
            zero_init_last=zero_init_last,
            approximate=approximate,
            prefix_tokens=passed_on,
            pad=self.pad,
        )

    def forward(
        self, x: torch.Tensor | Sequence[torch.Tensor], grid: Sequence[int], *, layout: str = "raster"
    ) -> tuple[torch.Tensor, tuple[int, int] | None]:
        """As :meth:`Compressor.forward`; the operator adds the residual and passes the prefix on in the same pass."""
        grid = check_grid(grid)
        tokens = self.check_input(x, grid, layout)[0]
        if self.place == "behind":
            tokens = tokens[:, self.prefix_tokens :]
        return self.layer(tokens, grid, layout=layout), self.out_grid(grid)
