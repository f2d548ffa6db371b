"""Timing what takes microseconds: by clock on a processor; cold caches and replayed graphs on a GPU."""

from __future__ import annotations

import gc
import statistics
import time
from typing import TYPE_CHECKING, Any

import torch

from laco_kernels.bench.timing import between, milliseconds, stamp

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

WALL, COLD, GRAPH = "wall", "cold", "graph"
REPLAY_MS, MOST_CALLS = 1.0, 50  # a replayed graph holds as many calls as fit into about this
SLEEP_CYCLES = 4_000_000  # two milliseconds, in which a processor launches everything that is timed
ROUNDS = 10  # the fewest; what was measured less often chooses no implementation
FLUSH_BYTES = 256 * 2**20  # more than any L2 cache holds


class Replay:
    """Some calls in a row, captured as one CUDA graph; ``milliseconds`` is the time of one of them."""

    def __init__(self, make: Callable[[], Callable[[], object]], device: torch.device) -> None:
        """Capture what ``make`` returns; it is made on the stream that captures, where its backward pass then runs too."""
        before = torch.cuda.current_stream()
        gc.collect()  # else it may free something while the graph is captured
        side = torch.cuda.Stream()
        side.wait_stream(before)
        try:
            with torch.cuda.stream(side):
                call = make()
                for _ in range(3):
                    call()
                side.synchronize()
            self.calls = 1
            self.graph = self._capture(call, side)
            # A replay is timed, not a call: that would be the time of launching it.
            wanted = round(REPLAY_MS / max(self.milliseconds(device), 1e-3))
            if wanted > 1:
                self.calls = min(wanted, MOST_CALLS)
                self.graph = self._capture(call, side)
        finally:
            torch.cuda.set_stream(before)  # a capture that fails leaves the other one behind
            torch.cuda.empty_cache()  # and at worst an allocator that can do no more, which had better be known at once
        self.kept = call  # what the graph reads must live as long as it does

    def _capture(self, call: Callable[[], object], stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(self.calls):
                call()
        return graph

    def milliseconds(self, device: torch.device) -> float:
        """Time one replay behind another one, during which it is launched."""
        torch.cuda.synchronize(device)
        self.graph.replay()
        start = stamp(device)
        self.graph.replay()
        return between(start, stamp(device)) / self.calls


class Clock:
    """How one variant is timed on one device: every kind of time it has, in microseconds."""

    def __init__(self, make: Callable[[], Callable[[], object]], device: torch.device) -> None:
        self.device = device
        self.replay: Replay | None = None
        self.reason: str | None = None
        if device.type == "cuda":
            try:
                self.replay = Replay(make, device)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # what synchronises cannot be captured
                self.reason = str(error).partition("\n")[0]
                torch.cuda.synchronize(device)
        self.call = make()
        for _ in range(2):
            self.call()

    def round(self, flush: torch.Tensor | None) -> dict[str, float]:
        """Take every kind of time once."""
        if flush is None:
            return {WALL: 1e3 * milliseconds(self.call, self.device)}
        taken = {}
        if self.replay is not None:
            taken[GRAPH] = 1e3 * self.replay.milliseconds(self.device)
        torch.cuda._sleep(SLEEP_CYCLES)
        flush.zero_()
        start = stamp(self.device)
        self.call()
        taken[COLD] = 1e3 * between(start, stamp(self.device))
        return taken


def rounds_of(
    clocks: Mapping[str, Clock], device: torch.device, *, rounds: int | None, seconds: float
) -> dict[str, dict[str, list[float]]]:
    """Time the variants in turn, round after round; microseconds by variant and kind.

    ``rounds`` of them, or as many as ``seconds`` allow: at least ten, at most 200. Every other round goes backwards, so that
    what runs before a variant does not always do so.
    """
    flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device=device) if device.type == "cuda" else None
    samples: dict[str, dict[str, list[float]]] = {name: {} for name in clocks}
    begin = time.perf_counter()
    least, most = (rounds, rounds) if rounds is not None else (ROUNDS, 200)
    for i in range(most):
        if i >= least and time.perf_counter() - begin > seconds:
            break
        order = list(clocks.items())
        for name, clock in order if i % 2 == 0 else reversed(order):
            for kind, value in clock.round(flush).items():
                samples[name].setdefault(kind, []).append(value)
    return samples


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Measure what this device reaches: a large matrix product in TFLOP/s, a large copy in GB/s read and written."""
    on_gpu = device.type == "cuda"
    n, count = (8192, 2**29) if on_gpu else (1024, 2**25)
    left, right = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(left)
    source = torch.empty(count, device=device, dtype=torch.uint8).random_()
    target = torch.empty_like(source)
    product = _best(lambda: torch.mm(left, right, out=out), device)
    copy = _best(lambda: target.copy_(source), device)
    return {"tflops": 2 * n**3 / product / 1e9, "gbs": 2 * count / copy / 1e6}


def _best(call: Callable[[], Any], device: torch.device) -> float:
    for _ in range(3):
        call()
    return statistics.median(milliseconds(call, device) for _ in range(15))
