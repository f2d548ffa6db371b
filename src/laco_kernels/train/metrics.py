"""What a run tells about itself: :class:`Ledger` counts, :class:`MetricsFile` keeps a line of JSON a logged step."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from laco_kernels.errors import complaint
from laco_kernels.train.checkpoint import write_whole


@dataclass
class Ledger:
    """What was seen since the run began, over all processes and all resumptions.

    Args:
        tokens: in rows of batches, those of images included, padding not.
        samples: rows of batches.
        non_finite: optimiser steps that were left out as their loss or gradient was no number.
        steps: optimiser steps that were taken.
        loss: the sum of their losses.
        window_steps, window_loss, window_samples, window_seconds: the same since a line was last logged.
        seconds: of training.
    """

    tokens: int = 0
    samples: int = 0
    non_finite: int = 0
    steps: int = 0
    loss: float = 0.0
    window_steps: int = 0
    window_loss: float = 0.0
    window_samples: int = 0
    window_seconds: float = 0.0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self._clock = time.monotonic()

    def start_clock(self) -> None:
        """Count seconds from here on."""
        self._clock = time.monotonic()

    def count(self, tokens: int, samples: int) -> None:
        """Count the batches of an optimiser step."""
        self.tokens += tokens
        self.samples += samples
        self.window_samples += samples

    def add(self, loss: float) -> None:
        """Add the loss of an optimiser step that is taken."""
        self.steps += 1
        self.loss += loss
        self.window_steps += 1
        self.window_loss += loss

    def close_window(self) -> tuple[float | None, float]:
        """Return the mean loss of the steps since this was last called, ``None`` if none was taken, and samples per second."""
        self._read_clock()
        loss = self.window_loss / self.window_steps if self.window_steps else None
        rate = self.window_samples / self.window_seconds if self.window_seconds else math.inf
        self.window_steps, self.window_samples, self.window_loss, self.window_seconds = 0, 0, 0.0, 0.0
        return loss, rate

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, as JSON can write it."""
        self._read_clock()
        return asdict(self)

    def _read_clock(self) -> None:
        now = time.monotonic()
        self.seconds += now - self._clock
        self.window_seconds += now - self._clock
        self._clock = now


class MetricsFile:
    """A file with one JSON object a line, each with its ``"step"``; numbers that are none are written as ``null``.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(self) -> None:
        """Begin a new run: lines of another one are set aside, as ``metrics.jsonl.1``, not overwritten."""
        if not self.path.exists():
            return
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.{number}")).exists():
            number += 1
        self.path.rename(aside)

    def resume(self, step: int) -> None:
        """Go on after this step: lines of later ones, and one that a killed process did not finish, are dropped.

        The file is replaced when the new one is on the disk.
        """
        kept = [line for line in self.read() if line["step"] <= step]
        write_whole(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def write(self, line: dict[str, Any]) -> None:
        """Append a line.

        Raises:
            OSError: the disk is full, or the file cannot be written to.
        """
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(_plain(line)) + "\n")
        except OSError as error:
            given = f"{self.path}, which could not be written to ({error.strerror})"
            remedy = "Free some space or make the folder writable, and resume from the last checkpoint"
            raise OSError(error.errno, complaint("metrics", given, "a place for another line", remedy)) from error

    def read(self) -> list[dict[str, Any]]:
        """Return all complete lines."""
        lines = []
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []:
            try:
                lines.append(json.loads(line))
            except ValueError:  # the last line of a process that was killed
                continue
        return lines


def _plain(value: Any) -> Any:
    """Return a value as strict JSON has it: no NaN."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
