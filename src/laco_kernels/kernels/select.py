"""Which implementation runs an operator, and why another one cannot.

An explicit ``impl=`` never falls back. The automatic choice is made by this rule:

1. ``LACO_IMPL`` in the environment, for debugging, is an explicit choice for every call that makes none.
2. The shipped table (``winners.json``, written by measurement) has rows for this device's name: the winner of the row for
   this operator, direction (forward or backward), form (the layout of the tokens, the kind of norm, the activation), dtype
   and number of output tokens.
3. It has rows for other devices, and ``laco check`` passed here (its verdict lies in the user's cache folder): the winner on
   the device of the nearest architecture.
4. Else the reference. A kernel that was never verified on this GPU or its like is never chosen by itself.

Where the choice cannot do the call at hand (``"cuda"`` has limits of shape and alignment, which the table does not know) the
composite does; see :func:`laco_kernels.ops.library.run_forward`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from laco_kernels.errors import complaint

if TYPE_CHECKING:
    from types import ModuleType

MODULES = {
    "reference": "laco_kernels.reference",
    "composite": "laco_kernels.kernels.composite",
    "triton": "laco_kernels.kernels.fused",
    "cuda": "laco_kernels.kernels.cuda",
}
IMPLEMENTATIONS = tuple(MODULES)
OPERATORS = ("patch_merge", "strided_conv_gelu", "strided_conv", "multi_block_linear_gelu", "gelu_mlp")
# The operators inside an encoder have modules of their own.
TOWER_MODULES = {
    "reference": "laco_kernels.reference_tower",
    "triton": "laco_kernels.kernels.tower",
}
TOWER_OPERATORS = ("add_norm", "gated_silu", "activate")
# The argument by whose value an operator is measured and chosen apart: its form.
FORMS = {
    "patch_merge": "layout",
    "strided_conv_gelu": "layout",
    "strided_conv": "layout",
    "gelu_mlp": "approximate",
    "add_norm": "kind",
    "activate": "activation",
}
# The form that goes without saying, in rows and calls alike: the order of tokens in which these are measured.
UNSAID = {"strided_conv_gelu": "raster", "strided_conv": "raster"}
AUTO = "auto"


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # somebody's own finder may say it so
        return False


HAS_TRITON = _is_installed("triton")  # looked up here, for a compiler cannot trace it
TABLE = Path(__file__).with_name("winners.json")


class Choice(NamedTuple):
    """An implementation and why it was chosen."""

    impl: str
    reason: str


def modules(op: str) -> dict[str, str]:
    """Return by name the modules that implement ``op``."""
    return TOWER_MODULES if op in TOWER_OPERATORS else MODULES


def implementations(op: str) -> tuple[str, ...]:
    """Return the names that ``impl=`` may have for ``op``."""
    return tuple(TOWER_MODULES) if op in TOWER_OPERATORS else IMPLEMENTATIONS


def interpreted() -> bool:
    """Return whether Triton kernels run in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")  # what Triton takes for yes


def unavailable(impl: str, device: torch.device | None = None, dtype: torch.dtype | None = None) -> str | None:
    """Return why ``impl`` cannot run here (on ``device``, in ``dtype``), or ``None`` where it can."""
    if impl == "reference":
        return None
    if not HAS_TRITON:
        return "Triton is not installed (it comes with torch's CUDA builds)"
    kind = device.type if device is not None else ("cuda" if torch.cuda.is_available() else "cpu")
    if impl == "cuda":
        return _no_cuda_kernels(kind, device, dtype)
    if interpreted():
        if dtype == torch.bfloat16:
            return "Triton's interpreter cannot compute in bfloat16"
        return None if kind == "cpu" else "TRITON_INTERPRET=1 runs kernels on the CPU only"
    if kind != "cuda":
        return "Triton kernels need an NVIDIA GPU (or TRITON_INTERPRET=1, set before Python starts, to interpret them)"
    if torch.version.hip is not None:
        return "the kernels are verified on NVIDIA GPUs only"
    if torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0):
        return "the kernels need compute capability 8.0 (Ampere) or newer"
    if dtype == torch.float64:
        return "the kernels have no float64 on a GPU"
    return None


