"""Multimodal models: generation and training steps beside the papers' figures, in full, and against their goals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from laco_kernels.bench.cases import PAPER_STEP_RATIO, PAPER_STEP_S, PAPER_TPS, PAPER_TTFT_MS, STF
from laco_kernels.bench.page import rows as read
from laco_kernels.bench.page import text
from laco_kernels.bench.page.tables import Cell, Table
from laco_kernels.bench.page.views import ratio_cell, tick_cell

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from laco_kernels.bench.page.devices import Device
    from laco_kernels.bench.page.rows import Interval
    from laco_kernels.bench.results import Row

SUITES = ("generate", "step")
NO_ROWS = "ours: not measured yet"
RATIOS = {"tps": "tps_ratio", "ttft": "ttft_ratio", "step": "ratio"}
NAMES = {"tps": "TPS", "ttft": "TTFT", "step": "step"}


@dataclass(frozen=True)
class Beside:
    """A table of a paper: which of our rows stand beside it, by which ratio."""

    title: str
    what: str
    suite: str
    of: str
    stage: str
    paper: dict[str, tuple[float, str]]  # the ratio by model, and the figure that it is of

    def holds(self, row: Row) -> bool:
        """Return whether a row belongs here."""
        is_laco = str(row.case.get("subject", "")).startswith("@")
        return is_laco == ("@1" in self.paper) and row.case.get("stage", "") == self.stage


def _over(figures: dict[str, float], unit: str, where: str) -> dict[str, tuple[float, str]]:
    """Return the first of a paper's times over each, and the times; ``where`` they were taken stands with the first."""
    first = next(iter(figures))
    notes = {name: f"{figure} {unit}" + (f", {where}" if name == first else "") for name, figure in figures.items()}
    return {name: (figures[first] / figure, notes[name]) for name, figure in figures.items()}


_TPS = PAPER_TPS["aimv2-l-336"]
PAPERS = (
    Beside(
        "AIMv2-L with Qwen2.5-0.5B, tokens a second (LaCo, Table 4)",
        "TPS of this over @1, eager",
        "generate",
        "tps",
        "",
        {f"@{at}": (tps / _TPS[Fraction(1)], f"{tps:.1f} a second") for at, tps in sorted(_TPS.items())},
    ),
    Beside(
        "LLaVA-1.5, time to first token (STF)",
        "TTFT of LLaVA-1.5, eager, over this",
        "generate",
        "ttft",
        "",
        _over(PAPER_TTFT_MS, "ms", "A100, batch 16"),
    ),
    Beside(
        "AIMv2-L with Qwen2.5-0.5B, a training step of everything (LaCo)",
        "@1, eager, over this",
        "step",
        "step",
        "stage2",
        {at: (ratio, "") for at, ratio in sorted(PAPER_STEP_RATIO.items(), reverse=True)},
    ),
    Beside(
        "LLaVA-1.5, a step of fine-tuning by LoRA (STF)",
        "LLaVA-1.5, eager, over this",
        "step",
        "step",
        "finetune",
        _over(PAPER_STEP_S, "s", "8 A6000, batch 128"),
    ),
)


def beside_the_papers(devices: Sequence[Device]) -> list[Table]:
    """One table for each of the papers': their figures, then those of every device, batch, precision and variant."""
    return [_beside(paper, devices) for paper in PAPERS]


def _beside(paper: Beside, devices: Sequence[Device]) -> Table:
    table = Table((paper.what, *paper.paper), title=paper.title)
    table.add("paper", *(Cell(text.times(ratio), note) for ratio, note in paper.paper.values()))
    for device in devices:
        lines: dict[tuple[str, ...], dict[str, Row]] = {}
        for row in sorted(filter(paper.holds, device.suite(paper.suite)), key=_order):
            lines.setdefault((*_run(row), row.variant), {})[str(row.case["subject"])] = row
        for (*_, variant), line in lines.items():
            about = f"{_about(next(iter(line.values())))}, {variant}"
            table.add(Cell(device.name, about), *(_figure(line.get(subject), paper.of) for subject in paper.paper))
    if len(table) == 1:
        table.head(NO_ROWS)
    return table


def _figure(row: Row | None, of: str) -> Cell:
    if row is None:
        return Cell(text.NOTHING)
    ratio = _ratio(row, of)
    if ratio is None:
        return Cell("no time", read.why(row))
    return Cell(text.times(ratio.median), _amount(row, of), ratio_cell(ratio).kind.replace("good", ""))


def _amount(row: Row, of: str) -> str:
    """Return what a ratio is of: tokens a second, or a time."""
    time = _time(row, "ttft" if of == "ttft" else "wall")
    if time is None:
        return ""
    if of == "tps":
        return f"{text.digits(_tokens_a_second(row, time))} a second"
    return text.duration(time.median)


def _tokens_a_second(row: Row, time: Interval) -> float:
    return 1e6 * float(row.case["batch"]) * float(row.case["new_tokens"]) / time.median


def _time(row: Row, part: str) -> Interval | None:
    return read.interval(row.values["timings"].get(part)) if read.times(row) else None


def _ratio(row: Row, of: str) -> Interval | None:
    return read.interval(row.values.get(RATIOS[of])) if read.times(row) else None


def _run(row: Row) -> tuple[str, ...]:
    """What rows that were measured against each other have in common."""
    return (row.suite, *(f"{name}={value}" for name, value in sorted(row.case.items()) if name != "subject"))


