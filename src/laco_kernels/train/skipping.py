"""Samples that cannot be trained on: why, how many, and how many are too many."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from laco_kernels.errors import complaint

if TYPE_CHECKING:
    from collections.abc import Iterable

#: How many ids a report names for each cause.
NAMED = 5


class Cause(str, Enum):
    """Why a sample is left out."""

    MALFORMED = "not a sample"
    EMPTY = "empty conversation"
    PLACEHOLDERS = "placeholders that do not match the images"
    TOO_LONG = "too long"
    MISSING = "missing file"
    UNREADABLE = "file that may not be read"
    EMPTY_FILE = "empty file"
    NO_IMAGE = "file that is no image"
    DAMAGED = "damaged image"
    BOMB = "decompression bomb"
    TINY = "image one pixel wide or high"
    ELONGATED = "image far longer than wide"


@dataclass(frozen=True)
class Skipped:
    """A sample that is left out.

    Args:
        index: which of the data it is.
        id: its own, or its file and position where it has none.
        cause: for counting.
        detail: for whoever repairs it.
    """

    index: int
    id: str
    cause: Cause
    detail: str


class BadSampleError(ValueError):
    """Raised where a sample turns out to be unusable; becomes a :class:`Skipped`."""

    def __init__(self, cause: Cause, detail: str) -> None:
        super().__init__(detail)
        self.cause = cause
        self.detail = detail


class TooManySkippedError(RuntimeError):
    """More samples were left out than the cap allows."""


class Tally:
    """Counts the samples that were left out, each once however often it is met, and stops above a cap.

    Args:
        samples: how many there are.
        cap: how many may be left out: a number, or as a ``float`` a share of the samples.

    Raises:
        ValueError: if ``cap`` is negative, or a share above 1.
    """

    def __init__(self, samples: int, cap: float = 0.01) -> None:
        if cap < 0 or (isinstance(cap, float) and not cap <= 1):
            raise ValueError(complaint("cap", cap, "a number from 0 on, or a share from 0.0 to 1.0", "Pass 0.01 for 1 %"))
        self.samples = samples
        self.cap = cap
        self.skipped: dict[int, Skipped] = {}

    def add(self, skipped: Iterable[Skipped]) -> None:
        """Count samples.

        Raises:
            TooManySkippedError: if there are now more than the cap allows.
        """
        self.skipped.update((sample.index, sample) for sample in skipped)
        allowed = int(self.cap * self.samples) if isinstance(self.cap, float) else self.cap
        if len(self.skipped) > allowed:
            remedy = "Repair the data, or raise the cap if they may be missing"
            raise TooManySkippedError(complaint("data", str(self), f"at most {allowed} left out", remedy))

    def counts(self) -> dict[Cause, int]:
        """Return how many samples were left out for each cause, the most frequent first."""
        return dict(Counter(sample.cause for sample in self.skipped.values()).most_common())

    def __str__(self) -> str:
        if not self.skipped:
            return f"none of {self.samples} samples left out"
        parts = []
        for cause, count in self.counts().items():
            ids = [sample.id for sample in self.skipped.values() if sample.cause is cause]
            named = ", ".join(ids[:NAMED]) + (", ..." if count > NAMED else "")
            parts.append(f"{count} {cause.value} ({named})")
        return f"{len(self.skipped)} of {self.samples} samples left out: {'; '.join(parts)}"

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, as JSON can write it."""
        return {"skipped": [asdict(sample) | {"cause": sample.cause.name} for sample in self.skipped.values()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the counts of a checkpoint."""
        found = [Skipped(**sample | {"cause": Cause[sample["cause"]]}) for sample in state["skipped"]]
        self.skipped = {sample.index: sample for sample in found}
