"""What ``laco bench kept`` found, as tables, sentences, Markdown and a picture."""

from __future__ import annotations

import itertools
import json
import statistics
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib import colormaps
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex
from matplotlib.lines import Line2D
from rich.table import Table

from laco_kernels.bench.kept import DRAWN, NONE, OFF, ON
from laco_kernels.bench.report import depth_label, machine, write_new

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from laco_kernels.bench.kept import Cosine, KeptResult, KeptRow

MEASURES = {"windows": "windows", "mean_token": "mean token"}
LINES = {ON: "-", OFF: "--", DRAWN: "-.", NONE: ":"}
MEANINGS = {ON: "with the residual", OFF: "without", DRAWN: "with it, all weights drawn", NONE: "no parameters"}
MARKERS = "osD^vPX"
COLUMNS = 5  # depths that fit into 80 columns beside each other


def headline(result: KeptResult) -> str:
    """One line that says what was measured, and first of all of what kind the encoder's weights are."""
    encoder = result.encoder
    if result.weights == "random":
        encoder += " with RANDOM weights, which says nothing of a trained encoder"
    if result.accuracy is not None:
        encoder += f", pretrained here (reads {result.accuracy:.1%} of held-out digits)"
    images = f"{result.images} image{'s' if result.images > 1 else ''} of {result.tokens_in} tokens"
    draws = f"{result.seeds} draw{'s' if result.seeds > 1 else ''} of untrained compressors"
    return f"What compressing {result.ratio} x {result.ratio} inside leaves of the final features: {encoder}; {images}, {draws}"


def legend(result: KeptResult) -> str:
    """What the figures mean."""
    parts = [
        "Cosine between last_hidden_state of the frozen encoder with an untrained compressor inside and without one, the "
        "latter averaged over each window; mean\N{PLUS-MINUS SIGN}standard deviation over images and draws. "
        "The mean token is that of all patches of an image: a merged token counts as often as it has patches (tome), "
        "dropped ones do not count (visionzip, prumerge_plus)."
    ]
    kinds = {row.residual for row in result.rows}
    if DRAWN in kinds:
        parts.append(
            "on*: as on, but with the last map of the compressor drawn, which else starts at zero where there is a residual."
        )
    if NONE in kinds:
        parts.append("-: no parameters to draw, and no residual to switch.")
    if any(row.windows is None for row in result.rows):
        parts.append("n/a: what comes out has no grid, hence no windows.")
    return " ".join(parts)


def findings(result: KeptResult) -> list[str]:
    """Say what the figures show, whichever way that is."""
    lines = []
    for depth in result.depths:
        kept = {
            (row.compressor, row.residual): row.windows.mean
            for row in result.rows
            if row.depth == depth and row.windows is not None
        }
        if not kept:
            continue
        first = max(kept, key=lambda key: kept[key])
        level = sum(kept[first] - value < 0.005 for value in kept.values()) - 1
        text = f"{depth_label(depth)}: closest is {_label(*first)} ({kept[first]:.2f})"
        text += f", {level} more within 0.005." if level else "."
        pairs = [(kept[name, ON], kept[name, OFF]) for name, residual in kept if residual == ON and (name, OFF) in kept]
        if pairs:
            better = sum(on > off for on, off in pairs)
            on, off = (statistics.mean(side) for side in zip(*pairs, strict=True))
            text += f" With the residual {better} of {len(pairs)} come closer than without, on average {on:.2f} to {off:.2f}."
        lines.append(text)
    for measure, other in (("windows", result.other_windows), ("mean_token", result.other_mean_token)):
        if other is not None:
            lines.append(_against_another_image(result, measure, other))
    lines += [f"Left out: {name} ({reason})" for name, reason in result.left_out.items()]
    return lines


def _against_another_image(result: KeptResult, measure: str, other: float) -> str:
    counts = []
    for kind, words in ((ON, "with the residual"), (OFF, "without"), (NONE, "without parameters")):
        values = [cosine.mean for row in result.rows if row.residual == kind and (cosine := _value(row, measure)) is not None]
        if values:
            counts.append(f"{sum(value <= other for value in values)} of {len(values)} {words}")
    return f"By {MEASURES[measure]} another image's features reach {other:.2f}; no closer are {', '.join(counts)}."


def tables(result: KeptResult) -> list[Table]:
    """Return the figures as tables that fit into 80 columns."""
    made = []
    for measure, title in MEASURES.items():
        for start in range(0, len(result.depths), COLUMNS):
            depths = result.depths[start : start + COLUMNS]
            table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
            table.add_column(title, no_wrap=True)
            table.add_column("residual", no_wrap=True)
            for depth in depths:
                table.add_column(depth_label(depth), justify="right", no_wrap=True)
            for name, residual, cells in _lines(result, measure, depths):
                table.add_row(name, residual, *cells)
            made.append(table)
    return made


