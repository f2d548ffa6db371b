"""The activations of an encoder's feed-forward blocks as operators that keep their input only."""

from __future__ import annotations

from typing import Any

import torch

from laco_kernels.errors import complaint
from laco_kernels.kernels import select
from laco_kernels.ops import checks, library

ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu")


def gated_silu(h: torch.Tensor, *, impl: str | None = None) -> torch.Tensor:
    r"""Gate the second half of ``h`` by the first, the activation of SwiGLU.

    .. math:: y = \mathrm{silu}(g) \odot u, \qquad h = [g; u]

    Args:
        h: gate and up side by side ``[..., 2 * F]``, in any strides; adjacent channels are read in place.
        impl: ``None`` for the automatic choice; ``"reference"`` and ``"triton"`` never fall back.

    Returns:
        ``[..., F]`` in the dtype of ``h``, under autocast too, as torch's own activations.

    Raises:
        TypeError: ``h`` is no floating-point tensor.
        ValueError: an odd number of channels, an ``impl`` that this operator does not have.
        RuntimeError: ``impl`` names an implementation that cannot run here.
    """
    _check_pair(h)
    library.know_sharding()
    library.refuse_forward_mode("gated_silu", (h,))
    return torch.ops.laco.gated_silu(h, select.check(impl, h.device, h.dtype, "gated_silu"))


def activate(h: torch.Tensor, *, activation: str = "gelu", impl: str | None = None) -> torch.Tensor:
    r"""Apply an activation to what a linear layer computed.

    Args:
        h: ``[..., F]``, in any strides; adjacent channels are read in place.
        activation: ``"gelu"`` (erf), ``"gelu_tanh"``, or ``"quick_gelu"``, :math:`h\,\mathrm{sigmoid}(1.702\,h)`.
        impl: ``None`` for the automatic choice; ``"reference"`` and ``"triton"`` never fall back.

    Returns:
        ``[..., F]`` in the dtype of ``h``, under autocast too, as torch's own activations.

    Raises:
        TypeError: ``h`` is no floating-point tensor.
        ValueError: an unknown activation, a tensor without channels, an ``impl`` that this operator does not have.
        RuntimeError: ``impl`` names an implementation that cannot run here.
    """
    checks.check_choice("activation", activation, ACTIVATIONS)
    checks.check_channels("h", h)
    library.know_sharding()
    library.refuse_forward_mode("activate", (h,))
    return torch.ops.laco.activate(h, activation, select.check(impl, h.device, h.dtype, "activate"))


def run_gated_silu(h: torch.Tensor, impl: str) -> torch.Tensor:
    """:func:`gated_silu` inside an encoder: without the dispatcher where nothing else looks."""
    if not library.is_direct(h) or not h.numel() or h.shape[-1] % 2 or not library.can_run("gated_silu", impl, h):
        return gated_silu(h, impl=impl)
    return (_gated_silu_differentiable if library.needs_saving((h,)) else _gated_silu)(h, impl)


def run_activate(h: torch.Tensor, activation: str, impl: str) -> torch.Tensor:
    """:func:`activate` inside an encoder: without the dispatcher where nothing else looks."""
    if not library.is_direct(h) or not h.numel() or not library.can_run("activate", impl, h):
        return activate(h, activation=activation, impl=impl)
    return (_activate_differentiable if library.needs_saving((h,)) else _activate)(h, activation, impl)


def _check_pair(h: torch.Tensor) -> None:
    checks.check_channels("h", h)
    if h.shape[-1] % 2:
        remedy = "Concatenate gate and up, torch.cat([gate, up], dim=-1)"
        raise ValueError(complaint("h", f"{h.shape[-1]} channels", "an even number, gate and up side by side", remedy))


def _module(impl: str, op: str, direction: str, h: torch.Tensor, form: str | None = None) -> Any:
    return select.load(impl, op, direction, h, h.numel() // h.shape[-1], form)


def _gated_silu(h: torch.Tensor, impl: str) -> torch.Tensor:
    return _module(impl, "gated_silu", "forward", h).gated_silu_forward(h).contiguous()


def _gated_silu_fake(h: torch.Tensor, impl: str) -> torch.Tensor:
    _check_pair(h)
    return h.new_empty(*h.shape[:-1], h.shape[-1] // 2)


def _gated_silu_backward(grad: torch.Tensor, h: torch.Tensor, impl: str) -> torch.Tensor:
    return _module(impl, "gated_silu", "backward", h).gated_silu_backward(grad, h).contiguous()


def _activate(h: torch.Tensor, activation: str, impl: str) -> torch.Tensor:
    return _module(impl, "activate", "forward", h, activation).activate_forward(h, activation=activation).contiguous()


def _activate_fake(h: torch.Tensor, activation: str, impl: str) -> torch.Tensor:
    checks.check_choice("activation", activation, ACTIVATIONS)
    checks.check_channels("h", h)
    return h.new_empty(h.shape)


def _activate_backward(grad: torch.Tensor, h: torch.Tensor, activation: str, impl: str) -> torch.Tensor:
    return _module(impl, "activate", "backward", h, activation).activate_backward(grad, h, activation=activation).contiguous()


def _backward_fake(grad: torch.Tensor, h: torch.Tensor, *_: Any) -> torch.Tensor:
    return h.new_empty(h.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    h, *ctx.settings = inputs
    ctx.save_for_backward(h)


def _differentiate_gated_silu(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    (h,) = ctx.saved_tensors
    direct = not torch.is_grad_enabled() and library.is_direct(h, grad)
    return (_gated_silu_backward if direct else torch.ops.laco.gated_silu_backward)(grad, h, *ctx.settings), None


def _differentiate_activate(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    (h,) = ctx.saved_tensors
    direct = not torch.is_grad_enabled() and library.is_direct(h, grad)
    return (_activate_backward if direct else torch.ops.laco.activate_backward)(grad, h, *ctx.settings), None, None


library.define("gated_silu(Tensor h, str impl) -> Tensor", _gated_silu, _gated_silu_fake)
library.define("gated_silu_backward(Tensor grad, Tensor h, str impl) -> Tensor", _gated_silu_backward, _backward_fake)
_gated_silu_differentiable = library.differentiate("gated_silu", _setup_context, _differentiate_gated_silu, body=_gated_silu)
library.define("activate(Tensor h, str activation, str impl) -> Tensor", _activate, _activate_fake)
library.define(
    "activate_backward(Tensor grad, Tensor h, str activation, str impl) -> Tensor", _activate_backward, _backward_fake
)
_activate_differentiable = library.differentiate("activate", _setup_context, _differentiate_activate, body=_activate)
