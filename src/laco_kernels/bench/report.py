"""What a measurement looks like: a table in the terminal, Markdown, JSON and a picture."""

from __future__ import annotations

import json
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from rich.table import Table

from laco_kernels.errors import complaint

if TYPE_CHECKING:
    from laco_kernels.bench.system import VecResult, VecRow

SUFFIXES = ("json", "md", "png")
MEASURED, PAPER = "#1b6ca8", "#d1495b"


def headline(result: VecResult) -> str:
    """One line that says what was measured."""
    images = f"{result.images} photo{'s' if result.images > 1 else ''}"
    how = "torch.compile" if result.compiled else "eager"
    return (
        f"{result.encoder}, batch {result.batch}, {result.dtype}, {how}, {result.weights} weights, {images}, "
        f"{result.tokens_in} tokens in, {result.rounds} interleaved rounds"
    )


def machine(result: VecResult) -> str:
    """One line that says where it was measured."""
    env = result.environment
    threads = f", {env['cpu_threads']} threads" if result.device == "cpu" else f", driver {env['driver']}"
    versions = f"torch {env['torch']}, transformers {env['transformers']}, Python {env['python']}"
    commit = f" ({env['commit']})" if env["commit"] else ""
    return f"{env['device']}{threads}; {versions}; laco_kernels {env['laco_kernels']}{commit}; {env['date']}"


def legend(result: VecResult) -> str:
    """What the columns mean, and the overhead."""
    worst = max(row.overhead for row in result.rows)
    return (
        "VEC: vision-encode time of one batch in ms, median (p20-p80). Ratio: VEC @1 / VEC, paired by round; "
        "paper: the same from LaCo's tables. MiB: peak of activations. ok: error against float64 weights and products at most "
        f"twice that of the raster layout in the run's precision. Time outside embeddings, layers, merge and norms: at most "
        f"{worst:.2%}."
    )


COLUMNS = ("depth", "layer", "tokens", "GFLOPs", "+params", "VEC ms", "ratio", "paper", "MiB", "ok")


def cells(row: VecRow) -> tuple[str, ...]:
    """Return the cells of one row, in the order of ``COLUMNS``."""
    values = (row.vec_ms.median, row.vec_ms.p20, row.vec_ms.p80)
    form = "{:.3g}" if row.vec_ms.median >= 1e5 else "{:.0f}" if row.vec_ms.median >= 100 else "{:.2f}"
    median, low, high = (form.format(value) for value in values)
    return (
        depth_label(row.depth),
        str(row.layer),
        str(row.tokens),
        f"{row.gflops:.0f}" if row.gflops >= 10 else f"{row.gflops:.2g}",
        f"{row.added_parameters / 1e6:.1f}M",
        f"{median} ({low}-{high})",
        f"{row.ratio.median:.2f}x",
        "-" if row.paper_ratio is None else f"{row.paper_ratio:.2f}x",
        f"{row.peak_mib:.0f}",
        "yes" if row.correct else "NO",
    )


def depth_label(depth: str) -> str:
    """``@1/4``; a fraction that is long to write as a decimal."""
    return f"@{depth}" if len(depth) <= 5 else f"@{float(Fraction(depth)):.3g}"


def table(result: VecResult) -> Table:
    """Return the result as a table that fits into 80 columns."""
    out = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    for name in COLUMNS:
        out.add_column(name, justify="left" if name == "depth" else "right", no_wrap=True)
    for row in result.rows:
        out.add_row(*cells(row), style=None if row.correct else "red")
    return out


def markdown(result: VecResult) -> str:
    """Return the result as Markdown."""
    lines = [f"**{headline(result)}**", "", f"| {' | '.join(COLUMNS)} |", "|---" + "|---:" * (len(COLUMNS) - 1) + "|"]
    lines += [f"| {' | '.join(cells(row))} |" for row in result.rows]
    return "\n".join([*lines, "", legend(result), "", f"Measured on {machine(result)}.", ""])


def picture(result: VecResult, path: Path) -> None:
    """Draw VEC against depth, measured and as published, each relative to its own @1, as PNG."""
    rows = result.rows
    xs = range(len(rows))
    figure, axes = plt.subplots(figsize=(7, 4.2), dpi=160, layout="constrained")
    share = [100 / row.ratio.median for row in rows]
    low = [s - 100 / row.ratio.p80 for s, row in zip(share, rows, strict=True)]
    high = [100 / row.ratio.p20 - s for s, row in zip(share, rows, strict=True)]
    axes.errorbar(xs, share, yerr=[low, high], color=MEASURED, marker="o", capsize=3, label="measured (p20 to p80)")
    for x, y, row in zip(xs, share, rows, strict=True):
        text = f"{row.vec_ms.median:.0f} ms" if row.vec_ms.median >= 100 else f"{row.vec_ms.median:.1f} ms"
        axes.annotate(text, (x, y), xytext=(6, -16), textcoords="offset points", ha="left", color=MEASURED)
    published = [(x, 100 / row.paper_ratio) for x, row in zip(xs, rows, strict=True) if row.paper_ratio]
    if published:
        axes.plot(*zip(*published, strict=True), color=PAPER, marker="s", linestyle="--", label="LaCo paper")
    axes.set_xticks(xs, [f"{depth_label(row.depth)}\nlayer {row.layer}" for row in rows])
    axes.set_xlim(-0.3, len(rows) - 0.4)
    axes.set_ylim(0, 110)
    axes.set_xlabel(f"where 2 x 2 tokens are merged ({result.tokens_in} tokens in, {rows[0].tokens} out)")
    axes.set_ylabel("vision encoding cost, % of @1")
    axes.set_title(f"{result.encoder}, batch {result.batch}, {result.dtype}\n{result.environment['device']}", fontsize=10)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(path)
    plt.close(figure)


def check_folder(folder: Path) -> None:
    """Raise ValueError unless results can be written into ``folder``, which need not exist yet."""
    try:
        existing = folder.absolute()
        while not existing.exists():
            existing = existing.parent
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        given = f"{str(folder)!r} ({error.strerror})"
        remedy = "Choose another folder, or make this one writable"
        raise ValueError(complaint("out", given, "a folder that can be written to", remedy)) from None


def write(result: VecResult, folder: Path) -> list[Path]:
    """Write JSON, Markdown and the picture into ``folder`` under a name that nothing there has yet; return the paths.

    Where writing fails nothing is left behind.
    """
    folder.mkdir(parents=True, exist_ok=True)
    encoder = Path(result.encoder).resolve().name
    base = f"vec-{encoder}-{result.device}-{result.dtype}-batch{result.batch}"
    stem, number = base, 1
    while any((folder / f"{stem}.{suffix}").exists() for suffix in SUFFIXES):
        number += 1
        stem = f"{base}-{number}"
    paths = [folder / f"{stem}.{suffix}" for suffix in SUFFIXES]
    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as part:
        parts = [Path(part) / path.name for path in paths]
        parts[0].write_text(json.dumps(result.to_dict(), indent=2) + "\n", encoding="utf-8")
        parts[1].write_text(f"{markdown(result)}\n![VEC against depth]({stem}.png)\n", encoding="utf-8")
        picture(result, parts[2])
        for finished, path in zip(parts, paths, strict=True):
            finished.replace(path)
    return paths
