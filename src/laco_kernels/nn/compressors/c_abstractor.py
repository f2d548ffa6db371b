"""C-Abstractor, Honeybee's convolutional projector."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from laco_kernels.geometry import check_grid, integer
from laco_kernels.nn.compressors.base import Compressor
from laco_kernels.nn.compressors.images import adaptive_average, to_image, to_tokens

if TYPE_CHECKING:
    from collections.abc import Sequence


class RegBlock(nn.Module):
    r"""A bottleneck block of RegNet on tokens: 1x1, depth-wise 3x3, squeeze and excitation, 1x1, each convolution normed.

    .. math::
        u &= \mathrm{silu}(\mathrm{LN}(\mathrm{conv}_{3 \times 3}(\mathrm{silu}(\mathrm{LN}(W_1 x))))) \\
        y &= \mathrm{silu}(\mathrm{LN}(W_3 (u \cdot \sigma(W_e\,\mathrm{silu}(W_s\,\mathrm{mean}(u) + b_s) + b_e))) + R(x))

    The mean is over the whole image, and squeezed to a quarter of ``in_dim`` channels. ``R(x) = x``, or
    ``LN(W_r x)`` where the width changes. Convolutions have no biases; every norm is over channels, epsilon 1e-6, the
    channel norm of feature maps. ``[B, H * W, in_dim] -> [B, H * W, out_dim]``.
    """

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        squeezed = max(1, round(in_dim / 4))
        self.conv1 = nn.Linear(in_dim, out_dim, bias=False)
        self.norm1 = nn.LayerNorm(out_dim, eps=1e-6)
        self.conv2 = nn.Conv2d(out_dim, out_dim, 3, padding=1, groups=out_dim, bias=False)
        self.norm2 = nn.LayerNorm(out_dim, eps=1e-6)
        self.squeeze = nn.Linear(out_dim, squeezed)
        self.excite = nn.Linear(squeezed, out_dim)
        self.conv3 = nn.Linear(out_dim, out_dim, bias=False)
        self.norm3 = nn.LayerNorm(out_dim, eps=1e-6)
        self.shortcut: nn.Module = nn.Identity()
        if in_dim != out_dim:
            self.shortcut = nn.Sequential(nn.Linear(in_dim, out_dim, bias=False), nn.LayerNorm(out_dim, eps=1e-6))

    def forward(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Transform the tokens ``x`` of an image of ``grid`` patches, in raster order."""
        y = F.silu(self.norm1(self.conv1(x)))
        y = F.silu(self.norm2(to_tokens(self.conv2(to_image(y, grid)))))
        y = y * torch.sigmoid(self.excite(F.silu(self.squeeze(y.mean(1, keepdim=True)))))
        return F.silu(self.norm3(self.conv3(y)) + self.shortcut(x))


class CAbstractor(Compressor):
    """C-Abstractor (Honeybee): position embedding, ``depth`` RegNet blocks, pooling, ``depth`` more, Linear-SiLU-Linear.

    The pooling is adaptive, to ``ceil(grid / ratio)``: on a grid that ``ratio`` does not divide neighbouring cells share
    rows or columns. Blocks are :class:`RegBlock`, those before the pooling ``C -> hidden_dim``; then
    ``hidden_dim -> D -> D``. Honeybee's tokens that mark the end of an image are left out.

    The position embedding is learned for the patches of one ``grid``; for an image of another one it is interpolated
    bicubically, as vision transformers do with theirs.

    Args:
        in_dim, out_dim, ratio, place, prefix_tokens, residual, pad: those of :class:`Compressor`; ``pad`` changes nothing.
        grid: the image in patches that the position embedding is made for.
        hidden_dim: width of the blocks; ``in_dim`` unless given, as 1024 for CLIP ViT-L.
        depth: blocks before the pooling, and again behind it.
    """

    places = ("behind", "inside")
    fits_any_grid = True

    def __init__(
        self,
        in_dim: int,
        out_dim: int | None = None,
        ratio: int = 2,
        *,
        grid: Sequence[int] = (24, 24),
        hidden_dim: int | None = None,
        depth: int = 3,
        **common: Any,
    ):
        super().__init__(in_dim, out_dim, ratio, **common)
        self.grid = check_grid(grid)
        hidden = self.in_dim if hidden_dim is None else integer("hidden_dim", hidden_dim, 1)
        depth = integer("depth", depth, 1)
        self.position = nn.Parameter(torch.empty(1, self.grid[0] * self.grid[1], self.in_dim))
        self.before = nn.ModuleList([RegBlock(hidden if i else self.in_dim, hidden) for i in range(depth)])
        self.after = nn.ModuleList([RegBlock(hidden, hidden) for _ in range(depth)])
        self.mlp = nn.Sequential(nn.Linear(hidden, self.out_dim), nn.SiLU(), nn.Linear(self.out_dim, self.out_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the position embedding (normal, standard deviation 0.02) and everything else as its modules do."""
        super().reset_parameters()
        nn.init.trunc_normal_(self.position, std=0.02)

    def compress(self, patches: torch.Tensor, grid: tuple[int, int], layout: str) -> torch.Tensor:
        """Compress ``[B, N, in_dim]`` into ``[B, N', out_dim]``."""
        windows = self.windows(grid)
        y = patches + self._position(grid)
        for block in self.before:
            y = block(y, grid)
        y = adaptive_average(y, windows)
        for block in self.after:
            y = block(y, windows.out_grid)
        return self.mlp(y)

    def _position(self, grid: tuple[int, int]) -> torch.Tensor:
        if grid == self.grid:
            return self.position
        image = to_image(self.position, self.grid)
        return to_tokens(F.interpolate(image, size=grid, mode="bicubic", align_corners=False))
