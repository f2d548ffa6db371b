"""What the optimiser is given: :func:`parameter_groups` by part, and each group's own :func:`cosine` of learning rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from laco_kernels.errors import complaint
from laco_kernels.train.parts import PARTS, check_rate, part_of

if TYPE_CHECKING:
    from torch import nn


def parameter_groups(model: nn.Module, rates: Mapping[str, float], weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Return a model's trainable parameters by part, those with weight decay and those without.

    Without are parameters of fewer than two dimensions: biases, the weights of norms, scales and class tokens.

    Args:
        model: LLaVA-style, wrapped by PEFT or not; what is frozen has ``requires_grad=False``.
        rates: learning rates by part (:data:`~laco_kernels.train.parts.PARTS`).
        weight_decay: of the groups with weight decay.

    Returns:
        Groups as a ``torch.optim.Optimizer`` takes them: ``"params"``, ``"lr"``, ``"weight_decay"``, and ``"name"``, the part.

    Raises:
        ValueError: a trainable parameter is in a part without a rate, nothing is trained at a rate, or a rate is not positive.
    """
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {(part, decays): [] for part in PARTS for decays in (True, False)}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = part_of(name)
        if part not in rates:
            remedy = "Give the part a rate, or freeze it with laco_kernels.train.parts.freeze"
            raise ValueError(complaint("rates", f"none for {part}, but {name} is trained", f"a rate for {part}", remedy))
        groups[part, parameter.ndim > 1].append(parameter)
    for part, rate in rates.items():
        if not any(groups.get((part, decays)) for decays in (True, False)):
            trained = ", ".join(dict.fromkeys(part for (part, _), parameters in groups.items() if parameters)) or "nothing"
            remedy = "Leave the rate out, or let the part be trained"
            raise ValueError(complaint("rates", repr(part), f"a part that is trained; {trained} is", remedy))
        check_rate(part, rate)
    return [
        {"params": parameters, "lr": rates[part], "weight_decay": weight_decay if decays else 0.0, "name": part}
        for (part, decays), parameters in groups.items()
        if parameters
    ]


def cosine(rate: float, min_lr: float, warmup: int, steps: int) -> Callable[[int], float]:
    """Return the factor of a learning rate at every step: linear from 0 while it warms up, then a cosine down to ``min_lr``.

    With ``m = min_lr / rate``, and ``t`` from 0 at the end of warming up to 1 after the last step, it is
    ``m + (1 - m) (1 + cos(pi t)) / 2``, as in ``transformers.get_cosine_with_min_lr_schedule_with_warmup``.

    Args:
        rate: the learning rate that the factor is of.
        min_lr: the learning rate at the end.
        warmup, steps: optimiser steps, of warming up and altogether.

    Raises:
        ValueError: ``min_lr`` is negative or above ``rate``.
    """
    if not 0 <= min_lr <= rate:
        remedy = "Lower it, or pass 0"
        raise ValueError(complaint("min_lr", min_lr, f"a number from 0 to the smallest rate, here {rate}", remedy))
    least = min_lr / rate

    def factor(step: int) -> float:
        if step < warmup:
            return step / max(1, warmup)
        progress = min(1.0, (step - warmup) / max(1, steps - warmup))
        return least + (1 - least) * (1 + math.cos(math.pi * progress)) / 2

    return factor
