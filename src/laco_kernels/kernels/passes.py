"""Who wants to know of kernels that run: what each one reads and writes. Needs no Triton."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    Tensors = Sequence[torch.Tensor | None]

LISTENERS: list[Callable[[Tensors, Tensors], None]] = []


def announce(reads: Tensors, writes: Tensors) -> None:
    """Tell every listener of one pass over memory."""
    for listener in LISTENERS:
        listener(reads, writes)
