"""What ``laco bench generate`` shows: tables in the terminal, Markdown, JSON and a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from rich.table import Table

from laco_kernels.bench import report
from laco_kernels.bench.generate import EXPLAINED

if TYPE_CHECKING:
    from collections.abc import Callable

    from laco_kernels.bench.generate import GenerateResult, GenerateRow
    from laco_kernels.bench.timing import Spread

FIRST_TOKEN = ("mode", "TTFT ms", "vision", "proj", "prefill", "ratio", "paper", "ok")
ALL_TOKENS = ("mode", "TPS", "TPOT ms", "ratio", "paper", "same", "MiB")
PARTS = {"vision": "#1b6ca8", "projector": "#e9a23b", "prefill": "#d1495b"}


def headline(result: GenerateResult) -> str:
    """One line that says what was measured."""
    cut = f", REDUCED to {result.reduced}" if result.reduced else ""
    return (
        f"{result.model}{cut}, batch {result.batch}, {result.text_tokens} text tokens and one image a row, "
        f"{result.new_tokens} new tokens, {result.dtype}, random weights, {result.rounds} interleaved rounds"
    )


def legend(result: GenerateResult) -> str:
    """What the columns mean."""
    first = f"{result.rows[0].subject} {result.modes[0]}"
    parts = [
        "TTFT: from prompt and image to the first token, median (p20-p80) in ms, and its parts: vision encoder, projector, the "
        "LLM's prefill with all else. TPS: new tokens of all rows a second of the whole answer; TPOT: ms a token behind the "
        f"first. Ratio: to {first}, paired by round; above 1 is faster; paper: the same from LaCo's or STF's tables. Same: "
        "tokens that are those of eager. MiB: peak beyond the weights. ok: logits of the first and last row against float64 "
        "err at most twice as much as eager's, and every token is "
        + ("eager's." if result.dtype == "float32" else "the one that logits choose."),
        " ".join(f"{mode}: {EXPLAINED[mode]}." for mode in result.modes),
    ]
    if result.reduced:
        parts.append(f"With {result.reduced} neither times nor ratios are those of the whole model.")
    if result.device == "cpu":
        parts.append("Times on a CPU are no claim of performance.")
    return " ".join(parts)


def short(number: float) -> str:
    """Three digits or so."""
    return f"{number:.0f}" if number >= 100 else f"{number:.1f}" if number >= 10 else f"{number:.2f}"


def spread_text(spread: Spread) -> str:
    """Median, and 20th and 80th percentile in brackets, written like the median."""
    form = "{:.0f}" if spread.median >= 100 else "{:.1f}" if spread.median >= 10 else "{:.2f}"
    return "{} ({}-{})".format(*(form.format(value) for value in (spread.median, spread.p20, spread.p80)))


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def first_cells(row: GenerateRow) -> tuple[str, ...]:
    """Return the cells of a row of the first table."""
    parts = (short(part.median) for part in (row.vision_ms, row.projector_ms, row.prefill_ms))
    ratio, paper = _times(row.ttft_ratio.median), _times(row.paper_ttft_ratio)
    return (row.mode, spread_text(row.ttft_ms), *parts, ratio, paper, "yes" if row.correct else "NO")


def all_cells(row: GenerateRow) -> tuple[str, ...]:
    """Return the cells of a row of the second table."""
    ratio, paper = _times(row.tps_ratio.median), _times(row.paper_tps_ratio)
    tpot = short(row.tpot_ms.median)
    return (row.mode, spread_text(row.tps), tpot, ratio, paper, f"{row.agreement:.0%}", short(row.peak_mib))


TABLES: tuple[tuple[tuple[str, ...], Callable[[GenerateRow], tuple[str, ...]]], ...] = (
    (FIRST_TOKEN, first_cells),
    (ALL_TOKENS, all_cells),
)


def tables(result: GenerateResult) -> list[Table]:
    """Return both tables, each fitting into 80 columns; the model stands above its modes."""
    made = []
    for columns, fill in TABLES:
        table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
        for name in columns:
            table.add_column(name, justify="left" if name == "mode" else "right", no_wrap=True)
        subject = ""
        for row in result.rows:
            if row.subject != subject:
                subject = row.subject
                table.add_row(f"{subject}, {row.image_tokens} tokens", style="bold")
            table.add_row(*fill(row), style=None if row.correct else "red")
        made.append(table)
    return made


def markdown(result: GenerateResult) -> str:
    """Return the result as Markdown."""
    lines = [f"**{headline(result)}**", ""]
    for columns, fill in TABLES:
        lines += [f"| model | image tokens | {' | '.join(columns)} |", "|---|---:|---" + "|---:" * (len(columns) - 1) + "|"]
        lines += [f"| {row.subject} | {row.image_tokens} | {' | '.join(fill(row))} |" for row in result.rows]
        lines.append("")
    for key, reason in result.left_out.items():
        lines += [f"Left out: {key}: {reason}", ""]
    return "\n".join([*lines, legend(result), "", f"Measured on {report.machine(result)}.", ""])


def picture(result: GenerateResult, path: Path) -> None:
    """Draw the parts of TTFT and the tokens a second, model by model, as PNG."""
    rows = result.rows[::-1]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 1.6 + 0.32 * len(rows)), dpi=160, layout="constrained", sharey=True)
    places = range(len(rows))
    behind = [0.0] * len(rows)
    for part, color in PARTS.items():
        medians = [getattr(row, f"{part}_ms").median for row in rows]
        left.barh(places, medians, left=behind, color=color, label=part)
        behind = [sum(pair) for pair in zip(behind, medians, strict=True)]
    for place, end, row in zip(places, behind, rows, strict=True):
        left.annotate(_times(row.ttft_ratio.median), (end, place), xytext=(3, 0), textcoords="offset points", va="center")
        right.annotate(
            _times(row.tps_ratio.median), (row.tps.median, place), xytext=(3, 0), textcoords="offset points", va="center"
        )
    right.barh(places, [row.tps.median for row in rows], color="#2a9d8f")
    left.set_yticks(places, [f"{row.subject} {row.mode}" for row in rows], fontsize=8)
    left.set_xlabel("time to first token, ms (and times faster)")
    right.set_xlabel("tokens a second (and times faster)")
    left.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.12), ncols=3)
    for axes in (left, right):
        axes.margins(x=0.14)
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    cut = f"\nreduced to {result.reduced}" if result.reduced else ""
    title = f"{result.model}, batch {result.batch}, {result.new_tokens} new tokens, {result.dtype}"
    figure.suptitle(f"{title}, {result.environment['device']}{cut}", fontsize=10)
    figure.savefig(path)
    plt.close(figure)


def write(result: GenerateResult, folder: Path) -> list[Path]:
    """Write JSON, Markdown and the picture into ``folder``; return the paths."""
    base = f"generate-{result.model}-{result.device}-{result.dtype}-batch{result.batch}{'-reduced' * bool(result.reduced)}"
    data = json.dumps(result.to_dict(), indent=2) + "\n"
    text = f"{markdown(result)}\n![time to first token and tokens a second]({{stem}}.png)\n"
    return report.write_new(folder, base, data, text, lambda path: picture(result, path))
