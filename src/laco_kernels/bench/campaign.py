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

from laco_kernels.bench import op_cases, operators
from laco_kernels.bench.environment import clocks, environment
from laco_kernels.bench.gpu_timing import ceilings
from laco_kernels.bench.op_variants import OURS
from laco_kernels.bench.results import Row

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from laco_kernels.bench.op_cases import OpCase
    from laco_kernels.bench.results import Results

    Case = dict[str, Any]
    Measured = list[tuple[Case, str, dict[str, Any]]]  # case, variant, values


@dataclass(frozen=True)
class Unit:
    """One interleaved run: which rows it makes, and how."""

    name: str
    suite: str
    cases: tuple[Case, ...]
    measure: Callable[[], Measured]


@dataclass
class Report:
    """What a campaign did."""

    measured: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)  # measured before at this commit
    left: list[str] = field(default_factory=list)  # no time for them
    failed: dict[str, str] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)


def op_unit(
    case: OpCase,
    device: torch.device,
    *,
    variants: Sequence[str] | None = None,
    autotune: bool = False,
    limits: dict[str, float] | None = None,
    rounds: int | None = None,
    seconds: float = 1.0,
) -> Unit:
    """Return the run of one operator's case; max-autotune competes where a goal is set, and everywhere with ``autotune``."""

    def measure() -> Measured:
        tune = autotune or case.goal is not None
        rivals = operators.contenders(case, device, variants, autotune=tune)
        values = operators.measure_case(case, device, rivals, ceilings=limits, rounds=rounds, seconds=seconds)
        return [(case.facts, name, found) for name, found in values.items()]

    return Unit(str(case), "sweep" if case.sweep else "ops", (case.facts,), measure)


def plan(
    device: torch.device,
    dtype: str,
    *,
    small: bool = False,
    autotune: bool = False,
    limits: dict[str, float] | None = None,
    rounds: int | None = None,
    seconds: float = 1.0,
) -> list[Unit]:
    """Return every unit, the most telling first: operators with a goal, encoders, sweeps, the other operators."""
    from laco_kernels.bench.vec_units import vec_units

    ops, sweeps = op_cases.op_cases(dtype), op_cases.sweep_cases(dtype)
    if small:
        ops, sweeps = op_cases.tiny(ops)[:3], op_cases.tiny(sweeps)[:2]
    options: dict[str, Any] = {"limits": limits, "rounds": rounds, "seconds": seconds}
    units = [op_unit(case, device, autotune=autotune, **options) for case in ops]
    first = [i for i, case in enumerate(ops) if case.goal is not None]
    encoders = vec_units(device, dtype, small=small, rounds=rounds, seconds=8 * seconds)
    growing = [op_unit(case, device, **options) for case in sweeps]
    rest = [unit for i, unit in enumerate(units) if i not in first]
    return [*(units[i] for i in first), *encoders, *growing, *rest]


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

    A unit is expected to take as long as the longest of its suite so far. One that was measured before at this commit on a
    clean checkout is skipped; one that breaks is named, and the rest goes on.
    """
    report, begun = Report(), now()
    longest: dict[str, float] = {}
    block = results.environments[name]
    commit = block["commit"]
    known = {_unit_key(row.suite, row.case, row.commit) for row in results.rows.values()}
    queue = list(units)
    for i, unit in enumerate(queue):
        keys = [_unit_key(unit.suite, case, commit) for case in unit.cases]
        if not str(commit).endswith("*") and all(key in known for key in keys):
            report.skipped.append(unit.name)
            continue
        start = now()
        if budget is not None and start - begun + longest.get(unit.suite, 0.0) > budget:
            report.left.append(unit.name)
            continue
        on_unit(unit.name, i / len(queue))
        try:
            measured = unit.measure()
        except Exception as error:  # whatever broke there, the other units are worth having
            report.failed[unit.name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            if not _answers(device):
                report.left += [later.name for later in queue[i + 1 :]]
                return report
            continue
        longest[unit.suite] = max(longest.get(unit.suite, 0.0), now() - start)
        rows = [Row(unit.suite, case, variant, values, name, commit) for case, variant, values in measured]
        block["clocks_after"] = clocks(device)
        results.add(rows)
        report.measured.append(unit.name)
        report.rows += rows
    return report


def _answers(device: torch.device) -> bool:
    """Whether this process can still use ``device``: after an illegal access it cannot, and a new run resumes here."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
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
