"""Residual sum and norm, what stands between two blocks of an encoder layer, as one operator."""

from __future__ import annotations

from typing import Any

import torch

from laco_kernels.errors import complaint
from laco_kernels.kernels import select
from laco_kernels.ops import checks, library

KINDS = ("layer", "rms")


def add_norm(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    scale: torch.Tensor | None = None,
    kind: str = "layer",
    eps: float = 1e-6,
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Add what a block computed to the residual stream and normalise the sum for the next block.

    .. math:: t = x + s \odot \delta, \qquad
        y = w \odot \frac{t - \mathrm{mean}(t)}{\sqrt{\mathrm{var}(t) + \epsilon}} + b
        \quad\text{or, for RMSNorm,}\quad y = w \odot \frac{t}{\sqrt{\mathrm{mean}(t^2) + \epsilon}} + b

    The norm sees ``t`` as it is rounded to the dtype of ``x``, takes its statistics in float32 (float64 for float64), and
    rounds ``y`` once, as :class:`torch.nn.LayerNorm` does. The RMSNorm of transformers' AIMv2 and InternVL rounds to the
    dtype of ``x`` before it multiplies by the weight, and again afterwards; this one errs less.

    Args:
        x: the residual stream ``[..., C]``, in any strides; channels that are adjacent in memory are read in place, as are
            views without a class token, ``x[:, 1:]``.
        delta: what to add, of the shape of ``x``; ``None`` before the first block, where there is only ``x`` to normalise.
        weight: ``[C]``.
        bias: ``[C]`` or ``None``.
        scale: LayerScale's ``[C]``, or ``None`` for one.
        kind: ``"layer"`` (LayerNorm) or ``"rms"`` (RMSNorm).
        eps: added to the variance or to the mean square.
        impl: ``None`` for the automatic choice; ``"reference"`` and ``"triton"`` never fall back.

    Returns:
        ``t`` and ``y``, both ``[..., C]``. Without a delta ``t`` is ``x`` itself. Under autocast ``t`` has the widest dtype of
        ``x``, ``delta`` and ``scale``, as torch's own sum, and ``y`` has autocast's.

    Raises:
        TypeError: integer or complex tensors, mixed dtypes outside autocast, an ``eps`` that is no number.
        ValueError: shapes that do not fit together, mixed devices, a scale without delta, an unknown kind, a negative ``eps``,
            an ``impl`` that this operator does not have.
        RuntimeError: ``impl`` names an implementation that cannot run here.
    """
    checks.check_choice("kind", kind, KINDS)
    _check_eps(eps)
    tensors = {"x": x, "delta": delta, "weight": weight, "bias": bias, "scale": scale}
    _check_shapes(x, delta, weight, bias, scale)
    checks.check_alike(tensors)
    library.know_sharding()
    library.refuse_forward_mode("add_norm", tensors.values())
    dtype = checks.autocast_dtype(x)
    impl = select.check(impl, x.device, dtype, "add_norm")
    wide = x
    for other in (delta, scale):
        wide = wide if other is None else wide.to(torch.promote_types(wide.dtype, other.dtype))
    save = library.needs_saving(tensors.values())
    total, normed, _, _ = torch.ops.laco.add_norm(wide, delta, weight, bias, scale, dtype, kind, float(eps), impl, save)
    return x if delta is None else total, normed


def run_add_norm(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    kind: str,
    eps: float,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`add_norm` inside an encoder, which calls it dozens of times: without the dispatcher where nothing else looks.

    Only what varies from call to call is looked at; where it is not as usual the public function sees to it.
    """
    shape, vector = x.shape, x.shape[-1:]
    if (
        not library.is_direct(x, delta, weight, bias, scale)
        or not x.numel()
        or (scale is not None if delta is None else delta.shape != shape)
        or weight is None
        or weight.shape != vector
        or (bias is not None and bias.shape != vector)
        or (scale is not None and scale.shape != vector)
        or not library.can_run("add_norm", impl, x)
    ):
        return add_norm(x, delta, weight, bias, scale=scale, kind=kind, eps=eps, impl=impl)
    save = library.needs_saving((x, delta, weight, bias, scale))
    run: Any = _differentiable if save else _compute
    made = run(x, delta, weight, bias, scale, x.dtype, kind, float(eps), impl, save)
    return x if delta is None else made[0], made[1]


def _check_eps(eps: object) -> None:
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(complaint("eps", repr(eps), "a number of at least 0", "Pass the norm's own, e.g. eps=1e-6"))
    if not eps >= 0:
        raise ValueError(complaint("eps", eps, "a number of at least 0", "Pass the norm's own, e.g. eps=1e-6"))


def _check_shapes(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
) -> None:
    checks.check_channels("x", x)
    if delta is not None:
        checks.check_tensor("delta", delta)
        if delta.shape != x.shape:
            expected = f"{list(x.shape)}, the shape of x"
            raise ValueError(complaint("delta", list(delta.shape), expected, "Expand it, or pass None for no delta"))
    elif scale is not None:
        raise ValueError(complaint("scale", "a tensor without delta", "None", "Pass what it scales as delta"))
    for name, tensor in (("weight", weight), ("bias", bias), ("scale", scale)):
        if name == "weight" or tensor is not None:
            checks.check_tensor(name, tensor)
            _check_vector(name, tensor, x.shape[-1])


def _check_vector(name: str, tensor: Any, channels: int) -> None:
    if tensor.dim() != 1 or tensor.shape[0] != channels:
        expected = f"[{channels}], one entry a channel of x"
        raise ValueError(complaint(name, list(tensor.shape), expected, f"Pass the {name} of a norm of this width"))


SETTINGS = "ScalarType dtype, str kind, float eps, str impl"


def _compute(*inputs: Any) -> tuple[torch.Tensor | None, ...]:
    *tensors, dtype, kind, eps, impl, save = inputs
    x = tensors[0]
    module = select.load(impl, "add_norm", "forward", x, x.numel() // x.shape[-1], kind)
    total, normed, *statistics = module.add_norm_forward(*tensors, kind=kind, eps=eps, dtype=dtype, save=save)
    return library.dense((total, normed, *(statistics if save else (None, None))))


def _forward(*inputs: Any) -> tuple[torch.Tensor, ...]:
    return library.present(_compute(*inputs), inputs[0])


def _forward_fake(*inputs: Any) -> tuple[torch.Tensor, ...]:
    *tensors, dtype, kind, _, _, save = inputs
    _check_shapes(*tensors)
    x, delta, *_ = tensors
    total, normed = x.new_empty(x.shape if delta is not None else (0,)), x.new_empty(x.shape, dtype=dtype)
    wide = torch.promote_types(x.dtype, torch.float32)
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=wide) if save else x.new_empty(0) for _ in range(2))
    return total, normed, mean if kind == "layer" else x.new_empty(0), rstd


