"""How an operator becomes a real torch operator: ``laco::<name>`` and ``laco::<name>_backward``.

Each has one body for CPU and CUDA, which asks :mod:`laco_kernels.kernels.select` for an implementation, and a fake for
tracing. Backward is an operator of its own, so that ``torch.compile``, export, selective checkpointing and data parallelism
see both; it has no derivative and says so.

In a training step of a small batch the dispatcher's Python takes longer than a GPU takes for the work. So the layers of an
encoder, which call operators by the dozen, call bodies and derivatives directly where nothing else would see the difference
(:func:`is_direct`).
"""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd import forward_ad

from laco_kernels.errors import UnsupportedError
from laco_kernels.kernels import select
from laco_kernels.ops.checks import DTYPES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

LIBRARY = torch.library.Library("laco", "DEF")
BODIES: dict[str, Callable[..., Any]] = {}
BODIES_ON = ("cpu", "cuda")


_seen: list[Any] = []  # functools.partial of bodies that a compiler would look into


def define(schema: str, body: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register ``laco::<schema>`` with its body and its fake."""
    name = schema.partition("(")[0]
    BODIES[name] = body
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for kind in BODIES_ON:
        _seen.append(functools.partial(_without_autocast(body, kind)))
        LIBRARY.impl(name, _seen[-1], kind.upper())

    def traced(*inputs: Any) -> Any:
        _hide_bodies()
        return fake(*inputs)

    torch.library.register_fake(f"laco::{name}", traced, lib=LIBRARY)


def _hide_bodies() -> None:
    """Have compilers leave the bodies alone, from the first trace on.

    Compiled code calls an operator under the compiler's eye, which would trace what it does inside. What prevents that imports
    the compiler, and with it distributed tensors: too much for programs that use neither.
    """
    while _seen:
        run = _seen.pop()
        run.__setstate__((torch.compiler.disable(run.func), (), {}, {}))  # the registered object stays the same


def _without_autocast(body: Callable[..., Any], kind: str) -> Callable[..., Any]:
    """Return ``body`` as it runs outside autocast: the public wrapper has cast its arguments, the rest is ours to decide."""

    @functools.wraps(body)
    def plain(*inputs: Any) -> Any:
        if not torch.is_autocast_enabled(kind):
            return body(*inputs)
        with torch.autocast(kind, enabled=False):
            return body(*inputs)

    return plain


def is_direct(x: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Return whether an operator on these tensors may run without torch's dispatcher, as nothing but autograd would see it.

    Nothing else sees it without a compiler, a tracer, a transform of ``torch.func``, a forward-mode derivative, a mode or a
    tensor's subclass. Tensors of several dtypes or devices, and autocast, are left to the public functions.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    ):
        return False
    dtype, device = x.dtype, x.device
    for tensor in (x, *others):
        if tensor is not None and (
            (type(tensor) is not torch.Tensor and type(tensor) is not torch.nn.Parameter)
            or tensor.dtype != dtype
            or tensor.device != device
        ):
            return False
    return dtype in DTYPES and device.type in BODIES_ON and not torch.is_autocast_enabled(device.type)


def can_run(op: str, impl: str, like: torch.Tensor) -> bool:
    """Return ``True`` once :func:`select.check` lets ``impl`` run ``op`` on the device and in the dtype of ``like``."""
    key = (op, impl, like.device, like.dtype)
    if key not in _checked:
        select.check(impl, like.device, like.dtype, op)
        _checked.add(key)
    return True


_checked: set[tuple[Any, ...]] = set()


def differentiate(
    name: str,
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    *,
    results: int = 1,
    body: Callable[..., Any] | None = None,
) -> Any:
    """Give ``laco::<name>`` its derivative, and ``laco::<name>_backward`` a refusal to be differentiated.

    The first ``results`` outputs have gradients, which ``backward`` gets; those behind them are kept for it and have none.
    Returns the same derivative of ``body``, which may return ``None`` for outputs, as a function for where :func:`is_direct`:
    without the dispatcher it takes half the time.
    """

    def prepare(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        # Else every backward pass would fill a tensor of zeros for the pre-activation.
        ctx.set_materialize_grads(False)
        if isinstance(output, tuple):
            ctx.mark_non_differentiable(*[tensor for tensor in output[results:] if tensor is not None])
        setup_context(ctx, inputs, output)

    def differentiated(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        for grad in grads[:results]:
            if grad is not None:
                return backward(ctx, *grads[:results])
        return tuple([None] * len(needs) if isinstance(needs, (list, tuple)) else None for needs in ctx.needs_input_grad)

    torch.library.register_autograd(f"laco::{name}", differentiated, setup_context=prepare, lib=LIBRARY)

    def refuse(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(
            f"laco::{name}: got a second derivative, expected first derivatives only. Call backward without create_graph=True, "
            f"or use {select.modules(name)['reference']}, which is differentiable to any order."
        )

    torch.library.register_autograd(f"laco::{name}_backward", refuse, lib=LIBRARY)
    return body and _function(name, body, prepare, differentiated)


def _function(name: str, body: Callable[..., Any], prepare: Callable[..., None], backward: Callable[..., Any]) -> Any:
    def forward(ctx: Any, *inputs: Any) -> Any:
        output = body(*inputs)
        prepare(ctx, inputs, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return plain_apply(type(f"laco_{name}", (torch.autograd.Function,), members))


def plain_apply(kind: type) -> Callable[..., Any]:
    """Return ``kind.apply`` for where :func:`is_direct`: it looks at no argument, which ``torch.func`` may have left behind."""
    applied: Callable[..., Any] = super(torch.autograd.Function, kind).apply  # type: ignore[misc]
    return applied


def run(name: str, impl: str, tensors: Sequence[Any], options: dict[str, Any]) -> Any:
    """Run ``<name>_forward`` of an implementation. What the automatic choice cannot do, the composite does."""
    module = _load(impl, name, "forward", tensors[0], options)
    try:
        return getattr(module, f"{name}_forward")(*tensors, **options)
    except UnsupportedError:  # said before anything was done
        if impl != select.AUTO:
            raise
        module = _load("composite", name, "forward", tensors[0], options)
        return getattr(module, f"{name}_forward")(*tensors, **options)


def run_forward(
    name: str, impl: str, tensors: Sequence[Any], save: bool, options: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`run` where there is an activation: the output, and the pre-activation, empty unless it is to be saved."""
    y, pre = run(name, impl, tensors, {**options, "save": save})
    return y, pre if save else y.new_empty(0)


def run_backward(
    name: str, impl: str, grad: torch.Tensor, saved: Sequence[Any], needs: Sequence[bool], options: dict[str, Any]
) -> tuple[torch.Tensor, ...]:
    """Run ``<name>_backward`` of an implementation on what was saved, the tokens first.

    Gradients arrive expanded and sliced. So may what was saved, as hooks bring it back in strides of their choice: a
    pre-activation, which was contiguous, is to be made so again before.
    """
    module = _load(impl, name, "backward", saved[0], options)
    grad = grad.contiguous()
    try:
        gradients = getattr(module, f"{name}_backward")(grad, *saved, needs, **options)
    except UnsupportedError:
        if impl != select.AUTO:
            raise
        module = _load("composite", name, "backward", saved[0], options)
        gradients = getattr(module, f"{name}_backward")(grad, *saved, needs, **options)
    return present(gradients, grad)


def _load(impl: str, name: str, direction: str, xs: torch.Tensor | Sequence[torch.Tensor], options: dict[str, Any]) -> Any:
    x = xs if isinstance(xs, torch.Tensor) else xs[0]
    if impl != select.AUTO:  # rows and form are for the choice
        return select.load(impl, name, direction, x, 0)
    tokens = options["windows"].num_windows if "windows" in options else x.shape[1] - options["prefix_tokens"]
    return select.load(impl, name, direction, x, x.shape[0] * tokens, select.form_of({"op": name, **options}))


def refuse_forward_mode(name: str, tensors: Iterable[torch.Tensor | None]) -> None:
    """Raise where a tensor carries a forward-mode tangent, which an operator without a rule would silently drop.

    Tracing does not see tangents, so there any call inside a ``dual_level`` is refused; without ``fullgraph=True`` the
    refusal breaks the graph, and the call is looked at again as it is.
    """
    if forward_ad._current_level < 0:
        return
    if torch.compiler.is_compiling() or any(
        tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors
    ):
        raise RuntimeError(
            f"laco_kernels.{name}: got a forward-mode derivative (torch.autograd.forward_ad, torch.func.jvp), expected "
            f"reverse mode. Use {select.modules(name)['reference']}, which has forward-mode derivatives."
        )


def refuse_unsaved(name: str, save: bool) -> None:
    """Raise where ``laco::<name>`` was told not to save and yet is to be differentiated."""
    if not save:
        raise RuntimeError(
            f"laco::{name}: got save=False with inputs that require gradients, expected save=True. Call "
            f"laco_kernels.{name}, which knows, or run under torch.no_grad()."
        )


def know_sharding() -> None:
    """Register the sharding rules where a ``DTensor`` can exist: where somebody has imported ``torch.distributed.tensor``."""
    if "torch.distributed.tensor" in sys.modules:
        from laco_kernels.ops import sharding  # noqa: F401


def dense(tensors: Iterable[torch.Tensor | None]) -> tuple[torch.Tensor | None, ...]:
    """Return what an operator returns, ``None`` included: contiguous tensors."""
    return tuple([None if tensor is None else tensor.contiguous() for tensor in tensors])


def needs_saving(tensors: Iterable[torch.Tensor | None]) -> bool:
    """Return whether a backward pass may follow."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def present(gradients: Sequence[torch.Tensor | None], like: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Stand an empty tensor in for every gradient that was not asked for: operators return no ``None``."""
    return tuple(like.new_empty(0) if gradient is None else gradient.contiguous() for gradient in gradients)


def asked_for(gradients: Sequence[torch.Tensor | None], needs: Sequence[bool]) -> list[torch.Tensor | None]:
    """Undo :func:`present`."""
    return [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]
