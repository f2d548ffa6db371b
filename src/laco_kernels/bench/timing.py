"""Timing: variants interleaved in one run, medians with their spread, paired ratios."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


@dataclass(frozen=True)
class Spread:
    """A sample in five numbers, and its size."""

    median: float
    p20: float
    p80: float
    low: float  # the 95 % confidence interval of the median, from the ranks of blocks' medians
    high: float
    rounds: int


BLOCKS = 8


def spread(sample: Sequence[float]) -> Spread:
    """Summarise ``sample``, in the order in which it was taken; it must not be empty.

    One round is like the one before it, so the interval is not of single rounds: those make it cover too little. It is of
    the medians of consecutive blocks, at least eight, which are as good as independent.
    """
    n, median = len(sample), statistics.median(sample)
    fifths = statistics.quantiles(sample, n=5, method="inclusive") if n > 1 else list(sample) * 4
    length = max(n // BLOCKS, 1)
    medians = sorted(statistics.median(sample[i : i + length]) for i in range(0, n - length + 1, length))
    middle, reach = len(medians) / 2, 1.96 * math.sqrt(len(medians)) / 2  # binomial, normal approximation
    low, high = medians[max(math.floor(middle - reach), 0)], medians[min(math.ceil(middle + reach), len(medians) - 1)]
    return Spread(median, fifths[0], fifths[3], min(low, median), max(high, median), n)


def paired_ratio(baseline: Sequence[float], sample: Sequence[float]) -> Spread:
    """Summarise the round-by-round ratios ``baseline / sample``: how many times faster than the baseline."""
    return spread([b / s for b, s in zip(baseline, sample, strict=True)])


def stamp(device: torch.device) -> Any:
    """Mark a moment: a recorded CUDA event on a GPU, the wall clock elsewhere."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(start: Any, stop: Any) -> float:
    """Return the milliseconds between two stamps of one device, waiting for the second to pass."""
    if isinstance(start, float):
        return (stop - start) * 1e3
    stop.synchronize()
    return float(start.elapsed_time(stop))


def milliseconds(call: Callable[[], object], device: torch.device) -> float:
    """Time one call on an otherwise idle ``device``."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = stamp(device)
    call()
    return between(start, stamp(device))


def interleave(
    variants: Mapping[str, Callable[[int], object]],
    device: torch.device,
    *,
    rounds: int | None = None,
    seconds: float = 45.0,
    warmup: int = 1,
    on_call: Callable[[float], None] = lambda _: None,
) -> dict[str, list[float]]:
    """Time the variants in turn, round after round, so that drift of the machine meets all of them alike.

    Args:
        variants: by name, what to time; each is called with the round's number.
        device: where they run.
        rounds: how many rounds; by default as many as ``seconds`` allow, at least 5 and at most 200.
        seconds: time budget for the rounds where ``rounds`` is not given.
        warmup: untimed rounds before.
        on_call: called after every call with how much of the whole is done, for a progress bar.

    Returns:
        Milliseconds by name, one entry a round.
    """
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(warmup):
        for call in variants.values():
            milliseconds(lambda call=call: call(0), device)  # type: ignore[misc]
            on_call(0.0)
    begin = time.perf_counter()
    least, most = (rounds, rounds) if rounds is not None else (5, 200)
    for i in range(most):
        spent = time.perf_counter() - begin
        if i >= least and spent > seconds:
            break
        for name, call in variants.items():
            samples[name].append(milliseconds(lambda call=call, i=i: call(i), device))  # type: ignore[misc]
            on_call(i / most if rounds is not None else min(max(i / most, spent / max(seconds, 1e-9)), i / least))
    return samples
