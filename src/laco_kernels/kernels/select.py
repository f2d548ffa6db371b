"""Which implementation runs an operator, and why another one cannot.

An explicit choice never falls back. The automatic one is the reference wherever nothing faster has been verified.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import TYPE_CHECKING

import torch

from laco_kernels.errors import complaint

if TYPE_CHECKING:
    from types import ModuleType

MODULES = {
    "reference": "laco_kernels.reference",
    "composite": "laco_kernels.kernels.composite",
    "triton": "laco_kernels.kernels.fused",
}
IMPLEMENTATIONS = (*MODULES, "cuda")
AUTO = "auto"


def interpreted() -> bool:
    """Return whether Triton kernels run in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unavailable(impl: str, device: torch.device | None = None, dtype: torch.dtype | None = None) -> str | None:
    """Return why ``impl`` cannot run here (on ``device``, in ``dtype``), or ``None`` where it can."""
    if impl == "reference":
        return None
    if impl == "cuda":
        return "this version of laco_kernels has no CUDA kernels yet"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (it comes with torch's CUDA builds)"
    kind = device.type if device is not None else ("cuda" if torch.cuda.is_available() else "cpu")
    if interpreted():
        if dtype == torch.bfloat16:
            return "Triton's interpreter cannot compute in bfloat16"
        return None if kind == "cpu" else "TRITON_INTERPRET=1 runs kernels on the CPU only"
    if kind != "cuda":
        return "Triton kernels need an NVIDIA GPU (or TRITON_INTERPRET=1, set before Python starts, to interpret them)"
    if torch.version.hip is not None:
        return "the kernels are verified on NVIDIA GPUs only"
    if dtype == torch.float64:
        return "the kernels have no float64 on a GPU"
    return None


def check(impl: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """Validate the public ``impl=`` argument and return what an operator is to be told: a name, or ``"auto"``.

    Raises:
        ValueError: if ``impl`` is no implementation's name.
        RuntimeError: if the implementation asked for cannot run here.
    """
    name = "impl"
    if impl is None:
        impl = os.environ.get("LACO_IMPL") or None
        name = "LACO_IMPL"
        if impl is None:
            return AUTO
    if impl not in IMPLEMENTATIONS:
        names = ", ".join(map(repr, IMPLEMENTATIONS))
        raise ValueError(complaint(name, repr(impl), f"None or one of {names}", "Leave it out for the automatic choice"))
    if reason := unavailable(impl, device, dtype):
        raise RuntimeError(complaint(name, repr(impl), f"an implementation that can run, but {reason}", "Leave it out"))
    return impl


def load(impl: str) -> ModuleType:
    """Return the module that implements the operators; Triton is imported here and not before."""
    return importlib.import_module(MODULES["reference" if impl == AUTO else impl])
