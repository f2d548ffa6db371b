"""LaCo's patch merge layer as a module."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from laco_kernels import reference
from laco_kernels.errors import complaint
from laco_kernels.geometry import Windows, check_grid, integer
from laco_kernels.nn.children import is_plain
from laco_kernels.ops import checks, patch_merge
from laco_kernels.ops.patch_merge import RESIDUALS

if TYPE_CHECKING:
    from collections.abc import Sequence

NORMS = {"layer_norm": nn.LayerNorm, "rms_norm": nn.RMSNorm}


class PatchMergeLayer(nn.Module):
    """Merges ``ratio x ratio`` neighbouring visual tokens into one: space-to-depth, a two-layer MLP, and a residual.

    The residual has no parameters, so with ``zero_init_last`` an untrained layer is exactly average pooling and a
    pretrained encoder behind it starts from something it knows.

    Args:
        dim: width ``C`` of the tokens.
        ratio: side of a window in patches, at least 2.
        hidden_dim: width of the MLP; ``dim`` unless given.
        out_dim: width of the merged tokens; ``dim`` unless given. Another width needs ``residual="none"``.
        residual: ``"mean"`` (average pooling), ``"channel_group"`` or ``"none"``.
        norm: ``None``, or ``"layer_norm"`` / ``"rms_norm"`` of each token before it enters the MLP; the residual stays raw.
        bias: whether the two linear maps have biases.
        zero_init_last: start the second linear map at zero; by default wherever there is a residual.
        approximate: ``"none"`` (erf) or ``"tanh"``, as in :func:`torch.nn.functional.gelu`.
        prefix_tokens: tokens before the patches (class, registers), which pass through unchanged.
        pad: zero-pad grids that ``ratio`` does not divide instead of refusing them.

    Raises:
        TypeError: if a size is not an integer.
        ValueError: if a size is out of range, an option is unknown, or the options contradict each other.
    """

    def __init__(
        self,
        dim: int,
        ratio: int = 2,
        hidden_dim: int | None = None,
        out_dim: int | None = None,
        residual: str = "mean",
        *,
        norm: str | None = None,
        bias: bool = True,
        zero_init_last: bool | None = None,
        approximate: str = "none",
        prefix_tokens: int = 0,
        pad: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_dim = integer("dim", dim, 1)
        self.ratio = integer("ratio", ratio, 2)
        self.hidden_dim = self.in_dim if hidden_dim is None else integer("hidden_dim", hidden_dim, 1)
        self.out_dim = self.in_dim if out_dim is None else integer("out_dim", out_dim, 1)
        self.prefix_tokens = integer("prefix_tokens", prefix_tokens, 0)
        checks.check_choice("residual", residual, RESIDUALS)
        checks.check_choice("approximate", approximate, checks.APPROXIMATIONS)
        if norm is not None:
            checks.check_choice("norm", norm, tuple(NORMS))
        self.residual, self.approximate, self.pad = residual, approximate, bool(pad)
        for name, value in (("zero_init_last", zero_init_last), ("bias", bias)):
            if not (isinstance(value, bool) or (value is None and name == "zero_init_last")):
                raise TypeError(complaint(name, repr(value), "True or False", f"Leave {name} out for its default"))
        self.zero_init_last = residual != "none" if zero_init_last is None else zero_init_last
        self._check_options()
        factory = {"device": device, "dtype": dtype}
        self.norm = NORMS[norm](self.in_dim, **factory) if norm else None
        self.linear1 = nn.Linear(self.ratio**2 * self.in_dim, self.hidden_dim, bias=bias, **factory)
        self.linear2 = nn.Linear(self.hidden_dim, self.out_dim, bias=bias, **factory)
        self.reset_parameters()

    def _check_options(self) -> None:
        same_width = f"{self.in_dim}, the same as dim"
        if self.out_dim != self.in_dim and self.residual != "none":
            remedy = "Pass residual='none' to change the width"
            raise ValueError(complaint("out_dim", self.out_dim, f"{same_width}, with residual={self.residual!r}", remedy))
        if self.out_dim != self.in_dim and self.prefix_tokens:
            remedy = "Prefix tokens pass through unchanged; drop them before a layer that changes the width"
            raise ValueError(complaint("out_dim", self.out_dim, f"{same_width}, with prefix tokens", remedy))
        if self.zero_init_last and self.residual == "none":
            remedy = "Without a residual the layer would start by returning zeros"
            raise ValueError(complaint("zero_init_last", True, "False with residual='none'", remedy))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights (truncated normal, std 0.02; biases zero); the last linear map is zero with ``zero_init_last``."""
        if self.norm is not None:
            self.norm.reset_parameters()
        nn.init.trunc_normal_(self.linear1.weight, std=0.02)
        if self.zero_init_last:
            nn.init.zeros_(self.linear2.weight)
        else:
            nn.init.trunc_normal_(self.linear2.weight, std=0.02)
        for linear in (self.linear1, self.linear2):
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def num_output_tokens(self, grid: Sequence[int]) -> int:
        """Tokens that come out for an image of ``grid = (H, W)`` patches, prefix tokens included."""
        return Windows(check_grid(grid), self.ratio, self.prefix_tokens, self.pad).num_output_tokens

    def forward(self, x: torch.Tensor, grid: Sequence[int], *, layout: str = "raster") -> torch.Tensor:
        """Merge ``x [B, P + N, dim]`` with ``grid = (H, W)`` into ``[B, P + N', out_dim]``.

        ``layout="block"`` says that the patch tokens already lie window by window. Under autocast the MLP computes in
        autocast's dtype, the residual and the prefix keep that of ``x``. Errors are those of
        :func:`laco_kernels.patch_merge`.
        """
        fused = is_plain(self.linear1) and is_plain(self.linear2)
        if fused and self.norm is None and checks.autocast_dtype(x) == x.dtype:
            return self._merge(x, grid, layout, self.residual, self.prefix_tokens)
        # Residual and prefix are those of the tokens as they came, whatever the MLP sees of them.
        prefix, patches = x[:, : self.prefix_tokens], x[:, self.prefix_tokens :]
        windows = Windows(check_grid(grid), self.ratio, 0, self.pad)
        normed = patches if self.norm is None else self.norm(patches)
        if fused:
            merged = self._merge(normed, grid, layout, "none", 0)
        else:
            hidden = self.linear1(reference.space_to_depth(normed, windows, layout))
            merged = self.linear2(F.gelu(hidden, approximate=self.approximate))
        if self.residual != "none":
            merged = merged + reference.residual(patches, windows, self.residual, layout)
        return torch.cat([prefix, merged], dim=1) if self.prefix_tokens else merged

    def _merge(self, x: torch.Tensor, grid: Sequence[int], layout: str, residual: str, prefix_tokens: int) -> torch.Tensor:
        return patch_merge(
            x,
            self.linear1.weight,
            self.linear1.bias,
            self.linear2.weight,
            self.linear2.bias,
            grid=grid,
            ratio=self.ratio,
            residual=residual,
            approximate=self.approximate,
            prefix_tokens=prefix_tokens,
            pad=self.pad,
            layout=layout,
        )

    def extra_repr(self) -> str:
        """What the children's own lines do not show."""
        return (
            f"{self.in_dim}, ratio={self.ratio}, residual={self.residual!r}, approximate={self.approximate!r}, "
            f"prefix_tokens={self.prefix_tokens}, pad={self.pad}"
        )
