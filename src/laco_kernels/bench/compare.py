"""``laco bench compare``: two results files, row against row."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from laco_kernels.bench.gpu_timing import COLD, GRAPH, WALL
from laco_kernels.bench.op_variants import OURS

if TYPE_CHECKING:
    from laco_kernels.bench.results import Results, Row


@dataclass(frozen=True)
class Change:
    """One variant of one case in both files: how many times as fast it is now."""

    suite: str
    case: dict[str, Any]
    variant: str
    kind: str
    ratio: float
    low: float  # worst and best that the intervals of both medians allow
    high: float
    broke: bool = False  # had a time, has none now

    @property
    def counts(self) -> bool:
        """Whether the row is of this library: a model, or one of its implementations of an operator."""
        return self.suite in ("vec", "generate", "step") or self.variant in OURS

    def is_slower(self, tolerance: float) -> bool:
        """Whether it lost more than ``tolerance`` (a fraction) beyond what both intervals allow."""
        return self.broke or self.high < 1 - tolerance


def compare(old: Results, new: Results) -> list[Change]:
    """Return what both have, paired row by row, the worst first; a row that lost its time to a failure comes first."""
    before = {_key(row): row for row in old.latest()}
    found = []
    for row in new.latest():
        rival = before.get(_key(row))
        if rival is None or not rival.values["timings"]:
            continue
        facts = (row.suite, row.case, row.variant)
        if not row.values["timings"]:
            found.append(Change(*facts, "-", 0.0, 0.0, 0.0, broke=True))
            continue
        for kind in (GRAPH, COLD, WALL):
            if kind in row.values["timings"] and kind in rival.values["timings"]:
                was, now = rival.values["timings"][kind], row.values["timings"][kind]
                ratio = was["median"] / now["median"]
                found.append(Change(*facts, kind, ratio, was["low"] / now["high"], was["high"] / now["low"]))
                break
    return sorted(found, key=lambda change: change.ratio)


def missing(old: Results, new: Results) -> list[Row]:
    """Return the timed rows of ``old`` that ``new`` does not have."""
    there = {_key(row) for row in new.latest()}
    return [row for row in old.latest() if row.values["timings"] and _key(row) not in there]


def overall(changes: list[Change]) -> float:
    """Return the geometric mean of the ratios."""
    timed = [change.ratio for change in changes if not change.broke]
    return math.exp(sum(map(math.log, timed)) / len(timed)) if timed else math.nan


def _key(row: Row) -> str:
    return json.dumps([row.suite, row.case, row.variant], sort_keys=True)