def _compute_backward(*inputs: Any) -> tuple[torch.Tensor | None, ...]:
    *tensors, _, kind, _, impl, needs = inputs
    total = tensors[2]
    module = select.load(impl, "add_norm", "backward", total, total.numel() // total.shape[-1], kind)
    return library.dense(module.add_norm_backward(*tensors, needs))


def _backward(*inputs: Any) -> tuple[torch.Tensor, ...]:
    return library.present(_compute_backward(*inputs), inputs[2])


def _backward_fake(*inputs: Any) -> tuple[torch.Tensor, ...]:
    _, _, total, _, _, _, weight, scale, *_, needs = inputs
    likes = (total, total, weight, weight, weight if scale is None else scale)
    return tuple(like.new_empty(like.shape) if need else total.new_empty(0) for like, need in zip(likes, needs, strict=True))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, delta, weight, _, scale, *ctx.settings, save = inputs
    total, _, mean, rstd = output
    library.refuse_unsaved("add_norm", save)
    ctx.has_delta = delta is not None
    kept = delta if scale is not None and ctx.needs_input_grad[4] else None
    centre = mean if ctx.settings[1] == "layer" else None
    ctx.save_for_backward(total if ctx.has_delta else x, kept, centre, rstd, weight, scale)


def _differentiate(ctx: Any, dtotal: torch.Tensor | None, dnormed: torch.Tensor | None) -> tuple[Any, ...]:
    total, delta, mean, rstd, weight, scale = ctx.saved_tensors
    x_needs, delta_needs, weight_needs, bias_needs, scale_needs = ctx.needs_input_grad[:5]
    if dnormed is None:  # only the total went on
        dnormed, weight_needs, bias_needs = torch.zeros_like(total), False, False
    plain = delta_needs and scale is None  # its gradient is that of x
    needs = [x_needs or plain, delta_needs and not plain, weight_needs, bias_needs, scale_needs]
    dtotal = dtotal if ctx.has_delta else None
    direct = not torch.is_grad_enabled() and library.is_direct(total, dnormed, dtotal, delta, weight, scale)
    gradients = (_compute_backward if direct else torch.ops.laco.add_norm_backward)(
        dnormed, dtotal, total, delta, mean, rstd, weight, scale, *ctx.settings, needs
    )
    dx, ddelta, *others = library.asked_for(gradients, needs)
    return dx if x_needs else None, dx if plain else ddelta, *others, *[None] * (len(ctx.settings) + 1)


library.define(
    f"add_norm(Tensor x, Tensor? delta, Tensor weight, Tensor? bias, Tensor? scale, {SETTINGS}, bool save)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
library.define(
    "add_norm_backward(Tensor dnormed, Tensor? dtotal, Tensor total, Tensor? delta, Tensor? mean, Tensor rstd, "
    f"Tensor weight, Tensor? scale, {SETTINGS}, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_differentiable = library.differentiate("add_norm", _setup_context, _differentiate, results=2, body=_compute)
