"""What a measurement ran on: the block that stands beside every number."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import laco_kernels
from laco_kernels.kernels import select
from laco_kernels.ops.activation import ACTIVATIONS
from laco_kernels.ops.add_norm import KINDS
from laco_kernels.ops.checks import LAYOUTS, MLP_APPROXIMATIONS

# The values of what select.FORMS names; None for the one that goes without saying.
FORMS: dict[str, tuple[str | None, ...]] = {
    "patch_merge": LAYOUTS,
    "strided_conv_gelu": (None, "block"),
    "strided_conv": (None, "block"),
    "gelu_mlp": MLP_APPROXIMATIONS,
    "add_norm": KINDS,
    "activate": ACTIVATIONS,
}
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
        report["capability"] = capability(device) if device.type == "cuda" else None
    return report


def implementations() -> dict[str, str | None]:
    """Return, for every implementation, ``None`` where it is available and else the reason why it is not."""
    return {impl: select.unavailable(impl) for impl in select.IMPLEMENTATIONS}


def automatic_choices() -> dict[str, select.Choice]:
    """Return what runs each operator where no ``impl=`` is given, and why: for 4096 tokens in bfloat16 on a GPU if any.

    That is the choice for the forward pass; backward is chosen by itself. Where an operator knows several layouts of its
    tokens, norms or activations each has an entry. ``LACO_IMPL`` comes before it.
    """
    operators = (*select.OPERATORS, *select.TOWER_OPERATORS)
    keys = {" ".join(filter(None, [op, by])): (op, by) for op in operators for by in FORMS.get(op, (None,))}
    if name := os.environ.get("LACO_IMPL"):
        said = select.Choice(name, "LACO_IMPL says so")
        refused = select.Choice("refused", f"LACO_IMPL says {name}, which this operator does not have")
        return {key: said if name in select.implementations(op) else refused for key, (op, _) in keys.items()}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {key: select.choose(op, "forward", device, torch.bfloat16, 4096, by) for key, (op, by) in keys.items()}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    """The commit of the checkout that this package lies in, with a star where its sources differ; else their own hash.

    Results and the selection table, which measuring changes, make no difference.
    """
    package, root = Path(__file__).parents[1], Path(__file__).parents[3]
    commit = _output("git", "-C", str(root), "rev-parse", "--short=12", "HEAD") if (root / ".git").exists() else None
    if commit is None:
        digest = hashlib.sha256()
        for file in sorted(package.rglob("*.py")):
            digest.update(file.read_bytes())
        return f"files-{digest.hexdigest()[:12]}"
    where = ("--", "src", ":!src/laco_kernels/kernels/winners.json")
    return f"{commit}*" if _output("git", "-C", str(root), "status", "--porcelain", *where) else commit


def _driver() -> str | None:
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def capability(device: torch.device) -> str:
    """Return a GPU's architecture such as ``"9.0"``."""
    return ".".join(map(str, torch.cuda.get_device_capability(device)))


def clocks(device: torch.device) -> dict[str, float] | None:
    """Return a GPU's clocks in MHz, its temperature in degrees Celsius and its power in watts; ``None`` elsewhere."""
    fields = {"clocks.sm": "sm_mhz", "clocks.mem": "memory_mhz", "temperature.gpu": "celsius", "power.draw": "watts"}
    if device.type != "cuda":
        return None
    query = ("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits")
    lines = (_output(*query) or "").splitlines()
    if len(lines) <= (device.index or 0):
        return None
    values = [value.strip() for value in lines[device.index or 0].split(",")]
    numbers = zip(fields.values(), values, strict=True)
    return {name: float(value) for name, value in numbers if value.replace(".", "").isdigit()}


def other_processes() -> list[int]:
    """Return the processes that compute on this machine's GPUs; to be asked before this one does."""
    answer = _output("nvidia-smi", "--query-compute-apps=pid", "--format=csv,noheader") or ""
    return [int(line) for line in answer.split() if line.isdigit()]


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
