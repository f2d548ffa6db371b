"""STF's strided convolution with GELU as one operator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from laco_kernels.geometry import Windows, check_grid, integer
from laco_kernels.kernels import select
from laco_kernels.ops import checks, library

if TYPE_CHECKING:
    from collections.abc import Sequence


def strided_conv_gelu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    grid: Sequence[int],
    kernel_size: int = 2,
    approximate: str = "none",
    prefix_tokens: int = 0,
    pad: bool = False,
    impl: str | None = None,
) -> torch.Tensor:
    r"""Fuse ``k x k`` tokens by a convolution of stride ``k`` and a GELU (STF, spatial token fusion, first layer).

    .. math:: y = \mathrm{gelu}(\mathrm{conv}_{k \times k,\, \mathrm{stride}\, k}(x) + b) = \mathrm{gelu}(W S(x) + b)

    Args:
        x: tokens ``[B, P + N, C]``, ``N = H * W``, in raster order.
        weight: ``[out, k * k * C]``, columns ordered ``(dy, dx, c)``; a ``Conv2d`` weight ``[out, C, k, k]`` becomes one
            by ``weight.permute(0, 2, 3, 1).flatten(1)``.
        bias: ``[out]`` or ``None``.
        grid: ``(H, W)`` in patches.
        kernel_size: side ``k`` of a window, at least 1.
        approximate: ``"none"`` (erf) or ``"tanh"``, as in :func:`torch.nn.functional.gelu`.
        prefix_tokens: ``P`` tokens before the patches; they are dropped.
        pad: zero-pad a grid that ``kernel_size`` does not divide at the bottom and at the right.
        impl: ``None`` for the automatic choice; ``"reference"``, ``"composite"``, ``"triton"``, ``"cuda"`` never fall back.

    Returns:
        ``[B, N', out]``, ``N' = ceil(H / k) * ceil(W / k)``; under autocast in autocast's dtype.

    Raises:
        TypeError: integer or complex tensors, mixed dtypes outside autocast, a kernel size or grid that is no integer.
        ValueError: shapes that do not fit together, mixed devices, unknown options, a grid that needs ``pad=True``.
        RuntimeError: ``impl`` names an implementation that cannot run here, or cannot do this call (``"cuda"``).
    """
    windows = Windows(check_grid(grid), integer("kernel_size", kernel_size, 1), prefix_tokens, pad)
    checks.check_choice("approximate", approximate, checks.APPROXIMATIONS)
    tensors = {"x": x, "weight": weight, "bias": bias}
    _check_shapes(x, weight, bias, windows)
    checks.check_alike(tensors)
    library.know_sharding()
    library.refuse_forward_mode("strided_conv_gelu", tensors.values())
    dtype = checks.autocast_dtype(x)
    impl = select.check(impl, x.device, dtype)
    y, _ = torch.ops.laco.strided_conv_gelu(
        x.to(dtype),
        weight.to(dtype),
        checks.cast(bias, dtype),
        windows.ratio,
        list(windows.grid),
        approximate,
        windows.prefix_tokens,
        pad,
        impl,
        library.needs_saving(tensors.values()),
    )
    return y


def _check_shapes(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, windows: Windows) -> None:
    checks.check_image_tokens(x, windows)
    checks.check_linear("", weight, bias, (windows.ratio, windows.ratio, x.shape[2]), "(dy, dx, c)")


SETTINGS = "int kernel_size, int[] grid, str approximate, int prefix_tokens, bool pad, str impl"


def _options(kernel_size: int, grid: Sequence[int], approximate: str, prefix_tokens: int, pad: bool) -> dict[str, Any]:
    """What implementations take, from the operator's settings."""
    return {"windows": Windows((grid[0], grid[1]), kernel_size, prefix_tokens, pad), "approximate": approximate}


def _forward(*inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    x, weight, bias, *settings, impl, save = inputs
    return library.run_forward("strided_conv_gelu", impl, (x, weight, bias), save, _options(*settings))


def _forward_fake(*inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    x, weight, bias, *settings, _, save = inputs
    windows = _options(*settings)["windows"]
    _check_shapes(x, weight, bias, windows)
    checks.check_alike({"x": x, "weight": weight, "bias": bias})
    shape = (x.shape[0], windows.num_windows, weight.shape[0])
    return x.new_empty(shape), x.new_empty(shape if save else (0,))


def _backward(*inputs: Any) -> tuple[torch.Tensor, ...]:
    grad, x, pre, weight, *settings, impl, needs = inputs
    return library.run_backward("strided_conv_gelu", impl, grad, (x, pre, weight), needs, _options(*settings))


def _backward_fake(*inputs: Any) -> tuple[torch.Tensor, ...]:
    _, x, _, weight, *_, needs = inputs
    shapes = (x.shape, weight.shape, weight.shape[:1])
    return tuple(x.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs, strict=True))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, weight, _, *ctx.settings, save = inputs
    library.refuse_unsaved("strided_conv_gelu", save)
    ctx.save_for_backward(x, output[1], weight)


def _differentiate(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    needs = list(ctx.needs_input_grad[:3])
    gradients = torch.ops.laco.strided_conv_gelu_backward(grad, *ctx.saved_tensors, *ctx.settings, needs)
    return *library.asked_for(gradients, needs), *[None] * (len(ctx.settings) + 1)


library.define(
    f"strided_conv_gelu(Tensor x, Tensor weight, Tensor? bias, {SETTINGS}, bool save) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
library.define(
    f"strided_conv_gelu_backward(Tensor grad, Tensor x, Tensor pre, Tensor weight, {SETTINGS}, bool[] needs)"
    " -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
library.differentiate("strided_conv_gelu", _setup_context, _differentiate)
