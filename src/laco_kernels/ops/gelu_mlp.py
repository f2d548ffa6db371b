"""An encoder's feed-forward block, two linear layers with GELU between them, as one operator that keeps no activation."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from laco_kernels.errors import complaint
from laco_kernels.geometry import Windows
from laco_kernels.kernels import select
from laco_kernels.kernels.rows import rows_of
from laco_kernels.ops import checks, library
from laco_kernels.ops.add_norm import run_add_norm


def gelu_mlp(
    x: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor | None,
    weight2: torch.Tensor,
    bias2: torch.Tensor | None,
    *,
    approximate: str = "none",
    impl: str | None = None,
) -> torch.Tensor:
    r"""Apply a feed-forward block with GELU.

    .. math:: y = W_2\,\mathrm{gelu}(W_1 x + b_1) + b_2

    It is :func:`laco_kernels.patch_merge` with windows of one token and no residual. For the backward pass it keeps the
    pre-activation, and ``x`` where ``weight1`` has a gradient; the activation, which two linear layers would keep besides, is
    made again in the pass that takes GELU's derivative.

    Args:
        x: ``[..., C]``, in any strides.
        weight1: ``[hidden, C]``.
        bias1: ``[hidden]`` or ``None``.
        weight2: ``[C_out, hidden]``.
        bias2: ``[C_out]`` or ``None``.
        approximate: ``"none"`` (erf) or ``"tanh"``, as in :func:`torch.nn.functional.gelu`, or ``"sigmoid"``,
            :math:`h\,\mathrm{sigmoid}(1.702\,h)`, which is CLIP's quick GELU.
        impl: ``None`` for the automatic choice; ``"reference"``, ``"composite"``, ``"triton"``, ``"cuda"`` never fall back.

    Returns:
        ``[..., C_out]``; under autocast in autocast's dtype.

    Raises:
        TypeError: integer or complex tensors, mixed dtypes outside autocast.
        ValueError: shapes that do not fit together, mixed devices, an unknown approximation.
        RuntimeError: ``impl`` names an implementation that cannot run here, or cannot do this call (``"cuda"``).
    """
    checks.check_choice("approximate", approximate, checks.MLP_APPROXIMATIONS)
    tensors = {"x": x, "weight1": weight1, "bias1": bias1, "weight2": weight2, "bias2": bias2}
    _check_shapes(x, weight1, bias1, weight2, bias2)
    checks.check_alike(tensors)
    library.know_sharding()
    library.refuse_forward_mode("gelu_mlp", tensors.values())
    dtype = checks.autocast_dtype(x)
    impl = select.check(impl, x.device, dtype, "gelu_mlp")
    save = library.needs_saving(tensors.values())
    return torch.ops.laco.gelu_mlp(x, weight1, bias1, weight2, bias2, dtype, approximate, impl, save)[0]


class Norm(NamedTuple):
    """What an input was made by: ``add_norm`` of this total, without a delta."""

    total: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    kind: str
    eps: float
    impl: str


def run_gelu_mlp(
    x: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor | None,
    weight2: torch.Tensor,
    bias2: torch.Tensor | None,
    approximate: str,
    impl: str,
    made_by: Norm | None = None,
) -> torch.Tensor:
    """:func:`gelu_mlp` inside an encoder: without the dispatcher where nothing else looks.

    With ``made_by`` the backward pass may make ``x`` again from the norm's input, which the norm keeps in any case.
    """
    if (
        not library.is_direct(x, weight1, bias1, weight2, bias2)
        or not x.numel()
        or weight1.shape[1:] != x.shape[-1:]
        or weight2.shape[1:] != weight1.shape[:1]
        or (bias1 is not None and bias1.shape != weight1.shape[:1])
        or (bias2 is not None and bias2.shape != weight2.shape[:1])
        or not library.can_run("gelu_mlp", impl, x)
    ):
        return gelu_mlp(x, weight1, bias1, weight2, bias2, approximate=approximate, impl=impl)
    save = library.needs_saving((x, weight1, bias1, weight2, bias2))
    inputs = (x, weight1, bias1, weight2, bias2, x.dtype, approximate, impl, save)
    y: torch.Tensor = (_differentiable(*inputs, made_by) if save else _forward(*inputs))[0]
    return y


def _check_shapes(
    x: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor | None,
    weight2: torch.Tensor,
    bias2: torch.Tensor | None,
) -> None:
    checks.check_channels("x", x)
    checks.check_linear("1", weight1, bias1, (x.shape[-1],), "as the channels of x")
    checks.check_linear("2", weight2, bias2, (weight1.shape[0],), "as the rows of weight1")
    for name, weight in (("weight1", weight1), ("weight2", weight2)):
        if weight.shape[0] == 0:
            raise ValueError(complaint(name, "no rows", "[out, in] with at least one row", "Pass the weight of a linear layer"))


# By tokens and approximation. A dictionary, as a compiler that traces the body warns of functools' caches.
_OPTIONS: dict[tuple[int, str], dict[str, Any]] = {}


def _options(tokens: int, approximate: str) -> dict[str, Any]:
    """What a merge of one token a window takes; looked up, as an encoder asks a layer."""
    if torch.compiler.is_compiling() or (found := _OPTIONS.get((tokens, approximate))) is None:
        windows = Windows((1, tokens), 1, 0, False)
        found = {"windows": windows, "residual_kind": "none", "approximate": approximate, "layout": "block"}
        if not torch.compiler.is_compiling() and len(_OPTIONS) < 64:
            _OPTIONS[tokens, approximate] = found
    return found


def _forward(*inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    x, *parameters, dtype, approximate, impl, save = inputs[:9]
    tokens = rows_of(x.to(dtype))
    cast = [tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype) for tensor in parameters]
    y, pre = library.run_forward("gelu_mlp", impl, (tokens, *cast), save, _options(tokens.shape[1], approximate))
    shape = x.shape[:-1]
    # No view to autograd, so that a hook may change it in place.
    y = torch.ops.aten._unsafe_view(y.contiguous(), (*shape, y.shape[-1]))
    return y, pre.reshape(*shape, pre.shape[-1]).contiguous() if save else pre


def _forward_fake(*inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    x, weight1, bias1, weight2, bias2, dtype, *_, save = inputs
    _check_shapes(x, weight1, bias1, weight2, bias2)
    shape = x.shape[:-1]
    pre = x.new_empty((*shape, weight1.shape[0]) if save else (0,), dtype=dtype)
    return x.new_empty(*shape, weight2.shape[0], dtype=dtype), pre


def _backward(*inputs: Any) -> tuple[torch.Tensor, ...]:
    grad, x, pre, weight1, weight2, dtype, approximate, impl, needs = inputs
    rows = rows_of(pre).contiguous()
    # Of a missing x nothing is read but the shape and the dtype of its gradient.
    tokens = rows.new_empty(1).expand(*rows.shape[:2], weight1.shape[1]) if x is None else rows_of(x.to(dtype))
    saved = (tokens, rows, weight1.to(dtype), weight2.to(dtype))
    dx, *others = library.run_backward("gelu_mlp", impl, rows_of(grad), saved, needs, _options(tokens.shape[1], approximate))
    dx = dx.reshape(*pre.shape[:-1], tokens.shape[2]) if needs[0] else dx
    return dx, *[gradient.to(weight1.dtype) for gradient in others]


def _backward_fake(*inputs: Any) -> tuple[torch.Tensor, ...]:
    _, _, pre, weight1, weight2, *_, needs = inputs
    shapes = ((*pre.shape[:-1], weight1.shape[1]), weight1.shape, weight1.shape[:1], weight2.shape, weight2.shape[:1])
    likes = (pre, weight1, weight1, weight1, weight1)
    made = zip(likes, shapes, needs, strict=True)
    return tuple(like.new_empty(shape if need else (0,)) for like, shape, need in made)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, weight1, _, weight2, _, *ctx.settings, save = inputs[:9]
    library.refuse_unsaved("gelu_mlp", save)
    made_by = inputs[9] if len(inputs) > 9 else None
    ctx.arguments, ctx.dtype = len(inputs), x.dtype
    ctx.norm, kept = None, (None, None, None)
    if ctx.needs_input_grad[1]:  # the only gradient that is made of x
        ctx.norm = None if made_by is None else made_by[3:]
        kept = (x, None, None) if made_by is None else made_by[:3]
    ctx.save_for_backward(*kept, output[1], weight1, weight2)


def _differentiate(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    x, norm_weight, norm_bias, *saved = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:5])
    if ctx.norm is not None:
        with torch.no_grad():
            x = run_add_norm(x, None, norm_weight, norm_bias, None, *ctx.norm)[1]
    direct = not torch.is_grad_enabled() and library.is_direct(grad, x, *saved)
    run = _backward if direct else torch.ops.laco.gelu_mlp_backward
    dx, *others = library.asked_for(run(grad, x, *saved, *ctx.settings, needs), needs)
    return None if dx is None else dx.to(ctx.dtype), *others, *[None] * (ctx.arguments - 5)


TENSORS = "Tensor x, Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2"
SETTINGS = "ScalarType dtype, str approximate, str impl"
library.define(f"gelu_mlp({TENSORS}, {SETTINGS}, bool save) -> (Tensor, Tensor)", _forward, _forward_fake)
library.define(
    f"gelu_mlp_backward(Tensor grad, Tensor? x, Tensor pre, Tensor weight1, Tensor weight2, {SETTINGS}, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_differentiable = library.differentiate("gelu_mlp", _setup_context, _differentiate, body=_forward)
