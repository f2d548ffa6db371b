"""How numbers and cases are written, everywhere in a report."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from laco_kernels.kernels import select

if TYPE_CHECKING:
    from laco_kernels.bench.page.rows import Interval

NOTHING = "-"
MICROSECONDS = "\N{MICRO SIGN}s"
OPERATORS = (*select.OPERATORS, *select.TOWER_OPERATORS)
DIRECTIONS = ("forward", "backward", "both")


def number(value: Any) -> float | None:
    """Return ``value`` as a float where it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def digits(value: float) -> str:
    """Three significant digits without an exponent; whole numbers from 100 on."""
    if abs(value) >= 99.95:
        return f"{value:.0f}"
    return f"{value:#.3g}" if value and abs(value) >= 1e-3 else f"{value:.2g}"


def scale(microseconds: float) -> tuple[float, str]:
    """Return the unit that suits a time, as microseconds, and its name."""
    if microseconds >= 999.5e3:
        return 1e6, "s"
    return (1e3, "ms") if microseconds >= 999.5 else (1.0, MICROSECONDS)


def duration(microseconds: float) -> str:
    """``12.3 us``, ``4.56 ms``."""
    unit, name = scale(microseconds)
    return f"{digits(microseconds / unit)} {name}"


def limits(interval: Interval, unit: float = 1.0) -> str:
    """``12.1-12.5``: the 20th and 80th percentile in ``unit``."""
    return f"{digits(interval.p20 / unit)}-{digits(interval.p80 / unit)}"


def times(value: float) -> str:
    """``1.23x``."""
    return f"{value:.2f}x"


def ratio(interval: Interval) -> str:
    """``1.23x (1.21-1.25)``."""
    return f"{times(interval.median)} ({interval.low:.2f}-{interval.high:.2f})"


def mebibytes(value: Any) -> str:
    """``12.3 MiB`` of a number of bytes."""
    count = number(value)
    return NOTHING if count is None else f"{digits(count / 2**20)} MiB"


def plural(count: int, noun: str) -> str:
    """``1 row``, ``2 rows``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def fraction(depth: Any) -> Fraction:
    """Return a depth such as ``"1/4"`` as a number; 0 where it is none."""
    try:
        return Fraction(str(depth))
    except (ValueError, ZeroDivisionError):
        return Fraction(0)


def depth_label(depth: Fraction) -> str:
    """``@1/4``; a fraction that is long to write as a decimal."""
    return f"@{depth}" if len(str(depth)) <= 5 else f"@{float(depth):.3g}"


def grid_tokens(case: dict[str, Any]) -> int:
    """Return how many patches the grid of a case has; 0 where it says none."""
    grid = case.get("grid")
    if not isinstance(grid, (list, tuple)):
        return 0
    return math.prod(int(number(side) or 0) for side in grid) if grid else 0


def encoder(case: dict[str, Any]) -> str:
    """What names a case: its encoder, or else its channels."""
    name = str(case.get("encoder") or "-")
    return f"{case.get('channels', '?')} channels" if name == "-" else name


def size(case: dict[str, Any]) -> str:
    """How large a case is: ``24 x 24, hidden 4096, batch 16``, ``rms, x+delta, tokens 576, batch 16``."""
    grid = case.get("grid")
    parts = [" x ".join(map(str, grid))] if isinstance(grid, (list, tuple)) and grid else []
    parts += [str(part) for part in (form(case), case.get("terms")) if part]
    return ", ".join(parts + [f"{name} {case[name]}" for name in ("hidden", "tokens", "batch") if name in case])


def form(case: dict[str, Any]) -> str:
    """``block order``, ``rms``, ``quick_gelu``; nothing in raster order, which is that of images."""
    if case.get("layout") == "block":
        return "block order"
    approximate = {"none": "erf"}.get(case.get("approximate", ""), case.get("approximate"))
    return str(case.get("kind") or case.get("activation") or approximate or "")


def way(case: dict[str, Any]) -> str:
    """In which direction and precision a case is computed: ``forward, bfloat16``."""
    return ", ".join(str(case[name]) for name in ("direction", "dtype") if name in case)


def shape(case: dict[str, Any]) -> str:
    """Size and way."""
    return ", ".join(filter(None, [size(case), way(case)]))


def more(case: dict[str, Any]) -> str:
    """Whatever else a case says: ``576 tokens, channels 1024``."""
    known = {
        "op",
        "encoder",
        "grid",
        *select.FORMS.values(),
        "terms",
        "hidden",
        "tokens",
        "batch",
        "direction",
        "dtype",
        "sweep",
    }
    tokens = [plural(grid_tokens(case), "token")] if grid_tokens(case) else []
    return ", ".join(tokens + [f"{name} {value}" for name, value in case.items() if name not in known])


def order(case: dict[str, Any]) -> tuple[Any, ...]:
    """Sort cases by operator, direction, precision, encoder, form, tokens, width and batch."""
    direction = case.get("direction")
    place = DIRECTIONS.index(direction) if direction in DIRECTIONS else len(DIRECTIONS)
    numbers = (grid_tokens(case), *(number(case.get(name)) or 0.0 for name in ("tokens", "hidden", "batch")))
    op, encoder_name, dtype = (str(case.get(name, "")) for name in ("op", "encoder", "dtype"))
    known = OPERATORS.index(op) if op in OPERATORS else len(OPERATORS)
    names = (encoder_name, form(case), str(case.get("terms", "")))
    return (known, op, place, dtype, *names, *numbers, fraction(case.get("depth")))


def slug(text: str) -> str:
    """Return what can be part of an id: lower-case letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "x"


def escape_markdown(text: str) -> str:
    """Return text that Markdown shows as it is, also in the cell of a table."""
    text = re.sub(r"([\\`*\[\]|~#])", r"\\\1", " ".join(text.split()))
    text = re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