def _order(row: Row) -> tuple[Any, ...]:
    subject = str(row.case.get("subject"))
    depth = -text.fraction(subject[1:]) if subject.startswith("@") else Fraction(subject == STF)
    return (*_run(row), depth, row.variant != "eager", row.variant)


def _about(row: Row) -> str:
    case = row.case
    parts = [str(case.get("llm")), f"batch {case.get('batch')}", f"{case.get('text_tokens')} text tokens"]
    parts += [f"{case['new_tokens']} new"] if "new_tokens" in case else []
    parts += [str(case["stage"])] if "stage" in case else []
    parts += [str(case.get("dtype"))]
    return ", ".join(parts + ([f"reduced to {case['reduced']}"] if "reduced" in case else []))


def in_full(device: Device, suite: str) -> list[Table]:
    """One table for every run of a suite: all models and variants."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in sorted(device.suite(suite), key=_order):
        groups.setdefault(_run(row), []).append(row)
    made = []
    for rows in groups.values():
        columns, fill = _FULL[suite]
        table = Table(("model", *columns, "correct", "run"), title=f"{text.encoder(rows[0].case)}, {_about(rows[0])}")
        for row in rows:
            cells = fill(row)
            if not read.times(row):
                cells = [
                    Cell("no time", read.why(row), "bad" if row.values.get("ok") is False else ""),
                    *[""] * (len(cells) - 1),
                ]
            table.add(Cell(str(row.case.get("subject")), row.variant), *cells, tick_cell(row), device.run(row))
        made.append(table.trimmed())
    return made


def _duration(row: Row, part: str) -> str:
    time = _time(row, part)
    return text.NOTHING if time is None else text.duration(time.median)


def _spread(row: Row, part: str) -> Cell:
    time = _time(row, part)
    return Cell() if time is None else Cell(text.duration(time.median), text.limits(time, text.scale(time.median)[0]))


def _generation(row: Row) -> list[Cell | str]:
    time, same = _time(row, "wall"), text.number(row.values.get("agreement"))
    parts = [_duration(row, part) for part in ("vision", "projector", "prefill", "tpot")]
    return [
        _spread(row, "ttft"),
        *parts,
        "" if time is None else text.digits(_tokens_a_second(row, time)),
        ratio_cell(_ratio(row, "ttft")),
        ratio_cell(_ratio(row, "tps")),
        text.mebibytes(row.values.get("peak_bytes")),
        "" if same is None else f"{same:.0%}",
    ]


def _training(row: Row) -> list[Cell | str]:
    held = text.number(row.values.get("held_mib"))
    return [
        _spread(row, "wall"),
        *(_duration(row, part) for part in ("forward", "backward", "update")),
        ratio_cell(_ratio(row, "step")),
        ratio_cell(read.interval(row.values.get("same_mode_ratio"))),
        "" if held is None else text.mebibytes(held * 2**20),
        text.mebibytes(row.values.get("peak_bytes")),
    ]


Fill = Callable[["Row"], "list[Cell | str]"]
_FULL: dict[str, tuple[tuple[str, ...], Fill]] = {
    "generate": (
        ("TTFT", "vision", "projector", "prefill", "TPOT", "TPS", "TTFT ratio", "TPS ratio", "peak", "same tokens"),
        _generation,
    ),
    "step": (("step", "forward", "backward", "update", "ratio", "same variant", "held", "peak"), _training),
}


def losing(device: Device) -> Table:
    """Every row that is slower than the first model, eager, beyond its interval."""
    table = Table(("model", "variant", "ratio", "of", "run"))
    for row in _rows(device):
        for of in ("ttft", "tps") if row.suite == "generate" else ("step",):
            ratio = _ratio(row, of)
            if ratio is not None and ratio.high < 1:
                label = Cell(str(row.case.get("subject")), _about(row))
                table.add(label, row.variant, ratio_cell(ratio), NAMES[of], device.run(row))
    return table.trimmed()


def goals(device: Device) -> Table:
    """Every goal of a run, and what the best of its rows reaches; missed ones first."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in _rows(device):
        if isinstance(row.values.get("goal"), dict):
            groups.setdefault(_run(row), []).append(row)
    lines: list[tuple[float, tuple[Cell | str, ...]]] = []
    for rows in groups.values():
        goal = rows[0].values["goal"]
        wanted, of = float(goal["ratio"]), str(goal["of"])
        found = [(ratio, row) for row in rows if row.variant != "eager" and (ratio := _ratio(row, of)) is not None]
        what = Cell(f"{NAMES[of]}, {text.times(wanted)} of {goal['against']}", _about(rows[0]))
        if not found:
            lines.append((-1.0, (what, "", "no time", Cell("missed", kind="bad"))))
            continue
        ratio, row = max(found, key=lambda pair: pair[0].median)
        share = ratio.median / wanted
        verdict = Cell("met", kind="good") if share >= 1 else Cell(f"{100 * (1 - share):.1f} % short", kind="bad")
        lines.append((share, (what, f"{row.case['subject']} {row.variant}", ratio_cell(ratio), verdict)))
    table = Table(("goal", "best of ours", "reached", "verdict"))
    for _, cells in sorted(lines, key=lambda line: line[0]):
        table.add(*cells)
    return table


def _rows(device: Device) -> Iterable[Row]:
    return sorted((row for suite in SUITES for row in device.suite(suite)), key=_order)
