"""Who wants to know of kernels that run: what each one reads and writes; what to do on the meta device. Needs no Triton."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    Tensors = Sequence[torch.Tensor | None]

LISTENERS: list[Callable[[Tensors, Tensors], None]] = []
COMPILERS: list[Callable[[Any, tuple[int, ...], dict[str, Any]], None]] = []  # kernel, programs, arguments


def announce(reads: Tensors, writes: Tensors) -> None:
    """Tell every listener of one pass over memory."""
    for listener in LISTENERS:
        listener(reads, writes)
