"""Tokens as the feature maps that convolutions and adaptive pooling want, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F

from laco_kernels import reference

if TYPE_CHECKING:
    import torch

    from laco_kernels.geometry import Windows


def to_image(tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """View raster-ordered tokens ``[B, H * W, C]`` as a feature map ``[B, C, H, W]`` in channels-last memory."""
    return tokens.transpose(1, 2).unflatten(2, grid)


def to_tokens(image: torch.Tensor) -> torch.Tensor:
    """Undo :func:`to_image`."""
    return image.flatten(2).transpose(1, 2)


def adaptive_average(tokens: torch.Tensor, windows: Windows, layout: str = "raster") -> torch.Tensor:
    """Average ``[B, N, C]`` into ``[B, N', C]``, as :func:`torch.nn.functional.adaptive_avg_pool2d` to ``windows.out_grid``.

    Where the windows tile the grid these are their means. Elsewhere cell ``i`` of ``n`` averages rows
    ``floor(i * H / n)`` to ``ceil((i + 1) * H / n)`` exclusive, and columns alike: neighbouring cells may share some.
    """
    if windows.is_even:
        # Also in the backward pass free of atomics, which the adaptive kernel is not.
        return reference.residual(tokens, windows, "mean", layout)
    return to_tokens(F.adaptive_avg_pool2d(to_image(tokens, windows.grid), windows.out_grid))
