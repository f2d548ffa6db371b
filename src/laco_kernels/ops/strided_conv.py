"""Strided convolutions of tokens as one operator each: by itself, and with GELU as STF has it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from laco_kernels.geometry import Windows, check_grid, integer
from laco_kernels.kernels import select
from laco_kernels.ops import checks, library

if TYPE_CHECKING:
    from collections.abc import Sequence


def strided_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    grid: Sequence[int],
    kernel_size: int = 2,
    prefix_tokens: int = 0,
    pad: bool = False,
    layout: str = "raster",
    impl: str | None = None,
) -> torch.Tensor:
    r"""Fuse ``k x k`` tokens by a convolution of stride ``k``: space-to-depth and a linear layer, as in connectors.

    .. math:: y = \mathrm{conv}_{k \times k,\, \mathrm{stride}\, k}(x) + b = W S(x) + b

    Args:
        x: tokens ``[B, P + N, C]``, ``N = H * W``, in float32, bfloat16, float16 or float64.
        weight: ``[out, k * k * C]``, columns ordered ``(dy, dx, c)``; a ``Conv2d`` weight ``[out, C, k, k]`` becomes one
            by ``weight.permute(0, 2, 3, 1).flatten(1)``.
        bias: ``[out]`` or ``None``.
        grid: ``(H, W)`` in patches.
        kernel_size: side ``k`` of a window, at least 1.
        prefix_tokens: ``P`` tokens before the patches; they are dropped.
        pad: zero-pad a grid that ``kernel_size`` does not divide at the bottom and at the right.
        layout: ``"raster"``, or ``"block"`` where the patch tokens already lie window by window,
            ``[H/k][W/k][dy][dx]``, which needs a grid that ``kernel_size`` divides.
        impl: ``None`` for the automatic choice; ``"reference"``, ``"composite"``, ``"triton"``, ``"cuda"`` never fall back.

    Returns:
        ``[B, N', out]`` in raster order, ``N' = ceil(H / k) * ceil(W / k)``; under autocast in autocast's dtype.

    Raises:
        TypeError: integer or complex tensors, mixed dtypes outside autocast, a kernel size or grid that is no integer.
        ValueError: shapes that do not fit together, mixed devices, unknown options, a grid that needs ``pad=True``.
        RuntimeError: ``impl`` names an implementation that cannot run here, or cannot do this call (``"cuda"``).
    """
    windows = Windows(check_grid(grid), integer("kernel_size", kernel_size, 1), prefix_tokens, pad)
    tensors, impl = _prepare("strided_conv", x, weight, bias, windows, layout, impl)
    settings = (windows.ratio, list(windows.grid), windows.prefix_tokens, pad, layout)
    return torch.ops.laco.strided_conv(*tensors, *settings, impl)


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
    layout: str = "raster",
    impl: str | None = None,
) -> torch.Tensor:
    r"""Fuse ``k x k`` tokens by a convolution of stride ``k`` and a GELU (STF, spatial token fusion, first layer).

    .. math:: y = \mathrm{gelu}(\mathrm{conv}_{k \times k,\, \mathrm{stride}\, k}(x) + b) = \mathrm{gelu}(W S(x) + b)

    Args:
        x: tokens ``[B, P + N, C]``, ``N = H * W``.
        weight: ``[out, k * k * C]``, columns ordered ``(dy, dx, c)``; a ``Conv2d`` weight ``[out, C, k, k]`` becomes one
            by ``weight.permute(0, 2, 3, 1).flatten(1)``.
        bias: ``[out]`` or ``None``.
        grid: ``(H, W)`` in patches.
        kernel_size: side ``k`` of a window, at least 1.
        approximate: ``"none"`` (erf) or ``"tanh"``, as in :func:`torch.nn.functional.gelu`.
        prefix_tokens: ``P`` tokens before the patches; they are dropped.
        pad: zero-pad a grid that ``kernel_size`` does not divide at the bottom and at the right.
        layout: how the patch tokens lie, ``"raster"`` or ``"block"``, as in :func:`strided_conv`.
        impl: ``None`` for the automatic choice; ``"reference"``, ``"composite"``, ``"triton"``, ``"cuda"`` never fall back.

    Returns:
        ``[B, N', out]`` in raster order, ``N' = ceil(H / k) * ceil(W / k)``; under autocast in autocast's dtype.

    Raises:
        TypeError: integer or complex tensors, mixed dtypes outside autocast, a kernel size or grid that is no integer.
        ValueError: shapes that do not fit together, mixed devices, unknown options, a grid that needs ``pad=True``.
        RuntimeError: ``impl`` names an implementation that cannot run here, or cannot do this call (``"cuda"``).
    """
    windows = Windows(check_grid(grid), integer("kernel_size", kernel_size, 1), prefix_tokens, pad)
    checks.check_choice("approximate", approximate, checks.APPROXIMATIONS)
    tensors, impl = _prepare("strided_conv_gelu", x, weight, bias, windows, layout, impl)
    settings = (windows.ratio, list(windows.grid), windows.prefix_tokens, pad, layout, approximate)
    save = library.needs_saving((x, weight, bias))
    return torch.ops.laco.strided_conv_gelu(*tensors, *settings, impl, save)[0]


def _prepare(
    name: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    windows: Windows,
    layout: str,
    impl: str | None,
) -> tuple[tuple[torch.Tensor | None, ...], str]:
    """Validate the arguments of both operators; return the tensors in the dtype to compute in, and what ``impl`` comes to."""
    _check_tensors(x, weight, bias, windows, layout)
    library.know_sharding()
    library.refuse_forward_mode(name, (x, weight, bias))
    dtype = checks.autocast_dtype(x)
    return (x.to(dtype), weight.to(dtype), checks.cast(bias, dtype)), select.check(impl, x.device, dtype, name)


def _check_tensors(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, windows: Windows, layout: str) -> None:
    checks.check_layout(layout, windows)
    checks.check_image_tokens(x, windows)
    checks.check_linear("", weight, bias, (windows.ratio, windows.ratio, x.shape[2]), "(dy, dx, c)")
    checks.check_alike({"x": x, "weight": weight, "bias": bias})


SETTINGS = "int kernel_size, int[] grid, int prefix_tokens, bool pad, str layout"
GELU_SETTINGS = f"{SETTINGS}, str approximate"


def _options(
    kernel_size: int, grid: Sequence[int], prefix_tokens: int, pad: bool, layout: str, *approximate: str
) -> dict[str, Any]:
    """What implementations take, from the settings of either operator."""
    options = {"windows": Windows((grid[0], grid[1]), kernel_size, prefix_tokens, pad), "layout": layout}
    return {**options, "approximate": approximate[0]} if approximate else options


def _shape(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, settings: Sequence[Any]) -> tuple[int, ...]:
    options = _options(*settings)
    windows = options["windows"]
    _check_tensors(x, weight, bias, windows, options["layout"])
    return x.shape[0], windows.num_windows, weight.shape[0]


def _forward(*inputs: Any) -> torch.Tensor:
    x, weight, bias, *settings, impl = inputs
    return library.run("strided_conv", impl, (x, weight, bias), _options(*settings))


def _forward_fake(*inputs: Any) -> torch.Tensor:
    x, weight, bias, *settings, _ = inputs
    return x.new_empty(_shape(x, weight, bias, settings))


def _backward(*inputs: Any) -> tuple[torch.Tensor, ...]:
    grad, x, weight, *settings, impl, needs = inputs
    return library.run_backward("strided_conv", impl, grad, (x, weight), needs, _options(*settings))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, _, *ctx.settings = inputs
    ctx.save_for_backward(x, weight)


def _differentiate(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    return _gradients(torch.ops.laco.strided_conv_backward, ctx, grad)


def _gelu_forward(*inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    x, weight, bias, *settings, impl, save = inputs
    return library.run_forward("strided_conv_gelu", impl, (x, weight, bias), save, _options(*settings))


def _gelu_forward_fake(*inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    x, weight, bias, *settings, _, save = inputs
    shape = _shape(x, weight, bias, settings)
    return x.new_empty(shape), x.new_empty(shape if save else (0,))


def _gelu_backward(*inputs: Any) -> tuple[torch.Tensor, ...]:
    grad, x, pre, weight, *settings, impl, needs = inputs
    return library.run_backward("strided_conv_gelu", impl, grad, (x, pre.contiguous(), weight), needs, _options(*settings))


def _gelu_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, weight, _, *ctx.settings, save = inputs
    library.refuse_unsaved("strided_conv_gelu", save)
    ctx.save_for_backward(x, output[1], weight)


def _gelu_differentiate(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    return _gradients(torch.ops.laco.strided_conv_gelu_backward, ctx, grad)


def _gradients(backward: Any, ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    """What autograd gets of either operator: the gradients asked for, and ``None`` for what is no tensor."""
    needs = list(ctx.needs_input_grad[:3])
    gradients = backward(grad, *ctx.saved_tensors, *ctx.settings, needs)
    return *library.asked_for(gradients, needs), *[None] * len(ctx.needs_input_grad[3:])


def _backward_fake(*inputs: Any) -> tuple[torch.Tensor, ...]:
    _, x, *_, weight = (tensor for tensor in inputs if isinstance(tensor, torch.Tensor))
    shapes = (x.shape, weight.shape, weight.shape[:1])
    return tuple(x.new_empty(shape if need else (0,)) for shape, need in zip(shapes, inputs[-1], strict=True))


TENSORS = "Tensor x, Tensor weight, Tensor? bias"
GRADIENTS = "bool[] needs) -> (Tensor, Tensor, Tensor)"
library.define(f"strided_conv({TENSORS}, {SETTINGS}, str impl) -> Tensor", _forward, _forward_fake)
library.define(
    f"strided_conv_backward(Tensor grad, Tensor x, Tensor weight, {SETTINGS}, str impl, {GRADIENTS}", _backward, _backward_fake
)
library.differentiate("strided_conv", _setup_context, _differentiate)
library.define(
    f"strided_conv_gelu({TENSORS}, {GELU_SETTINGS}, str impl, bool save) -> (Tensor, Tensor)",
    _gelu_forward,
    _gelu_forward_fake,
)
library.define(
    f"strided_conv_gelu_backward(Tensor grad, Tensor x, Tensor pre, Tensor weight, {GELU_SETTINGS}, str impl, {GRADIENTS}",
    _gelu_backward,
    _backward_fake,
)
library.differentiate("strided_conv_gelu", _gelu_setup_context, _gelu_differentiate)