def markdown(result: KeptResult) -> str:
    """Return everything as Markdown."""
    lines = [f"**{headline(result)}**", ""]
    for measure, title in MEASURES.items():
        lines += [f"| {title} | residual | {' | '.join(map(depth_label, result.depths))} |"]
        lines += ["|---|---" + "|---:" * len(result.depths) + "|"]
        lines += [f"| {name} | {kind} | {' | '.join(cells)} |" for name, kind, cells in _lines(result, measure, result.depths)]
        lines.append("")
    lines += [f"* {line}" for line in findings(result)]
    return "\n".join([*lines, "", legend(result), "", f"Computed on {machine(result)}.", ""])


def picture(result: KeptResult, path: Path) -> None:
    """Draw cosine against depth as PNG, by windows and by the mean token: a colour and marker for each compressor."""
    names = list(dict.fromkeys(row.compressor for row in result.rows))
    order = itertools.cycle([*range(0, 20, 2), *range(1, 20, 2)])  # the strong colours first
    looks = {name: (to_hex(colormaps["tab20"](next(order))), MARKERS[i % len(MARKERS)]) for i, name in enumerate(names)}
    figure, panels = plt.subplots(1, 2, figsize=(12, 6.2), dpi=130, layout="constrained", sharey=True)
    for panel, (measure, title) in zip(panels, MEASURES.items(), strict=True):
        _draw(panel, result, measure, looks)
        panel.set_title(f"by {title}", fontsize=10)
    panels[0].set_ylabel("cosine to the full-resolution features")
    handles = [Line2D([], [], color=colour, marker=marker, label=name) for name, (colour, marker) in looks.items()]
    kinds = dict.fromkeys(row.residual for row in result.rows)
    handles += [Line2D([], [], color="black", linestyle=LINES[kind], label=MEANINGS[kind]) for kind in kinds]
    if result.other_windows is not None:
        handles.append(Line2D([], [], color="#bbbbbb", linewidth=3, label="another image"))
    figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize=8)
    title = f"{Path(result.encoder).name} (weights: {result.weights}), {result.ratio} x {result.ratio} tokens compressed to one"
    figure.suptitle(title, fontsize=11)
    figure.savefig(path)
    plt.close(figure)


def write(result: KeptResult, folder: Path) -> list[Path]:
    """Write JSON, Markdown and the picture into ``folder``; return the paths."""
    base = f"kept-{Path(result.encoder).resolve().name}-ratio{result.ratio}"
    data = json.dumps(result.to_dict(), indent=2) + "\n"
    text = f"{markdown(result)}\n![Features kept against depth]({{stem}}.png)\n"
    return write_new(folder, base, data, text, lambda path: picture(result, path))


def _draw(panel: Axes, result: KeptResult, measure: str, looks: dict[str, tuple[str, str]]) -> None:
    other = result.other_windows if measure == "windows" else result.other_mean_token
    if other is not None:
        panel.axhline(other, color="#bbbbbb", linewidth=3)
    for (name, residual), rows in _grouped(result).items():
        values = [cosine.mean for row in rows if (cosine := _value(row, measure)) is not None]
        if values:
            colour, marker = looks[name]
            panel.plot(values, color=colour, marker=marker, markersize=4, linewidth=1.3, linestyle=LINES[residual])
    layers = {row.depth: row.layer for row in result.rows}
    panel.set_xticks(range(len(layers)), [f"{depth_label(depth)}\nlayer {layer}" for depth, layer in layers.items()])
    panel.set_xlabel("where the compressor stands")
    panel.grid(axis="y", alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)


def _lines(result: KeptResult, measure: str, depths: list[str]) -> list[tuple[str, str, list[str]]]:
    """Return for each line of a table the compressor, its residual and its cells."""
    return [
        (name, residual, [_cell(_value(row, measure)) for row in rows if row.depth in depths])
        for (name, residual), rows in _grouped(result).items()
    ]


def _grouped(result: KeptResult) -> dict[tuple[str, str], list[KeptRow]]:
    groups: dict[tuple[str, str], list[KeptRow]] = {}
    for row in result.rows:
        groups.setdefault((row.compressor, row.residual), []).append(row)
    return groups


def _value(row: KeptRow, measure: str) -> Cosine | None:
    return row.windows if measure == "windows" else row.mean_token


def _cell(cosine: Cosine | None) -> str:
    return "n/a" if cosine is None else f"{cosine.mean:.2f}\N{PLUS-MINUS SIGN}{cosine.std:.2f}"


def _label(name: str, residual: str) -> str:
    return name if residual == NONE else f"{name} {residual}"
