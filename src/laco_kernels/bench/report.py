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
    from collections.abc import Callable

    from laco_kernels.bench.compressors import CompressorResult
    from laco_kernels.bench.kept import KeptResult
    from laco_kernels.bench.system import VecResult, VecRow
    from laco_kernels.train.demo import DemoResult

SUFFIXES = ("json", "md", "png")
MEASURED, PAPER = "#1b6ca8", "#d1495b"
OTHERS = ("#2a9d8f", "#e9a23b", "#6a4c93", "#7d8597", "#b5651d", "#3a3a3a")  # one for every mode behind the first


def headline(result: VecResult) -> str:
    """One line that says what was measured."""
    images = f"{result.images} photo{'s' if result.images > 1 else ''}"
    how = "training step, " if result.training else ""
    how += result.modes[0] if len(result.modes) == 1 else f"{len(result.modes)} modes"
    how += f" (fused: {result.impl})" if result.impl else ""
    return (
        f"{result.encoder}, batch {result.batch}, {result.dtype}, {how}, {result.weights} weights, {images}, "
        f"{result.tokens_in} tokens in, {result.rounds} interleaved rounds"
    )


def machine(result: VecResult | CompressorResult | KeptResult | DemoResult) -> str:
    """One line that says where it was measured."""
    env = result.environment
    threads = f", {env['cpu_threads']} threads" if result.device == "cpu" else f", driver {env['driver']}"
    versions = f"torch {env['torch']}, transformers {env['transformers']}, Python {env['python']}"
    commit = f" ({env['commit']})" if env["commit"] else ""
    return f"{env['device']}{threads}; {versions}; laco_kernels {env['laco_kernels']}{commit}; {env['date']}"


def legend(result: VecResult) -> str:
    """What the columns mean, and the overhead."""
    first = f" in mode {result.modes[0]}" if len(result.modes) > 1 else ""
    what = "time of one forward and backward pass" if result.training else "vision-encode time of one batch"
    parts = [f"VEC: {what} in ms, median (p20-p80). Ratio: VEC @1{first} / VEC, paired by round;"]
    if len(result.modes) > 1:
        parts.append(f"over {result.modes[0]}: the same at one depth;")
    parts.append(
        "paper: the ratio from LaCo's tables. MiB: peak of activations. ok: error against float64 weights and products at most "
        "twice that of the raster layout in the run's precision."
    )
    outside = [row.overhead for row in result.rows if row.overhead is not None]
    if outside:
        parts.append(f"Time outside embeddings, layers, merge and norms: at most {max(outside):.2%}.")
    return " ".join(parts)


COLUMNS = ("depth", "layer", "tokens", "GFLOPs", "+params", "VEC ms", "ratio", "paper", "MiB", "ok")


MODE_COLUMNS = ("depth", "mode", "VEC ms", "ratio", "paper", "over", "MiB", "ok")


def columns(result: VecResult) -> tuple[str, ...]:
    """Return the columns of a table of ``result``: what a mode changes, where there are several."""
    if len(result.modes) == 1:
        return COLUMNS
    return tuple(f"over {result.modes[0]}" if name == "over" else name for name in MODE_COLUMNS)


def cells(row: VecRow, *, with_mode: bool = False) -> tuple[str, ...]:
    """Return the cells of one row, in the order of ``COLUMNS``, or of ``MODE_COLUMNS``."""
    values = (row.vec_ms.median, row.vec_ms.p20, row.vec_ms.p80)
    form = "{:.3g}" if row.vec_ms.median >= 1e5 else "{:.0f}" if row.vec_ms.median >= 100 else "{:.2f}"
    median, low, high = (form.format(value) for value in values)
    known = {
        "depth": depth_label(row.depth),
        "mode": row.mode,
        "layer": str(row.layer),
        "tokens": str(row.tokens),
        "GFLOPs": f"{row.gflops:.0f}" if row.gflops >= 10 else f"{row.gflops:.2g}",
        "+params": f"{row.added_parameters / 1e6:.1f}M",
        "VEC ms": f"{median} ({low}-{high})",
        "ratio": f"{row.ratio.median:.2f}x",
        "paper": "-" if row.paper_ratio is None else f"{row.paper_ratio:.2f}x",
        "over": f"{row.mode_ratio.median:.2f}x",
        "MiB": f"{row.peak_mib:.0f}",
        "ok": "yes" if row.correct else "NO",
    }
    return tuple(known[name] for name in (MODE_COLUMNS if with_mode else COLUMNS))


def depth_label(depth: str) -> str:
    """``@1/4``; a fraction that is long to write as a decimal."""
    return f"@{depth}" if len(depth) <= 5 else f"@{float(Fraction(depth)):.3g}"


