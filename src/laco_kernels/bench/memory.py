"""Peak memory of a forward pass."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from collections.abc import Callable


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of the storages that operators return, as long as they live; ``peak`` is the most at one time.

    Exact and repeatable on any device; an operator's internal workspace does not show.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and _storage(leaf) not in known:
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, size)

    def _forget(self, size: int) -> None:
        self.live -= size


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Return the most bytes that ``call`` held at one time beyond what was there before.

    From the allocator on a GPU; elsewhere counted over the tensors that operators return.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        # What was requested, not the allocator's blocks, whose sizes depend on what was freed before.
        before = torch.cuda.memory_stats(device)["requested_bytes.all.current"]
        call()
        torch.cuda.synchronize(device)
        return int(torch.cuda.memory_stats(device)["requested_bytes.all.peak"] - before)
    with LiveTensors() as live:
        call()
    return live.peak
