"""STF's strided convolution with GELU as one operator."""

from __future__ import annotations

from typing import TYPE_CHECKING

from laco_kernels import reference
from laco_kernels.geometry import Windows, check_grid, integer
from laco_kernels.kernels.select import choose
from laco_kernels.ops import checks

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch


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
        impl: ``None`` for the automatic choice, or ``"reference"``, ``"triton"``, ``"cuda"``, which never fall back.

    Returns:
        ``[B, N', out]``, ``N' = ceil(H / k) * ceil(W / k)``; under autocast in autocast's dtype.

    Raises:
        TypeError: integer or complex tensors, mixed dtypes outside autocast, a kernel size or grid that is no integer.
        ValueError: shapes that do not fit together, mixed devices, unknown options, a grid that needs ``pad=True``.
        RuntimeError: ``impl`` names an implementation that cannot run here.
    """
    windows = Windows(check_grid(grid), integer("kernel_size", kernel_size, 1), prefix_tokens, pad)
    checks.check_choice("approximate", approximate, checks.APPROXIMATIONS)
    checks.check_image_tokens(x, windows)
    checks.check_linear("", weight, bias, (windows.ratio, windows.ratio, x.shape[2]), "(dy, dx, c)")
    checks.check_alike({"x": x, "weight": weight, "bias": bias})
    choose(impl)
    dtype = checks.autocast_dtype(x)
    return reference.strided_conv_gelu(
        x.to(dtype), weight.to(dtype), checks.cast(bias, dtype), windows=windows, approximate=approximate
    )
