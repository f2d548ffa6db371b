"""What a measurement ran on: the block that stands beside every number."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import laco_kernels
from laco_kernels.kernels import select

PACKAGES = ("torch", "triton", "transformers", "numpy")


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """Return versions, hardware, commit and date as a JSON-ready dictionary; ``device`` adds what it runs on."""
    report: dict[str, Any] = {
        "laco_kernels": laco_kernels.__version__,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cpu_threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }
    if device is not None:
        report["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else report["cpu"]
        report["driver"] = _driver() if device.type == "cuda" else None
    return report


def implementations() -> dict[str, str | None]:
    """Return, for every implementation, ``None`` where it is available and else the reason why it is not."""
    return {impl: select.unavailable(impl) for impl in select.IMPLEMENTATIONS}


def automatic_choices() -> dict[str, select.Choice]:
    """Return what runs each operator where no ``impl=`` is given, and why: for 4096 tokens in bfloat16 on a GPU if any."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {op: select.choose(op, device, torch.bfloat16, 4096) for op in select.OPERATORS}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout that this package lies in, with a star where files differ from it."""
    root = Path(__file__).parents[3]
    if not (root / ".git").exists():
        return None
    commit = _output("git", "-C", str(root), "rev-parse", "--short=12", "HEAD")
    dirty = _output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return f"{commit}*" if commit and dirty else commit


def _driver() -> str | None:
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
