"""What ``laco study`` found, as a table, sentences, Markdown and a picture."""

from __future__ import annotations

import itertools
import json
from fractions import Fraction
from typing import TYPE_CHECKING

from matplotlib import pyplot as plt
from rich.table import Table

from laco_kernels.bench.report import MEASURED, PAPER, depth_label, machine, write_new
from laco_kernels.bench.study import StudyRow, difference, residual_free
from laco_kernels.train.digits import CLASSES
from laco_kernels.train.study import DEPTH, NONE, OFF, ON

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

    from laco_kernels.bench.study import Share, StudyResult

COLUMNS = ("compressor", "residual", "depth", "reads", "before", "after", "seconds")
LACO = "laco"
COLOURS = {ON: MEASURED, OFF: PAPER, NONE: "#7d8597"}
MEANINGS = {ON: "with the residual", OFF: "without", NONE: "no parameters"}
QUARTER = str(DEPTH)


def headline(result: StudyResult) -> str:
    """One line that says what was done."""
    settings, seeds = result.settings, f"{result.seeds} seed{'s' if result.seeds > 1 else ''}"
    return (
        f"What a compressor inside a tower leaves to be learnt: the tiny tower, pretrained for {result.tower_steps} steps "
        f"(reads {result.accuracy:.1%} of held-out digits), and fine-tuned for {settings.steps} with 2 x 2 tokens compressed "
        f"to one; {seeds}"
    )


def legend(result: StudyResult) -> str:
    """What the figures mean."""
    settings = result.settings
    parts = [
        f"Digits read right in {settings.held_out} held-out pictures, in per cent, before the first step and after the last; "
        f"mean\N{PLUS-MINUS SIGN}standard deviation over seeds, which draw the compressor's weights and the order of the same "
        f"{settings.steps * settings.batch} pictures. Chance is {100 / CLASSES:.0f}. Encoder at {settings.encoder_rate:g}, "
        f"compressor and heads at {settings.rate:g}. Reads: tokens that the layers read in all, against the uncompressed "
        f"tower. Seconds: of training{', of one processor core' if result.device == 'cpu' else ''}."
    ]
    if any(row.compressor is not None and row.residual == NONE for row in result.rows):
        parts.append("-: without parameters there is no residual to switch; avg_pool is LaCo's residual alone.")
    return " ".join(parts)


def cells(row: StudyRow) -> tuple[str, ...]:
    """Return the cells of one row, in the order of ``COLUMNS``."""
    return (
        row.compressor or "uncompressed",
        row.residual,
        "-" if row.depth is None else depth_label(row.depth),
        f"{row.token_layers:.0%}",
        _percent(row.before),
        _percent(row.after),
        f"{row.seconds:.0f}",
    )


def table(result: StudyResult) -> Table:
    """Return the figures as a table that fits into 80 columns."""
    out = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    for name in COLUMNS:
        out.add_column(name, justify="left" if name in COLUMNS[:3] else "right", no_wrap=True)
    for row in result.rows:
        out.add_row(*cells(row))
    return out


def findings(result: StudyResult) -> list[str]:
    """Say what the figures show, whichever way that is, beside what the paper says."""
    lines = []
    yardstick = result.find(None, NONE)
    if yardstick is not None:
        lines.append(
            f"The uncompressed tower, fine-tuned alike, reads {_percent(yardstick.after)} %, "
            f"and {_percent(yardstick.before)} % before."
        )
    lines += _ordering(result)
    lines += _residual(result)
    lines += _alike(result)
    lines += _depths(result)
    return lines


def markdown(result: StudyResult) -> str:
    """Return everything as Markdown."""
    lines = [f"**{headline(result)}**", "", f"| {' | '.join(COLUMNS)} |", "|---|---|---" + "|---:" * (len(COLUMNS) - 3) + "|"]
    lines += [f"| {' | '.join(cells(row))} |" for row in result.rows]
    lines += ["", *(f"* {line}" for line in findings(result)), "", legend(result), ""]
    return "\n".join([*lines, f"`{result.command}`", "", f"Computed on {machine(result)}.", ""])


