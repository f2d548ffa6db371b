"""What the operators cost: floating-point operations, and bytes moved by each implementation.

``torch.utils.flop_counter`` cannot look inside an operator, so it is told. A multiply-add counts as two operations;
activations, residuals and sums are left out, as it does for torch's own operators.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import register_flop_formula

from laco_kernels.errors import complaint
from laco_kernels.kernels import passes, select
from laco_kernels.ops.library import BODIES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def product_flops(rows: int, *weights: Sequence[int]) -> int:
    """Operations of ``rows`` rows times each weight ``[out, in]``."""
    return 2 * rows * sum(math.prod(weight) for weight in weights)


def _merge(x: Any, weight1: Any, bias1: Any, weight2: Any, *rest: Any, out_shape: Any, **_: Any) -> int:
    prefix = rest[5]
    return product_flops(x[0] * (out_shape[0][1] - prefix), weight1, weight2)


def _mlp(x: Any, weight1: Any, bias1: Any, weight2: Any, *_: Any, **__: Any) -> int:
    return product_flops(math.prod(x[:-1]), weight1, weight2)


def _mlp_backward(grad: Any, x: Any, pre: Any, weight1: Any, weight2: Any, *settings: Any, **_: Any) -> int:
    rows, needs = math.prod(pre[:-1]), settings[-1]
    hidden_gradient = any(needs[:3])
    return product_flops(rows, weight2) * (hidden_gradient + needs[3]) + product_flops(rows, weight1) * (needs[0] + needs[1])


def _linear(x: Any, weight: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    return product_flops(out_shape[0][0] * out_shape[0][1], weight)


def _plain_conv(x: Any, weight: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    return product_flops(out_shape[0] * out_shape[1], weight)


def _plain_conv_backward(grad: Any, x: Any, weight: Any, *settings: Any, **_: Any) -> int:
    needs = settings[-1]
    return product_flops(grad[0] * grad[1], weight) * (needs[0] + needs[1])


def _conv_backward(grad: Any, x: Any, pre: Any, weight: Any, *settings: Any, **_: Any) -> int:
    needs = settings[-1]
    return product_flops(pre[0] * pre[1], weight) * (needs[0] + needs[1])


def _fusion_backward(grad: Any, xs: Any, pre: Any, weight: Any, *settings: Any, **_: Any) -> int:
    needs, whole, blocks = settings[-1], product_flops(pre[0] * pre[1], weight), len(xs)
    return whole * sum(needs[:blocks]) // blocks + whole * needs[-2]


def _packed(x: Any, weights: Any, *_: Any, **__: Any) -> int:
    return product_flops(math.prod(x[:-1]), *weights)


def _packed_backward(grad: Any, x: Any, weights: Any, *settings: Any, **_: Any) -> int:
    needs = settings[-1]
    return product_flops(math.prod(grad[:-1]), *weights) * (needs[0] + needs[1])


FORMULAS: dict[str, Callable[..., int]] = {
    "patch_merge": _merge,
    "patch_merge_backward": _mlp_backward,
    "gelu_mlp": _mlp,
    "gelu_mlp_backward": _mlp_backward,
    "strided_conv_gelu": _linear,
    "strided_conv_gelu_backward": _conv_backward,
    "strided_conv": _plain_conv,
    "strided_conv_backward": _plain_conv_backward,
    "multi_block_linear_gelu": _linear,
    "multi_block_linear_gelu_backward": _fusion_backward,
    "packed_linear": _packed,
    "packed_linear_backward": _packed_backward,
}
for _name, _formula in FORMULAS.items():
    register_flop_formula(getattr(torch.ops.laco, _name))(_formula)

_ATEN = torch.ops.aten
ALLOCATIONS = {_ATEN.empty, _ATEN.new_empty, _ATEN.empty_like, _ATEN.empty_strided, _ATEN.new_empty_strided}
OVERWRITES = {_ATEN.copy_, _ATEN.fill_, _ATEN.zero_}  # in place, without reading what they replace


class Traffic(TorchDispatchMode):
    """Counts the bytes that passes over memory read and write: the tensors of every operator and kernel, once a pass.

    That is what a pass moves where nothing is left in a cache by the pass before and nothing is fetched twice. Views move
    nothing; an expanded tensor counts once, and so does one that a pass reads twice. With ``impl`` the operators ``laco::*``
    run in that implementation, also on the meta device, where nothing is computed::

        with Traffic("triton") as traffic:
            lk.patch_merge(x, weight1, None, weight2, None, grid=(24, 24))  # all on device="meta"
        print(traffic.read, traffic.written)
    """

    def __init__(self, impl: str | None = None) -> None:
        super().__init__()
        if impl is not None and impl not in select.MODULES:
            names = ", ".join(map(repr, select.MODULES))
            raise ValueError(
                complaint("impl", repr(impl), f"one of {names}, which show their passes", "Pass None to count torch")
            )
        self.impl = impl
        self.read = self.written = self._depth = 0

    def __enter__(self) -> Traffic:
        if self._depth == 0:
            passes.LISTENERS.append(self._count)
        self._depth += 1
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._depth -= 1
        if self._depth == 0:
            passes.LISTENERS.remove(self._count)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "laco":
            names = [argument.name for argument in func._schema.arguments]
            values = {**dict(zip(names, args, strict=False)), **kwargs}
            if self.impl is not None and "impl" in values:
                values["impl"] = self.impl
            with self:
                return BODIES[func._schema.name.partition("::")[2]](*values.values())
        out = func(*args, **kwargs)
        if func.overloadpacket not in ALLOCATIONS:
            self._count(*_touched(func, args, kwargs, out))
        return out

    def _count(self, reads: Sequence[torch.Tensor | None], writes: Sequence[torch.Tensor | None]) -> None:
        self.read += sum(_bytes(tensor) for tensor in reads if tensor is not None)
        self.written += sum(_bytes(tensor) for tensor in writes if tensor is not None)


def _touched(func: Any, args: Any, kwargs: Any, out: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return what an operator of torch reads and writes."""
    reads, writes = [], []
    for i, argument in enumerate(func._schema.arguments):
        value = kwargs.get(argument.name, args[i] if i < len(args) else None)
        tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
        written = argument.alias_info is not None and argument.alias_info.is_write
        if written:
            writes += tensors
        if not written or not (argument.kwarg_only or func.overloadpacket in OVERWRITES):
            reads += tensors
    storages = {tensor.untyped_storage()._cdata for tensor in (*reads, *writes)}
    results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
    made = [tensor for tensor in results if tensor.untyped_storage()._cdata not in storages]
    return (reads, writes + made) if made or writes else ([], [])


def _bytes(tensor: torch.Tensor) -> int:
    """Bytes of the distinct elements of ``tensor``."""
    sizes = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or size == 0]
    return math.prod(sizes) * tensor.element_size()
