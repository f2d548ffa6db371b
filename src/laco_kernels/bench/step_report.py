"""What ``laco bench step`` shows: a table in the terminal, Markdown, JSON and a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from rich.table import Table

from laco_kernels.bench import report
from laco_kernels.bench.generate_report import short, spread_text
from laco_kernels.bench.step import EXPLAINED, TRAINED

if TYPE_CHECKING:
    from laco_kernels.bench.step import StepResult, StepRow

COLUMNS = ("mode", "step ms", "fwd", "bwd", "upd", "ratio", "paper", "GiB", "ok")
PARTS = {"forward": "#1b6ca8", "backward": "#d1495b", "update": "#e9a23b"}


def headline(result: StepResult) -> str:
    """One line that says what was measured."""
    cut = f", REDUCED to {result.reduced}" if result.reduced else ""
    again = ", gradient checkpointing" if result.checkpointing else ""
    return (
        f"training steps of {result.model}{cut}, batch {result.batch}, {result.text_tokens} text tokens and one image a row, "
        f"{result.dtype}{again}, random weights, {result.rounds} interleaved rounds"
    )


def legend(result: StepResult) -> str:
    """What the columns mean."""
    stages = dict.fromkeys(row.stage for row in result.rows)
    parts = [
        "Step: forward and backward pass and AdamW's update on one batch, median (p20-p80) in ms; fwd, bwd, upd: its parts. "
        f"Ratio: to {result.rows[0].subject} in mode {result.modes[0]} at the same stage, paired by round; above 1 is faster; "
        "paper: the same from the papers, on other devices and batches. GiB: weights, AdamW's moments and the most that a step "
        "holds beside them. ok: loss and gradients of narrow models against float64 err at most twice as much as those of the "
        "first mode.",
        " ".join(f"{stage} trains {TRAINED[stage]}." for stage in stages),
        " ".join(f"{mode}: {EXPLAINED[mode]}." for mode in result.modes),
    ]
    if result.reduced:
        parts.append(f"With {result.reduced} neither times nor ratios are those of the whole model.")
    if result.device == "cpu":
        parts.append("Times on a CPU are no claim of performance.")
    return " ".join(parts)


def cells(row: StepRow) -> tuple[str, ...]:
    """Return the cells of a row, in the order of ``COLUMNS``."""
    parts = (short(part.median) for part in (row.forward_ms, row.backward_ms, row.update_ms))
    paper = "-" if row.paper_ratio is None else f"{row.paper_ratio:.2f}x"
    memory = "-" if row.peak_mib is None else f"{(row.held_mib + row.peak_mib) / 1024:.2f}"
    return (
        row.mode,
        spread_text(row.step_ms),
        *parts,
        f"{row.ratio.median:.2f}x",
        paper,
        memory,
        "yes" if row.correct else "NO",
    )


def table(result: StepResult) -> Table:
    """Return the result as a table that fits into 80 columns; stage and model stand above their modes."""
    out = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    for name in COLUMNS:
        out.add_column(name, justify="left" if name == "mode" else "right", no_wrap=True)
    above = ("", "")
    for row in result.rows:
        if (row.stage, row.subject) != above:
            above = (row.stage, row.subject)
            out.add_row(f"{row.stage} {row.subject}", style="bold")
        out.add_row(*cells(row), style=None if row.correct else "red")
    return out


def markdown(result: StepResult) -> str:
    """Return the result as Markdown."""
    lines = [f"**{headline(result)}**", ""]
    lines += [f"| stage | model | {' | '.join(COLUMNS)} |", "|---|---|---" + "|---:" * (len(COLUMNS) - 1) + "|"]
    lines += [f"| {row.stage} | {row.subject} | {' | '.join(cells(row))} |" for row in result.rows]
    lines += [""]
    for key, reason in result.left_out.items():
        lines += [f"Left out: {key}: {reason}", ""]
    return "\n".join([*lines, legend(result), "", f"Measured on {report.machine(result)}.", ""])


def picture(result: StepResult, path: Path) -> None:
    """Draw the parts of a step and its memory, row by row, as PNG."""
    rows = result.rows[::-1]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 1.6 + 0.32 * len(rows)), dpi=160, layout="constrained", sharey=True)
    places = range(len(rows))
    behind = [0.0] * len(rows)
    for part, color in PARTS.items():
        medians = [getattr(row, f"{part}_ms").median for row in rows]
        left.barh(places, medians, left=behind, color=color, label=part)
        behind = [sum(pair) for pair in zip(behind, medians, strict=True)]
    for place, end, row in zip(places, behind, rows, strict=True):
        left.annotate(f"{row.ratio.median:.2f}x", (end, place), xytext=(3, 0), textcoords="offset points", va="center")
    held = [row.held_mib / 1024 for row in rows]
    right.barh(places, held, color="#7d8597", label="weights and AdamW's moments")
    right.barh(
        places, [(row.peak_mib or 0.0) / 1024 for row in rows], left=held, color="#2a9d8f", label="most beside them in a step"
    )
    left.set_yticks(places, [f"{row.stage} {row.subject} {row.mode}" for row in rows], fontsize=8)
    left.set_xlabel("training step, ms (and times faster)")
    right.set_xlabel("memory, GiB")
    for axes in (left, right):
        axes.margins(x=0.14)
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.12), ncols=3)
    cut = f"\nreduced to {result.reduced}" if result.reduced else ""
    title = f"{result.model}, batch {result.batch}, {result.text_tokens} text tokens, {result.dtype}"
    figure.suptitle(f"{title}, {result.environment['device']}{cut}", fontsize=10)
    figure.savefig(path)
    plt.close(figure)


def write(result: StepResult, folder: Path) -> list[Path]:
    """Write JSON, Markdown and the picture into ``folder``; return the paths."""
    ends = "-checkpointing" * result.checkpointing + "-reduced" * bool(result.reduced)
    base = f"step-{result.model}-{result.device}-{result.dtype}-batch{result.batch}{ends}"
    data = json.dumps(result.to_dict(), indent=2) + "\n"
    text = f"{markdown(result)}\n![parts of a training step, and its memory]({{stem}}.png)\n"
    return report.write_new(folder, base, data, text, lambda path: picture(result, path))
