"""Reading the checkpoints that STF's and MBTF's authors released into this library's modules.

What is known, from the authors' code (repository ``visresearch/LLaVA-STF``): both modules are an ``nn.Sequential`` of
Linear, GELU, Linear, hence keys ``0.weight``, ``0.bias``, ``2.weight`` and ``2.bias``; they stand under
``model.mm_projector.`` (STF) and ``model.mm_projector_crosslayer.`` (MBTF), in the ``mm_projector.bin`` of the first
training stage as in the full model of the second. What is assumed: that the published files have just these names and that
a prefix other than ``model.`` may stand before them. No published file was at hand; ``keys=`` reads any other naming.
The authors' project is under CC BY-NC 4.0, which allows no commercial use.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from laco_kernels.errors import complaint
from laco_kernels.ops import checks

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

VARIANTS = ("paper", "released")
SEQUENTIAL = {"linear1": "0", "linear2": "2"}

Source = Mapping[str, torch.Tensor] | str | PathLike[str]


def channels_last(weight: torch.Tensor, area: int) -> torch.Tensor:
    """Turn columns ordered ``(c, dy, dx)`` into ``(dy, dx, c)``: ``W'[:, p * C + c] = W[:, c * area + p]``."""
    return weight.unflatten(1, (-1, area)).transpose(1, 2).flatten(1)


def load(module: nn.Module, source: Source, name: str, keys: Mapping[str, str] | None, area: int) -> None:
    """Load a released projector into ``module``, a ``variant="released"`` with ``linear1`` and ``linear2``.

    Args:
        module: what to fill, in its own dtype and on its own device.
        source: a state dict, a ``.safetensors`` file, or a file that ``torch.load(..., weights_only=True)`` reads.
        name: what the authors' model calls it, such as ``"mm_projector"``.
        keys: the checkpoint's name of every parameter of ``module``, where these are not the authors' names.
        area: tokens ``k * k`` whose channels alternate in the columns of the first weight.

    Raises:
        TypeError: ``source`` or a tensor in it is of the wrong kind.
        ValueError: keys are missing, unexpected, misshapen or ambiguous, or ``module`` is of another variant or on the
            meta device.
        RuntimeError: the file cannot be read.
        ImportError: the file needs safetensors, which is not installed.
    """
    if module.variant != "released":
        remedy = "Build the module with variant='released'"
        raise ValueError(complaint("variant", repr(module.variant), "'released', which the checkpoints are of", remedy))
    parameters = dict(module.named_parameters())
    if any(parameter.is_meta for parameter in parameters.values()):
        remedy = "Move the module with to_empty(device='cpu') first"
        raise ValueError(complaint("device", "meta", "a device that holds data", remedy))
    if keys is None:
        tensors = _read(source, re.compile(rf"(.*\.)?{name}\.|\d+\.").match)
        keys = _find(tensors, name, parameters)
    else:
        _check_keys(keys, parameters)
        tensors = _read(source, set(keys.values()).__contains__)
        tensors = {key: tensors[key] for key in keys.values() if key in tensors}
    _check_tensors(tensors, keys, parameters)
    state = {own: tensors[key] for own, key in keys.items()}
    state["linear1.weight"] = channels_last(state["linear1.weight"], area)
    module.load_state_dict(state, strict=True)


def _find(tensors: dict[str, Any], name: str, parameters: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return the checkpoint's names of ``parameters``; leave in ``tensors`` what stands beside them."""
    named = re.compile(rf"(.*\.)?{name}\.")
    prefixes = sorted({match.group() for match in map(named.match, tensors) if match})
    if not prefixes and tensors:
        prefixes = [""]  # the state dict of the nn.Sequential itself
    if len(prefixes) != 1:
        given = f"keys under {' and '.join(map(repr, prefixes))}" if prefixes else f"no key under '{name}.'"
        remedy = f"Pass keys={{{', '.join(f'{own!r}: ...' for own in parameters)}}}"
        raise ValueError(complaint("source", given, f"one projector, such as '{name}.0.weight', or a bare '0.weight'", remedy))
    for key in [key for key in tensors if not key.startswith(prefixes[0])]:
        del tensors[key]
    own_names = (own.partition(".") for own in parameters)
    return {f"{linear}.{kind}": f"{prefixes[0]}{SEQUENTIAL[linear]}.{kind}" for linear, _, kind in own_names}


def _check_keys(keys: Mapping[str, str], parameters: Mapping[str, torch.Tensor]) -> None:
    if not isinstance(keys, Mapping) or set(keys) != set(parameters):
        given = f"names for {', '.join(map(str, keys))}" if isinstance(keys, Mapping) else type(keys).__name__
        raise ValueError(complaint("keys", given, f"names for {', '.join(parameters)}", "Name every parameter of the module"))


def _check_tensors(tensors: Mapping[str, Any], keys: Mapping[str, str], parameters: Mapping[str, torch.Tensor]) -> None:
    missing = [key for key in keys.values() if key not in tensors]
    unexpected = [key for key in tensors if key not in keys.values()]
    shapes = {}
    for own, key in keys.items():
        if key in tensors:
            checks.check_tensor(key, tensors[key])
            if tensors[key].shape != parameters[own].shape:
                shapes[key] = f"{key} {list(tensors[key].shape)} instead of {list(parameters[own].shape)}"
    wrong = {"missing": missing, "unexpected": unexpected, "misshapen": list(shapes.values())}
    if any(wrong.values()):
        given = "; ".join(f"{kind} {', '.join(names)}" for kind, names in wrong.items() if names)
        remedy = "Build the module with the sizes of the checkpoint, or pass keys= if its names differ"
        raise ValueError(complaint("source", given, f"exactly {', '.join(keys.values())}", remedy))


def _read(source: Source, wanted: Callable[[str], object]) -> dict[str, Any]:
    """Return the wanted tensors of ``source``; of a safetensors file no others are read."""
    if isinstance(source, (str, PathLike)):
        path = Path(source)
        try:
            tensors = _read_safetensors(path, wanted) if path.suffix == ".safetensors" else _read_torch(path)
        except ImportError:
            raise
        except Exception as error:  # unpickling something else can raise anything
            telling = isinstance(error, (OSError, RuntimeError)) and str(error).strip()
            reason = str(error).strip().splitlines()[0] if telling else "it holds more than plain tensors, or none"
            expected = "a .safetensors file, or a file that torch.load(..., weights_only=True) reads"
            remedy = "Of a sharded checkpoint pass the shard that its index names for the projector"
            raise RuntimeError(complaint("source", f"{str(path)!r} ({reason})", expected, remedy)) from error
    else:
        tensors = source
    if not isinstance(tensors, Mapping):
        expected = "a state dict, or the path of a file with one"
        raise TypeError(complaint("source", type(tensors).__name__, expected, "Pass module.state_dict() or a path"))
    return {key: tensor for key, tensor in tensors.items() if isinstance(key, str) and wanted(key)}


def _read_torch(path: Path) -> object:
    # A zip archive is mapped, not read: of a whole model only the projector's pages are touched.
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def _read_safetensors(path: Path, wanted: Callable[[str], object]) -> dict[str, torch.Tensor]:
    try:
        from safetensors import SafetensorError, safe_open
    except ModuleNotFoundError:
        expected = "a file for torch.load where safetensors is not installed"
        raise ImportError(complaint("source", repr(str(path)), expected, "Run: pip install safetensors")) from None
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys() if wanted(key)}  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        raise RuntimeError(str(error)) from error
