"""MBTF's first 1x1 convolution over several encoder blocks as one operator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from laco_kernels.errors import complaint
from laco_kernels.geometry import integer
from laco_kernels.kernels import select
from laco_kernels.ops import checks, library

if TYPE_CHECKING:
    from collections.abc import Sequence


def multi_block_linear_gelu(
    xs: Sequence[torch.Tensor],
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    approximate: str = "none",
    prefix_tokens: int = 0,
    impl: str | None = None,
) -> torch.Tensor:
    r"""Fuse the tokens of ``M`` encoder blocks by one linear map and a GELU (MBTF, multi-block token fusion, first layer).

    .. math:: y = \mathrm{gelu}(W [x_1; \ldots; x_M] + b) = \mathrm{gelu}(\textstyle\sum_m W_m x_m + b)

    Args:
        xs: ``M`` block outputs ``[B, P + N, C]``, all of one shape, dtype and device.
        weight: ``[out, M * C]``, columns ordered block by block as ``xs``.
        bias: ``[out]`` or ``None``.
        approximate: ``"none"`` (erf) or ``"tanh"``, as in :func:`torch.nn.functional.gelu`.
        prefix_tokens: ``P`` tokens before the patches; they are dropped.
        impl: ``None`` for the automatic choice; ``"reference"``, ``"composite"``, ``"triton"``, ``"cuda"`` never fall back.

    Returns:
        ``[B, N, out]``; under autocast in autocast's dtype.

    Raises:
        TypeError: ``xs`` is no sequence of floating-point tensors, mixed dtypes outside autocast.
        ValueError: no blocks, blocks of different shapes, a weight that does not fit, mixed devices, unknown options.
        RuntimeError: ``impl`` names an implementation that cannot run here, or cannot do this call (``"cuda"``).
    """
    if isinstance(xs, torch.Tensor) or not isinstance(xs, (list, tuple)):
        remedy = "A stacked tensor [M, B, T, C] becomes one by tensor.unbind(0)"
        raise TypeError(complaint("xs", type(xs).__name__, "a list or tuple of tensors, one for each block", remedy))
    if not xs:
        raise ValueError(complaint("xs", "an empty list", "at least one block output [B, P + N, C]", "Pass hidden_states"))
    prefix_tokens = integer("prefix_tokens", prefix_tokens, 0)
    checks.check_choice("approximate", approximate, checks.APPROXIMATIONS)
    named = {f"xs[{i}]": x for i, x in enumerate(xs)}
    _check_shapes(xs, weight, bias, prefix_tokens)
    tensors = {**named, "weight": weight, "bias": bias}
    checks.check_alike(tensors)
    library.know_sharding()
    library.refuse_forward_mode("multi_block_linear_gelu", tensors.values())
    dtype = checks.autocast_dtype(xs[0])
    impl = select.check(impl, xs[0].device, dtype)
    y, _ = torch.ops.laco.multi_block_linear_gelu(
        [x.to(dtype) for x in xs],
        weight.to(dtype),
        checks.cast(bias, dtype),
        prefix_tokens,
        approximate,
        impl,
        library.needs_saving(tensors.values()),
    )
    return y


def _check_shapes(xs: Sequence[torch.Tensor], weight: torch.Tensor, bias: torch.Tensor | None, prefix_tokens: int) -> None:
    for i, x in enumerate(xs):
        checks.check_tokens(f"xs[{i}]", x)
        if x.shape != xs[0].shape:
            remedy = "Fuse blocks of one encoder that work on the same tokens"
            raise ValueError(complaint(f"xs[{i}]", list(x.shape), f"{list(xs[0].shape)}, the shape of xs[0]", remedy))
    tokens, channels = xs[0].shape[1:]
    if prefix_tokens > tokens:
        remedy = "Count the class and register tokens only"
        raise ValueError(complaint("prefix_tokens", prefix_tokens, f"at most {tokens}, the tokens of a block", remedy))
    checks.check_linear("", weight, bias, (len(xs), channels), "(block, c)")


SETTINGS = "int prefix_tokens, str approximate, str impl"


def _forward(*inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    xs, weight, bias, prefix_tokens, approximate, impl, save = inputs
    options = {"approximate": approximate, "prefix_tokens": prefix_tokens}
    return library.run_forward("multi_block_linear_gelu", impl, (xs, weight, bias), save, options)


def _forward_fake(*inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    xs, weight, bias, prefix_tokens, _, _, save = inputs
    _check_shapes(xs, weight, bias, prefix_tokens)
    checks.check_alike({**{f"xs[{i}]": x for i, x in enumerate(xs)}, "weight": weight, "bias": bias})
    shape = (xs[0].shape[0], xs[0].shape[1] - prefix_tokens, weight.shape[0])
    return weight.new_empty(shape), weight.new_empty(shape if save else (0,))


def _backward(*inputs: Any) -> list[torch.Tensor]:
    grad, xs, pre, weight, prefix_tokens, approximate, impl, needs = inputs
    options = {"approximate": approximate, "prefix_tokens": prefix_tokens}
    return list(library.run_backward("multi_block_linear_gelu", impl, grad, (xs, pre.contiguous(), weight), needs, options))


def _backward_fake(*inputs: Any) -> list[torch.Tensor]:
    _, xs, _, weight, *_, needs = inputs
    shapes = (*[x.shape for x in xs], weight.shape, weight.shape[:1])
    return [weight.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs, strict=True)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    xs, weight, bias, *ctx.settings, save = inputs
    library.refuse_unsaved("multi_block_linear_gelu", save)
    ctx.save_for_backward(*xs, output[1], weight)
    ctx.needs = [*[x.requires_grad for x in xs], weight.requires_grad, bias is not None and bias.requires_grad]


def _differentiate(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    *xs, pre, weight = ctx.saved_tensors
    gradients = torch.ops.laco.multi_block_linear_gelu_backward(grad, xs, pre, weight, *ctx.settings, ctx.needs)
    *dxs, dweight, dbias = library.asked_for(gradients, ctx.needs)
    return dxs, dweight, dbias, *[None] * (len(ctx.settings) + 1)


library.define(
    f"multi_block_linear_gelu(Tensor[] xs, Tensor weight, Tensor? bias, {SETTINGS}, bool save) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
library.define(
    "multi_block_linear_gelu_backward(Tensor grad, Tensor[] xs, Tensor pre, Tensor weight, "
    f"{SETTINGS}, bool[] needs) -> Tensor[]",
    _backward,
    _backward_fake,
)
library.differentiate("multi_block_linear_gelu", _setup_context, _differentiate)
