"""What one stored row says: its time, its ratios, its tick, and why it has no time."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from laco_kernels.bench.page.text import number

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from laco_kernels.bench.results import Row

EAGER = ("eager", "eager-conv")
COMPILED = ("compile", "compile-max-autotune")
OURS = ("composite", "triton", "cuda")
VARIANTS = (*EAGER, *COMPILED, *OURS, "products")
BASELINES = {"eager": EAGER, "compile": COMPILED}
WARM = ("graph", "wall")
KINDS = ("graph", "cold", "wall")  # the first that all variants of a case have is what they are compared by


class Interval(NamedTuple):
    """A median, the interval that it lies in, and the 20th and 80th percentile of the sample."""

    median: float
    low: float
    high: float
    p20: float = math.nan
    p80: float = math.nan


def interval(entry: Any) -> Interval | None:
    """Read an interval; percentiles and bounds stand in for each other where one of them is missing."""
    if not isinstance(entry, dict):
        return None
    median = number(entry.get("median"))
    if median is None or median <= 0:
        return None
    pairs = (("low", "p20"), ("high", "p80"), ("p20", "low"), ("p80", "high"))
    found = (number(entry.get(name, entry.get(other))) for name, other in pairs)
    return Interval(median, *(bound if bound is not None and bound > 0 else median for bound in found))


def times(row: Row) -> dict[str, Interval]:
    """Return the times of a row by kind in microseconds; none where it has a reason or failed its tick."""
    stored = row.values.get("timings")
    if row.values.get("ok") is False or row.values.get("reason") or not isinstance(stored, dict):
        return {}
    read = {kind: interval(stored.get(kind)) for kind in KINDS}
    return {kind: time for kind, time in read.items() if time is not None}


def warm(row: Row) -> Interval | None:
    """Return the time with warm caches on a GPU, the wall clock elsewhere."""
    found = times(row)
    return next((found[kind] for kind in WARM if kind in found), None)


def kind_of(rows: Iterable[Row]) -> str:
    """Return the kind of time that all rows have which have any; without one the kind that most have."""
    found = [set(times(row)) for row in rows if times(row)]
    return max(KINDS, key=lambda kind: sum(kind in kinds for kinds in found))


def ratio(row: Row, against: str) -> Interval | None:
    """Return a ratio of a row that has a time: ``"eager"``, ``"compile"``, or ``""`` for VEC's."""
    return interval(row.values.get(f"ratio_{against}" if against else "ratio")) if times(row) else None


def roofline(row: Row) -> float | None:
    """Return the fraction of the roofline that a row with a time reaches."""
    return number(row.values.get("roofline")) if times(row) else None


def tick(row: Row) -> str:
    """``yes``, ``NO``, or ``-`` where there was nothing to compare with."""
    return {True: "yes", False: "NO"}.get(row.values.get("ok"), "-")  # type: ignore[arg-type]


def error(row: Row) -> str:
    """The error of a row beside what it may be."""
    found, budget = number(row.values.get("error")), number(row.values.get("budget"))
    if found is None:
        return ""
    return f"{found:.1e}" if budget is None else f"{found:.1e} of {budget:.1e}"


def why(row: Row) -> str:
    """Say why a row has no time."""
    reason = str(row.values.get("reason") or "")
    if row.values.get("ok") is False:
        reason = reason or "the correctness tick failed"
        return f"{reason} (error {error(row)})" if error(row) else reason
    return reason or "no reason recorded"


def variant_order(row: Row) -> tuple[int, str]:
    """Sort baselines first, then ours, then the floor."""
    known = row.variant in VARIANTS
    return (VARIANTS.index(row.variant) if known else len(VARIANTS), row.variant)


def fastest(rows: Sequence[Row], variants: Iterable[str]) -> Row | None:
    """Return the fastest of ``variants`` among the rows of one case."""
    kind = kind_of(rows)
    timed = [(found.median, row) for row in rows if row.variant in variants and (found := times(row).get(kind)) is not None]
    return min(timed, key=lambda pair: (pair[0], pair[1].variant))[1] if timed else None