def _no_cuda_kernels(kind: str, device: torch.device | None, dtype: torch.dtype | None) -> str | None:
    needed = "the CUDA kernels need compute capability 8.0 (Ampere) or newer"
    if kind != "cuda" or torch.version.hip is not None:
        return f"{needed}, not {kind}"
    capability = torch.cuda.get_device_capability(device) if torch.cuda.is_available() else (9, 0)
    if capability < (8, 0):
        return f"{needed}, not {capability[0]}.{capability[1]}"
    if dtype not in (None, torch.bfloat16, torch.float16):
        return f"the CUDA kernels compute in bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if torch.compiler.is_compiling():  # which cannot trace an import; the operator's body will say it
        return None
    if not _EXTENSION:
        _load_extension()
    module, reason = _EXTENSION
    if reason is None and capability != (9, 0) and "80" not in module.ARCHITECTURES:
        return "the CUDA extension was built for Hopper GPUs alone; install again with LACO_CUDA_ARCHS='80;90a'"
    return reason


def extension() -> Any:
    """Return the compiled module of ``csrc/``.

    Raises:
        RuntimeError: if there is none, or it cannot run here.
    """
    if not _EXTENSION:
        _load_extension()
    module, reason = _EXTENSION
    if reason is not None:
        raise RuntimeError(f"laco_kernels._cuda: {reason}")
    return module


# The module, and why it cannot run. Not functools.cache: see _CHOICES.
_EXTENSION: list[Any] = []


def _load_extension() -> None:
    module, reason = None, None
    try:
        module = importlib.import_module("laco_kernels._cuda")
        if problem := module.problem():
            reason = f"the CUDA extension cannot use this machine's driver: {problem}"
    except ModuleNotFoundError:
        reason = "the CUDA extension is not built; install with nvcc (CUDA 12.5 or newer) at hand, and LACO_BUILD_CUDA=1"
    except ImportError as error:
        reason = f"the CUDA extension does not load: {error}"
    _EXTENSION[:] = [module, reason]


def check(impl: str | None, device: torch.device, dtype: torch.dtype, op: str = OPERATORS[0]) -> str:
    """Validate the public ``impl=`` argument of ``op`` and return what it is to be told: a name, or ``"auto"``.

    Raises:
        ValueError: if ``impl`` is no implementation's name, or ``op`` has none of that name.
        RuntimeError: if the implementation asked for cannot run here.
    """
    name = "impl"
    if impl is None:
        impl = os.environ.get("LACO_IMPL") or None
        name = "LACO_IMPL"
        if impl is None:
            return AUTO
    known = implementations(op)
    if impl not in known:
        expected = f"None or one of {', '.join(map(repr, known))}" + (f" for {op}" if op in TOWER_OPERATORS else "")
        raise ValueError(complaint(name, repr(impl), expected, "Leave it out for the automatic choice"))
    if reason := unavailable(impl, device, dtype):
        raise RuntimeError(complaint(name, repr(impl), f"an implementation that can run, but {reason}", "Leave it out"))
    return impl


def load(impl: str, op: str, direction: str, like: torch.Tensor, rows: int, form: str | None = None) -> ModuleType:
    """Return the module that runs ``op`` on ``rows`` output tokens on the device and in the dtype of ``like``.

    ``direction`` is ``"forward"`` or ``"backward"``, ``form`` the value of the argument that :data:`FORMS` names for ``op``.
    Triton is imported here and not before.
    """
    if impl == AUTO:
        impl = choose(op, direction, like.device, like.dtype, rows, form).impl
    module = _LOADED.get((op, impl))
    if module is None:
        module = _LOADED[op, impl] = importlib.import_module(modules(op)[impl])
    return module


def choose(op: str, direction: str, device: torch.device, dtype: torch.dtype, rows: int, form: str | None = None) -> Choice:
    """Make the automatic choice for one direction, and say why."""
    key = (op, direction, device, dtype, form)
    if key not in _CHOICES:
        _CHOICES[key] = _buckets(*key)
    buckets, beyond = _CHOICES[key]
    for up_to, choice in buckets:
        if rows <= up_to:
            return choice
    return beyond


_LOADED: dict[tuple[str, str], ModuleType] = {}
# Not functools.cache, of which Dynamo warns where it traces an operator's body.
_CHOICES: dict[tuple[Any, ...], tuple[tuple[tuple[int, Choice], ...], Choice]] = {}


