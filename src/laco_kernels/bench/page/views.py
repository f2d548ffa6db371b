"""What a device's rows of the operators say, as tables: pure functions of rows."""

from __future__ import annotations

import itertools
import statistics
from typing import TYPE_CHECKING

from laco_kernels.bench.page import default, text
from laco_kernels.bench.page import rows as read
from laco_kernels.bench.page.grouping import Case, cases
from laco_kernels.bench.page.tables import Cell, Table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from laco_kernels.bench.page.devices import Device
    from laco_kernels.bench.page.rows import Interval
    from laco_kernels.bench.results import Row


BESIDE_SPEED = ("of roofline", "memory vs eager")


def operators(device: Device, suite: str = "ops") -> dict[str, list[Case]]:
    """Return the cases of a suite by operator: ``"ops"``, or ``"tower"``, those inside an encoder."""
    found: dict[str, list[Case]] = {}
    for case in cases(device.suite(suite)):
        found.setdefault(str(case.case.get("op", "unnamed operator")), []).append(case)
    return found


def time_cell(interval: Interval | None) -> Cell:
    """Write a time with its 20th and 80th percentile."""
    if interval is None:
        return Cell()
    unit, _ = text.scale(interval.median)
    return Cell(text.duration(interval.median), text.limits(interval, unit))


def ratio_cell(interval: Interval | None, *, judge: bool = True) -> Cell:
    """Write how many times faster something is; ``judge`` marks where it is slower or faster beyond its interval."""
    if interval is None:
        return Cell()
    kind = "" if not judge else "bad" if interval.high < 1 else "good" if interval.low > 1 else ""
    note = f"{interval.low:.2f}-{interval.high:.2f}"
    return Cell(text.times(interval.median), note, kind)


def tick_cell(row: Row) -> Cell:
    """Write the correctness tick with the error and its budget."""
    return Cell(read.tick(row), read.error(row), kind="bad" if row.values.get("ok") is False else "")


def percent(share: float) -> str:
    """``62 %``."""
    return f"{100 * share:.0f} %"


def roofline_cell(row: Row) -> Cell:
    """Write which part of the roofline is reached, with a bar."""
    share = read.roofline(row)
    return Cell() if share is None else Cell(percent(share), bar=share)


def time_cells(device: Device, row: Row) -> list[Cell]:
    """Write both times of a row on a GPU, and none of one on a CPU."""
    times = read.times(row)
    if not device.gpu:
        return [Cell(), Cell()]
    first = Cell(text.NOTHING, "no CUDA graph") if times and read.warm(row) is None else time_cell(read.warm(row))
    return [first, time_cell(times.get("cold"))]


def _headed(table: Table, group: Sequence[Case]) -> Iterator[Case]:
    """Yield the cases, each direction and precision under a heading in ``table``."""
    for way, part in itertools.groupby(group, key=lambda case: text.way(case.case)):
        if way:
            table.head(way)
        yield from part


def fastest_of_ours(device: Device, group: Sequence[Case]) -> Table:
    """One line a case: the fastest of our implementations beside the best of the others, and what runs by default."""
    columns = ("case", "fastest of ours", "vs eager", "vs compile", "default", "default vs eager", "default vs compile")
    table = Table((*columns, "of roofline", "time", "cold", "run"))
    for case in _headed(table, group):
        row = read.fastest(case.rows, read.OURS)
        usual = default_cells(device, case)
        if row is None:
            ours = [row for row in case.rows if row.variant in read.OURS]
            note = "; ".join(dict.fromkeys(read.why(row) for row in ours)) or "not measured"
            table.add(case.label, Cell("none", note), "", "", *usual, *[""] * 4)
            continue
        table.add(
            case.label,
            Cell(row.variant, "correct" if row.values.get("ok") else "not checked"),
            ratio_cell(read.ratio(row, "eager")),
            ratio_cell(read.ratio(row, "compile")),
            *usual,
            roofline_cell(row),
            *time_cells(device, row),
            device.run(row),
        )
    return table.trimmed()


def default_cells(device: Device, case: Case) -> list[Cell]:
    """Write what runs a case by default, and how it compares."""
    row = default.row_of(device, case)
    names = " + ".join(default.implementations(device, case.case))
    if row is None:
        return [Cell(names, "not measured so"), Cell(), Cell()]
    return [Cell(names), *(ratio_cell(read.ratio(row, against)) for against in read.BASELINES)]


