"""LaCo's patch merge layer as one operator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from laco_kernels.errors import complaint
from laco_kernels.geometry import Windows, check_grid, integer
from laco_kernels.kernels import select
from laco_kernels.ops import checks, library

if TYPE_CHECKING:
    from collections.abc import Sequence

RESIDUALS = ("mean", "channel_group", "none")


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
        impl: ``None`` for the automatic choice; ``"reference"``, ``"composite"``, ``"triton"``, ``"cuda"`` never fall back.

    Returns:
        ``[B, P + N', C_out]`` in raster order, ``N' = ceil(H / r) * ceil(W / r)``; under autocast in autocast's dtype.

    Raises:
        TypeError: integer or complex tensors, mixed dtypes outside autocast, a ratio or grid that is no integer.
        ValueError: shapes that do not fit together, mixed devices, unknown options, a grid that needs ``pad=True``.
        RuntimeError: ``impl`` names an implementation that cannot run here, or cannot do this call (``"cuda"``).
    """
    windows = Windows(check_grid(grid), integer("ratio", ratio, 2), prefix_tokens, pad)
    checks.check_choice("residual", residual, RESIDUALS)
    checks.check_choice("approximate", approximate, checks.APPROXIMATIONS)
    tensors = {"x": x, "weight1": weight1, "bias1": bias1, "weight2": weight2, "bias2": bias2}
    _check_shapes(x, weight1, bias1, weight2, bias2, windows, residual, layout)
    checks.check_alike(tensors)
    library.know_sharding()
    library.refuse_forward_mode("patch_merge", tensors.values())
    dtype = checks.autocast_dtype(x)
    impl = select.check(impl, x.device, dtype)
    y, _ = torch.ops.laco.patch_merge(
        x.to(dtype),
        weight1.to(dtype),
        checks.cast(bias1, dtype),
        weight2.to(dtype),
        checks.cast(bias2, dtype),
        windows.ratio,
        list(windows.grid),
        residual,
        approximate,
        windows.prefix_tokens,
        pad,
        layout,
        impl,
        library.needs_saving(tensors.values()),
    )
    return y


def _check_shapes(
    x: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor | None,
    weight2: torch.Tensor,
    bias2: torch.Tensor | None,
    windows: Windows,
    residual: str,
    layout: str,
) -> None:
    checks.check_layout(layout, windows)
    checks.check_image_tokens(x, windows)
    channels = x.shape[2]
    checks.check_linear("1", weight1, bias1, (windows.ratio, windows.ratio, channels), "(dy, dx, c)")
    checks.check_linear("2", weight2, bias2, (weight1.shape[0],), "as the rows of weight1")
    out = weight2.shape[0]
    if out == channels or (residual == "none" and not windows.prefix_tokens):
        return
    remedy = "Prefix tokens pass through unchanged; drop them first, x[:, prefix_tokens:], to change the width"
    if residual != "none":
        remedy = f"residual={residual!r} adds tokens of that width; pass residual='none' to change the width"
    raise ValueError(complaint("weight2", f"{out} rows", f"{channels} rows, the width of x", remedy))


TENSORS = "Tensor x, Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2"
SETTINGS = "int ratio, int[] grid, str residual, str approximate, int prefix_tokens, bool pad, str layout, str impl"


def _options(
    ratio: int, grid: Sequence[int], residual: str, approximate: str, prefix_tokens: int, pad: bool, layout: str
) -> dict[str, Any]:
    """What implementations take, from the operator's settings."""
    windows = Windows((grid[0], grid[1]), ratio, prefix_tokens, pad)
    return {"windows": windows, "residual_kind": residual, "approximate": approximate, "layout": layout}


def _forward(*inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    *tensors, ratio, grid, residual, approximate, prefix_tokens, pad, layout, impl, save = inputs
    options = _options(ratio, grid, residual, approximate, prefix_tokens, pad, layout)
    return library.run_forward("patch_merge", impl, tensors, save, options)


def _forward_fake(*inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    x, weight1, bias1, weight2, bias2, *settings, _, save = inputs
    options = _options(*settings)
    windows = options["windows"]
    _check_shapes(x, weight1, bias1, weight2, bias2, windows, options["residual_kind"], options["layout"])
    checks.check_alike({"x": x, "weight1": weight1, "bias1": bias1, "weight2": weight2, "bias2": bias2})
    y = x.new_empty(x.shape[0], windows.num_output_tokens, weight2.shape[0])
    return y, x.new_empty((x.shape[0], windows.num_windows, weight1.shape[0]) if save else (0,))


def _backward(*inputs: Any) -> tuple[torch.Tensor, ...]:
    grad, x, pre, weight1, weight2, *settings, impl, needs = inputs
    return library.run_backward("patch_merge", impl, grad, (x, pre.contiguous(), weight1, weight2), needs, _options(*settings))


def _backward_fake(*inputs: Any) -> tuple[torch.Tensor, ...]:
    _, x, _, weight1, weight2, *_, needs = inputs
    shapes = (x.shape, weight1.shape, weight1.shape[:1], weight2.shape, weight2.shape[:1])
    return tuple(x.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs, strict=True))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, weight1, _, weight2, _, *ctx.settings, save = inputs
    library.refuse_unsaved("patch_merge", save)
    ctx.save_for_backward(x, output[1], weight1, weight2)


def _differentiate(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    needs = list(ctx.needs_input_grad[:5])
    gradients = torch.ops.laco.patch_merge_backward(grad, *ctx.saved_tensors, *ctx.settings, needs)
    return *library.asked_for(gradients, needs), *[None] * (len(ctx.settings) + 1)


library.define(f"patch_merge({TENSORS}, {SETTINGS}, bool save) -> (Tensor, Tensor)", _forward, _forward_fake)
library.define(
    f"patch_merge_backward(Tensor grad, Tensor x, Tensor pre, Tensor weight1, Tensor weight2, {SETTINGS}, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
library.differentiate("patch_merge", _setup_context, _differentiate)
