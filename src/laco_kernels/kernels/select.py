"""Which implementation runs an operator, and why another one cannot."""

from __future__ import annotations

from laco_kernels.errors import complaint

IMPLEMENTATIONS = ("reference", "triton", "cuda")


def unavailable(impl: str) -> str | None:
    """Return why ``impl`` cannot run here, or ``None`` where it can."""
    if impl == "reference":
        return None
    return f"this version of laco_kernels has no {impl} kernels yet"


def choose(impl: str | None) -> str:
    """Resolve the public ``impl=`` argument: ``None`` is the automatic choice, a name never falls back to another one.

    Raises:
        ValueError: if ``impl`` is no implementation's name.
        RuntimeError: if the implementation asked for cannot run here.
    """
    if impl is None:
        return "reference"
    if impl not in IMPLEMENTATIONS:
        names = ", ".join(map(repr, IMPLEMENTATIONS))
        raise ValueError(complaint("impl", repr(impl), f"None or one of {names}", "Leave impl out for the automatic choice"))
    if reason := unavailable(impl):
        raise RuntimeError(complaint("impl", repr(impl), f"an implementation that can run, but {reason}", "Pass impl=None"))
    return impl
