"""Where we lose: rows that are slower, goals that are missed, rows that have no time."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, TypeVar

from laco_kernels.bench.page import rows as read
from laco_kernels.bench.page import text
from laco_kernels.bench.page.grouping import OPS, Case, cases
from laco_kernels.bench.page.rows import Interval
from laco_kernels.bench.page.tables import Cell, Table
from laco_kernels.bench.page.views import ratio_cell, roofline_cell, time_cell

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from laco_kernels.bench.page.devices import Device
    from laco_kernels.bench.results import Row

COMPARISONS = {
    ("eager", read.WARM): "vs eager",
    ("compile", read.WARM): "vs compile",
    ("eager", ("cold",)): "cold, vs eager",
    ("compile", ("cold",)): "cold, vs compile",
}


def losing(device: Device, *, brief: bool = False) -> Table:
    """Every row of ours whose interval lies below the best eager or compiled one, worst first.

    ``brief`` is for narrow pages: below headings, without times, and with cold caches only where nothing else shows a loss.
    """
    found = [
        (lost, case, row)
        for suite in OPS
        for case in cases(device.suite(suite))
        for row in case.rows
        if row.variant in read.OURS and (lost := _lost(row, case)) is not None
    ]
    table = Table(("case", "ours", *COMPARISONS.values(), "time", "run"))
    found.sort(key=lambda loss: loss[0])
    is_warm = True
    for label, (_, case, row) in _labelled(table, found, lambda loss: loss[1], brief):
        ratios = [ratio_cell(comparison(row, case, *kind)) for kind in COMPARISONS]
        is_warm &= "bad" in [cell.kind for cell in ratios[:2]]
        time = time_cell(read.warm(row)) if device.gpu else Cell()
        table.add(label, row.variant, *ratios, time, device.run(row))
    if brief:
        table = table.without("time", "run", *(list(COMPARISONS.values())[2:] if is_warm else []))
    return table.trimmed()


T = TypeVar("T")


def _labelled(table: Table, found: Sequence[T], case_of: Callable[[T], Case], brief: bool) -> Iterator[tuple[Cell, T]]:
    """Yield what was found with its label: a full one, or a short one below a heading for each operator and way."""
    if not brief:
        yield from ((case_of(entry).full_label, entry) for entry in found)
        return

    def heading(entry: T) -> str:
        facts = case_of(entry).case
        sweep = f"sweep of {facts['sweep']}" if facts.get("sweep") else ""
        return ", ".join(filter(None, [str(facts.get("op", "operator")), text.way(facts), sweep]))

    for name, entries in itertools.groupby(sorted(found, key=heading), key=heading):
        table.head(name)
        yield from ((case_of(entry).label, entry) for entry in entries)


def lost_cases(device: Device) -> tuple[int, int]:
    """In how many cases even the fastest of ours is such a row, and how many cases ours have a time in."""
    groups = [case for suite in OPS for case in cases(device.suite(suite))]
    best = [(row, case) for case in groups if (row := read.fastest(case.rows, read.OURS)) is not None]
    return sum(_lost(row, case) is not None for row, case in best), len(best)


def _lost(row: Row, case: Case) -> float | None:
    """Return by how much a row loses at worst."""
    ratios = [ratio for kind in COMPARISONS if (ratio := comparison(row, case, *kind)) is not None]
    return min((ratio.median for ratio in ratios if ratio.high < 1), default=None)


def comparison(row: Row, case: Case, against: str, kinds: Sequence[str]) -> Interval | None:
    """Return how many times faster a row is than the best ``"eager"`` or ``"compile"`` variant of its case.

    That is the paired ratio where it was taken of such a time; else what the two times and their intervals say, if they are
    of one run.
    """
    run = [other for other in case.rows if other.environment == row.environment]
    if row.values.get("ratio_kind", read.kind_of(run)) in kinds and (paired := read.ratio(row, against)) is not None:
        return paired
    found = {other.variant: time for other in run for kind in kinds if (time := read.times(other).get(kind)) is not None}
    rivals = [time for variant, time in found.items() if variant in read.BASELINES[against]]
    if row.variant not in found or not rivals:
        return None
    best, mine = min(rivals), found[row.variant]
    return Interval(best.median / mine.median, best.low / mine.high, best.high / mine.low)


def losing_vec(device: Device) -> Table:
    """Every encoder that is slower than at @1, eager, beyond its interval."""
    table = Table(("encoder", "depth", "variant", "ratio", "run"))
    for row in sorted(device.suite("vec"), key=lambda row: text.order(row.case)):
        ratio = read.ratio(row, "")
        if ratio is not None and ratio.high < 1:
            depth = text.depth_label(text.fraction(row.case.get("depth")))
            table.add(
                Cell(text.encoder(row.case), text.shape(row.case)), depth, row.variant, ratio_cell(ratio), device.run(row)
            )
    return table.trimmed()


def goals(device: Device, *, brief: bool = False) -> Table:
    """Every goal, what the best of ours reaches, and how far that is off; missed ones first, ``brief`` as for what loses."""
    lines: list[tuple[float, Case, tuple[Cell | str, ...]]] = []
    for suite in OPS:
        for case in cases(device.suite(suite)):
            for (wanted, against), rows in _goals(case).items():
                reached = [(ratio, row) for row in rows if (ratio := read.ratio(row, against)) is not None]
                what = f"{text.times(wanted)} of {against}"
                if not reached:
                    reasons = "; ".join(dict.fromkeys(read.why(row) if not read.times(row) else "no ratio" for row in rows))
                    lines.append((-1.0, case, (what, "", Cell("no time", reasons), Cell("missed", kind="bad"), "")))
                    continue
                ratio, row = max(reached, key=lambda pair: pair[0].median)
                share = ratio.median / wanted
                verdict = Cell("met", kind="good") if share >= 1 else Cell(f"{100 * (1 - share):.1f} % short", kind="bad")
                lines.append((share, case, (what, row.variant, ratio_cell(ratio), verdict, roofline_cell(row))))
    table = Table(("case", "goal", "best of ours", "reached", "verdict", "of roofline"))
    lines.sort(key=lambda line: line[0])
    for label, (_, _, cells) in _labelled(table, lines, lambda line: line[1], brief):
        table.add(label, *cells)
    return (table.without("of roofline") if brief else table).trimmed()


def _goals(case: Case) -> dict[tuple[float, str], list[Row]]:
    found: dict[tuple[float, str], list[Row]] = {}
    for row in case.rows:
        goal: Any = row.values.get("goal")
        wanted = text.number(goal.get("ratio")) if isinstance(goal, dict) else None
        if row.variant in read.OURS and wanted:
            found.setdefault((wanted, str(goal.get("against", "eager"))), []).append(row)
    return found


def missed(table: Table) -> int:
    """Count the goals that are missed."""
    verdict = list(table.columns).index("verdict")
    return sum(line.cells[verdict].kind == "bad" for line in table.lines if line.cells)


def untimed(device: Device) -> Table:
    """Every row without a time, and why; failed ticks first."""
    table = Table(("case", "variant", "why there is no time", "run"))
    rows = [row for row in device.rows if not read.times(row)]
    for row in sorted(rows, key=lambda row: (row.values.get("ok") is not False, row.suite, text.order(row.case), row.variant)):
        name = text.encoder(row.case)
        if "depth" in row.case:
            name += f" {text.depth_label(text.fraction(row.case['depth']))}"
        name += f" {row.case['subject']}" if "subject" in row.case else ""
        label = Cell(str(row.case.get("op", row.suite)), f"{name}, {text.shape(row.case)}")
        failed = row.values.get("ok") is False
        table.add(label, row.variant, Cell(read.why(row), kind="bad" if failed else ""), device.run(row))
    return table.trimmed()
