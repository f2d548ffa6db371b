"""What a comparison of compressors looks like: two tables, Markdown, JSON and a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, StrMethodFormatter
from rich.table import Table

from laco_kernels.bench import report
from laco_kernels.bench.prefill import llm_names

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from matplotlib.axes import Axes

    from laco_kernels.bench.compressors import CompressorResult, CompressorRow

COLUMNS = ("compressor", "r", "where", "tokens", "params", "GFLOPs", "ms", "MiB", "ok")
PLACES = {"inside": "in", "behind": "behind", "before": "before"}
COLORS = {"inside": "#1b6ca8", "behind": "#d1495b", "before": "#2a9d8f"}


def headline(result: CompressorResult) -> str:
    """One line that says what was measured."""
    images = f"{result.images} photo{'s' if result.images > 1 else ''}"
    return (
        f"{result.encoder}, tokens behind layer {result.layer}, batch {result.batch}, {result.dtype}, "
        f"{result.weights} weights, {images}, {result.tokens_in} tokens in, {result.rounds} interleaved rounds"
    )


def legend(result: CompressorResult) -> str:
    """What the columns mean."""
    return (
        f"Where: in the encoder with its width, behind it projecting to {result.llm}'s width, or before it on the image; "
        "+ where it may stand elsewhere, too. r: side of a window. Tokens: what the LLM reads of one image. "
        "GFLOPs, ms (median, p20-p80) and MiB (peak of activations): the compressor alone, one batch. "
        "ok: error against float64 at most twice that of the reference implementation in the run's precision."
    )


def whole_legend(result: CompressorResult) -> str:
    """What the columns of the second table mean."""
    return (
        f"Encoder: GFLOPs of the encoder with the compressor, one batch; those inside stand behind layer {result.layer}. "
        "Others: TFLOPs of the LLM's prefill of one image, no text, counted on shapes."
    )


def cells(row: CompressorRow) -> tuple[str, ...]:
    """Return the cells of one row of the first table, in the order of ``COLUMNS``."""
    form = "{:.0f}" if row.ms.median >= 100 else "{:.1f}" if row.ms.median >= 10 else "{:.2f}"
    median, low, high = (form.format(value) for value in (row.ms.median, row.ms.p20, row.ms.p80))
    return (
        row.name,
        str(row.ratio),
        PLACES[row.place] + "+" * (len(row.places) > 1),
        str(row.tokens),
        f"{row.parameters / 1e6:.2f}M" if row.parameters < 1e8 else f"{row.parameters / 1e6:.0f}M",
        _short(row.gflops),
        f"{median} ({low}-{high})",
        f"{row.peak_mib:.0f}" if row.peak_mib >= 10 else f"{row.peak_mib:.1f}",
        "yes" if row.correct else "NO",
    )


def whole_columns() -> tuple[str, ...]:
    """Return the columns of the second table."""
    return ("compressor", "r", "tokens", "encoder", *llm_names())


def whole_cells(row: CompressorRow) -> tuple[str, ...]:
    """Return the cells of one row of the second table."""
    prefill = [f"{row.prefill_tflops[llm]:.2f}" for llm in llm_names()]
    return (row.name, str(row.ratio), str(row.tokens), _short(row.encoder_gflops), *prefill)


def _short(number: float) -> str:
    return f"{number:.0f}" if number >= 100 else f"{number:.1f}" if number >= 0.05 else f"{number:.2g}"


def tables(result: CompressorResult) -> list[Table]:
    """Return both tables, each fitting into 80 columns."""
    made = []
    for columns, fill in ((COLUMNS, cells), (whole_columns(), whole_cells)):
        table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
        for name in columns:
            table.add_column(name, justify="left" if name in ("compressor", "where") else "right", no_wrap=True)
        for row in result.rows:
            table.add_row(*fill(row), style=None if row.correct else "red")
        made.append(table)
    return made


def markdown(result: CompressorResult) -> str:
    """Return the result as Markdown."""
    lines = [f"**{headline(result)}**", ""]
    for columns, fill, explained in (
        (COLUMNS, cells, legend(result)),
        (whole_columns(), whole_cells, whole_legend(result)),
    ):
        lines += [f"| {' | '.join(columns)} |", "|---" + "|---:" * (len(columns) - 1) + "|"]
        lines += [f"| {' | '.join(fill(row))} |" for row in result.rows]
        lines += ["", explained, ""]
    for key, reason in result.left_out.items():
        lines += [f"Left out: {key.replace(' ', ', ratio ')}: {reason}", ""]
    return "\n".join([*lines, f"Measured on {report.machine(result)}.", ""])


def picture(result: CompressorResult, path: Path) -> None:
    """Draw what an image costs against the share of its tokens that is kept, as PNG."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 6), dpi=160, layout="constrained")
    costs: tuple[tuple[str, Callable[[CompressorRow], float]], ...] = (
        (f"the compressor alone, ms for a batch of {result.batch}", lambda row: row.ms.median),
        ("encoder and compressor, GFLOPs an image", lambda row: row.encoder_gflops / result.batch),
    )
    shares = sorted({100 * row.tokens / result.tokens_in for row in result.rows})
    for axes, (label, cost) in zip(panels, costs, strict=True):
        ends = []
        for name in dict.fromkeys(row.name for row in result.rows):
            rows = sorted((row for row in result.rows if row.name == name), key=lambda row: row.tokens)
            points = [(100 * row.tokens / result.tokens_in, cost(row)) for row in rows]
            axes.plot(*zip(*points, strict=True), color=COLORS[rows[0].place], marker="o", markersize=4, linewidth=1, alpha=0.8)
            ends.append((*points[-1], name, COLORS[rows[0].place]))
        axes.set(xscale="log", yscale="log", xlabel=f"tokens kept, % of {result.tokens_in}", ylabel=label)
        axes.set_xticks(shares, [f"{share:.3g}" for share in shares], minor=False)
        axes.set_xlim(shares[0] * 0.9, shares[-1] * 2.2)
        axes.minorticks_off()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        _label_apart(axes, ends)
    handles = [plt.Line2D([], [], color=color, marker="o", label=place) for place, color in COLORS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.suptitle(f"{result.encoder}, {result.dtype}, {result.environment['device']}", fontsize=10)
    figure.savefig(path)
    plt.close(figure)


def _label_apart(axes: Axes, ends: Sequence[tuple[float, float, str, str]], gap: float = 0.034) -> None:
    """Write a name beside each point, those at the same place apart from each other; ``gap`` is of the axes' height."""
    to_axes = axes.transData + axes.transAxes.inverted()
    for x in {end[0] for end in ends}:
        column = sorted((to_axes.transform((x, y))[1], y, name, color) for at, y, name, color in ends if at == x)
        heights = [height for height, *_ in column]
        for i in range(1, len(heights)):
            heights[i] = max(heights[i], heights[i - 1] + gap)
        heights.append(1.0 + gap)
        for i in reversed(range(len(heights) - 1)):  # what would leave the picture comes down
            heights[i] = min(heights[i], heights[i + 1] - gap)
        place = to_axes.transform((x, 1))[0] + 0.05
        for height, (_, y, name, color) in zip(heights, column, strict=False):
            axes.annotate(
                name,
                (x, y),
                xytext=(place, height),
                textcoords="axes fraction",
                fontsize=7,
                va="center",
                color=color,
                arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.4, "alpha": 0.6, "relpos": (0, 0.5)},
            )


def write(result: CompressorResult, folder: Path) -> list[Path]:
    """Write JSON, Markdown and the picture into ``folder``; return the paths."""
    encoder = Path(result.encoder).resolve().name
    base = f"compressors-{encoder}-{result.device}-{result.dtype}-batch{result.batch}"
    data = json.dumps(result.to_dict(), indent=2) + "\n"
    text = f"{markdown(result)}\n![cost against tokens kept]({{stem}}.png)\n"
    return report.write_new(folder, base, data, text, lambda path: picture(result, path))
