"""The public operators: one validated door each in front of the implementations."""

from laco_kernels.ops import library
from laco_kernels.ops.activation import activate, gated_silu
from laco_kernels.ops.add_norm import add_norm
from laco_kernels.ops.block_fusion import multi_block_linear_gelu
from laco_kernels.ops.gelu_mlp import gelu_mlp
from laco_kernels.ops.packed_linear import packed_linear
from laco_kernels.ops.patch_merge import patch_merge
from laco_kernels.ops.strided_conv import strided_conv, strided_conv_gelu

from laco_kernels.ops import cost  # isort: skip  # counts the operators registered above

library.know_sharding()

__all__ = [
    "activate",
    "add_norm",
    "cost",
    "gated_silu",
    "gelu_mlp",
    "multi_block_linear_gelu",
    "packed_linear",
    "patch_merge",
    "strided_conv",
    "strided_conv_gelu",
]
