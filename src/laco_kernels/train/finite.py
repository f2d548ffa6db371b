"""Losses that are no number: :func:`check_loss` stops, :func:`first_non_finite` finds where it began."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from laco_kernels.errors import complaint

if TYPE_CHECKING:
    from torch import nn


class NonFiniteError(RuntimeError):
    """A loss that is NaN or infinite."""


@dataclass(frozen=True)
class NonFinite:
    """Where values that are no number were met first.

    Args:
        kind: ``"input"``, ``"parameter"``, ``"buffer"``, ``"gradient of"`` or ``"output"``.
        name: of the input, the parameter, the buffer, or of the module whose output it is; ``""`` for the model itself.
        nan, infinite, size: how many of the values are NaN, how many infinite, of how many.
    """

    kind: str
    name: str
    nan: int
    infinite: int
    size: int

    def __str__(self) -> str:
        what = f"the {self.kind} {self.name}" if self.kind != "output" else f"the output of {self.name or 'the model'}"
        return f"{what} ({self.nan} NaN and {self.infinite} infinite of {self.size} values)"


def check_loss(
    loss: torch.Tensor | float, step: int, ids: Iterable[object] = (), where: NonFinite | None = None, what: str = "loss"
) -> float:
    """Return a loss as a number, or raise where it is NaN or infinite.

    Args:
        loss: one number; reading it waits for the GPU.
        step: the optimiser step.
        ids: of the samples it is the loss of.
        where: what :func:`first_non_finite` found.
        what: what the number is.

    Raises:
        NonFiniteError: naming the step, the samples and the module.
    """
    value = float(loss)
    if math.isfinite(value):
        return value
    samples = ", ".join(map(str, ids)) or "not known"
    given = f"{value} at step {step}, samples: {samples}" + (f", beginning in {where}" if where else "")
    remedy = "Look at these samples, lower the learning rate, or compute in bfloat16 or float32 instead of float16"
    raise NonFiniteError(complaint(what, given, "a finite number", remedy))


@torch.no_grad()
def first_non_finite(model: nn.Module, batch: Mapping[str, Any]) -> NonFinite | None:
    """Run a model on a batch and return the first values in it that are not finite; ``None`` where all are.

    Looked at in this order: the batch, the parameters and buffers, then what modules return in the order in which they finish,
    so that the innermost module is named and not one around it. Hooks are put on for this one call. Random numbers are drawn as
    in the call before where the caller sets the generators as they were then, and are as if nothing was drawn afterwards.
    Under FSDP all processes must call this together.

    Args:
        model: called as ``model(**batch)``, in the mode it is in, under the caller's autocast.
        batch: its arguments by name.
    """
    for kind, named in (("input", batch.items()), ("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, value in named:
            if found := _look(kind, name, value):
                return found
    first: list[NonFinite] = []

    def look_at(name: str) -> Any:
        def hook(_module: nn.Module, _arguments: Any, output: Any) -> None:
            # Nothing is raised here, which under FSDP would leave the other processes waiting.
            if not first and (found := _look("output", name, output)):
                first.append(found)

        return hook

    handles = [module.register_forward_hook(look_at(name)) for name, module in model.named_modules()]
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers()) if tensor.is_cuda}
    try:
        with torch.random.fork_rng(devices):
            model(**batch)
    except Exception:  # code may refuse such values; what was found before tells more
        if not first:
            raise
    finally:
        for handle in handles:
            handle.remove()
    return first[0] if first else None


def _look(kind: str, name: str, value: Any) -> NonFinite | None:
    for tensor in _tensors(value):
        if (tensor.is_floating_point() or tensor.is_complex()) and not bool(tensor.isfinite().all()):
            return NonFinite(kind, name, int(tensor.isnan().sum()), int(tensor.isinf().sum()), tensor.numel())
    return None


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple, Mapping)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(part)