def table(result: VecResult) -> Table:
    """Return the result as a table that fits into 80 columns."""
    out = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    for name in columns(result):
        out.add_column(name, justify="left" if name in ("depth", "mode") else "right", no_wrap=True)
    for row in result.rows:
        out.add_row(*cells(row, with_mode=len(result.modes) > 1), style=None if row.correct else "red")
    return out


def markdown(result: VecResult) -> str:
    """Return the result as Markdown."""
    names, several = columns(result), len(result.modes) > 1
    lines = [f"**{headline(result)}**", "", f"| {' | '.join(names)} |", "|---" + "|---:" * (len(names) - 1) + "|"]
    lines += [f"| {' | '.join(cells(row, with_mode=several))} |" for row in result.rows]
    return "\n".join([*lines, "", legend(result), "", f"Measured on {machine(result)}.", ""])


def picture(result: VecResult, path: Path) -> None:
    """Draw VEC against depth, measured and as published, each relative to @1 in the first mode, as PNG."""
    first = [row for row in result.rows if row.mode == result.modes[0]]
    places = {row.depth: x for x, row in enumerate(first)}
    figure, axes = plt.subplots(figsize=(7, 4.2), dpi=160, layout="constrained")
    several = len(result.modes) > 1
    for color, mode in zip([MEASURED, *OTHERS], result.modes, strict=False):
        rows = [row for row in result.rows if row.mode == mode]
        xs = [places[row.depth] for row in rows]
        share = [100 / row.ratio.median for row in rows]
        low = [s - 100 / row.ratio.p80 for s, row in zip(share, rows, strict=True)]
        high = [100 / row.ratio.p20 - s for s, row in zip(share, rows, strict=True)]
        label = mode if several else "measured (p20 to p80)"
        axes.errorbar(xs, share, yerr=[low, high], color=color, marker="o", capsize=3, label=label)
        if several:
            continue
        for x, y, row in zip(xs, share, rows, strict=True):
            text = f"{row.vec_ms.median:.0f} ms" if row.vec_ms.median >= 100 else f"{row.vec_ms.median:.1f} ms"
            axes.annotate(text, (x, y), xytext=(6, -16), textcoords="offset points", ha="left", color=color)
    published = [(places[row.depth], 100 / row.paper_ratio) for row in first if row.paper_ratio]
    if published:
        axes.plot(*zip(*published, strict=True), color=PAPER, marker="s", linestyle="--", label="LaCo paper")
    axes.set_xticks(list(places.values()), [f"{depth_label(row.depth)}\nlayer {row.layer}" for row in first])
    axes.set_xlim(-0.3, len(first) - 0.4)
    axes.set_ylim(0, max(110, *(105 / row.ratio.median for row in result.rows)))
    axes.set_xlabel(f"where 2 x 2 tokens are merged ({result.tokens_in} tokens in, {first[0].tokens} out)")
    what = "training step" if result.training else "vision encoding cost"
    axes.set_ylabel(f"{what}, % of @1" + (f" {result.modes[0]}" if several else ""))
    axes.set_title(f"{result.encoder}, batch {result.batch}, {result.dtype}\n{result.environment['device']}", fontsize=10)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left" if several else "lower right", frameon=False, fontsize=8)
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
    """Write JSON, Markdown and the picture into ``folder``; return the paths."""
    encoder = Path(result.encoder).resolve().name
    base = f"vec-{encoder}-{result.device}-{result.dtype}-batch{result.batch}{'-training' * result.training}"
    data = json.dumps(result.to_dict(), indent=2) + "\n"
    text = f"{markdown(result)}\n![VEC against depth]({{stem}}.png)\n"
    return write_new(folder, base, data, text, lambda path: picture(result, path))


def write_new(folder: Path, base: str, data: str, text: str, draw: Callable[[Path], None]) -> list[Path]:
    """Write JSON, Markdown and a picture into ``folder`` under a name that nothing there has yet; return the paths.

    Where writing fails nothing is left behind.

    Args:
        folder: made where it does not exist.
        base: the name without suffix; a number is put behind it where it is taken.
        data: the JSON.
        text: the Markdown, with ``{stem}`` for the name.
        draw: draws the picture to a path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stem, number = base, 1
    while any((folder / f"{stem}.{suffix}").exists() for suffix in SUFFIXES):
        number += 1
        stem = f"{base}-{number}"
    paths = [folder / f"{stem}.{suffix}" for suffix in SUFFIXES]
    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as part:
        parts = [Path(part) / path.name for path in paths]
        parts[0].write_text(data, encoding="utf-8")
        parts[1].write_text(text.replace("{stem}", stem), encoding="utf-8")
        draw(parts[2])
        for finished, path in zip(parts, paths, strict=True):
            finished.replace(path)
    return paths
