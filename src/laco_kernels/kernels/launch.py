"""What the Triton launchers share."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
import triton.language as tl
from triton.compiler import CompiledKernel

from laco_kernels.kernels.activation import ERF, QUICK, TANH
from laco_kernels.kernels.passes import COMPILERS, LISTENERS, announce
from laco_kernels.kernels.select import interpreted

if TYPE_CHECKING:
    from collections.abc import Callable

    from laco_kernels.kernels.passes import Tensors

INTERPRETED = interpreted()
PLANS = 4096  # of a kernel, to keep: one for each set of sizes and strides
ALIGNMENT = 16  # bytes; Triton compiles a kernel anew for an address that is no multiple


def launch(
    kernel: Any,
    programs: tuple[int, ...],
    device: torch.device,
    touches: Callable[[], tuple[Tensors, Tensors]],
    **arguments: Any,
) -> None:
    """Run ``kernel`` on a grid of ``programs``; ``touches`` returns what it reads and writes, for those who count bytes.

    On the meta device nothing runs; it is compiled where that is what somebody wants.
    """
    if LISTENERS:
        announce(*touches())
    if device.type == "meta":
        for compile_ in COMPILERS:
            compile_(kernel, programs, arguments)
        return
    # Triton launches on the current device, whatever device its arguments are on.
    here = device.type != "cuda" or device.index == torch.cuda.current_device()
    with contextlib.nullcontext() if here else torch.cuda.device(device):
        kernel[programs](**arguments)


class Plan:
    """A kernel with its grid and all arguments but the tensors; the tensors' parameters come first in its signature.

    Triton looks at every argument of every call to find what it has compiled, which takes several times as long as a launch. A
    plan, kept for the calls of the same sizes, strides and options, remembers what Triton found for tensors of these dtypes.
    """

    def __init__(self, kernel: Any, programs: tuple[int, ...], **arguments: Any) -> None:
        self.kernel = kernel
        self.programs = programs
        self.arguments = arguments
        self.values = [arguments[name] for name in kernel.arg_names if name in arguments]
        self.compiled: dict[tuple[Any, ...], Callable[..., None]] = {}

    def launch(self, device: torch.device, touches: Callable[[], tuple[Tensors, Tensors]], **tensors: torch.Tensor) -> None:
        """Run the kernel, as :func:`launch`; ``tensors`` are in the order of its signature."""
        if LISTENERS or INTERPRETED or device.type == "meta":
            launch(self.kernel, self.programs, device, touches, **tensors, **self.arguments)
            return
        # Triton launches on the current device, whatever device its arguments are on.
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                self.launch(device, touches, **tensors)
            return
        key: list[Any] = [device.index]
        addresses = 0
        for tensor in tensors.values():
            addresses |= tensor.data_ptr()
            key.append(tensor.dtype)
        compiled = None if addresses % ALIGNMENT else self.compiled.get(tuple(key))
        if compiled is not None:
            compiled(*tensors.values(), *self.values)
            return
        made = self.kernel[self.programs](**tensors, **self.arguments)
        if addresses % ALIGNMENT == 0 and isinstance(made, CompiledKernel):
            self.compiled[tuple(key)] = made[(*self.programs, 1, 1)[:3]]


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """Return the dtype that a kernel accumulates ``dtype`` in."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def accumulator_torch(dtype: torch.dtype) -> torch.dtype:
    """Return the same as a torch dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def activation_code(approximate: str) -> int:
    """Return the kernels' number for a GELU."""
    return {"none": ERF, "tanh": TANH, "sigmoid": QUICK}[approximate]


def is_cheap(dtype: torch.dtype) -> bool:
    """Return whether rounding to ``dtype`` hides the error of the cheap Phi."""
    return dtype in (torch.float16, torch.bfloat16)


def precision(dtype: torch.dtype) -> str:
    """Return how products of ``dtype`` are taken: those of float32 as torch's own are."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
