"""The report: stored measurements as a page, as Markdown, and as the README's section. Needs the ``bench`` extra."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup

from laco_kernels.bench.page import llava, sections, vec, views
from laco_kernels.bench.page.charts import draw
from laco_kernels.bench.page.devices import read
from laco_kernels.bench.page.how import HOW
from laco_kernels.bench.page.text import escape_markdown, plural

if TYPE_CHECKING:
    from collections.abc import Sequence

    from laco_kernels.bench.page.tables import Cell, Table

__all__ = ["NOT_MEASURED", "html", "markdown", "readme_section"]

NOT_MEASURED = "not yet measured on a GPU"
README_ROWS = 40  # the longest table that a README shows
LONG = 28  # letters that a cell holds in one line


def html(folders: Sequence[Path]) -> str:
    """Return one self-contained page about the results in ``folders``, one folder a device.

    Raises:
        ValueError: if a line of a file is no measurement.
    """
    data = _data(folders)
    parts = [part for section in data["sections"] for part in section["parts"]]
    numbers = itertools.count(1)
    for part in parts:
        part.drawn = [(chart.title, Markup(draw(chart, f"chart{next(numbers)}"))) for chart in part.charts]
    return _template("report.html.j2").render(data)


def markdown(folders: Sequence[Path]) -> str:
    """Return the same as Markdown, without the charts.

    Raises:
        ValueError: if a line of a file is no measurement.
    """
    return _template("report.md.j2").render(_data(folders))


def readme_section(folders: Sequence[Path]) -> str:
    """Return the README's performance section: what was measured on GPUs, or that nothing was.

    Raises:
        ValueError: if a line of a file is no measurement.
    """
    devices = [device for device in read(folders) if device.gpu]
    if sections.empty(devices):
        return f"{NOT_MEASURED}\n"
    data = [
        {
            "name": device.name,
            "headlines": sections.headlines(device),
            "paper": [
                table
                for table in vec.beside_the_paper([device])
                if not any(line.heading == vec.NO_ROWS for line in table.lines)
            ],
            "models": [table for table in llava.beside_the_papers([device]) if len(table) > 1],
            "overview": views.overview(device).without(*views.BESIDE_SPEED),
            "inside": views.overview(device, "tower").without(*views.BESIDE_SPEED),
            "losing": sections.where_we_lose(device, brief=True),
        }
        for device in devices
    ]
    return _template("readme.md.j2").render(sections=data, most_rows=README_ROWS).lstrip()


def _data(folders: Sequence[Path]) -> dict[str, Any]:
    devices = read(folders)
    return {
        "measured_on_gpu": not sections.empty(devices),
        "not_measured": NOT_MEASURED,
        "paper": vec.beside_the_paper(devices),
        "models": llava.beside_the_papers(devices),
        "sections": [sections.section(device) for device in devices],
        "how": HOW,
    }


def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=lambda template: str(template).endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters.update(md=escape_markdown, plural=plural, classes=_classes, wide=_wide)
    return environment.get_template(name)


def _wide(table: Table) -> list[bool]:
    """Say of every column but the first whether it has long texts, which are to be broken and start at the left."""
    lines = [line.cells for line in table.lines if line.cells]
    columns = ([len(part) for cells in lines for part in (cells[i].text, cells[i].note)] for i in range(len(table.columns)))
    return [i > 0 and max(letters, default=0) > LONG for i, letters in enumerate(columns)]


def _classes(cell: Cell, first: bool, wide: bool) -> str:
    return " ".join(filter(None, [cell.kind, "case" if first and len(cell.note) > LONG else "", "long" if wide else ""]))
