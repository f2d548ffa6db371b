"""Measurements as data: one file of JSON lines a device, every line a row or the environment that rows were measured in.

A row says what was measured (``suite``, ``case``, ``variant``), what came out (``values``), and in which environment. It is
unique by suite, case, variant and commit: measuring the same again replaces it, another commit's row stays beside it. The file
is always written whole and put in place at once, so that a run that is killed leaves no half row behind.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from laco_kernels.errors import complaint

if TYPE_CHECKING:
    from collections.abc import Iterable

FILE = "measurements.jsonl"


@dataclass(frozen=True)
class Row:
    """One variant of one case.

    ``case`` and ``values`` are JSON objects. ``values`` has ``ok``, the correctness tick, ``reason`` where there is no time,
    and ``timings`` by kind (:class:`laco_kernels.bench.timing.Spread` as an object, in microseconds).
    """

    suite: str
    case: dict[str, Any]
    variant: str
    values: dict[str, Any]
    environment: str
    commit: str | None

    @property
    def key(self) -> str:
        """What makes the row unique."""
        return json.dumps([self.suite, self.case, self.variant, self.commit], sort_keys=True)


@dataclass
class Results:
    """What is known of one device: rows in the order they were first measured, and environments by their name.

    Without a ``file`` nothing is kept.
    """

    file: Path | None
    rows: dict[str, Row] = field(default_factory=dict)
    environments: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path) -> Results:
        """Read the measurements in ``folder``, which need not exist yet.

        Raises:
            ValueError: if a line is no row; names file and line. Nothing is changed.
        """
        file = folder / FILE
        results = cls(file)
        if not file.exists():
            return results
        for number, line in enumerate(file.read_text(encoding="utf-8", errors="backslashreplace").splitlines(), 1):
            try:
                results._take(json.loads(line))
            except (ValueError, TypeError, KeyError) as error:
                given = f"{line[:60]!r} in line {number} of {file} ({error})"
                remedy = "Restore the file or remove the line; nothing was changed"
                raise ValueError(complaint("results", given, "a measurement as JSON", remedy)) from None
        return results

    def _take(self, entry: dict[str, Any]) -> None:
        if "id" in entry:
            self.environments[str(entry["id"])] = dict(entry["environment"])
            return
        row = Row(**entry)
        if row.case.get("op") == "patch_merge":
            row.case.setdefault("layout", "raster")  # as all were before a row said so
        if not (isinstance(row.case, dict) and row.case and isinstance(row.values, dict) and isinstance(row.suite, str)):
            raise TypeError("case and values are objects, suite is a name")
        if row.values.get("ok", 0) not in (True, False, None) or not isinstance(row.values.get("timings"), dict):
            raise TypeError("values has no tick or no timings")
        for spread in row.values["timings"].values():
            if not 0 < spread["low"] <= spread["median"] <= spread["high"] < math.inf:
                raise ValueError("a time is a positive median within its interval")
        if row.environment not in self.environments:
            raise ValueError(f"environment {row.environment!r} stands in no line above")
        self.rows[row.key] = row

    def begin(self, environment: dict[str, Any]) -> str:
        """Remember an environment and return its name."""
        name = hashlib.sha256(json.dumps(environment, sort_keys=True).encode()).hexdigest()[:12]
        self.environments[name] = environment
        return name

    def add(self, rows: Iterable[Row]) -> None:
        """Put rows in, and the file in place; a time without rivals does not replace one that has a ratio to them."""
        for row in rows:
            old = self.rows.get(row.key)
            is_poorer = old is not None and old.values.get("ratio_eager") and not row.values.get("ratio_eager")
            if not (is_poorer and row.values["timings"]):
                self.rows[row.key] = row
        self.write()

    def write(self) -> None:
        """Write the file beside itself and put it in place, with what another run may have added to it since."""
        if self.file is None:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.with_name(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            there = Results.open(self.file.parent)
            self.rows = {**there.rows, **self.rows}
            self.environments = {**there.environments, **self.environments}
            self._replace(self.file)

    def _replace(self, file: Path) -> None:
        used = {row.environment for row in self.rows.values()}
        lines = [{"id": name, "environment": block} for name, block in self.environments.items() if name in used]
        lines += [dataclasses.asdict(row) for row in self.rows.values()]
        part = file.with_suffix(f".{os.getpid()}.part")
        try:
            with part.open("w", encoding="utf-8") as stream:
                stream.writelines(json.dumps(line, allow_nan=False) + "\n" for line in lines)
                stream.flush()
                os.fsync(stream.fileno())
            part.replace(file)
        finally:
            part.unlink(missing_ok=True)

    def latest(self) -> list[Row]:
        """Return for every case and variant the row that was measured last, whatever the commit."""
        found: dict[str, Row] = {}
        for row in self.rows.values():
            key = json.dumps([row.suite, row.case, row.variant], sort_keys=True)
            if key not in found or self._date(row) >= self._date(found[key]):
                found[key] = row
        return list(found.values())

    def _date(self, row: Row) -> str:
        return str(self.environments[row.environment].get("date", ""))


def folder_name(environment: dict[str, Any]) -> str:
    """Return the folder of a device's results, such as ``nvidia-h200`` or ``cpu-amd-epyc-2-threads``."""
    if environment.get("gpus") and environment["device"] in environment["gpus"]:
        name = environment["device"]
    else:
        name = f"cpu {environment['cpu']} {environment['cpu_threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def device_folders(root: Path) -> list[Path]:
    """Return the folders in ``root`` that hold measurements, and ``root`` itself where it does.

    Raises:
        ValueError: if ``root`` is no folder.
    """
    if not root.is_dir():
        raise ValueError(complaint("results", str(root), "a folder of results", "Run laco bench all first"))
    return sorted(path.parent for path in [root / FILE, *root.glob(f"*/{FILE}")] if path.is_file())
