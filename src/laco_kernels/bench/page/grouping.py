"""Rows put together by what they measure: all variants of a case side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from laco_kernels.bench.page import rows as read
from laco_kernels.bench.page import text
from laco_kernels.bench.page.tables import Cell

if TYPE_CHECKING:
    from collections.abc import Sequence

    from laco_kernels.bench.results import Row

OPS = ("ops", "tower", "sweep")


@dataclass(frozen=True)
class Case:
    """All variants of one case, sorted."""

    case: dict[str, Any]
    rows: tuple[Row, ...]

    @property
    def label(self) -> Cell:
        """What the case is but for its operator, direction and precision."""
        return Cell(text.encoder(self.case), text.size(self.case))

    @property
    def eager_peak(self) -> float | None:
        """The peak memory of the leanest eager variant."""
        peaks = [text.number(row.values.get("peak_bytes")) for row in self.rows if row.variant in read.EAGER]
        return min((peak for peak in peaks if peak), default=None)

    @property
    def full_label(self) -> Cell:
        """What the case is, and the sweep that it is part of if any."""
        sweep = f", sweep of {self.case['sweep']}" if self.case.get("sweep") else ""
        return Cell(str(self.case.get("op", "operator")), f"{text.encoder(self.case)}, {text.shape(self.case)}{sweep}")


def cases(rows: Sequence[Row]) -> list[Case]:
    """Put rows together by case, sorted."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(repr(sorted(row.case.items())), []).append(row)
    groups = [Case(group[0].case, tuple(sorted(group, key=read.variant_order))) for group in found.values()]
    return sorted(groups, key=lambda group: (text.order(group.case), repr(group.case)))
