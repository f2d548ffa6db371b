"""What the charts show: rows as series of points."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from laco_kernels.bench.cases import paper_ratio
from laco_kernels.bench.page import rows as read
from laco_kernels.bench.page import text, vec
from laco_kernels.bench.page.rows import Interval

if TYPE_CHECKING:
    from collections.abc import Sequence

    from laco_kernels.bench.page.devices import Device
    from laco_kernels.bench.results import Row

SWEEPS = {"tokens": "tokens in an image", "batch": "images in a batch"}


class Point(NamedTuple):
    """A place on the horizontal axis, and what was found there."""

    x: float
    y: Interval


@dataclass(frozen=True)
class Series:
    """One line of a chart; ``role`` is a variant, or ``"paper"``, and gives it its colour and mark."""

    label: str
    role: str
    points: tuple[Point, ...]


@dataclass
class Chart:
    """A chart before it is drawn; ``second`` is what 100 on the vertical axis is on a second one, in ms."""

    title: str
    x_label: str
    y_label: str
    ticks: dict[float, str]
    series: list[Series] = field(default_factory=list)
    logarithmic: bool = False
    duration: bool = False
    second: float | None = None

    @property
    def description(self) -> str:
        """What somebody hears who does not see the chart."""
        names = ", ".join(series.label for series in self.series)
        return f"{self.title}: {self.y_label} by {self.x_label}; {names}. The numbers are in the table below."


def vec_chart(device: Device, key: tuple[str, int, str], rows: Sequence[Row]) -> Chart | None:
    """VEC against depth as a share of @1 in eager mode; on a GPU also in milliseconds."""
    depths = sorted({vec.depth(row) for row in rows})
    places = {depth: float(i) for i, depth in enumerate(depths)}
    chart = Chart(
        f"{key[0]}, batch {key[1]}, {key[2]}",
        "where 2 x 2 tokens are merged",
        "VEC, % of @1",
        {place: text.depth_label(depth) for depth, place in places.items()},
    )
    for variant in dict.fromkeys(row.variant for row in sorted(rows, key=read.variant_order)):
        points = [
            Point(places[vec.depth(row)], Interval(100 / ratio.median, 100 / ratio.high, 100 / ratio.low))
            for row in rows
            if row.variant == variant and (ratio := read.ratio(row, "")) is not None
        ]
        if points:
            chart.series.append(Series(variant, variant, tuple(points)))
            if variant == "eager" and device.gpu:
                chart.second = next((t.median / 1e3 for row in rows if (t := _whole(row)) is not None), None)
    known = [(place, paper_ratio(key[0], depth)) for depth, place in places.items()]
    paper = [Point(place, Interval(*[100 / ratio] * 3)) for place, ratio in known if ratio is not None]
    if chart.series and paper:
        chart.series.append(Series("LaCo", "paper", tuple(paper)))
    return chart if chart.series else None


def _whole(row: Row) -> Interval | None:
    return read.warm(row) if vec.depth(row) == 1 and row.variant == "eager" else None


def growth_charts(device: Device) -> list[Chart]:
    """How time grows with tokens and with the batch: one chart for everything that a sweep holds fixed."""
    groups: dict[str, list[Row]] = {}
    for row in sorted(device.suite("sweep"), key=lambda row: text.order(row.case)):
        sweep = row.case.get("sweep")
        if sweep in SWEEPS:
            varied = ("grid", "encoder") if sweep == "tokens" else ("batch",)
            key = json.dumps({name: value for name, value in row.case.items() if name not in varied}, sort_keys=True)
            groups.setdefault(key, []).append(row)
    charts = [_growth_chart(device, rows) for rows in groups.values()]
    charts.sort(key=lambda chart: chart is None or chart.x_label != SWEEPS["tokens"])
    return [chart for chart in charts if chart is not None]


def _growth_chart(device: Device, rows: Sequence[Row]) -> Chart | None:
    case = rows[0].case
    by_tokens = case["sweep"] == "tokens"
    kind = read.kind_of(rows)
    found: dict[str, list[Point]] = {}
    for row in sorted(rows, key=read.variant_order):
        time = read.times(row).get(kind)
        x = text.grid_tokens(row.case) if by_tokens else text.number(row.case.get("batch"))
        if time is not None and x:
            found.setdefault(row.variant, []).append(Point(float(x), time))
    if not found:
        return None
    fixed = f"batch {case.get('batch', '?')}" if by_tokens else f"{text.grid_tokens(case)} tokens"
    parts = [str(case[name]) for name in ("direction", "dtype") if name in case]
    title = ", ".join([str(case.get("op", "operator")), fixed, *parts])
    chart = Chart(
        title, SWEEPS[str(case["sweep"])], "time, cold" if kind == "cold" else "time", {}, logarithmic=True, duration=device.gpu
    )
    base = 1.0
    if not device.gpu:  # the absolute times of a CPU say little; how they grow and compare does
        yardstick = "eager" if "eager" in found else next(iter(found))
        start = min(found[yardstick])
        base, chart.y_label = start.y.median, f"time, {yardstick} at {start.x:.0f} = 1"
    for variant, points in found.items():
        scaled = [Point(x, Interval(*(value / base for value in y))) for x, y in sorted(points)]
        chart.series.append(Series(variant, variant, tuple(scaled)))
    chart.ticks = {x: f"{x:.0f}" for x in sorted({point.x for points in found.values() for point in points})}
    return chart
