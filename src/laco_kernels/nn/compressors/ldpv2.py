"""LDPv2, the lightweight downsample projector of MobileVLM V2."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from laco_kernels.nn.compressors.base import Compressor
from laco_kernels.nn.compressors.images import adaptive_average, to_image, to_tokens

if TYPE_CHECKING:
    import torch


class LDPv2(Compressor):
    """LDPv2 (MobileVLM V2): a two-layer MLP on every token, average pooling, and a depth-wise 3x3 convolution that is added.

    ``z = pool(W2 gelu(W1 x + b1) + b2)``, ``y = z + conv(z)``. The pooling is adaptive, to ``ceil(grid / ratio)``: on a grid
    that ``ratio`` does not divide neighbouring cells share rows or columns. The convolution has one 3x3 kernel a channel, a
    bias, and zeros around the pooled grid. ``C * D + D * D + 12 * D`` parameters: 1.73 M at ``C=1024, D=896``.

    Args:
        in_dim, out_dim, ratio, place, prefix_tokens, residual, pad: those of :class:`Compressor`; ``pad`` changes nothing.
    """

    places = ("behind", "inside")
    reads_blocks = True
    is_windowwise = False  # the convolution is over the pooled grid
    fits_any_grid = True

    def __init__(self, in_dim: int, out_dim: int | None = None, ratio: int = 2, **common: Any):
        super().__init__(in_dim, out_dim, ratio, **common)
        self.mlp = nn.Sequential(nn.Linear(self.in_dim, self.out_dim), nn.GELU(), nn.Linear(self.out_dim, self.out_dim))
        self.conv = nn.Conv2d(self.out_dim, self.out_dim, 3, padding=1, groups=self.out_dim)

    def compress(self, patches: torch.Tensor, grid: tuple[int, int], layout: str) -> torch.Tensor:
        """Compress ``[B, N, in_dim]`` into ``[B, N', out_dim]``."""
        windows = self.windows(grid)
        image = to_image(adaptive_average(self.mlp(patches), windows, layout), windows.out_grid)
        return to_tokens(image + self.conv(image))
