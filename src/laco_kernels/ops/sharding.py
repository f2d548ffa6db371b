"""How the operators run on ``DTensor``: every mesh dimension is either replicated or splits the batch.

Importing this module registers the rules. The public functions import it as soon as ``torch.distributed.tensor`` has been
imported by anyone (:func:`laco_kernels.ops.library.know_sharding`), so that importing the package does not cost that import;
code that calls ``torch.ops.laco`` on a ``DTensor`` itself imports this module first.

DTensor caches what it infers from an operator's fake, and of the arguments that are no tensors it looks at those from the
first ``int`` on, which a ``ScalarType`` is too. So in every schema where these decide shapes or dtypes of the outputs, an
``int`` comes first after the tensors, and ``needs`` and ``save`` last. And the first argument is never left out: it is the only
one where DTensor of torch 2.11 looks for the device mesh.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

if TYPE_CHECKING:
    from torch.distributed.tensor.placement_types import Placement


def rules(results: int, sums: int, activations: int, weights: int) -> list[tuple[list[Placement], list[Placement]]]:
    """Return the acceptable placements of outputs and of tensor inputs: all replicated, or batch-sharded.

    Outputs are ``results`` with a batch, then ``sums`` over the batch (gradients of weights and biases); inputs are
    ``activations`` with a batch, then ``weights``.
    """
    replicated: list[Placement] = [Replicate()]
    batch: list[Placement] = [Shard(0)]
    summed: list[Placement] = [Partial("sum")]
    return [
        (replicated * (results + sums), replicated * (activations + weights)),
        (batch * results + summed * sums, batch * activations + replicated * weights),
    ]


def _merge(x: Any, weight1: Any, bias1: Any, weight2: Any, bias2: Any, *_: Any) -> Any:
    return rules(2, 0, 1, 2 + (bias1 is not None) + (bias2 is not None))


def _merge_backward(*_: Any) -> Any:
    return rules(1, 4, 3, 2)


def _mlp(x: Any, *parameters: Any) -> Any:
    return _with_batch(x, _merge(x, *parameters))


def _mlp_backward(grad: Any, x: Any, *_: Any) -> Any:
    return _with_batch(grad, rules(1, 4, 2 + (x is not None), 2))


def _conv(x: Any, weight: Any, bias: Any, *_: Any) -> Any:
    return rules(2, 0, 1, 1 + (bias is not None))


def _conv_backward(*_: Any) -> Any:
    return rules(1, 2, 3, 1)


def _plain_conv(x: Any, weight: Any, bias: Any, *_: Any) -> Any:
    return rules(1, 0, 1, 1 + (bias is not None))


def _plain_conv_backward(*_: Any) -> Any:
    return rules(1, 2, 2, 1)


def _fusion(xs: Any, weight: Any, bias: Any, *_: Any) -> Any:
    return rules(2, 0, len(xs), 1 + (bias is not None))


def _norm(x: Any, delta: Any, weight: Any, bias: Any, scale: Any, *_: Any) -> Any:
    return _with_batch(x, rules(4, 0, 1 + (delta is not None), 1 + (bias is not None) + (scale is not None)))


def _norm_backward(
    dnormed: Any, dtotal: Any, total: Any, delta: Any, mean: Any, rstd: Any, weight: Any, scale: Any, *_: Any
) -> Any:
    activations = 3 + sum(tensor is not None for tensor in (dtotal, delta, mean))
    return _with_batch(total, rules(2, 3, activations, 1 + (scale is not None)))


def _activation(h: Any, *_: Any) -> Any:
    return _with_batch(h, rules(1, 0, 1, 0))


def _activation_backward(grad: Any, h: Any, *_: Any) -> Any:
    return _with_batch(h, rules(1, 0, 2, 0))


def _packed(x: Any, weights: Any, biases: Any, *_: Any) -> Any:
    return _with_batch(x, rules(1, 0, 1, len(weights) + len(biases)))


def _packed_backward(grad: Any, x: Any, weights: Any, *_: Any) -> Any:
    return _with_batch(grad, rules(1, 2, 1 + (x is not None), len(weights)))


def _with_batch(x: Any, placements: list[Any]) -> list[Any]:
    """Leave the batch-sharded placements out where the only dimension of ``x`` is its channels."""
    return placements[: 2 if x.ndim > 1 else 1]


RULES = {
    "patch_merge": _merge,
    "patch_merge_backward": _merge_backward,
    "gelu_mlp": _mlp,
    "gelu_mlp_backward": _mlp_backward,
    "strided_conv_gelu": _conv,
    "strided_conv_gelu_backward": _conv_backward,
    "strided_conv": _plain_conv,
    "strided_conv_backward": _plain_conv_backward,
    "multi_block_linear_gelu": _fusion,
    "add_norm": _norm,
    "add_norm_backward": _norm_backward,
    "gated_silu": _activation,
    "gated_silu_backward": _activation_backward,
    "activate": _activation,
    "activate_backward": _activation_backward,
    "packed_linear": _packed,
    "packed_linear_backward": _packed_backward,
}
for _name, _rule in RULES.items():
    register_sharding(getattr(torch.ops.laco, _name).default)(_rule)


def _register_fusion_backward() -> None:
    """Register what ``register_sharding`` cannot: it counts the outputs in a schema and takes ``Tensor[]`` for one."""
    from torch.distributed.tensor._op_schema import OpSchema, OpStrategy, RuntimeSchemaInfo
    from torch.distributed.tensor._ops.utils import expand_to_full_mesh_op_strategy

    def strategy(schema: OpSchema) -> OpStrategy:
        blocks = len(schema.args_strategy) - 3
        placements: Any = [outputs + inputs for outputs, inputs in rules(blocks, 2, blocks + 2, 1)]
        return expand_to_full_mesh_op_strategy(schema.get_mesh_from_args(), schema, placements, input_index=blocks + 2)

    operator = torch.ops.laco.multi_block_linear_gelu_backward.default
    info = RuntimeSchemaInfo(static_argnum=4, needs_pytree=True)
    DTensor._op_dispatcher.sharding_propagator.register_op_strategy(operator, strategy, info)


with contextlib.suppress(ImportError, AttributeError):  # torch's own; without them DTensor refuses this one operator
    _register_fusion_backward()
