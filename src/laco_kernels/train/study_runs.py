"""The runs of a study, carried out by several processes and kept: what is finished is never run again.

Every run is a small JSON file of its own, named after a hash of all that its outcome depends on: the weights of the tower, what
stands inside it, the seed, the settings, the versions of what computes. An interrupted study goes on where it stopped, and a
study of other settings finds none of its files.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import multiprocessing
import os
import threading
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import connection
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import torch
import transformers

from laco_kernels.errors import complaint
from laco_kernels.geometry import integer
from laco_kernels.train.checkpoint import write_whole
from laco_kernels.train.study import Arm, Outcome, Settings, digest, fine_tune, one_thread
from laco_kernels.train.tiny_tower import WIDTH, QuadrantReader, TinyTower, build_tiny_tower, pretrain_tiny_tower

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

#: Raised whenever the code changes such that the same settings give another outcome.
FORMAT = 1
ENCODER, READER = "encoder.", "reader."


@dataclass(frozen=True)
class Run:
    """One arm with one seed, and what came of it."""

    arm: Arm
    seed: int
    outcome: Outcome


@dataclass(frozen=True)
class _Job:
    """All that a run depends on."""

    arm: Arm
    seed: int
    settings: Settings
    tower: str  # SHA-256 of its weights
    device: str

    def key(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), **_versions()}

    def path(self, work: Path) -> Path:
        return work / f"run-{_hash(self.key())}.json"


def prepare_tower(
    work: Path, steps: int, seed: int = 0, on_step: Callable[[str, float], None] = lambda *_: None
) -> tuple[TinyTower, Path]:
    """Return the tower pretrained for ``steps``, and its file: kept in ``work``, or pretrained and kept now.

    It is pretrained on one thread, so that it is the same whatever the machine is busy with.

    Raises:
        TypeError, ValueError: a number is out of range.
        RuntimeError: the file is damaged.
        OSError: it cannot be written.
    """
    path = work / f"tower-{_hash({'steps': steps, 'seed': seed, **_versions()})}.safetensors"
    if not path.exists():
        with one_thread():
            tower = pretrain_tiny_tower(steps=steps, seed=seed, on_step=on_step)
        facts = {"accuracy": repr(tower.accuracy), "steps": str(steps), "seed": str(seed)}
        write_whole(path, safetensors.torch.save(_tensors(tower), facts))
    return load_tower(path), path


def load_tower(path: Path) -> TinyTower:
    """Load a tower of :func:`prepare_tower`; RuntimeError where the file is damaged."""
    encoder, reader = build_tiny_tower(), QuadrantReader(WIDTH)
    try:
        with safetensors.safe_open(path, "pt") as file:
            facts = file.metadata()
        tensors = safetensors.torch.load_file(path)
        for prefix, module in ((ENCODER, encoder), (READER, reader)):
            found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            module.load_state_dict(found)
        accuracy, steps, seed = float(facts["accuracy"]), int(facts["steps"]), int(facts["seed"])
    except Exception as error:  # a damaged file raises whatever its reader raises
        raise _damaged(path, error) from error
    encoder.eval().requires_grad_(False)
    reader.eval().requires_grad_(False)
    return TinyTower(encoder, reader, accuracy, steps, seed)


def carry_out(
    tower_path: Path,
    arms: Sequence[Arm],
    seeds: int,
    settings: Settings,
    work: Path,
    *,
    jobs: int = 1,
    device: str = "cpu",
    on_run: Callable[[Run, bool], None] = lambda *_: None,
) -> list[Run]:
    """Return the runs of all ``arms`` with seeds 0 to ``seeds - 1``, in this order; those that ``work`` holds are read from it.

    Args:
        tower_path: the tower's file.
        arms: what is put inside.
        seeds: how many.
        settings: how each is trained.
        work: the folder for finished runs; made where there is none.
        jobs: processes that run at once, on one thread each; one computes here.
        device: where.
        on_run: called for every run with whether it was read: first for those that were, then as others finish.

    Raises:
        TypeError, ValueError: ``seeds`` or ``jobs`` is no positive integer.
        RuntimeError: a file in ``work`` is damaged, a loss is not finite, or a process has died.
        OSError: a run cannot be written.
    """
    integer("seeds", seeds, 1), integer("jobs", jobs, 1)
    weights = digest(_tensors(load_tower(tower_path)))
    todo = [_Job(arm, seed, settings, weights, device) for seed in range(seeds) for arm in arms]
    done: dict[_Job, Run] = {}
    for job in todo:
        if (outcome := _read(job, work)) is not None:
            done[job] = Run(job.arm, job.seed, outcome)
            on_run(done[job], True)
    for job, outcome in _finish([job for job in todo if job not in done], tower_path, work, jobs):
        done[job] = Run(job.arm, job.seed, outcome)
        on_run(done[job], False)
    return sorted(done.values(), key=lambda run: (arms.index(run.arm), run.seed))


def _finish(todo: Sequence[_Job], tower_path: Path, work: Path, jobs: int) -> Iterator[tuple[_Job, Outcome]]:
    if jobs == 1 or len(todo) < 2:
        tower = load_tower(tower_path)
        for job in todo:
            yield job, _run(job, tower, work)
        return
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(min(jobs, len(todo)), context, _begin, (tower_path,))
    try:
        futures = {pool.submit(_run_there, job, work): job for job in todo}
        for future in concurrent.futures.as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        remedy = "Start the same command again: it goes on with what is finished; use fewer jobs where memory is short"
        raise RuntimeError(complaint("jobs", f"{jobs}, of which one has died", "processes that finish", remedy)) from error
    finally:
        pool.shutdown(cancel_futures=True)


_tower: TinyTower  # in the processes that :func:`_finish` starts


def _begin(tower_path: Path) -> None:
    global _tower
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_follow, args=(parent.sentinel,), daemon=True).start()
    _tower = load_tower(tower_path)


def _follow(parent: int) -> None:
    """End this process with its parent, also where that was killed and could not say so."""
    connection.wait([parent])
    os._exit(1)


def _run_there(job: _Job, work: Path) -> Outcome:
    return _run(job, _tower, work)


def _run(job: _Job, tower: TinyTower, work: Path) -> Outcome:
    outcome = fine_tune(tower, job.arm, job.seed, job.settings, job.device)
    data = {"key": job.key(), "outcome": dataclasses.asdict(outcome)}
    write_whole(job.path(work), (json.dumps(data, indent=2) + "\n").encode())
    return outcome


def _read(job: _Job, work: Path) -> Outcome | None:
    path = job.path(work)
    if not path.exists():
        return None
    try:
        data = json.loads(path.read_bytes())
        if data["key"] != job.key():
            raise ValueError("it is of another run")
        return Outcome(**data["outcome"])
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from error


def _tensors(tower: TinyTower) -> dict[str, torch.Tensor]:
    parts = ((ENCODER, tower.encoder), (READER, tower.reader))
    return {prefix + name: tensor for prefix, module in parts for name, tensor in module.state_dict().items()}


def _versions() -> dict[str, Any]:
    return {"format": FORMAT, "torch": torch.__version__, "transformers": transformers.__version__}


def _hash(key: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def _damaged(path: Path, error: Exception) -> RuntimeError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    remedy = "Delete this file, and start the same command again"
    return RuntimeError(complaint("work", f"{str(path)!r} ({reason})", "a file as it was written", remedy))
