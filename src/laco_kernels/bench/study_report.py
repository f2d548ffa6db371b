"""What ``laco study`` found, as a table, sentences, Markdown and a picture."""

from __future__ import annotations

import itertools
import json
from fractions import Fraction
from typing import TYPE_CHECKING

from matplotlib import pyplot as plt
from matplotlib.lines import Line2D
from rich.table import Table

from laco_kernels.bench.report import MEASURED, PAPER, depth_label, machine, write_new
from laco_kernels.bench.study import StudyRow, difference, residual_free
from laco_kernels.train.digits import CLASSES
from laco_kernels.train.study import DEPTH, NONE, OFF, ON, RATIO

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

    from laco_kernels.bench.study import Share, StudyResult

LACO = "laco"
COLOURS = {ON: MEASURED, OFF: PAPER, NONE: "#7d8597"}
MEANINGS = {ON: "with the residual", OFF: "without", NONE: "no parameters"}
QUARTER = str(DEPTH)


def headline(result: StudyResult) -> str:
    """One line that says what was done."""
    return (
        f"What is read through a compressor: the tiny tower, pretrained for {result.tower_steps} steps (reads "
        f"{result.accuracy:.1%} of held-out digits), fine-tuned for {' or '.join(map(str, result.steps))} steps with 2 x 2 "
        f"tokens compressed to one; {_seeds(result)}"
    )


def legend(result: StudyResult) -> str:
    """What the figures mean."""
    settings = result.settings
    parts = [
        f"Digits read right in {settings.held_out} held-out pictures, in per cent, before the first step and after the last, "
        "in runs of their own for each number of steps; mean\N{PLUS-MINUS SIGN}standard deviation over seeds, which draw the "
        f"compressor's weights and the order of the pictures, {settings.batch} a step. Chance is {100 / CLASSES:.0f}. Encoder "
        f"at {settings.encoder_rate:g}, compressor and heads at {settings.rate:g}. Reads: tokens that the layers read in all, "
        f"against the uncompressed tower. Seconds: of training for {result.steps[-1]} steps"
        f"{', of one processor core' if result.device == 'cpu' else ''}."
    ]
    if any(row.compressor is not None and row.residual == NONE for row in result.rows):
        parts.append("-: without parameters there is no residual to switch; avg_pool is LaCo's residual alone.")
    return " ".join(parts)


def columns(result: StudyResult) -> list[str]:
    """Return the names of the columns."""
    return ["compressor", "residual", "depth", "reads", "before", *(f"{steps} steps" for steps in result.steps), "seconds"]


def cells(row: StudyRow) -> list[str]:
    """Return the cells of one row, in the order of :func:`columns`."""
    return [
        row.compressor or "uncompressed",
        row.residual,
        "-" if row.depth is None else depth_label(row.depth),
        f"{row.token_layers:.0%}",
        _percent(row.before),
        *map(_percent, row.after),
        f"{row.seconds[-1]:.0f}",
    ]


def table(result: StudyResult) -> Table:
    """Return the figures as a table that fits into 80 columns."""
    out = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    for i, name in enumerate(columns(result)):
        out.add_column(name, justify="left" if i < 3 else "right", no_wrap=True)
    for row in result.rows:
        out.add_row(*cells(row))
    return out


def findings(result: StudyResult) -> list[str]:
    """Say what the figures show, whichever way that is, beside what the paper says."""
    lines = []
    yardstick = result.find(None, NONE)
    if yardstick is not None:
        lines.append(
            f"The uncompressed tower, fine-tuned alike, reads {_percent(yardstick.before)} % before, "
            f"{_after(result, [_percent(found) for found in yardstick.after])}. Nothing but its heads is trained at "
            f"{result.settings.rate:g}."
        )
    lines += _residual(result)
    for i, steps in enumerate(result.steps):
        lines += [f"After {steps} steps: {line}" for line in (*_ordering(result, i), *_alike(result, i), *_depths(result, i))]
    return lines


def markdown(result: StudyResult) -> str:
    """Return everything as Markdown."""
    names = columns(result)
    lines = [f"**{headline(result)}**", "", f"| {' | '.join(names)} |", "|---|---|---" + "|---:" * (len(names) - 3) + "|"]
    lines += [f"| {' | '.join(cells(row))} |" for row in result.rows]
    lines += ["", *(f"* {line}" for line in findings(result)), "", legend(result), ""]
    return "\n".join([*lines, f"`{result.command}`", "", f"Computed on {machine(result)}.", ""])


