"""LaCo's patch merge layer as one operator."""

from __future__ import annotations

from typing import TYPE_CHECKING

from laco_kernels import reference
from laco_kernels.errors import complaint
from laco_kernels.geometry import Windows, check_grid, integer
from laco_kernels.kernels.select import choose
from laco_kernels.ops import checks

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

RESIDUALS = ("mean", "channel_group", "none")
LAYOUTS = ("raster", "block")


def patch_merge(
    x: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor | None,
    weight2: torch.Tensor,
    bias2: torch.Tensor | None,
    *,
    grid: Sequence[int],
    ratio: int = 2,
    residual: str = "mean",
    approximate: str = "none",
    prefix_tokens: int = 0,
    pad: bool = False,
    layout: str = "raster",
    impl: str | None = None,
) -> torch.Tensor:
    r"""Merge ``r x r`` neighbouring visual tokens into one (LaCo, patch merge layer).

    .. math:: y = W_2\,\mathrm{gelu}(W_1 S(x) + b_1) + b_2 + R(S(x))

    ``S`` is space-to-depth with channels ordered ``(dy, dx, c)``, ``R`` the parameter-free residual.

    Args:
        x: tokens ``[B, P + N, C]``, ``N = H * W``, in float32, bfloat16, float16 or float64.
        weight1: ``[hidden, r * r * C]``.
        bias1: ``[hidden]`` or ``None``.
        weight2: ``[C_out, hidden]``.
        bias2: ``[C_out]`` or ``None``.
        grid: ``(H, W)`` in patches.
        ratio: side ``r`` of a window, at least 2.
        residual: ``"mean"`` (``r x r`` average pooling; padding does not count), ``"channel_group"`` (means of ``r * r``
            consecutive channels of ``S(x)``) or ``"none"``. The first two need ``C_out == C``.
        approximate: ``"none"`` (erf) or ``"tanh"``, as in :func:`torch.nn.functional.gelu`.
        prefix_tokens: ``P`` tokens before the patches; they pass through unchanged, which needs ``C_out == C``.
        pad: zero-pad a grid that ``ratio`` does not divide at the bottom and at the right.
        layout: ``"raster"``, or ``"block"`` where the patch tokens already lie window by window,
            ``[H/r][W/r][dy][dx]``, which needs a grid that ``ratio`` divides.
        impl: ``None`` for the automatic choice, or ``"reference"``, ``"triton"``, ``"cuda"``, which never fall back.

    Returns:
        ``[B, P + N', C_out]`` in raster order, ``N' = ceil(H / r) * ceil(W / r)``; under autocast in autocast's dtype.

    Raises:
        TypeError: integer or complex tensors, mixed dtypes outside autocast, a ratio or grid that is no integer.
        ValueError: shapes that do not fit together, mixed devices, unknown options, a grid that needs ``pad=True``.
        RuntimeError: ``impl`` names an implementation that cannot run here.
    """
    windows = Windows(check_grid(grid), integer("ratio", ratio, 2), prefix_tokens, pad)
    checks.check_choice("residual", residual, RESIDUALS)
    checks.check_choice("approximate", approximate, checks.APPROXIMATIONS)
    checks.check_choice("layout", layout, LAYOUTS)
    if layout == "block" and not windows.is_even:
        given = f"'block' with a grid of {windows.grid[0]} x {windows.grid[1]}"
        raise ValueError(complaint("layout", given, f"'raster' unless {windows.ratio} divides both sides", "Keep raster order"))
    checks.check_image_tokens(x, windows)
    channels = x.shape[2]
    checks.check_linear("1", weight1, bias1, (windows.ratio, windows.ratio, channels), "(dy, dx, c)")
    checks.check_linear("2", weight2, bias2, (weight1.shape[0],), "as the rows of weight1")
    _check_width(weight2.shape[0], channels, residual, windows.prefix_tokens)
    checks.check_alike({"x": x, "weight1": weight1, "bias1": bias1, "weight2": weight2, "bias2": bias2})
    choose(impl)
    dtype = checks.autocast_dtype(x)
    return reference.patch_merge(
        x.to(dtype),
        weight1.to(dtype),
        checks.cast(bias1, dtype),
        weight2.to(dtype),
        checks.cast(bias2, dtype),
        windows=windows,
        residual_kind=residual,
        approximate=approximate,
        layout=layout,
    )


def _check_width(out: int, channels: int, residual: str, prefix_tokens: int) -> None:
    if out == channels or (residual == "none" and not prefix_tokens):
        return
    expected = f"{channels} rows, the width of x"
    if residual != "none":
        remedy = f"residual={residual!r} adds tokens of that width; pass residual='none' to change the width"
        raise ValueError(complaint("weight2", f"{out} rows", expected, remedy))
    remedy = "Prefix tokens pass through unchanged; drop them first, x[:, prefix_tokens:], to change the width"
    raise ValueError(complaint("weight2", f"{out} rows", expected, remedy))
