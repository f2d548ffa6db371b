"""What runs where a call names no implementation: the shipped table's choice, found again among the measured rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from laco_kernels.bench.page import rows as read
from laco_kernels.bench.tune import output_tokens
from laco_kernels.kernels import select

if TYPE_CHECKING:
    from laco_kernels.bench.page.devices import Device
    from laco_kernels.bench.page.grouping import Case
    from laco_kernels.bench.results import Row


def implementations(device: Device, case: dict[str, Any]) -> tuple[str, ...]:
    """Return what runs a case on a device by the names of its rows: one, or forward's and backward's where they differ."""
    entry = select.winners().get(device.name) if device.gpu else None
    if entry is None:
        return ("eager",)
    try:
        tokens = output_tokens(case)
        op, direction, dtype = case["op"], case["direction"], case["dtype"]
    except (KeyError, TypeError, ValueError):  # a row of something else
        return ("eager",)
    names = []
    for way in ("forward", "backward") if direction == "both" else (direction,):
        rows = select.rows_of(entry, op, way, select.form_of(case), dtype)
        impl = next((row["impl"] for row in rows if tokens <= row["up_to"]), "reference")
        names.append("eager" if impl == "reference" else str(impl))
    return tuple(dict.fromkeys(names))


def row_of(device: Device, case: Case) -> Row | None:
    """Return the row with a time of what runs a case by default; none where forward and backward are of different kinds."""
    names = implementations(device, case.case)
    return next((row for row in case.rows if (row.variant,) == names and read.times(row)), None)
