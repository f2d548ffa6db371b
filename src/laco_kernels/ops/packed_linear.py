"""Several linear layers of one input as one matrix product."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.utils import dlpack

from laco_kernels.errors import complaint
from laco_kernels.ops import checks, library

if TYPE_CHECKING:
    from collections.abc import Sequence


def packed_linear(
    x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor] | None = None
) -> torch.Tensor:
    r"""Apply several linear layers to the same input, with one product forward and two backward.

    .. math:: y = [x W_1^\top + b_1;\; x W_2^\top + b_2;\; \ldots]

    Weights that lie behind each other in memory, as the rows of one matrix that was split or that :func:`lay_together` has
    made, are read where they lie; others are copied together first. For the backward pass it keeps ``x`` where a
    weight has a gradient.

    Args:
        x: ``[..., C]``.
        weights: matrices ``[F_i, C]`` in one dtype.
        biases: vectors ``[F_i]``, one for each weight, or ``None``.

    Returns:
        ``[..., F_1 + F_2 + ...]``, under autocast in its dtype; ``y.split([F_1, F_2, ...], dim=-1)`` are the layers' outputs.
        ``y`` may be written in place under gradients, as a linear layer's output; where it is not used besides, so may each
        output that ``y.unsafe_split_with_sizes`` makes, which ``split``, as everywhere in torch, does not allow.

    Raises:
        TypeError: integer or complex tensors, mixed dtypes outside autocast.
        ValueError: shapes that do not fit together, mixed devices, no weights.
    """
    _check_shapes(x, weights, biases)
    tensors = {"x": x, **{f"weights[{i}]": weight for i, weight in enumerate(weights)}}
    tensors |= {f"biases[{i}]": bias for i, bias in enumerate(biases or ())}
    checks.check_alike(tensors)
    library.know_sharding()
    library.refuse_forward_mode("packed_linear", tensors.values())
    return torch.ops.laco.packed_linear(x, list(weights), list(biases or ()), checks.autocast_dtype(x))


def run_packed_linear(
    x: torch.Tensor,
    whole: torch.Tensor,
    whole_bias: torch.Tensor | None,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
) -> torch.Tensor:
    """:func:`packed_linear` inside an encoder, which keeps :func:`pack` of ``weights`` and ``biases``, detached.

    Without the dispatcher where nothing else looks. The output may be a view to autograd, parts by ``unsafe_split`` are none.
    """
    if not library.is_direct(x, whole, whole_bias) or x.shape[-1:] != whole.shape[1:]:
        return packed_linear(x, weights, biases)
    if library.needs_saving((x, *weights, *biases)):
        return _differentiable(x, whole, whole_bias, len(weights), *weights, *biases)
    return F.linear(x, whole, whole_bias)


class Whole:
    """Memory in which tensors lie behind each other, as the rows of one tensor, each in a storage of its own.

    Whoever saves tensors takes those that share a storage for tied, and drops all but one.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor: torch.Tensor | None = tensor

    def holds(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Return whether these tensors, and nothing else, lie here."""
        return self.tensor is not None and _lie_in(self.tensor, tensors)

    def forget(self) -> None:
        """Let the memory go, once the tensors have left it."""
        self.tensor = None


# By the address of the first row. Who holds a whole keeps its memory, so that nothing else can come to lie at its address.
_wholes: weakref.WeakValueDictionary[tuple[torch.device, int], Whole] = weakref.WeakValueDictionary()


def lay_together(tensors: Sequence[torch.Tensor]) -> Whole:
    """Move tensors behind each other, each into a storage that is but its rows, unless somebody has done so already."""
    whole = _wholes.get(_place(tensors[0]))
    if whole is not None and whole.holds(tensors):
        return whole
    whole = Whole(torch.cat([tensor.detach() for tensor in tensors]))
    assert whole.tensor is not None
    for tensor, rows in zip(tensors, whole.tensor.split([len(tensor) for tensor in tensors]), strict=True):
        tensor.data = dlpack.from_dlpack(rows)
    _wholes[_place(whole.tensor)] = whole
    return whole


def find_whole(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Return the one tensor whose rows these are, where they lie behind each other: of one storage, or laid together."""
    first = tensors[0]
    known, storage = _wholes.get(_place(first)), first.untyped_storage()
    whole = None if known is None else known.tensor
    if whole is None:
        end = first.data_ptr() + sum(tensor.nbytes for tensor in tensors)
        if end > storage.data_ptr() + storage.nbytes():  # the others may be neighbours by accident
            return None
        whole = first.as_strided((sum(len(tensor) for tensor in tensors), *first.shape[1:]), first.stride())
    return whole if _lie_in(whole, tensors) else None


def pack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the rows of all tensors as one tensor: where they lie as one, else a copy."""
    if len(tensors) == 1:
        return tensors[0]
    whole = None if tensors[0].is_meta else find_whole(tensors)
    return torch.cat(list(tensors)) if whole is None else whole


def _place(tensor: torch.Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.data_ptr()


def _lie_in(whole: torch.Tensor, tensors: Sequence[torch.Tensor]) -> bool:
    """Return whether ``tensors`` are the rows of ``whole``, in order and all of them."""
    address, rows, shape = whole.data_ptr(), 0, whole.shape[1:]
    for tensor in tensors:
        if (
            tensor.data_ptr() != address
            or tensor.dtype != whole.dtype
            or tensor.device != whole.device
            or tensor.shape[1:] != shape
            or not tensor.is_contiguous()
        ):
            return False
        rows += tensor.shape[0]
        address += tensor.nbytes
    return rows == whole.shape[0]


def _check_shapes(x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor] | None) -> None:
    checks.check_channels("x", x)
    if not weights:
        raise ValueError(complaint("weights", "none", "one or more matrices", "Pass the weights of the layers to apply"))
    if biases and len(biases) != len(weights):
        expected = f"{len(weights)}, one for each weight"
        raise ValueError(complaint("biases", f"{len(biases)} vectors", expected, "Pass zeros for a layer without a bias"))
    for i, weight in enumerate(weights):
        checks.check_tensor(f"weights[{i}]", weight)
        if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
            expected = f"[out, {x.shape[-1]}], the channels of x"
            raise ValueError(complaint(f"weights[{i}]", list(weight.shape), expected, "Pass layers that read x"))
        if weight.dtype != weights[0].dtype:
            expected = f"{weights[0].dtype}, the dtype of weights[0]"
            raise TypeError(complaint(f"weights[{i}]", weight.dtype, expected, "Convert one of them"))
    for i, (bias, weight) in enumerate(zip(biases or (), weights, strict=False)):
        checks.check_tensor(f"biases[{i}]", bias)
        if bias.shape != weight.shape[:1]:
            expected = f"[{weight.shape[0]}], the rows of weights[{i}]"
            raise ValueError(complaint(f"biases[{i}]", list(bias.shape), expected, "Pass the bias of that layer"))


def _forward(x: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    bias = pack(biases).to(dtype) if biases else None
    y = F.linear(x.to(dtype), pack(weights).to(dtype), bias)
    # No view to autograd, which would refuse that an output of ours is written in place.
    return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y


def _forward_fake(x: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    _check_shapes(x, weights, biases)
    return x.new_empty(*x.shape[:-1], sum(weight.shape[0] for weight in weights), dtype=dtype)


def _backward(
    grad: torch.Tensor, x: torch.Tensor | None, weights: list[torch.Tensor], bias_dtype: torch.dtype, needs: list[bool]
) -> tuple[torch.Tensor, ...]:
    return library.present(_compute_backward(grad, x, pack(weights), bias_dtype, needs), grad)


def _compute_backward(
    grad: torch.Tensor, x: torch.Tensor | None, weight: torch.Tensor, bias_dtype: torch.dtype, needs: Sequence[bool]
) -> tuple[torch.Tensor | None, ...]:
    rows = grad.reshape(-1, grad.shape[-1])
    dx = grad @ weight.to(grad.dtype) if needs[0] else None
    dweight = None
    if needs[1]:  # the only gradient that is made of x, kept for it
        assert x is not None
        dweight = (rows.t() @ x.reshape(-1, x.shape[-1]).to(grad.dtype)).to(weight.dtype)
    wide = torch.promote_types(grad.dtype, torch.float32)
    dbias = rows.sum(0, dtype=wide).to(bias_dtype) if needs[2] else None
    return dx, dweight, dbias


def _backward_fake(
    grad: torch.Tensor, x: torch.Tensor | None, weights: list[torch.Tensor], bias_dtype: torch.dtype, needs: list[bool]
) -> tuple[torch.Tensor, ...]:
    channels = weights[0].shape[1]
    made = (
        grad.new_empty(*grad.shape[:-1], channels),
        weights[0].new_empty(grad.shape[-1], channels),
        grad.new_empty(grad.shape[-1], dtype=bias_dtype),
    )
    return tuple(tensor if need else grad.new_empty(0) for tensor, need in zip(made, needs, strict=True))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weights, biases, _ = inputs
    ctx.needs = [any(tensor.requires_grad for tensor in tensors) for tensors in ((x,), weights, biases)]
    ctx.dtype, ctx.bias_dtype = x.dtype, biases[0].dtype if biases else weights[0].dtype
    ctx.sizes = [weight.shape[0] for weight in weights]
    ctx.has_biases = bool(biases)
    ctx.save_for_backward(x if ctx.needs[1] else None, *weights)


def _differentiate(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    x, *weights = ctx.saved_tensors
    gradients = torch.ops.laco.packed_linear_backward(grad.contiguous(), x, weights, ctx.bias_dtype, ctx.needs)
    dx, dweight, dbias = library.asked_for(gradients, ctx.needs)
    dweights = [None] * len(ctx.sizes) if dweight is None else list(dweight.split(ctx.sizes))
    dbiases = [None] * len(ctx.sizes) if dbias is None else list(dbias.split(ctx.sizes))
    return None if dx is None else dx.to(ctx.dtype), dweights, dbiases if ctx.has_biases else [], None


class _Direct(torch.autograd.Function):
    """The same derivative for :func:`run_packed_linear`, which has lists of tensors taken apart."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, whole: torch.Tensor, whole_bias: torch.Tensor | None, n: int, *parts: Any) -> Any:
        ctx.whole, ctx.n, ctx.bias_dtype = whole, n, whole.dtype if whole_bias is None else whole_bias.dtype
        ctx.sizes, ctx.addresses = [part.shape[0] for part in parts[:n]], [part.data_ptr() for part in parts[:n]]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if any(ctx.needs_input_grad[4 : 4 + n]) else None, *parts[:n])
        return F.linear(x, whole, whole_bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        needs_x, _, _, _, *others = ctx.needs_input_grad
        n, needs = ctx.n, [needs_x, any(others[: ctx.n]), any(others[ctx.n :])]
        x, *weights = ctx.saved_tensors
        if torch.is_grad_enabled() or not library.is_direct(grad, x, *weights):
            made = torch.ops.laco.packed_linear_backward(grad.contiguous(), x, weights, ctx.bias_dtype, needs)
            made = library.asked_for(made, needs)
        else:
            # Where hooks have put copies of the weights aside, these count.
            kept = [weight.data_ptr() for weight in weights] == ctx.addresses
            made = _compute_backward(grad.contiguous(), x, ctx.whole if kept else pack(weights), ctx.bias_dtype, needs)
        dx, *sums = made
        parts = [d for s in sums[: 1 + (len(others) > n)] for d in ([None] * n if s is None else s.split_with_sizes(ctx.sizes))]
        return dx, None, None, None, *[part if need else None for part, need in zip(parts, others, strict=True)]


_differentiable = library.plain_apply(_Direct)
library.define(
    "packed_linear(Tensor x, Tensor[] weights, Tensor[] biases, ScalarType dtype) -> Tensor",
    _forward,
    _forward_fake,
)
library.define(
    "packed_linear_backward(Tensor grad, Tensor? x, Tensor[] weights, ScalarType bias_dtype, bool[] needs)"
    " -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
library.differentiate("packed_linear", _setup_context, _differentiate)
