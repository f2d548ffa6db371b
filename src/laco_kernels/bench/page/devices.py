"""Results by device: what a report has one section for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from laco_kernels.bench.page.tables import Table
from laco_kernels.bench.page.text import digits, number, slug
from laco_kernels.bench.results import Results

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from laco_kernels.bench.results import Row

UNITS = {
    "tflops": "{} TFLOP/s",
    "gbs": "{} GB/s",
    "sm_mhz": "SM {} MHz",
    "memory_mhz": "memory {} MHz",
    "celsius": "{} \N{DEGREE SIGN}C",
    "watts": "{} W",
}


@dataclass(frozen=True)
class Device:
    """One device, the newest row of every case and variant on it, and the environments of these rows by date."""

    name: str
    anchor: str
    gpu: bool
    rows: tuple[Row, ...]
    environments: dict[str, dict[str, Any]]

    def suite(self, name: str) -> list[Row]:
        """Return the rows of one suite."""
        return [row for row in self.rows if row.suite == name]

    def run(self, row: Row) -> str:
        """Name the run that a row is from: a letter where there are several, else nothing."""
        return letter(list(self.environments).index(row.environment)) if len(self.environments) > 1 else ""


def letter(index: int) -> str:
    """``A`` to ``Z``, then numbers."""
    return chr(ord("A") + index) if index < 26 else str(index + 1)


def read(folders: Sequence[Path]) -> list[Device]:
    """Read every folder and return its devices, GPUs first; a folder without rows gives none.

    Raises:
        ValueError: if a line of a file is no row.
    """
    found = []
    for folder in folders:
        results = Results.open(folder)
        parts: dict[tuple[bool, str], list[Row]] = {}
        for row in results.latest():
            parts.setdefault(_device(results.environments[row.environment]), []).append(row)
        for (gpu, name), rows in parts.items():
            used = {row.environment: results.environments[row.environment] for row in rows}
            environments = dict(sorted(used.items(), key=lambda item: (str(item[1].get("date", "")), item[0])))
            found.append((not gpu, name, folder.name, tuple(rows), environments))
    found.sort(key=lambda part: part[:3])
    return [Device(name, f"d{i}-{slug(name)}", not cpu, rows, envs) for i, (cpu, name, _, rows, envs) in enumerate(found)]


def _device(environment: dict[str, Any]) -> tuple[bool, str]:
    gpus = environment.get("gpus")
    name = str(environment.get("device") or environment.get("cpu") or "unknown device")
    if isinstance(gpus, list) and name in gpus:
        return True, name
    threads = environment.get("cpu_threads")
    return False, f"{name}, {threads} threads" if threads else name


def headline(environment: dict[str, Any]) -> str:
    """One line that says where and with what a run was measured."""
    parts = [f"driver {environment['driver']}"] if environment.get("driver") else []
    parts += [f"{name} {environment[name]}" for name in ("torch", "triton", "transformers") if environment.get(name)]
    parts += [f"Python {environment['python']}"] if environment.get("python") else []
    commit = f" ({environment['commit']})" if environment.get("commit") else ""
    parts.append(f"laco_kernels {environment.get('laco_kernels', 'of an unknown version')}{commit}")
    parts += [str(environment["date"])] if environment.get("date") else []
    return ", ".join(parts)


def environment_tables(device: Device) -> list[Table]:
    """Everything that is recorded about each run of a device."""
    out = []
    for i, block in enumerate(device.environments.values()):
        table = Table(("what", "recorded"), title=f"Run {letter(i)}" if len(device.environments) > 1 else "")
        for key, value in block.items():
            table.add(key.replace("_", " "), _plain(value))
        out.append(table)
    return out


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(UNITS.get(key, f"{key} {{}}").format(_plain(item)) for key, item in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(_plain, value)) or "none"
    if value is None:
        return "none"
    return digits(value) if isinstance(value, float) and number(value) is not None else str(value)
