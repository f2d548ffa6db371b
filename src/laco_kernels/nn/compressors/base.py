"""What every compressor of visual tokens is: tokens and grid in, tokens and grid out."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

from laco_kernels import reference
from laco_kernels.errors import complaint
from laco_kernels.geometry import Windows, check_grid, integer
from laco_kernels.ops import checks

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Where a compressor may stand: before an encoder (on the image), between its layers, or between encoder and LLM.
PLACES = ("before", "inside", "behind")


class Compressor(nn.Module):
    """Turns the visual tokens of an image into fewer, or into others.

    Subclasses say where they may stand, and implement :meth:`compress` on the patch tokens alone. Prefix tokens (class,
    registers) pass through unchanged inside an encoder, and are dropped behind it.

    Args:
        in_dim: width ``C`` of the tokens.
        out_dim: width ``D`` of what comes out; ``in_dim`` unless given.
        ratio: side of a window in patches: ``ratio * ratio`` tokens become one; 1 where nothing is reduced (:attr:`reduces`).
        place: ``"before"``, ``"inside"`` or ``"behind"``; unless given the first of :attr:`places` that allows the widths.
        prefix_tokens: tokens before the patches.
        residual: add the mean of each window to what comes out (``True`` or ``"mean"``; ``False`` or ``"none"``), as LaCo
            does. It is a switch for all, so that compressors can be compared inside an encoder on equal terms.
        pad: complete grids that ``ratio`` does not divide with zeros at the bottom and right instead of refusing them.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if one is out of range, the compressor may not stand in ``place``, or the width changes where it may not.
    """

    #: Where it may stand, its usual place first.
    places: ClassVar[tuple[str, ...]]
    #: Whether it can read tokens that lie window by window (``layout="block"``), where a window is a view.
    reads_blocks: ClassVar[bool] = False
    #: Whether each window gives a token by itself, in the order in which windows come: of a block layout, too.
    is_windowwise: ClassVar[bool] = True
    #: Whether it moves grids that ``ratio`` does not divide on to ``ceil`` by itself, without ``pad``.
    fits_any_grid: ClassVar[bool] = False
    #: Whether it looks at the queries and keys of the encoder layer in front of it.
    reads_attention: ClassVar[bool] = False
    #: Whether fewer tokens come out. Where not, ``ratio`` is 1.
    reduces: ClassVar[bool] = True
    #: Whether what comes out always has the width of what goes in.
    keeps_width: ClassVar[bool] = False
    #: The kinds of residual it knows, the one that ``True`` means first.
    residuals: ClassVar[tuple[str, ...]] = ("mean", "none")
    #: How many encoder blocks it reads: ``forward`` takes a tensor for one, a list of them for more.
    num_blocks: int = 1
    #: Which blocks these are, counted from 1, in the order of the list: of block ``n`` it reads ``hidden_states[n]``.
    blocks: tuple[int, ...] | None = None
    #: Which of them is the deepest, whose prefix tokens and residual go on.
    deepest: int = -1

    def __init__(
        self,
        in_dim: int,
        out_dim: int | None = None,
        ratio: int = 2,
        *,
        place: str | None = None,
        prefix_tokens: int = 0,
        residual: bool | str = False,
        pad: bool = False,
    ) -> None:
        super().__init__()
        self.in_dim = integer("in_dim", in_dim, 1)
        self.out_dim = self.in_dim if out_dim is None else integer("out_dim", out_dim, 1)
        if place is None:
            changes = self.out_dim != self.in_dim and "behind" in self.places
            place = "behind" if changes else self.places[0]
        elif place not in self.places:
            expected = f"{' or '.join(map(repr, self.places))}, where {type(self).__name__} may stand"
            raise ValueError(complaint("place", repr(place), expected, f"Pass place={self.places[0]!r}"))
        self.place = place
        self.ratio = integer("ratio", ratio, 1)
        if self.ratio > 1 and not self.reduces:
            remedy = f"{type(self).__name__} returns as many tokens as it reads; leave ratio out"
            raise ValueError(complaint("ratio", self.ratio, "1", remedy))
        self.prefix_tokens = integer("prefix_tokens", prefix_tokens, 0)
        if not isinstance(pad, bool):
            raise TypeError(complaint("pad", repr(pad), "True or False", "Pass pad=True to complete odd grids"))
        self.pad = pad
        self.residual = parse_residual(residual, self.residuals)
        same_width = f"{self.in_dim}, the same as in_dim"
        if self.out_dim != self.in_dim and self.place != "behind":
            remedy = "The layers behind it need the width they have; place a compressor that changes it behind the encoder"
            raise ValueError(complaint("out_dim", self.out_dim, f"{same_width}, {self.place} an encoder", remedy))
        if self.out_dim != self.in_dim and self.keeps_width:
            remedy = "Project to another width, that of the LLM, behind it"
            raise ValueError(complaint("out_dim", self.out_dim, f"{same_width}, which it keeps", remedy))
        if self.out_dim != self.in_dim and self.residual != "none":
            expected = f"{same_width}, with residual={self.residual!r}"
            raise ValueError(complaint("out_dim", self.out_dim, expected, "Pass residual=False to change the width"))

    def compress(self, patches: torch.Tensor, grid: tuple[int, int], layout: str) -> torch.Tensor:
        """Compress the patch tokens ``[B, N, in_dim]`` of a checked ``grid = (H, W)`` into ``[B, N', out_dim]``."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Draw the weights of all children anew, as these do by themselves."""
        _draw_children(self)

    def windows(self, grid: Sequence[int]) -> Windows:
        """Return the windows of ``grid``; refused where ``ratio`` does not divide it and nothing completes it."""
        return Windows(check_grid(grid), self.ratio, pad=self.pad or self.fits_any_grid)

    def out_grid(self, grid: Sequence[int]) -> tuple[int, int] | None:
        """Return the grid of the tokens that come out for ``grid = (H, W)``; ``None`` where they no longer form one."""
        return self.windows(grid).out_grid

    def num_output_patches(self, grid: Sequence[int]) -> int:
        """Tokens that come out for the patches of ``grid = (H, W)``, prefix tokens apart."""
        out = self.out_grid(grid)
        assert out is not None, f"{type(self).__name__} has to count its tokens itself"
        return out[0] * out[1]

    def num_output_tokens(self, grid: Sequence[int]) -> int:
        """All tokens that come out for ``grid = (H, W)``: prefix tokens included where they pass through."""
        return self.num_output_patches(grid) + (self.prefix_tokens if self.place == "inside" else 0)

    def forward(
        self, x: torch.Tensor | Sequence[torch.Tensor], grid: Sequence[int], *, layout: str = "raster"
    ) -> tuple[torch.Tensor, tuple[int, int] | None]:
        """Compress ``x [B, P + N, in_dim]`` of a ``grid = (H, W)``.

        Args:
            x: the tokens, prefix first; of a compressor that reads several blocks a list of :attr:`num_blocks` such tensors.
            grid: the image in patches.
            layout: ``"raster"``, or ``"block"`` where the patches lie window by window (:attr:`reads_blocks`).

        Returns:
            The tokens, ``[B, P + N', out_dim]`` inside an encoder and ``[B, N', out_dim]`` behind it, and their grid.

        Raises:
            TypeError: a tensor or the grid is of the wrong type.
            ValueError: the tokens do not fit the grid or the width, or the grid does not fit the windows.
        """
        grid = check_grid(grid)
        out_grid = self.out_grid(grid)
        blocks = self.check_input(x, grid, layout)
        prefix = blocks[self.deepest][:, : self.prefix_tokens]
        patches = [block[:, self.prefix_tokens :] if self.prefix_tokens else block for block in blocks]
        y = self.compress(patches if self.num_blocks > 1 else patches[0], grid, layout)  # type: ignore[arg-type]
        if self.residual != "none":
            y = y + self.shortcut(patches[self.deepest], grid, layout)
        passed_on = self.place == "inside" and self.prefix_tokens > 0
        return (torch.cat([prefix, y], dim=1) if passed_on else y), out_grid

    def shortcut(self, patches: torch.Tensor, grid: tuple[int, int], layout: str) -> torch.Tensor:
        """Return what the residual adds: the mean of every window's real tokens, ``[B, N', C]``."""
        windows = Windows(grid, self.ratio, pad=True)
        return reference.residual(patches, windows, self.residual, layout)

    def check_input(
        self, x: torch.Tensor | Sequence[torch.Tensor], grid: tuple[int, int], layout: str
    ) -> Sequence[torch.Tensor]:
        """Return the blocks of ``x`` if they are what this compressor reads of an image of ``grid`` patches."""
        checks.check_choice("layout", layout, checks.LAYOUTS if self.reads_blocks else checks.LAYOUTS[:1])
        if self.reads_blocks:
            checks.check_layout(layout, self.windows(grid))
        if self.num_blocks == 1:
            self._check_tokens("x", x, grid)  # type: ignore[arg-type]
            return (x,)  # type: ignore[return-value]
        if not isinstance(x, (list, tuple)) or len(x) != self.num_blocks:
            given = f"{len(x)} tensors" if isinstance(x, (list, tuple)) else type(x).__name__
            expected = f"a list of {self.num_blocks} tensors, one an encoder block"
            raise ValueError(complaint("x", given, expected, "Pass the hidden states of the blocks it was built for"))
        for i, block in enumerate(x):
            self._check_tokens(f"x[{i}]", block, grid)
        return x

    def _check_tokens(self, name: str, tokens: torch.Tensor, grid: tuple[int, int]) -> None:
        checks.check_tokens(name, tokens)
        windows = Windows(grid, 1, self.prefix_tokens)
        checks.check_image_tokens(tokens, windows)
        if tokens.shape[2] != self.in_dim:
            remedy = "Build the compressor with in_dim equal to the encoder's hidden size"
            raise ValueError(complaint(name, f"{tokens.shape[2]} channels", f"in_dim = {self.in_dim}", remedy))

    def extra_repr(self) -> str:
        """What the children's own lines do not show."""
        return f"{self.in_dim}, {self.out_dim}, ratio={self.ratio}, place={self.place!r}, residual={self.residual!r}"


def parse_residual(residual: object, kinds: tuple[str, ...]) -> str:
    """Return the residual's kind; ``True`` is the first of ``kinds``, ``False`` is ``"none"``."""
    if residual is True and kinds == ("none",):
        raise ValueError(complaint("residual", True, "False", "This compressor has nothing to add the windows' means to"))
    if isinstance(residual, bool):
        return kinds[0] if residual else "none"
    checks.check_choice("residual", residual, kinds)
    return str(residual)


def _draw_children(module: nn.Module) -> None:
    for child in module.children():
        if hasattr(child, "reset_parameters"):
            child.reset_parameters()  # type: ignore[operator]
        else:
            _draw_children(child)