def picture(result: StudyResult, path: Path) -> None:
    """Draw accuracy against depth, and the compressors at 1/4 beside each other, as PNG."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), dpi=130, layout="constrained", sharey=True)
    _draw_depths(left, result)
    _draw_compressors(right, result)
    yardstick = result.find(None, NONE)
    for panel in (left, right):
        if yardstick is not None:
            panel.axhline(100 * yardstick.after.mean, color="#3a3a3a", linewidth=1.2, linestyle=":", zorder=1)
        panel.axhline(100 / CLASSES, color="#bbbbbb", linewidth=1.2, zorder=1)
        panel.grid(axis="y", alpha=0.3)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    if yardstick is not None:
        _note(left, 100 * yardstick.after.mean, "uncompressed, fine-tuned alike")
    _note(left, 100 / CLASSES, "chance")
    left.set_ylim(0, 100)
    left.set_ylabel("held-out digits read right, %")
    steps, seeds = result.settings.steps, f"{result.seeds} seed{'s' if result.seeds > 1 else ''}"
    figure.suptitle(
        f"A compressor inside a small pretrained vision tower, fine-tuned for {steps} steps "
        f"(mean and standard deviation of {seeds})",
        fontsize=11,
    )
    figure.savefig(path)
    plt.close(figure)


def write(result: StudyResult, folder: Path) -> list[Path]:
    """Write JSON, Markdown and the picture into ``folder``; return the paths."""
    data = json.dumps(result.to_dict(), indent=2) + "\n"
    text = f"{markdown(result)}\n![Digits read right against depth, and by compressor]({{stem}}.png)\n"
    return write_new(folder, f"study-tiny-tower-{result.settings.steps}-steps", data, text, lambda path: picture(result, path))


def _ordering(result: StudyResult) -> list[str]:
    laco, others = result.find(LACO, ON), residual_free(result)
    if laco is None or not others:
        return []
    pairs = [(row, difference(laco, row)) for row in sorted(others, key=lambda row: -row.after.mean)]
    above = sum(_clear(found) for _, found in pairs)
    said = "The paper has LaCo far above what is free of a residual at 1/4. Here it "
    if above == len(pairs):
        said += "is above all of it with every seed: "
    else:
        said += f"is above {above} of {len(pairs)} of them with every seed: "
    said += f"LaCo reads {_percent(laco.after)} %, which is, in points, "
    return [said + ", ".join(f"{_points(found)} to {_label(row)}" for row, found in pairs) + "."]


def _residual(result: StudyResult) -> list[str]:
    """Say what the residual does to each compressor at 1/4."""
    parts = []
    for row in result.rows:
        other = result.find(row.compressor, OFF)
        if row.residual == ON and row.depth == QUARTER and other is not None:
            found = difference(row, other)
            parts.append(f"{row.compressor} {_points(found)} (better with {_seeds(found)})")
    return [f"What the residual adds at 1/4, in points: {', '.join(parts)}."] if parts else []


def _alike(result: StudyResult) -> list[str]:
    """Compare LaCo with compressors that are given the same residual."""
    laco = result.find(LACO, ON)
    others = [
        row for row in result.rows if row.residual == ON and row.depth == QUARTER and laco is not None and row is not laco
    ]
    if laco is None or not others:
        return []
    parts = []
    for row in others:
        found = difference(laco, row)
        parts.append(f"{_points(found)} to {row.compressor} (above it with {_seeds(found)})")
    return [f"Against compressors that are given the same residual, LaCo's lead at 1/4 is, in points, {', '.join(parts)}."]


def _depths(result: StudyResult) -> list[str]:
    lines = []
    at = {kind: [row for row in result.rows if row.compressor == LACO and row.residual == kind] for kind in (ON, OFF)}
    for kind, rows in at.items():
        if len(rows) < 2:
            continue
        steps = [difference(after, before) for before, after in itertools.pairwise(rows)]
        read = ", ".join(f"{_percent(row.after)} {depth_label(str(row.depth))}" for row in rows)
        rises = sum(step.mean > 0 for step in steps)
        line = f"LaCo {MEANINGS[kind]}, by depth: {read} %; deeper reads more at {rises} of {len(steps)} steps"
        first, last = rows[0], rows[-1]
        if kind == ON:
            line += f", while training takes {first.seconds / last.seconds:.0%} of the time at {depth_label(str(first.depth))}"
            line += f" that it takes at {depth_label(str(last.depth))} (paper: depth trades accuracy for time)"
        lines.append(line + ".")
    gaps = [
        f"{_points(difference(on, off))} {depth_label(str(on.depth))}"
        for on in at[ON]
        for off in at[OFF]
        if on.depth == off.depth
    ]
    if len(gaps) > 1:
        lines.append(f"What the residual adds to LaCo, by depth, in points: {', '.join(gaps)}.")
    return lines


def _draw_depths(panel: Axes, result: StudyResult) -> None:
    rows = [row for row in result.rows if row.compressor == LACO]
    depths = {str(row.depth): row.layer for row in sorted(rows, key=lambda row: Fraction(str(row.depth)))}
    places = {depth: x for x, depth in enumerate(depths)}
    for kind in (ON, OFF):
        chosen = [row for row in rows if row.residual == kind]
        xs = [places[str(row.depth)] for row in chosen]
        for name, style, values in (
            ("", "-", [row.after for row in chosen]),
            (", before the first step", "--", [row.before for row in chosen]),
        ):
            means, stds = ([100 * value for value in column] for column in _columns(values))
            panel.errorbar(
                xs,
                means,
                yerr=stds,
                color=COLOURS[kind],
                linestyle=style,
                marker="o" if style == "-" else None,
                linewidth=1.8 if style == "-" else 1.1,
                capsize=3,
                label=f"{MEANINGS[kind]}{name}",
            )
    panel.set_xticks(range(len(depths)), [f"{depth_label(depth)}\nlayer {layer}" for depth, layer in depths.items()])
    panel.set_xlabel("where LaCo stands")
    panel.set_title("LaCo at every depth", fontsize=10)
    panel.legend(loc="lower right", frameon=False, fontsize=8, bbox_to_anchor=(1.0, 0.12))


def _draw_compressors(panel: Axes, result: StudyResult) -> None:
    rows = [row for row in result.rows if row.depth == QUARTER]
    names = list(dict.fromkeys(str(row.compressor) for row in rows))
    width = 0.38
    for kind in (ON, OFF, NONE):
        chosen = [row for row in rows if row.residual == kind]
        shift = {ON: -width / 2, OFF: width / 2, NONE: 0.0}[kind]
        xs = [names.index(str(row.compressor)) + shift for row in chosen]
        means, stds = ([100 * value for value in column] for column in _columns([row.after for row in chosen]))
        panel.bar(xs, means, width, yerr=stds, capsize=3, color=COLOURS[kind], label=MEANINGS[kind])
        for x, mean, std in zip(xs, means, stds, strict=True):
            panel.annotate(f"{mean:.0f}", (x, mean + std), xytext=(0, 3), textcoords="offset points", ha="center", fontsize=8)
    panel.set_xticks(range(len(names)), names, fontsize=9)
    panel.set_xlabel(f"what stands at {depth_label(QUARTER)}")
    panel.set_title(f"Compressors at {depth_label(QUARTER)}", fontsize=10)
    panel.legend(loc="upper right", frameon=False, fontsize=8)


def _columns(values: list[Share]) -> tuple[list[float], list[float]]:
    return [value.mean for value in values], [value.std for value in values]


def _note(panel: Axes, height: float, text: str) -> None:
    panel.annotate(text, (0.0, height), xytext=(2, 3), textcoords="offset points", fontsize=8, color="#555555")


def _label(row: StudyRow) -> str:
    return str(row.compressor) if row.residual == NONE else f"{row.compressor} {row.residual}"


def _percent(value: Share) -> str:
    return f"{100 * value.mean:.1f}\N{PLUS-MINUS SIGN}{100 * value.std:.1f}"


def _points(value: Share) -> str:
    return f"{100 * value.mean:+.1f}\N{PLUS-MINUS SIGN}{100 * value.std:.1f}"


def _clear(found: Share) -> bool:
    return all(value > 0 for value in found.by_seed)


def _seeds(found: Share) -> str:
    return f"{sum(value > 0 for value in found.by_seed)} of {len(found.by_seed)} seeds"
