"""Compiling before anything is timed: processes beside each other fill the caches on disk that measuring then reads.

Nearly all the time of an operator's run is torch.compile's and Triton's, on one core. What breaks here breaks nothing: a unit
that was not compiled ahead is compiled when it is measured.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from laco_kernels.bench.campaign import answers

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Job = Callable[[], object]  # that can be pickled

MOST_PROCESSES = 14  # each holds a context on the GPU and the tensors of one case
MOST_SECONDS, SHARE = 90.0, 0.2  # and of a budget
LEAST_SECONDS = 20.0  # below which no process would come to compile anything


def processes(device: torch.device) -> int:
    """Return how many processes compile where nobody says: all cores of a machine with a GPU but two, and none elsewhere."""
    return max(min(len(os.sched_getaffinity(0)) - 2, MOST_PROCESSES), 0) if device.type == "cuda" else 0


def time_for(budget: float | None) -> float:
    """Return how many seconds of a budget may be spent, 0 where they would not do any good."""
    seconds = MOST_SECONDS if budget is None else min(MOST_SECONDS, SHARE * budget)
    return seconds if seconds >= LEAST_SECONDS else 0.0


def warm(
    jobs: Sequence[Job],
    count: int,
    device: torch.device,
    seconds: float,
    on_progress: Callable[[int], object] = lambda _: None,
) -> tuple[int, int]:
    """Do ``jobs`` in ``count`` new processes until all are done or ``seconds`` are over, and end the processes.

    Returns:
        How many jobs were done, and how many of these broke.
    """
    context = multiprocessing.get_context("spawn")
    count = min(count, len(jobs))
    taken = context.Value("i", 0)
    # Without locks, each process its own place: one that is killed may hold a lock.
    done, broken = context.RawArray("i", max(count, 1)), context.RawArray("i", max(count, 1))
    running = [context.Process(target=_work, args=(jobs, device, taken, done, broken, i), daemon=True) for i in range(count)]
    begin, deadline = time.time(), time.monotonic() + seconds
    try:
        with contextlib.suppress(OSError):  # no more processes: then fewer
            for process in running:
                process.start()
        while any(process.is_alive() for process in running) and time.monotonic() < deadline:
            time.sleep(0.1)
            on_progress(sum(done))
    finally:
        for process in running:
            if process.pid is not None:
                process.kill()
                process.join()
        _forget_choices(begin)
    return sum(done), sum(broken)


def _work(jobs: Sequence[Job], device: torch.device, taken: Any, done: Any, broken: Any, place: int) -> None:
    """Do one job after the other, whichever nobody has taken yet."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    torch.set_num_threads(1)
    if device.index is not None:
        torch.cuda.set_device(device)
    torch._inductor.config.compile_threads = 1  # no pool of processes in every process
    while True:
        with taken.get_lock():
            i, taken.value = taken.value, taken.value + 1
        if i >= len(jobs):
            return
        try:
            jobs[i]()
        except Exception:  # measuring the unit will say what it is
            broken[place] += 1
            if not answers(device):
                return  # rather than break all that is left
        done[place] += 1


def _forget_choices(begin: float) -> None:
    """Remove what Inductor found fastest of several configurations since ``begin``: it timed them on a GPU in use."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    for file in Path(cache_dir()).rglob("*.best_config"):
        with contextlib.suppress(OSError):
            if file.stat().st_mtime >= begin - 1:
                file.unlink()
