"""The parts of a LLaVA-style model that are trained or frozen, and at which rate: :func:`part_of`, :func:`freeze`.

Which part a parameter belongs to is read off its name, segment by segment, and not found by a piece of text in it: the merge
inside an encoder carries the encoder's name, too, and would get the encoder's rate, or stay frozen where the encoder does.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from laco_kernels.errors import complaint

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

#: Of LaCo's paper: the vision encoder, what compresses inside it, the projector (or a compressor in its place), the LLM.
PARTS = ("encoder", "merge", "projector", "llm")


def part_of(name: str) -> str:
    """Return which of :data:`PARTS` a parameter belongs to, by its name in a LLaVA-style model, wrapped by PEFT or not.

    Raises:
        ValueError: there is no such parameter in such a model.
    """
    segments = name.split(".")
    if "vision_tower" in segments:
        return "merge" if "merge" in segments[segments.index("vision_tower") :] else "encoder"
    if "multi_modal_projector" in segments:
        return "projector"
    if "language_model" in segments or "lm_head" in segments:
        return "llm"
    remedy = "Pass a model of laco_kernels.hf.build_llava"
    raise ValueError(complaint("model", f"a parameter {name!r}", "those of a LLaVA-style model", remedy))


def parts_of(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """Return the parameters of every part that ``model`` has, by name."""
    parts: dict[str, dict[str, nn.Parameter]] = {part: {} for part in PARTS}
    for name, parameter in model.named_parameters():
        parts[part_of(name)][name] = parameter
    return {part: parameters for part, parameters in parts.items() if parameters}


def freeze(model: nn.Module, rates: Mapping[str, float]) -> None:
    """Have the parts with a learning rate trained, and freeze all others, in place.

    Where an adapter is in a part, as PEFT's LoRA in the LLM, call this before the adapter is put in: it freezes what it adapts.

    Args:
        model: of :func:`laco_kernels.hf.build_llava`.
        rates: learning rates by part.

    Raises:
        ValueError: ``model`` has no such part, or a rate is not a positive number. Nothing was changed.
    """
    parts = parts_of(model)
    for part, rate in rates.items():
        if part not in parts:
            expected = f"some of {', '.join(parts)}"
            remedy = "Leave it out" + (", or compress inside the encoder" if part == "merge" else "")
            raise ValueError(complaint("rates", repr(part), expected, remedy))
        check_rate(part, rate)
    for part, parameters in parts.items():
        for parameter in parameters.values():
            parameter.requires_grad_(part in rates)


def check_rate(part: str, rate: float) -> None:
    """Raise ValueError unless a part's learning rate is a positive number."""
    if not (rate > 0 and math.isfinite(rate)):
        raise ValueError(complaint("rates", f"{rate} for {part}", "a positive number", "Leave a part out to freeze it"))