def _buckets(
    op: str, direction: str, device: torch.device, dtype: torch.dtype, form: str | None
) -> tuple[tuple[tuple[int, Choice], ...], Choice]:
    """Return the choices by the output tokens that they go up to, growing, and the one beyond them."""

    def always(reason: str) -> tuple[tuple[()], Choice]:
        return (), Choice("reference", reason)

    if device.type != "cuda":
        return always(f"kernels run on NVIDIA GPUs, not on {device.type}")
    table = winners()
    if not table:
        return always("no kernel has been measured on a GPU yet")
    name = torch.cuda.get_device_name(device)
    source = name
    if name not in table:
        if not passed(name, op, str(dtype)):
            return always(f"`laco check` has not passed for {op} in {dtype} on this {name}")
        here = float(".".join(map(str, torch.cuda.get_device_capability(device))))
        source = min(table, key=lambda other: abs(float(table[other]["capability"]) - here))
    buckets = []
    for row in rows_of(table[source], op, direction, form, str(dtype).removeprefix("torch.")):
        reason = unavailable(row["impl"], device, dtype)
        fastest = Choice(row["impl"], f"measured fastest on {source} up to {row['up_to']} output tokens")
        if reason is not None:
            # The CUDA kernels need a compiler at installation and one architecture; what they were faster than does not.
            able = row["impl"] == "cuda" and unavailable("composite", device, dtype) is None
            fastest = Choice("composite" if able else "reference", reason)
        buckets.append((row["up_to"], fastest))
    what = " ".join(filter(None, [op, direction, form and f"with {FORMS[op]}={form!r}"]))
    beyond = f" above {buckets[-1][0]} output tokens" if buckets else ""
    return tuple(buckets), Choice("reference", f"not measured on {source} for {what} in {dtype}{beyond}")


def rows_of(entry: dict[str, Any], op: str, direction: str, form: str | None, dtype: str) -> list[dict[str, Any]]:
    """Return the rows that one device's entry in the table has for such calls, by growing number of tokens."""
    wanted = (op, direction, form, dtype)
    mine = [row for row in entry["rows"] if (row["op"], row["direction"], form_of(row), row["dtype"]) == wanted]
    return sorted(mine, key=lambda row: int(row["up_to"]))


def form_of(facts: dict[str, Any]) -> str | None:
    """Return the form that a row of the table, a measured case or a call is of; ``None`` where it goes without saying."""
    form = facts.get(FORMS.get(facts["op"], ""))
    return None if form is None or form == UNSAID.get(facts["op"]) else str(form)


@functools.cache
def winners() -> dict[str, Any]:
    """Return the shipped table: by device name its ``capability`` and ``rows``.

    A row has op, direction, dtype, up_to, impl, and under the name in :data:`FORMS` the form.
    """
    table: dict[str, Any] = json.loads(TABLE.read_text())
    return table


def verdict_file() -> Path:
    """Return where this user's verdicts of ``laco check`` are kept."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "laco_kernels" / "verdicts.json"


@functools.cache
def _verdict_key(device_name: str, op: str, dtype: str) -> str:
    # Not from the distributions' metadata: Triton comes under several names.
    packages = [importlib.import_module(name) for name in ("laco_kernels", "torch", "triton")]
    versions = [f"{package.__name__} {package.__version__}" for package in packages]
    return ", ".join([device_name, op, dtype.removeprefix("torch."), *versions])


def passed(device_name: str, op: str, dtype: str) -> bool:
    """Return whether ``laco check`` passed for ``op`` and ``dtype`` here, with these versions of everything."""
    try:
        return _verdicts().get(_verdict_key(device_name, op, dtype)) is True
    except ImportError:  # without Triton nothing was checked
        return False


def record(device_name: str, op: str, dtype: str, *, ok: bool) -> None:
    """Keep a verdict of ``laco check``; a cache folder that cannot be written to keeps none."""
    file = verdict_file()
    _CHOICES.clear()
    _verdicts.cache_clear()  # another process may have written since
    verdicts = {**_verdicts(), _verdict_key(device_name, op, dtype): ok}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(verdicts, indent=2))
        part.replace(file)
    except OSError:
        return
    _verdicts.cache_clear()


@functools.cache
def _verdicts() -> dict[str, bool]:
    try:
        verdicts = json.loads(verdict_file().read_text())
    except (OSError, ValueError):
        return {}
    return verdicts if isinstance(verdicts, dict) else {}
