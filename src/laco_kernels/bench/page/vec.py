"""Vision encoding cost (VEC): beside the paper's figures, and in full."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

from laco_kernels.bench.cases import PAPER_MS, PAPER_TPS
from laco_kernels.bench.page import rows as read
from laco_kernels.bench.page import text
from laco_kernels.bench.page.tables import Cell, Table
from laco_kernels.bench.page.views import ratio_cell, tick_cell

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from laco_kernels.bench.page.devices import Device
    from laco_kernels.bench.results import Row

TABLES = {"aimv2-l-336": "Table 4", "siglip-so400m-384": "Table 8", "internvit-300m-448": "Table 8"}
NO_TPS = "TPS, ours: not measured yet"
NO_ROWS = "ours: not measured yet"


def runs(rows: Iterable[Row]) -> dict[tuple[str, int, str], list[Row]]:
    """Put rows together by encoder, batch and precision, sorted by depth and variant."""
    found: dict[tuple[str, int, str], list[Row]] = {}
    for row in rows:
        batch = int(text.number(row.case.get("batch")) or 0)
        found.setdefault((_name(row), batch, str(row.case.get("dtype", "?"))), []).append(row)
    for group in found.values():
        group.sort(key=lambda row: (depth(row), read.variant_order(row)))
    return dict(sorted(found.items()))


def _name(row: Row) -> str:
    return text.encoder(row.case) + (", training step" if row.case.get("step") == "training" else "")


def depth(row: Row) -> Fraction:
    """Return where a row's encoder is compressed."""
    return text.fraction(row.case.get("depth"))


def beside_the_paper(devices: Sequence[Device]) -> list[Table]:
    """One table an encoder, a column for each depth: the paper's figures, then those of every device."""
    measured = {row.case.get("encoder") for device in devices for row in device.suite("vec")}
    unknown = sorted(str(name) for name in measured if name is not None and name not in PAPER_MS)
    return [_beside(name, devices) for name in [*PAPER_MS, *unknown]]


def _beside(name: str, devices: Sequence[Device]) -> Table:
    paper, speed = PAPER_MS.get(name, {}), PAPER_TPS.get(name, {})
    measured = [(device, [row for row in device.suite("vec") if _name(row) == name]) for device in devices]
    rows = [row for _, group in measured for row in group]
    depths = sorted({*paper, *map(depth, rows)})
    title = f"{name} (LaCo, {TABLES[name]})" if name in TABLES else f"{name} (not in LaCo's tables)"
    table = Table(("vision time, @1 over this", *map(text.depth_label, depths)), title=title)
    if paper:
        figures = [(paper.get(Fraction(1)), paper.get(at)) for at in depths]
        table.add(
            Cell("LaCo", "GPU and batch not stated"),
            *(Cell(text.times(whole / ms), f"{ms:.1f} ms") if whole and ms else Cell(text.NOTHING) for whole, ms in figures),
        )
    for device, own in measured:
        for (_, batch, dtype), group in runs(own).items():
            for variant in dict.fromkeys(row.variant for row in sorted(group, key=read.variant_order)):
                line = {depth(row): row for row in group if row.variant == variant}
                cells = [_ours(line.get(at)) for at in depths]
                table.add(Cell(device.name, f"batch {batch}, {dtype}, {variant}"), *cells)
    if not rows:
        table.head(NO_ROWS)
    if speed:
        table.add("LaCo, TPS", *(f"{speed[at]:.1f}" if at in speed else text.NOTHING for at in depths))
        if not any(device.suite("generate") for device in devices):
            table.head(NO_TPS)
    return table


def _ours(row: Row | None) -> Cell:
    if row is None:
        return Cell(text.NOTHING)
    ratio, time = read.ratio(row, ""), read.warm(row)
    if time is None:
        return Cell("no time", "tick failed" if row.values.get("ok") is False else "")
    note = _milliseconds(time.median)
    return Cell(note) if ratio is None else Cell(text.times(ratio.median), note, ratio_cell(ratio).kind.replace("good", ""))


def _milliseconds(microseconds: float) -> str:
    return f"{text.digits(microseconds / 1e3)} ms"


def in_full(device: Device, rows: Sequence[Row]) -> Table:
    """Everything about one encoder, batch and precision."""
    columns = (
        "depth",
        "VEC",
        "ratio",
        "over eager",
        "LaCo",
        "layer",
        "tokens",
        "GFLOPs",
        "added",
        "peak",
        "outside",
        "correct",
    )
    table = Table((*columns, "run"), title="Every depth and variant", closed=True)
    for row in rows:
        values, time = row.values, read.warm(row)
        paper, gflops, added, outside = (text.number(values.get(name)) for name in _NUMBERS)
        vec = Cell("no time", read.why(row), "bad" if values.get("ok") is False else "")
        if time is not None:
            vec = Cell(_milliseconds(time.median), text.limits(time, 1e3))
        table.add(
            Cell(text.depth_label(depth(row)), row.variant),
            vec,
            ratio_cell(read.ratio(row, "")),
            ratio_cell(read.interval(values.get("mode_ratio"))) if row.variant != "eager" else "",
            "" if paper is None else text.times(paper),
            str(values.get("layer", "")),
            str(values.get("tokens", "")),
            "" if gflops is None else text.digits(gflops),
            "" if added is None else f"{added / 1e6:.1f}M",
            text.mebibytes(values.get("peak_bytes")),
            "" if outside is None else f"{outside:.2%}",
            tick_cell(row),
            device.run(row),
        )
    return table.trimmed()


_NUMBERS = ("paper_ratio", "gflops", "added_parameters", "overhead")


def label(key: tuple[str, int, str], rows: Sequence[Row]) -> str:
    """Name one encoder, batch and precision."""
    name, batch, dtype = key
    tokens = next((n for row in rows if (n := row.case.get("tokens_in") or row.values.get("tokens_in"))), None)
    return f"{name}, batch {batch}, {dtype}" + (f", {tokens} tokens in" if tokens else "")
