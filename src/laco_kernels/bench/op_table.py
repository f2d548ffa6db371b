"""The rows of ``laco bench ops`` in a terminal of 80 columns: a table a case."""

from __future__ import annotations

import json
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.table import Table

from laco_kernels.bench.gpu_timing import COLD, GRAPH, WALL
from laco_kernels.kernels.select import form_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from laco_kernels.bench.results import Row


def tables(rows: Iterable[Row]) -> list[Table]:
    """Return a table for every case, in the order of ``rows``."""
    groups = groupby(rows, key=lambda row: json.dumps(row.case))
    return [_table(list(group)) for _, group in groups]


def _table(rows: list[Row]) -> Table:
    case = rows[0].case
    size = "x".join(map(str, case["grid"])) if "grid" in case else f"tokens={case['tokens']}"
    title = " ".join(filter(None, [case["op"], case["encoder"], form_of(case), case.get("terms"), size]))
    title += f" batch={case['batch']}" + (f" hidden={case['hidden']}" if "hidden" in case else "")
    table = Table(title=f"{title} {case['direction']} {case['dtype']}", title_justify="left", box=None, padding=(0, 1, 0, 0))
    kinds = [kind for kind in (GRAPH, COLD, WALL) if any(kind in row.values["timings"] for row in rows)]
    for name in ("variant", *[f"{kind} us" for kind in kinds], "x eager", "x compile", "roof", "MB", "ok"):
        table.add_column(name, justify="left" if name == "variant" else "right", no_wrap=True)
    for row in rows:
        values = row.values
        tick = {True: "yes", False: "NO", None: "-"}[values["ok"]]
        name = row.variant.replace("max-autotune", "max")
        ratios = [_ratio(values[column]) for column in ("ratio_eager", "ratio_compile")]
        roof = "-" if values["roofline"] is None else f"{values['roofline']:.0%}"
        moved = "-" if values["bytes"] is None else f"{values['bytes'] / 1e6:.1f}"
        table.add_row(name, *[_time(values["timings"].get(kind)) for kind in kinds], *ratios, roof, moved, tick)
    return table


def _time(spread: dict[str, Any] | None) -> str:
    if spread is None:
        return "-"
    median = spread["median"]
    return f"{median:.0f}" if median >= 100 else f"{median:.1f}"


def _ratio(spread: dict[str, Any] | None) -> str:
    return "-" if spread is None else f"{spread['median']:.2f}x ({spread['low']:.2f}-{spread['high']:.2f})"