def picture(result: StudyResult, path: Path) -> None:
    """Draw accuracy against depth, and the compressors at 1/4 beside each other, as PNG; a row for each number of steps."""
    count = len(result.steps)
    figure, panels = plt.subplots(
        count, 2, figsize=(12, 0.6 + 4.2 * count), dpi=130, layout="constrained", sharey=True, squeeze=False
    )
    yardstick = result.find(None, NONE)
    for i, (left, right) in enumerate(panels):
        _draw_depths(left, result, i)
        _draw_compressors(right, result, i)
        for panel in (left, right):
            if yardstick is not None:
                panel.axhline(100 * yardstick.after[i].mean, color="#3a3a3a", linewidth=1.2, linestyle=":", zorder=1)
            panel.axhline(100 / CLASSES, color="#bbbbbb", linewidth=1.2, zorder=1)
            panel.grid(axis="y", alpha=0.3)
            panel.set_axisbelow(True)
            panel.spines[["top", "right"]].set_visible(False)
        left.set_ylim(0, 108)
        left.set_yticks(range(0, 101, 20))
        left.set_ylabel(f"held-out digits read right after {result.steps[i]} steps, %")
    handles = [Line2D([], [], color=COLOURS[kind], marker="o", label=MEANINGS[kind]) for kind in (ON, OFF, NONE)]
    handles.append(Line2D([], [], color="black", linestyle="--", linewidth=1.1, label="before the first step"))
    if yardstick is not None:
        handles.append(Line2D([], [], color="#3a3a3a", linestyle=":", label="uncompressed, fine-tuned alike"))
    handles.append(Line2D([], [], color="#bbbbbb", label="chance"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    figure.suptitle(
        f"A compressor inside a small pretrained vision tower (mean and deviation of {_seeds(result)})", fontsize=11
    )
    figure.savefig(path)
    plt.close(figure)


def write(result: StudyResult, folder: Path) -> list[Path]:
    """Write JSON, Markdown and the picture into ``folder``; return the paths."""
    data = json.dumps(result.to_dict(), indent=2) + "\n"
    text = f"{markdown(result)}\n![Digits read right against depth, and by compressor]({{stem}}.png)\n"
    return write_new(folder, f"study-tiny-tower-ratio{RATIO}", data, text, lambda path: picture(result, path))


def _residual(result: StudyResult) -> list[str]:
    """Say what the residual does to each compressor at 1/4, from before the first step on."""
    lines = []
    for row in result.rows:
        other = result.find(row.compressor, OFF)
        if row.residual == ON and row.depth == QUARTER and other is not None:
            gaps = [difference(one, two) for one, two in zip(row.after, other.after, strict=True)]
            parts = [f"{_points(gap)} (better with {_better(gap)})" for gap in gaps]
            start = _points(difference(row.before, other.before))
            lines.append(f"What the residual adds to {row.compressor} at 1/4: {start} points before, {_after(result, parts)}.")
    return lines


def _ordering(result: StudyResult, i: int) -> list[str]:
    laco, others = result.find(LACO, ON), residual_free(result)
    if laco is None or not others:
        return []
    ranked = sorted(others, key=lambda row: -row.after[i].mean)
    pairs = [(row, difference(laco.after[i], row.after[i])) for row in ranked]
    above = sum(all(value > 0 for value in found.by_seed) for _, found in pairs)
    lead = ", ".join(f"{_points(found)} to {_label(row)}" for row, found in pairs)
    return [
        f"LaCo at 1/4 reads {_percent(laco.after[i])} %, in points {lead}: with every seed it is above {above} of the "
        f"{len(pairs)} that are free of a residual (paper: far above them)."
    ]


def _alike(result: StudyResult, i: int) -> list[str]:
    """Compare LaCo with compressors that are given the same residual."""
    laco = result.find(LACO, ON)
    if laco is None:
        return []
    parts = []
    for row in result.rows:
        if row.residual == ON and row.depth == QUARTER and row.compressor != LACO:
            found = difference(laco.after[i], row.after[i])
            parts.append(f"{_points(found)} to {row.compressor} (better with {_better(found)})")
    return (
        [f"against others that are given its residual LaCo's lead at 1/4 is, in points, {', '.join(parts)}."] if parts else []
    )


def _depths(result: StudyResult, i: int) -> list[str]:
    lines = []
    at = {kind: [row for row in result.rows if row.compressor == LACO and row.residual == kind] for kind in (ON, OFF)}
    for kind, rows in at.items():
        if len(rows) < 2:
            continue
        read = ", ".join(f"{_percent(row.after[i])} {depth_label(str(row.depth))}" for row in rows)
        rises = sum(after.after[i].mean > before.after[i].mean for before, after in itertools.pairwise(rows))
        first, last = rows[0], rows[-1]
        lines.append(
            f"LaCo {MEANINGS[kind]} reads, in per cent by depth, {read}: more at {rises} of {len(rows) - 1} steps deeper, and "
            f"{depth_label(str(first.depth))} takes {first.seconds[i] / last.seconds[i]:.0%} of the training time of "
            f"{depth_label(str(last.depth))} (paper: depth trades accuracy for time)."
        )
    gaps = [
        f"{_points(difference(on.after[i], off.after[i]))} {depth_label(str(on.depth))}"
        for on in at[ON]
        for off in at[OFF]
        if on.depth == off.depth
    ]
    if len(gaps) > 1:
        lines.append(f"what the residual adds to LaCo is, in points by depth, {', '.join(gaps)}.")
    return lines


def _draw_depths(panel: Axes, result: StudyResult, i: int) -> None:
    rows = [row for row in result.rows if row.compressor == LACO]
    depths = {str(row.depth): row.layer for row in sorted(rows, key=lambda row: Fraction(str(row.depth)))}
    places = {depth: x for x, depth in enumerate(depths)}
    for kind in (ON, OFF):
        chosen = [row for row in rows if row.residual == kind]
        xs = [places[str(row.depth)] for row in chosen]
        means, stds = _columns([row.after[i] for row in chosen])
        panel.errorbar(xs, means, yerr=stds, color=COLOURS[kind], marker="o", linewidth=1.8, capsize=3)
        panel.plot(xs, _columns([row.before for row in chosen])[0], color=COLOURS[kind], linestyle="--", linewidth=1.1)
    panel.set_xticks(range(len(depths)), [f"{depth_label(depth)}\nlayer {layer}" for depth, layer in depths.items()])
    panel.set_title(f"LaCo at every depth, {result.steps[i]} steps", fontsize=10)


def _draw_compressors(panel: Axes, result: StudyResult, i: int) -> None:
    rows = [row for row in result.rows if row.depth == QUARTER]
    names = list(dict.fromkeys(str(row.compressor) for row in rows))
    width = 0.38
    for kind in (ON, OFF, NONE):
        chosen = [row for row in rows if row.residual == kind]
        shift = {ON: -width / 2, OFF: width / 2, NONE: 0.0}[kind]
        xs = [names.index(str(row.compressor)) + shift for row in chosen]
        means, stds = _columns([row.after[i] for row in chosen])
        panel.bar(xs, means, width, yerr=stds, capsize=3, color=COLOURS[kind])
        panel.hlines(
            _columns([row.before for row in chosen])[0],
            [x - width / 2 for x in xs],
            [x + width / 2 for x in xs],
            color="black",
            linestyle="--",
            linewidth=1.1,
        )
        clear = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # of the lines behind
        for x, mean, std in zip(xs, means, stds, strict=True):
            panel.annotate(
                f"{mean:.0f}",
                (x, mean + std),
                xytext=(0, 4),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                bbox=clear,
            )
    panel.set_xticks(range(len(names)), names, fontsize=9)
    panel.set_title(f"Compressors at {depth_label(QUARTER)}, {result.steps[i]} steps", fontsize=10)


def _columns(values: list[Share]) -> tuple[list[float], list[float]]:
    """Return means and deviations in per cent."""
    return [100 * value.mean for value in values], [100 * value.std for value in values]


def _after(result: StudyResult, parts: list[str]) -> str:
    return ", ".join(f"{part} after {steps}" for part, steps in zip(parts, result.steps, strict=True)) + " steps"


def _seeds(result: StudyResult) -> str:
    return f"{result.seeds} seed{'s' if result.seeds > 1 else ''}"


def _label(row: StudyRow) -> str:
    return str(row.compressor) if row.residual == NONE else f"{row.compressor} {row.residual}"


def _percent(value: Share) -> str:
    return f"{100 * value.mean:.1f}\N{PLUS-MINUS SIGN}{100 * value.std:.1f}"


def _points(value: Share) -> str:
    return f"{100 * value.mean:+.1f}\N{PLUS-MINUS SIGN}{100 * value.std:.1f}"


def _better(found: Share) -> str:
    return f"{sum(value > 0 for value in found.by_seed)} of {len(found.by_seed)} seeds"
