"""Grids, windows, padding, prefix tokens and token counts: the only place that knows how tokens lie in a sequence.

A sequence is ``[B, P + N, C]``: ``P`` prefix tokens (class, registers) first, then ``N = H * W`` patch tokens. In *raster*
order patch token ``y * W + x`` is the patch in row ``y`` and column ``x``. In *block* order the tokens of one ``r x r``
window are neighbours, ``[H/r][W/r][dy][dx]``, so that merging a window is a view.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from laco_kernels.errors import complaint

if TYPE_CHECKING:
    from collections.abc import Sequence


def integer(name: str, value: object, minimum: int) -> int:
    """Return ``value`` as an integer of at least ``minimum``; ``bool`` and ``float`` are refused.

    Raises:
        TypeError: if ``value`` is not an integer.
        ValueError: if it is smaller than ``minimum``.
    """
    expected = f"an integer of at least {minimum}"
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise TypeError(complaint(name, repr(value), expected, f"Pass {name} as an int"))
        try:
            value = operator.index(value)
        except TypeError:  # a tensor of several numbers
            raise TypeError(complaint(name, repr(value), expected, f"Pass {name} as an int")) from None
    if value < minimum:
        raise ValueError(complaint(name, value, expected, f"Choose a {name} of {minimum} or more"))
    return value  # type: ignore[return-value]


def check_grid(grid: Sequence[int]) -> tuple[int, int]:
    """Return ``grid`` as ``(height, width)`` in patches.

    Raises:
        TypeError: if ``grid`` is not a pair of integers.
        ValueError: if a side is smaller than 1.
    """
    if not isinstance(grid, (tuple, list, torch.Size)) or len(grid) != 2:
        raise TypeError(complaint("grid", repr(grid), "(height, width) in patches", "Pass a pair such as grid=(24, 24)"))
    return integer("grid height", grid[0], 1), integer("grid width", grid[1], 1)


@dataclass(frozen=True)
class Windows:
    """How the patch tokens of an image fall into ``ratio x ratio`` windows.

    Args:
        grid: ``(height, width)`` of the image in patches.
        ratio: side of a window in patches, at least 1.
        prefix_tokens: tokens that stand before the patches and belong to no window.
        pad: complete the windows of a grid that ``ratio`` does not divide with zeros at the bottom and at the right.

    Raises:
        TypeError: if an argument is not an integer, or ``pad`` no bool.
        ValueError: if an argument is out of range, or ``ratio`` does not divide the grid and ``pad`` is off.
    """

    grid: tuple[int, int]
    ratio: int
    prefix_tokens: int = 0
    pad: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", check_grid(self.grid))
        object.__setattr__(self, "ratio", integer("ratio", self.ratio, 1))
        object.__setattr__(self, "prefix_tokens", integer("prefix_tokens", self.prefix_tokens, 0))
        if not isinstance(self.pad, bool):
            raise TypeError(complaint("pad", repr(self.pad), "True or False", "Pass pad=True to complete odd grids"))
        if not self.pad and not self.is_even:
            raise ValueError(
                complaint(
                    "grid",
                    f"{self.grid[0]} x {self.grid[1]}",
                    f"both sides divisible by {self.ratio}",
                    "Pass pad=True to complete the last windows with zeros, or resize the image",
                )
            )

    @property
    def is_even(self) -> bool:
        """Whether the windows tile the grid without padding."""
        return self.grid[0] % self.ratio == 0 and self.grid[1] % self.ratio == 0

    @property
    def num_patches(self) -> int:
        """Patch tokens going in, ``N = H * W``."""
        return self.grid[0] * self.grid[1]

    @property
    def num_tokens(self) -> int:
        """All tokens going in, ``P + N``."""
        return self.prefix_tokens + self.num_patches

    @property
    def out_grid(self) -> tuple[int, int]:
        """The grid of windows, ``(ceil(H / r), ceil(W / r))``."""
        height, width = self.grid
        return -(-height // self.ratio), -(-width // self.ratio)

    @property
    def num_windows(self) -> int:
        """Windows, hence patch tokens coming out, ``N'``."""
        return self.out_grid[0] * self.out_grid[1]

    @property
    def num_output_tokens(self) -> int:
        """All tokens coming out when the prefix passes through, ``P + N'``."""
        return self.prefix_tokens + self.num_windows

    @property
    def padding(self) -> tuple[int, int]:
        """Rows added at the bottom and columns added at the right."""
        return self.out_grid[0] * self.ratio - self.grid[0], self.out_grid[1] * self.ratio - self.grid[1]

    def tiles(self, patches: torch.Tensor) -> torch.Tensor:
        """View the raster-ordered patches ``[B, N, C]`` of an even grid as ``[B, H / r, r, W / r, r, C]``."""
        (height, width), r = self.out_grid, self.ratio
        return patches.unflatten(1, (height, r, width, r))

    def split(self, patches: torch.Tensor) -> torch.Tensor:
        """Window the raster-ordered patches ``[B, N, C]`` into ``[B, N', r * r, C]``, zero-padded where a grid is odd."""
        batch, _, channels = patches.shape
        (height, width), r = self.out_grid, self.ratio
        image = patches.reshape(batch, *self.grid, channels)
        if not self.is_even:
            bottom, right = self.padding
            image = F.pad(image, (0, 0, 0, right, 0, bottom))
        windows = image.reshape(batch, height, r, width, r, channels).transpose(2, 3)
        return windows.reshape(batch, self.num_windows, r * r, channels)

    def join(self, windows: torch.Tensor) -> torch.Tensor:
        """Undo :meth:`split`: ``[B, N', r * r, C] -> [B, N, C]``, padding dropped."""
        batch, _, _, channels = windows.shape
        (height, width), r = self.out_grid, self.ratio
        image = windows.reshape(batch, height, width, r, r, channels).transpose(2, 3)
        image = image.reshape(batch, height * r, width * r, channels)[:, : self.grid[0], : self.grid[1]]
        return image.reshape(batch, self.num_patches, channels)

    def to_block_order(self, tokens: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """Put the patch tokens along ``dim`` (``P + N`` entries in raster order) window by window; the prefix stays first."""
        return self._reorder(tokens, dim, blocks_first=True)

    def to_raster_order(self, tokens: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """Undo :meth:`to_block_order`."""
        return self._reorder(tokens, dim, blocks_first=False)

    def _reorder(self, tokens: torch.Tensor, dim: int, *, blocks_first: bool) -> torch.Tensor:
        dim = dim % tokens.dim()
        prefix = tokens.narrow(dim, 0, self.prefix_tokens)
        patches = tokens.narrow(dim, self.prefix_tokens, self.num_patches)
        (height, width), r = self.out_grid, self.ratio
        sides = (height, r, width, r) if blocks_first else (height, width, r, r)
        patches = patches.unflatten(dim, sides).transpose(dim + 1, dim + 2).flatten(dim, dim + 3)
        return torch.cat([prefix, patches], dim) if self.prefix_tokens else patches


@dataclass(frozen=True)
class Cascade:
    """Merges one behind the other: the windows of the first, those of what comes out of it, and so on.

    In block order the tokens of a window are neighbours, and so are the windows of a window of the next stage; each merge is
    then a view of what the one before it leaves.

    Args:
        stages: the windows of each merge, with the same prefix; the grid of each is the ``out_grid`` of the one before it.
    """

    stages: tuple[Windows, ...]

    def to_block_order(self, tokens: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """Put the patch tokens along ``dim`` (``P + N`` entries in raster order) window by window; the prefix stays first."""
        dim = dim % tokens.dim()
        for i in range(len(self.stages)):
            tokens = self._reorder(tokens, dim, i, blocks_first=True)
        return tokens

    def to_raster_order(self, tokens: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """Undo :meth:`to_block_order`."""
        dim = dim % tokens.dim()
        for i in reversed(range(len(self.stages))):
            tokens = self._reorder(tokens, dim, i, blocks_first=False)
        return tokens

    def _reorder(self, tokens: torch.Tensor, dim: int, i: int, *, blocks_first: bool) -> torch.Tensor:
        """Order the windows of stage ``i - 1``, whole, as stage ``i`` wants them."""
        first, stage = self.stages[0], self.stages[i]
        if i == 0:
            return first._reorder(tokens, dim, blocks_first=blocks_first)
        prefix = tokens.narrow(dim, 0, first.prefix_tokens)
        patches = tokens.narrow(dim, first.prefix_tokens, first.num_patches)
        groups = patches.unflatten(dim, (stage.num_patches, first.num_patches // stage.num_patches))
        patches = replace(stage, prefix_tokens=0)._reorder(groups, dim, blocks_first=blocks_first).flatten(dim, dim + 1)
        return torch.cat([prefix, patches], dim) if first.prefix_tokens else patches


@dataclass(frozen=True)
class Cuts:
    """An order of patches as axes: rows and columns of the grid are cut into ``rows`` and ``columns``, outermost first.

    Permuted by ``order``, the axes ``[*rows, *columns]`` are the order, so that what reads patches from an image reads them
    in that order for nothing. For ``r x r`` windows: ``rows = (H / r, r)``, ``columns = (W / r, r)``, ``order = (0, 2, 1, 3)``.
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    order: tuple[int, ...]


def find_cuts(patches: Sequence[int], grid: tuple[int, int]) -> Cuts | None:
    """Return how to cut a ``grid`` so that its patches come in the order given, or ``None`` where no cuts do that.

    Args:
        patches: raster numbers ``y * W + x`` of all ``H * W`` patches.
        grid: ``(H, W)``.
    """
    places = [divmod(patch, grid[1]) for patch in patches]
    axes: list[tuple[int, int, int]] = []  # innermost first: along rows (0) or columns (1), in what steps, how many
    while len(places) > 1:
        down, across = (places[1][i] - places[0][i] for i in (0, 1))
        count = 2
        while count < len(places) and places[count] == (places[0][0] + count * down, places[0][1] + count * across):
            count += 1
        if (down > 0) == (across > 0) or len(places) % count:
            return None
        axes.append((0, down, count) if down else (1, across, count))
        places = places[::count]
    outermost_first = sorted(axes, key=lambda axis: (axis[0], -axis[1]))
    rows, columns = (tuple(count for side, _, count in outermost_first if side == i) for i in (0, 1))
    cuts = Cuts(rows, columns, tuple(outermost_first.index(axis) for axis in reversed(axes)))
    if (math.prod(rows), math.prod(columns)) != grid:
        return None
    made = torch.arange(len(patches), device="cpu").view((*rows, *columns)).permute(cuts.order).flatten()
    return cuts if made.tolist() == list(patches) else None
