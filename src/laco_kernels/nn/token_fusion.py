"""STF, spatial token fusion, as a module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from laco_kernels.errors import complaint
from laco_kernels.geometry import Windows, check_grid, integer
from laco_kernels.nn import released
from laco_kernels.nn.children import linear_gelu
from laco_kernels.ops import checks

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class SpatialTokenFusion(nn.Module):
    r"""Fuses ``k x k`` neighbouring visual tokens into ``E`` and projects them to the LLM's width (STF).

    ``variant="paper"``, the paper's Table 1 (151.0 M parameters at ``in_dim=1024, out_dim=4096``): a ``k x k`` convolution
    of stride ``k`` to ``k * k * C`` channels, and 1x1 convolutions to ``4 * k * k * C`` and to ``out_dim``, each followed
    by a GELU.

    ``variant="released"``, the authors' code (134.24 M): the tokens of a window side by side, without parameters, then a
    1x1 convolution to ``4 * k * k * C``, a GELU, and one to ``out_dim``.

    Both have 16C hidden channels at ``k = 2``, the paper's size; ``4 * k * k * C`` at another ``k`` is this library's
    reading. With ``E = num_tokens > 1`` the ``k * k * C`` channels of a window are cut into ``E`` consecutive pieces
    in front of the 1x1 convolutions, which then take ``k * k * C / E`` channels and give one token a piece. In
    ``"paper"`` these are the channels after the first GELU. In ``"released"`` they are the window's channels in the authors'
    order ``(c, dy, dx)``, so that piece ``e`` has the channels ``[e * C / E, (e + 1) * C / E)`` of all ``k * k`` tokens.
    ``kernel_size=1`` with ``num_tokens=1`` projects every token and reduces nothing.

    Args:
        in_dim: width ``C`` of the tokens.
        out_dim: width ``D`` of the fused tokens, that of the LLM.
        kernel_size: side ``k`` of a window in patches, at least 1.
        num_tokens: tokens ``E`` that come out for a window; divides ``k * k * C`` (``"paper"``) or ``C`` (``"released"``).
        variant: ``"paper"`` or ``"released"``.
        prefix_tokens: tokens before the patches (class, registers), which are dropped.
        pad: zero-pad grids that ``kernel_size`` does not divide at the bottom and right instead of refusing them.

    Raises:
        TypeError: if a size is not an integer.
        ValueError: if a size is out of range, the variant is unknown, or ``num_tokens`` does not divide the channels.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        kernel_size: int = 2,
        num_tokens: int = 1,
        variant: str = "paper",
        *,
        prefix_tokens: int = 0,
        pad: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_dim = integer("in_dim", in_dim, 1)
        self.out_dim = integer("out_dim", out_dim, 1)
        self.kernel_size = integer("kernel_size", kernel_size, 1)
        self.num_tokens = integer("num_tokens", num_tokens, 1)
        self.prefix_tokens = integer("prefix_tokens", prefix_tokens, 0)
        checks.check_choice("variant", variant, released.VARIANTS)
        self.variant, self.pad = variant, bool(pad)
        merged_dim = self.kernel_size**2 * self.in_dim
        self.hidden_dim = 4 * merged_dim
        cut = merged_dim if variant == "paper" else self.in_dim
        if cut % self.num_tokens:
            expected = f"a divisor of {cut}, the {'channels of a window' if variant == 'paper' else 'channels of a token'}"
            remedy = "A window's channels are cut into num_tokens equal pieces; choose another num_tokens"
            raise ValueError(complaint("num_tokens", self.num_tokens, expected, remedy))
        piece = merged_dim // self.num_tokens
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.linear3: nn.Linear | None = None
        if variant == "paper":
            self.linear1 = nn.Linear(merged_dim, merged_dim, **factory)
            self.linear2 = nn.Linear(piece, self.hidden_dim, **factory)
            self.linear3 = nn.Linear(self.hidden_dim, self.out_dim, **factory)
        else:
            self.linear1 = nn.Linear(piece, self.hidden_dim, **factory)
            self.linear2 = nn.Linear(self.hidden_dim, self.out_dim, **factory)

    def reset_parameters(self) -> None:
        """Draw weights and biases as :class:`torch.nn.Linear` and :class:`torch.nn.Conv2d` do."""
        for linear in self.children():
            linear.reset_parameters()  # type: ignore[operator]

    def num_output_tokens(self, grid: Sequence[int]) -> int:
        """Tokens that come out for an image of ``grid = (H, W)`` patches: ``ceil(H / k) * ceil(W / k) * E``."""
        return Windows(check_grid(grid), self.kernel_size, self.prefix_tokens, self.pad).num_windows * self.num_tokens

    def forward(self, x: torch.Tensor, grid: Sequence[int], *, layout: str = "raster") -> torch.Tensor:
        """Fuse ``x [B, P + N, in_dim]`` with ``grid = (H, W)`` into ``[B, N' * E, out_dim]``, window by window.

        ``layout="block"`` says that the patch tokens already lie window by window, which needs a grid that ``kernel_size``
        divides.

        Raises:
            ValueError: ``x`` has another width, or the layout is unknown or does not fit the grid. Further errors are
                those of :func:`laco_kernels.strided_conv_gelu`.
        """
        checks.check_tokens("x", x)
        if x.shape[2] != self.in_dim:
            remedy = "Build the module with in_dim equal to the encoder's hidden size"
            raise ValueError(complaint("x", f"{x.shape[2]} channels", f"in_dim = {self.in_dim}", remedy))
        windows = Windows(check_grid(grid), self.kernel_size, self.prefix_tokens, self.pad)
        checks.check_layout(layout, windows)
        checks.check_image_tokens(x, windows)
        batch, pieces = x.shape[0], self.num_tokens
        if self.linear3 is None:
            if pieces > 1:
                x = x.unflatten(2, (pieces, self.in_dim // pieces)).movedim(2, 1).flatten(0, 1)  # [B * E, P + N, C / E]
            hidden = linear_gelu(self.linear1, x, windows, layout)
            if pieces > 1:
                hidden = hidden.unflatten(0, (batch, pieces)).transpose(1, 2).flatten(1, 2)  # [B, N' * E, hidden_dim]
            return self.linear2(hidden)
        merged = linear_gelu(self.linear1, x, windows, layout)
        merged = merged.unflatten(2, (pieces, merged.shape[2] // pieces)).flatten(1, 2)  # [B, N' * E, k * k * C / E]
        return F.gelu(self.linear3(F.gelu(self.linear2(merged))))

    def load_released(self, source: released.Source, *, keys: Mapping[str, str] | None = None) -> SpatialTokenFusion:
        """Load the authors' weights into this module (``variant="released"``) and return it.

        Their columns, ordered ``(c, dy, dx)`` as by :func:`torch.nn.functional.pixel_unshuffle`, are brought into this
        library's order once, here. Weights are converted to the module's dtype and device.

        Args:
            source: a state dict, a ``.safetensors`` file, or a file for ``torch.load(..., weights_only=True)``, such as
                the authors' ``mm_projector.bin``; also of the whole model, whose other keys are left alone.
            keys: the checkpoint's name of each of ``linear1.weight``, ``linear1.bias``, ``linear2.weight`` and
                ``linear2.bias``. Unless given, ``0.weight``, ``0.bias``, ``2.weight`` and ``2.bias`` are looked for under
                ``mm_projector.``, whatever stands before that, or with no prefix at all. These are the names in the
                authors' code; the published files themselves have not been seen.

        Raises:
            TypeError: ``source`` is neither, or holds something else than floating-point tensors under these names.
            ValueError: keys are missing, unexpected, misshapen or ambiguous, or this is not ``variant="released"``.
            RuntimeError: the file cannot be read.
        """
        released.load(self, source, "mm_projector", keys, self.kernel_size**2)
        return self

    def extra_repr(self) -> str:
        """What the children's own lines do not show."""
        return (
            f"{self.in_dim}, {self.out_dim}, kernel_size={self.kernel_size}, num_tokens={self.num_tokens}, "
            f"variant={self.variant!r}, prefix_tokens={self.prefix_tokens}, pad={self.pad}"
        )