def every_variant(device: Device, group: Sequence[Case]) -> Table:
    """Every row that was measured, case by case."""
    columns = ("variant", "time", "cold", "vs eager", "vs compile", "of roofline", "moves", "peak", "correct", "run")
    table = Table(columns, title="Every variant", closed=True)
    for case in group:
        table.head(
            ", ".join(filter(None, [*_swept(case), text.encoder(case.case), text.shape(case.case), text.more(case.case)]))
        )
        usual = default.row_of(device, case)
        for row in case.rows:
            note = "a floor, no contender" if row.variant == "products" else "the default" if row is usual else ""
            shown = time_cells(device, row)
            if not read.times(row):
                shown[0] = Cell("no time", read.why(row), "bad" if row.values.get("ok") is False else "")
            table.add(
                Cell(row.variant, note),
                *shown,
                ratio_cell(read.ratio(row, "eager"), judge=row.variant in read.OURS),
                ratio_cell(read.ratio(row, "compile"), judge=row.variant in read.OURS),
                roofline_cell(row),
                text.mebibytes(row.values.get("bytes")),
                text.mebibytes(row.values.get("peak_bytes")),
                tick_cell(row),
                device.run(row),
            )
    return table.trimmed()


def _swept(case: Case) -> list[str]:
    return [str(case.case.get("op", "operator"))] if case.case.get("sweep") else []


def memory(group: Sequence[Case]) -> Table:
    """Peak memory of every variant, and how many times that of eager it is."""
    used = {row.variant for case in group for row in case.rows if text.number(row.values.get("peak_bytes")) is not None}
    variants = sorted(used, key=lambda name: read.VARIANTS.index(name) if name in read.VARIANTS else len(read.VARIANTS))
    table = Table(("case", *variants))
    for case in _headed(table, group):
        peaks = {row.variant: text.number(row.values.get("peak_bytes")) for row in case.rows}
        eager = case.eager_peak
        line = []
        for name in variants:
            peak = peaks.get(name)
            note = f"{peak / eager:.2f}x" if peak is not None and eager else ""
            worse = name in read.OURS and peak is not None and eager is not None and peak > 1.005 * eager
            line.append(Cell("" if peak is None else text.mebibytes(peak), note, "bad" if worse else ""))
        if any(cell.text for cell in line):
            table.add(case.label, *line)
    return table


def overview(device: Device, suite: str = "ops") -> Table:
    """Two lines an operator, form, direction and precision: the fastest of ours, and the default, over all their cases."""
    table = Table(("operator", "ours", "cases", "vs eager", "vs compile", *BESIDE_SPEED))
    groups: dict[tuple[str, ...], list[Case]] = {}
    for case in cases(device.suite(suite)):
        key = (str(case.case.get("op", "")), text.form(case.case), text.way(case.case))
        groups.setdefault(key, []).append(case)
    for (op, *rest), group in groups.items():
        for who, choose in (("fastest", _fastest), ("default", default.row_of)):
            pairs = [(case, row) for case in group if (row := choose(device, case)) is not None]
            rows = [row for _, row in pairs]
            if rows and (device.gpu or who != "default"):
                ratios = [[r.median for row in rows if (r := read.ratio(row, against))] for against in read.BASELINES]
                table.add(
                    Cell(op, ", ".join(filter(None, rest))),
                    who,
                    str(len(rows)),
                    *(_span(found, text.times) for found in ratios),
                    _span((share for row in rows if (share := read.roofline(row)) is not None), percent, bar=True),
                    _span((peak for case, row in pairs if (peak := _share_of_eager(case, row)) is not None), text.times),
                )
    return table.trimmed()


def _fastest(_: Device, case: Case) -> Row | None:
    return read.fastest(case.rows, read.OURS)


def _share_of_eager(case: Case, row: Row) -> float | None:
    eager, peak = case.eager_peak, text.number(row.values.get("peak_bytes"))
    return peak / eager if peak is not None and eager else None


def _span(values: Iterable[float], form: Callable[[float], str], *, bar: bool = False) -> Cell:
    """Write the median of ``values`` and between what they lie."""
    found = list(values)
    if not found:
        return Cell()
    middle, note = statistics.median(found), f"{form(min(found)).rstrip('x %')}-{form(max(found))}" if len(found) > 1 else ""
    return Cell(form(middle), note, bar=middle if bar else None)
