"""Whether a layer may run otherwise than its stock code says: what :mod:`laco_kernels.hf.fused` asks at every call."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch.autograd import forward_ad

from laco_kernels.kernels import select
from laco_kernels.ops.checks import MLP_APPROXIMATIONS, autocast_dtype

if TYPE_CHECKING:
    from collections.abc import Iterator


# Elements of an input, without and with gradients, below which a launch of ours may cost the host more than its pass saves
# the GPU, where the stock code needs two or three: seen on an H200 at 0.6 million (0.80x), even at 3.6 million, 1.2x at 4.2
# million; in training 0.93x at 4.2 million, 1.06x at 13 million.
LEAST = {False: 2**22, True: 2**23}
_launches = threading.local()


@contextlib.contextmanager
def launches_are_free() -> Iterator[None]:
    """Fuse whatever its size in this thread: what runs here is captured as a CUDA graph, or about to be."""
    before = getattr(_launches, "free", False)
    _launches.free = True
    try:
        yield
    finally:
        _launches.free = before


def pays(elements: int) -> bool:
    """Return whether a tensor is large enough for one pass instead of two or three to be worth a launch of ours."""
    return torch.compiler.is_compiling() or getattr(_launches, "free", False) or elements >= LEAST[torch.is_grad_enabled()]


class Fused(nn.Module):
    """Mixin for a module whose class was swapped; ``impl`` is what :func:`laco_kernels.hf.optimize` was told."""

    impl: str | None
    stock: ClassVar[type[nn.Module]]  # whose forward pass it replaces


# The forward passes that ours replace or pass over, as they were when this was imported.
FORWARDS: dict[type[nn.Module], Any] = {}


def know(*kinds: type[nn.Module]) -> None:
    """Note the forward passes of these classes."""
    FORWARDS.update({kind: kind.forward for kind in kinds})


def is_patched(kind: type[nn.Module]) -> bool:
    """Return whether somebody has given the class, or the one that a fused class stands for, another forward pass since."""
    stock = getattr(kind, "stock", kind)
    return FORWARDS.get(stock, stock.forward) is not stock.forward


SMALL_GAINS = ("layer", "quick_gelu", *MLP_APPROXIMATIONS)  # forms whose stock code is a few launches


def implementation(module: Fused, op: str, x: torch.Tensor, form: str | None = None) -> str | None:
    """Return the implementation that a fused ``module`` calls ``op`` with on ``x``, or ``None`` for the stock code.

    Where there may be a backward pass it must have been measured faster than the stock one, too.
    """
    if is_transformed() or is_patched(type(module)):
        return None
    if module.impl is not None:
        return module.impl
    if form in SMALL_GAINS and not pays(x.numel()):
        return None
    ways = ("forward", "backward") if torch.is_grad_enabled() else ("forward",)
    size = autocast_dtype(x), x.numel() // max(x.shape[-1], 1)
    chosen = [select.choose(op, way, x.device, *size, form).impl for way in ways]
    return None if "reference" in chosen else chosen[0]


def is_watched(module: nn.Module) -> bool:
    """Return whether hooks wait for ``module`` to be called, its own or those of all modules."""
    own = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(own) or torch.nn.modules.module._has_any_global_hook()


CAPTURING = "transformers.utils.output_capturing"  # its hooks note a layer's outputs and change nothing


def is_called_for_others(module: nn.Module) -> bool:
    """Return whether forward hooks wait for ``module`` to be called, other than those of transformers."""
    if not module._forward_hooks and not module._forward_pre_hooks:
        return False
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(getattr(hook, "__module__", None) != CAPTURING for hook in hooks)


def is_plain(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Return whether ``module`` is of one of these very classes, runs their forward pass as it is, and nothing watches it."""
    kind = type(module)
    return (
        kind in kinds
        and "forward" not in module.__dict__
        and module._compiled_call_impl is None
        and not is_watched(module)
        and not is_patched(kind)
    )


def is_transformed() -> bool:
    """Return whether ``torch.func`` or forward mode is at work, for which operators of our own have no rules."""
    return not torch.compiler.is_compiling() and has_transforms()


def has_transforms() -> bool:
    """:func:`is_transformed`, where no compiler is at work, which cannot trace the question."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()
