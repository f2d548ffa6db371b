"""Visual-token compression for multimodal LLMs: fused operators, modules, and real vision encoders around them.

Importing the package touches no GPU, compiles nothing and needs neither Triton nor transformers; ``laco_kernels.hf`` is
loaded on first use and needs the ``hf`` extra.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from laco_kernels import nn
from laco_kernels.ops import (
    activate,
    add_norm,
    gated_silu,
    gelu_mlp,
    multi_block_linear_gelu,
    packed_linear,
    patch_merge,
    strided_conv,
    strided_conv_gelu,
)

__version__ = "0.1.0"
__all__ = [
    "activate",
    "add_norm",
    "gated_silu",
    "gelu_mlp",
    "multi_block_linear_gelu",
    "nn",
    "packed_linear",
    "patch_merge",
    "strided_conv",
    "strided_conv_gelu",
]


def __getattr__(name: str) -> ModuleType:
    if name == "hf":
        return importlib.import_module("laco_kernels.hf")
    raise AttributeError(f"module 'laco_kernels' has no attribute {name!r}")
