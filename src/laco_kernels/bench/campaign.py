"""``laco bench all``: everything there is to measure, the most telling first, under a budget; what is done is never redone.

The work is cut into units, each an interleaved run of its own whose rows are put into the results file together. A run that is
killed loses the unit under way and nothing else.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from laco_kernels.bench import operators
from laco_kernels.bench.environment import clocks, environment
from laco_kernels.bench.gpu_timing import ceilings
from laco_kernels.bench.op_variants import OURS
from laco_kernels.bench.results import Row

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from laco_kernels.bench.results import Results

    Case = dict[str, Any]
    Measured = list[tuple[Case, str, dict[str, Any]]]  # case, variant, values


UNKNOWN = 20.0  # seconds that the first unit of a kind is expected to take


@dataclass(frozen=True)
class Unit:
    """One interleaved run: which rows it makes, and how."""

    name: str
    suite: str
    cases: tuple[Case, ...]
    measure: Callable[[], Measured]
    variants: tuple[str, ...] = ()  # that it is to have rows of
    kind: str = ""  # units of one kind take about as long as each other
    compile: Callable[[], object] | None = None  # what measuring needs compiled, by a process of its own: can be pickled


@dataclass
class Report:
    """What a campaign did."""

    measured: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)  # measured before at this commit
    left: list[str] = field(default_factory=list)  # no time for them
    failed: dict[str, str] = field(default_factory=dict)
    lost: bool = False  # the device no longer answers this process
    rows: list[Row] = field(default_factory=list)


def begin(
    results: Results, device: torch.device, dtype: str, commit: str | None, others: Sequence[int] = ()
) -> tuple[str, dict[str, float]]:
    """Look at the machine and measure what it reaches; return the environment's name and the ceilings.

    ``commit`` names the version where git cannot; ``others`` are processes that compute on the device beside this one.
    """
    limits = ceilings(device, getattr(torch, dtype))
    block = {**environment(device), "ceilings": limits, "clocks_before": clocks(device), "clocks_after": None}
    block["other_processes"] = len(others)
    if commit is not None:
        block["commit"] = commit
    return results.begin(block), limits


def pending(units: Iterable[Unit], results: Results, name: str) -> list[Unit]:
    """Return the units that lack rows of this commit; on a changed checkout all do."""
    commit = results.environments[name]["commit"]
    known = {row.key for row in results.rows.values()}

    def is_done(unit: Unit) -> bool:
        keys = [Row(unit.suite, case, variant, {}, "", commit).key for case in unit.cases for variant in unit.variants]
        return not str(commit).endswith("*") and all(key in known for key in keys)

    return [unit for unit in units if not is_done(unit)]


def run(
    units: Iterable[Unit],
    results: Results,
    name: str,
    device: torch.device,
    *,
    budget: float | None = None,
    on_unit: Callable[[str, float], None] = lambda *_: None,
    now: Callable[[], float] = time.monotonic,
) -> Report:
    """Measure the units in turn and keep their rows, until ``budget`` seconds would not suffice for the next one.

    A unit is expected to take as long as the longest of its kind so far, twenty seconds where there was none. One that has all
    its rows at this commit on a clean checkout is skipped; one that breaks is named, and the rest goes on. One after which the
    device no longer answers keeps that as its rows' reason, so that a new run goes on behind it.
    """
    report, begun = Report(), now()
    longest: dict[str, float] = {}
    block = results.environments[name]
    commit = block["commit"]
    everything = list(units)
    queue = pending(everything, results, name)
    report.skipped = [unit.name for unit in everything if unit not in queue]
    for i, unit in enumerate(queue):
        start = now()
        if budget is not None and start - begun + longest.get(unit.kind, UNKNOWN) > budget:
            report.left.append(unit.name)
            continue
        on_unit(unit.name, i / len(queue))
        try:
            measured = unit.measure()
        except Exception as error:  # whatever broke there, the other units are worth having
            report.failed[unit.name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            if not answers(device):
                report.left += [later.name for later in queue[i + 1 :]]
                report.lost = True
                empty = {**operators.EMPTY, "reason": report.failed[unit.name]}
                results.add(
                    Row(unit.suite, case, variant, empty, name, commit) for case in unit.cases for variant in unit.variants
                )
                return report
            continue
        longest[unit.kind] = max(longest.get(unit.kind, 0.0), now() - start)
        rows = [Row(unit.suite, case, variant, values, name, commit) for case, variant, values in measured]
        block["clocks_after"] = clocks(device)
        results.add(rows)
        report.measured.append(unit.name)
        report.rows += rows
    return report


def answers(device: torch.device) -> bool:
    """Whether this process can still use ``device``: after an illegal access it cannot, and a new run resumes here."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
            torch.zeros(1, device=device).add_(1).item()
    except RuntimeError:
        return False
    return True


def _unit_key(suite: str, case: Case, commit: str | None) -> str:
    return json.dumps([suite, case, commit], sort_keys=True)


def furthest(rows: Iterable[Row], count: int = 5) -> list[tuple[Row, float]]:
    """Return the cases that are furthest from their goal: our best row of each, and its ratio over the goal's."""
    best: dict[str, tuple[Row, float]] = {}
    for row in rows:
        goal = row.values.get("goal")
        reached = row.values.get(f"ratio_{goal['against']}") if goal and row.variant in OURS else None
        if not goal or not reached:
            continue
        share = reached["median"] / goal["ratio"]
        key = _unit_key(row.suite, row.case, None)
        if key not in best or share > best[key][1]:
            best[key] = (row, share)
    return sorted(best.values(), key=lambda found: found[1])[:count]
