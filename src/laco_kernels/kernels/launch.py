"""What the Triton launchers share."""

from __future__ import annotations

import os

import torch
import triton.language as tl

from laco_kernels.kernels.activation import ERF, TANH

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """Return the dtype that a kernel accumulates ``dtype`` in."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def accumulator_torch(dtype: torch.dtype) -> torch.dtype:
    """Return the same as a torch dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def activation_code(approximate: str) -> int:
    """Return the kernels' number for a GELU."""
    return ERF if approximate == "none" else TANH


def is_cheap(dtype: torch.dtype) -> bool:
    """Return whether rounding to ``dtype`` hides the error of the cheap Phi."""
    return dtype in (torch.float16, torch.bfloat16)


def precision() -> str:
    """Return how float32 products are taken: as torch's own are."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
