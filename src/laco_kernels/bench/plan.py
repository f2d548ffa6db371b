"""What there is to measure, as units of a campaign, in order."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from laco_kernels.bench import op_cases, operators, tower_cases
from laco_kernels.bench.campaign import Unit
from laco_kernels.bench.op_variants import AUTOTUNE
from laco_kernels.bench.vec_units import vec_units

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from laco_kernels.bench.campaign import Measured
    from laco_kernels.bench.tower_cases import AnyCase


def op_unit(
    case: AnyCase,
    device: torch.device,
    *,
    variants: Sequence[str] | None = None,
    autotune: bool = False,
    limits: dict[str, float] | None = None,
    rounds: int | None = None,
    seconds: float = 1.0,
) -> Unit:
    """Return the run of one operator's case; max-autotune competes with ``autotune``, or where it is among ``variants``."""
    able = operators.names(case, device, variants, autotune=autotune)

    def measure() -> Measured:
        rivals = operators.contenders(case, device, able)
        values = operators.measure_case(case, device, rivals, ceilings=limits, rounds=rounds, seconds=seconds)
        return [(case.facts, name, found) for name, found in values.items()]

    suite = "tiny" if case.encoder.startswith("tiny-") else case.suite
    kind = "max-autotune" if AUTOTUNE in able else "ops"
    name = f"{case} with max-autotune" if AUTOTUNE in able else str(case)
    # Autotuning times what it compiles, so it must run alone.
    ahead = None if AUTOTUNE in able else functools.partial(operators.compile_once, case, device, able)
    return Unit(name, suite, (case.facts,), measure, tuple(able), kind, ahead)


def plan(
    device: torch.device,
    dtype: str,
    *,
    small: bool = False,
    autotune: bool = False,
    limits: dict[str, float] | None = None,
    rounds: int | None = None,
    seconds: float = 1.0,
) -> list[Unit]:
    """Return every unit, the most telling first.

    Operators with a goal, generation and training steps with one, encoders, the other operators and the merge as they run
    inside these, the shapes of the goals in other directions, sweeps, the other shapes, generation and training steps without
    a goal; last what takes longest, compiled encoders and the goals with max-autotune.
    """
    from laco_kernels.bench.llava_units import llava_units  # transformers takes seconds to import, which operators do not need

    options: dict[str, Any] = {"limits": limits, "rounds": rounds, "seconds": seconds}
    ops: Sequence[AnyCase] = op_cases.op_cases(dtype)
    inside: Sequence[AnyCase] = op_cases.encoder_cases(dtype)
    sweeps: Sequence[AnyCase] = op_cases.sweep_cases(dtype)
    tower: Sequence[AnyCase] = [*tower_cases.tower_cases(dtype), *op_cases.mlp_cases(dtype)]
    if small:
        ops, inside, sweeps = op_cases.tiny(ops)[:3], op_cases.tiny(inside)[:1], op_cases.tiny(sweeps)[:2]
        tower = op_cases.tiny(tower)[:2]
    goals = [case for case in ops if case.goal is not None]
    shapes = {replace(case, direction="forward") for case in goals}
    akin = [case for case in ops if case not in goals and replace(case, direction="forward") in shapes]
    rest = [case for case in ops if case not in (*goals, *inside, *akin)]

    def units(cases: Sequence[AnyCase], autotune: bool = autotune) -> list[Unit]:
        return [op_unit(case, device, autotune=autotune, **options) for case in cases]

    encoders = vec_units(device, dtype, small=small, rounds=rounds, seconds=8 * seconds)
    again = [] if autotune or small else units(goals, autotune=True)
    compiled = [] if small else vec_units(device, dtype, small=False, rounds=rounds, seconds=8 * seconds, compiled=True)
    models = llava_units(device, dtype, small=small, rounds=rounds, seconds=16 * seconds)
    others = [] if small else llava_units(device, dtype, small=False, rounds=rounds, seconds=16 * seconds, goals=False)
    first = [*units(goals), *models, *encoders, *units(tower), *units(inside), *units(akin)]
    return [*first, *units(sweeps, False), *units(rest), *others, *compiled, *again]
