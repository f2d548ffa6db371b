"""Charts as SVG that lies in the page itself and takes its colours from it, so that it suits light and dark."""

from __future__ import annotations

import io
import math
import re
from html import escape
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from laco_kernels.bench.page import text

if TYPE_CHECKING:
    from laco_kernels.bench.page.series import Chart, Series

# Role: mark, line. The colours are the page's custom properties --c-<role>; each stands as an odd hex colour while drawing.
STYLES = {
    "eager": ("o", "-"),
    "eager-conv": ("v", ":"),
    "compile": ("s", "-"),
    "compile-max-autotune": ("D", ":"),
    "composite": ("^", "-"),
    "triton": ("P", "-"),
    "cuda": ("X", "-"),
    "products": ("", "--"),
    "paper": ("d", "--"),
    "other": (".", "-."),
}
ROLES = (*STYLES, "ink", "line")
COLOURS = {role: f"#{0xABCD00 + i:06x}" for i, role in enumerate(ROLES)}
SIZE = 11.5  # of letters; the picture is as wide as a phone's screen, where this is about one pixel a unit
WIDTH, HEIGHT, LEGEND_LINE = 360, 235, 16


def draw(chart: Chart, name: str) -> str:
    """Draw a chart as an ``<svg>`` element; ``name`` must be unique in its page."""
    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.size": SIZE,
        "axes.edgecolor": COLOURS["line"],
        "axes.labelcolor": COLOURS["ink"],
        "text.color": COLOURS["ink"],
        "xtick.color": COLOURS["line"],
        "ytick.color": COLOURS["line"],
        "xtick.labelcolor": COLOURS["ink"],
        "ytick.labelcolor": COLOURS["ink"],
        "text.parse_math": False,
        "path.simplify": False,
    }
    lines = -(-len(chart.series) // 2)
    stream = io.StringIO()
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(WIDTH / 72, (HEIGHT + LEGEND_LINE * lines) / 72), dpi=72, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        for series in chart.series:
            _plot(axes, series)
        _axes(axes, chart)
        figure.legend(loc="outside lower center", ncols=2, frameon=False, handlelength=2.6, columnspacing=1.2, labelspacing=0.2)
        unwritten = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(stream, format="svg", metadata=unwritten, transparent=True)
    return inline(stream.getvalue(), name, chart.title, chart.description)


def _plot(axes: Any, series: Series) -> None:
    role = series.role if series.role in STYLES else "other"
    colour, (mark, line) = COLOURS[role], STYLES[role]
    xs = [point.x for point in series.points]
    axes.fill_between(
        xs, [p.y.low for p in series.points], [p.y.high for p in series.points], color=colour, alpha=0.18, linewidth=0
    )
    axes.plot(xs, [p.y.median for p in series.points], color=colour, marker=mark, linestyle=line, label=series.label, ms=5)


def _axes(axes: Any, chart: Chart) -> None:
    if chart.logarithmic:
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=9))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _value(y, chart)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(0, 1.08 * max(100.0, *(point.y.high for series in chart.series for point in series.points)))
        axes.margins(x=0.08)
    axes.set_xticks(list(chart.ticks), _labels(chart))
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.y_label)
    axes.grid(axis="y", color=COLOURS["line"], alpha=0.5, linewidth=0.6)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    if chart.second is not None:
        share = chart.second / 100
        right = axes.secondary_yaxis("right", functions=(lambda y: y * share, lambda ms: ms / share))
        right.set_ylabel("ms")
        right.spines["right"].set_visible(False)
        right.tick_params(length=0)


def _labels(chart: Chart) -> list[str]:
    """Leave out the labels on a logarithmic axis that the one before or the last would run into."""
    places = [math.log(x) if chart.logarithmic else x for x in chart.ticks]
    room = 0.095 * (places[-1] - places[0])
    labels, last = [], -math.inf
    for place, label in zip(places, chart.ticks.values(), strict=True):
        fits = not chart.logarithmic or place == places[-1] or (place - last >= room and places[-1] - place >= room)
        labels.append(label if fits else "")
        last = place if fits else last
    return labels


def _value(y: float, chart: Chart) -> str:
    if not chart.duration:
        return f"{y:g}"
    unit, name = text.scale(y)
    return f"{y / unit:g} {name}"


def inline(svg: str, name: str, title: str, description: str) -> str:
    """Make a stand-alone SVG part of a page: no namespaces, no fixed size, no colours and ids of its own."""
    body = re.sub(r"<style.*?</style>|<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    view = re.search(r'viewBox="([^"]+)"', body)
    body = body[body.index(">") + 1 : body.rindex("</svg>")].replace("xlink:href", "href")
    used = set(re.findall(r"#([\w.-]+)(?=[\")])", body))
    body = re.sub(r' id="([^"]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", body)
    body = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", body)
    for role, colour in COLOURS.items():
        body = body.replace(colour, f"var(--c-{role})")
    body = re.sub(r"font-family: [^;\"]+;? ?", "", body)
    body = re.sub(r"<defs>\s*</defs>\s*", "", body)
    body = re.sub(r"\s*\n\s*", "\n", body)
    head = f'<svg viewBox="{view[1] if view else ""}" role="img" aria-labelledby="{name}-title {name}-desc">'
    head += f'\n<title id="{name}-title">{escape(title)}</title>\n<desc id="{name}-desc">{escape(description)}</desc>'
    return f"{head}{body}</svg>"
