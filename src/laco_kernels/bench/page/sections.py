"""The sections of a report: what is said about a device, in which order, and what is absent."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from laco_kernels.bench.page import llava, losses, series, text, vec, views
from laco_kernels.bench.page import rows as read
from laco_kernels.bench.page.devices import environment_tables, headline, letter
from laco_kernels.bench.page.grouping import cases
from laco_kernels.bench.page.tables import Cell, Table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from laco_kernels.bench.page.devices import Device
    from laco_kernels.bench.page.grouping import Case
    from laco_kernels.bench.page.series import Chart

LONG = 16  # lines; longer tables are folded


@dataclass
class Part:
    """A headed part of a section."""

    title: str
    text: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    drawn: list[tuple[str, str]] = field(default_factory=list)  # the charts, by title


def section(device: Device) -> dict[str, Any]:
    """Return everything that is said about one device."""
    parts = [
        *_vec(device),
        *_models(device),
        _growth(device),
        *_operators(device),
        *_tower(device),
        _memory(device),
        *where_we_lose(device),
    ]
    for part in parts:
        part.tables = [piece for table in part.tables for piece in table.split(LONG)]
    return {
        "name": device.name,
        "anchor": device.anchor,
        "headlines": headlines(device),
        "facts": facts(device),
        "parts": parts,
        "environments": environment_tables(device),
    }


def headlines(device: Device) -> list[str]:
    """One line a run."""
    blocks = list(device.environments.values())
    names = [f"Run {letter(i)}: " if len(blocks) > 1 else "" for i in range(len(blocks))]
    return [f"{name}{headline(block)}." for name, block in zip(names, blocks, strict=True)]


def facts(device: Device) -> list[Cell]:
    """What to know before reading on, as a number and what it counts."""
    goals = [table for table in (losses.goals(device), llava.goals(device)) if len(table)]
    lost = len(losses.losing(device)) + len(losses.losing_vec(device)) + len(llava.losing(device))
    failed = sum(row.values.get("ok") is False for row in device.rows)
    untimed = len(losses.untimed(device))
    counts = [(len(device.rows), "row", "", ""), (lost, "losing row", "", "bad"), (failed, "failed tick", "", "bad")]
    counts.append((untimed, "row", " without a time", ""))
    out = [Cell(str(n), text.plural(n, noun).partition(" ")[2] + rest, kind if n else "") for n, noun, rest, kind in counts]
    if goals:
        missed = sum(losses.missed(table) for table in goals)
        out.append(Cell(f"{sum(map(len, goals)) - missed} of {sum(map(len, goals))}", "goals met"))
    return out


def _vec(device: Device) -> list[Part]:
    groups = vec.runs(device.suite("vec"))
    title = "Vision encoding cost against depth"
    if not groups:
        return [Part(title, ["No encoder has been measured on this device."])]
    parts = [Part(title)]
    for key, rows in groups.items():
        chart = series.vec_chart(device, key, rows)
        parts[0].charts += [chart] if chart is not None else []
        table = vec.in_full(device, rows)
        table.title = vec.label(key, rows)
        parts[0].tables.append(table)
    return parts


def _models(device: Device) -> list[Part]:
    titles = {"generate": "Generation", "step": "Training steps"}
    found = [Part(title, tables=llava.in_full(device, suite)) for suite, title in titles.items()]
    for part in found:
        if any("reduced" in table.title for table in part.tables):
            part.text.append(
                "Models that were cut in depth say how far; neither their times nor their ratios are those of the whole."
            )
    return [part for part in found if part.tables]


def _growth(device: Device) -> Part:
    part = Part("How time grows with tokens and batch")
    rows = device.suite("sweep")
    if not rows:
        part.text.append("This has not been measured on this device.")
        return part
    part.charts = series.growth_charts(device)
    part.tables.append(views.every_variant(device, cases(rows)))
    return part


def _operators(device: Device) -> list[Part]:
    groups = views.operators(device)
    part = Part("The operators")
    if not groups:
        part.text.append("The operators have not been measured on this device.")
        return [part]
    part.text.append(
        "The fastest of our implementations in each case, and the one that runs by default, against the best of eager PyTorch "
        "and of torch.compile: the median over all cases with their range; then every case."
    )
    if device.gpu and not any(read.roofline(row) for row in device.suite("ops")):
        part.text.append("No ceilings were measured on this device, so there is no roofline.")
    overview = views.overview(device)
    part.tables += [overview] if len(overview) else []
    return [part, *(Part(op, tables=_cases(device, group)) for op, group in groups.items())]


def _tower(device: Device) -> list[Part]:
    groups = views.operators(device, "tower")
    if not groups:
        return []
    overview = views.overview(device, "tower")
    part = Part("Inside the encoder", tables=[overview] if len(overview) else [])
    part.text.append(
        "Residual sum with norm, and activations, which stand between an encoder's matrix products: against what the layers of "
        "transformers do there today, and against torch.compile of that. What memory bounds has a roofline of bytes alone."
    )
    return [part, *(Part(op, tables=_cases(device, group)) for op, group in groups.items())]


def _cases(device: Device, group: Sequence[Case]) -> list[Table]:
    """One table of the cases of an operator where they are few, else one for each direction and precision."""
    tables = []
    for way, part in itertools.groupby(group, key=lambda case: text.way(case.case) if len(group) > LONG else ""):
        table = views.fastest_of_ours(device, list(part))
        table.title, table.closed = way, len(table) > LONG
        tables.append(table)
    return [*tables, views.every_variant(device, group)]


def _memory(device: Device) -> Part:
    part = Part("Memory")
    for op, group in {**views.operators(device), **views.operators(device, "tower")}.items():
        table = views.memory(group)
        if len(table):
            table.title, table.closed = op, len(table) > LONG
            part.tables.append(table)
    part.text.append(
        "The most memory that one call holds at a time, and how many times that of the leanest eager variant."
        if part.tables
        else "The memory of the operators has not been measured on this device."
    )
    return part


def where_we_lose(device: Device, *, brief: bool = False) -> list[Part]:
    """Say where we lose, what goals are missed, and which rows have no time; ``brief`` for narrow pages."""
    out = []
    lost, encoders = losses.losing(device, brief=brief), losses.losing_vec(device)
    part = Part("Where we lose", tables=[table for table in (lost, encoders, llava.losing(device)) if len(table)])
    ours = [row for row in device.rows if row.variant in read.OURS and read.times(row)]
    if len(lost):
        verb, among = ("is", "that one") if len(lost) == 1 else ("are", "among them")
        some, every = losses.lost_cases(device)
        part.text.append(
            f"{text.plural(len(lost), 'row')} of ours {verb} slower than the best other one beyond the interval; "
            f"the fastest of ours is {among} in {some} of {text.plural(every, 'case')}."
        )
    elif ours:
        part.text.append(
            f"None of our {text.plural(len(ours), 'timed row')} is slower than the best other one beyond its interval."
        )
    else:
        part.text.append("None of our implementations has a time on this device, so none could lose.")
    out.append(part)
    goals = losses.goals(device, brief=brief)
    if len(goals):
        out.append(Part("Goals", [f"{losses.missed(goals)} of {len(goals)} goals are missed."], [goals]))
    models = llava.goals(device)
    if len(models):
        said = f"{losses.missed(models)} of {text.plural(len(models), 'goal')} of whole models are missed."
        out.append(Part("Goals of whole models", [said], [models]))
    untimed = losses.untimed(device)
    if len(untimed):
        out.append(Part("Rows without a time", [f"{text.plural(len(untimed), 'row')} could not be timed."], [untimed]))
    return out


def empty(devices: Sequence[Device]) -> bool:
    """Say whether nothing was measured on a GPU."""
    return not any(device.gpu and device.rows for device in devices)
