"""A smaller image instead of fewer tokens: the baseline that stands before the encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from laco_kernels.errors import complaint
from laco_kernels.geometry import check_grid
from laco_kernels.nn.compressors.base import Compressor
from laco_kernels.ops import checks

if TYPE_CHECKING:
    from collections.abc import Sequence


class Downsample(Compressor):
    """Shrinks the image by ``ratio`` before the encoder sees it, by antialiased bicubic interpolation; no parameters.

    A simple baseline that many methods do not beat. A grid that ``ratio`` does not divide goes to ``ceil(grid / ratio)``
    patches, which changes the proportions of the image slightly. Tokens are counted in patches: whether prefix tokens come
    in front is the encoder's business.

    Args:
        in_dim, out_dim: width of the encoder's tokens, which nothing here depends on.
        ratio, place, pad: those of :class:`Compressor`; before only, and ``pad`` changes nothing here.
        prefix_tokens, residual: those of :class:`Compressor`; an image has no prefix tokens and no residual is added.
    """

    places = ("before",)
    fits_any_grid = True
    residuals = ("none",)

    def __init__(self, in_dim: int, out_dim: int | None = None, ratio: int = 2, **common: Any) -> None:
        super().__init__(in_dim, out_dim, ratio, **common)

    def forward(  # type: ignore[override]
        self, pixels: torch.Tensor, grid: Sequence[int]
    ) -> tuple[torch.Tensor, tuple[int, int]]:
        """Shrink ``pixels [B, 3, H * patch, W * patch]`` of a ``grid = (H, W)`` to ``[B, 3, H' * patch, W' * patch]``.

        Computed in float32, or in float64 for float64, and returned in the dtype of ``pixels``, with ``(H', W')``.

        Raises:
            TypeError: ``pixels`` is no floating-point tensor, or the grid no pair of integers.
            ValueError: ``pixels`` is no batch of images, or its patches are not square on that grid.
        """
        height, width = check_grid(grid)
        checks.check_tensor("pixels", pixels)
        if pixels.dim() != 4:
            given = f"{pixels.dim()} dimensions {tuple(pixels.shape)}"
            raise ValueError(complaint("pixels", given, "4 dimensions [B, 3, height, width]", "Pass pixel_values, not tokens"))
        patch = pixels.shape[2] // height
        if patch < 1 or tuple(pixels.shape[2:]) != (height * patch, width * patch):
            given = f"{pixels.shape[2]} x {pixels.shape[3]}"
            remedy = "Pass the grid of these images in patches"
            raise ValueError(complaint("pixels", given, f"square patches on a grid of {height} x {width}", remedy))
        out_grid = self.windows(grid).out_grid
        size = (out_grid[0] * patch, out_grid[1] * patch)
        wide = pixels.to(torch.promote_types(pixels.dtype, torch.float32))
        return F.interpolate(wide, size=size, mode="bicubic", antialias=True).to(pixels.dtype), out_grid
