"""Multimodal models in ``laco bench all``: runs of ``laco bench generate`` and ``laco bench step``, as rows."""

from __future__ import annotations

import dataclasses
import gc
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from laco_kernels.bench import cases, generate, llava_cases, operators, step
from laco_kernels.bench.campaign import Unit
from laco_kernels.bench.vec_units import microseconds

if TYPE_CHECKING:
    from collections.abc import Sequence

    from laco_kernels.bench.campaign import Measured
    from laco_kernels.bench.generate import GenerateResult, GenerateRow
    from laco_kernels.bench.llava_cases import Setting
    from laco_kernels.bench.step import StepResult, StepRow


@dataclass(frozen=True)
class Run:
    """One run of ``laco bench generate``, or with a ``stage`` of ``laco bench step``."""

    method: str
    modes: tuple[str, ...]
    batch: int
    text_tokens: int
    new_tokens: int = 0
    depths: str = "1/4,1"
    llm: str | None = None
    stage: str | None = None

    @property
    def suite(self) -> str:
        """The suite of its rows."""
        return "generate" if self.stage is None else "step"

    def __str__(self) -> str:
        """Return its name in a campaign."""
        what = f"{self.method} {self.llm or llava_cases.METHODS[self.method][1]} batch={self.batch}"
        depths = f" {self.depths}" if self.method == "laco" else ""
        return f"{self.suite} {what}{depths}{f' {self.stage}' if self.stage else ''} {','.join(self.modes)}"


_ALL = ("eager", "fused", "static+graphs", "fused+graphs", "fused+compile+graphs")
_BEST = ("eager", "fused+graphs")
_STEPS = ("eager", "fused", "fused+head", "fused+compile+head")
# The most telling first: each of these has a goal.
GOALS = (
    Run("laco", _ALL, 1, 64, 128),
    Run("stf", _ALL, 16, 64, 32),
    Run("laco", _STEPS, 8, 128, stage="stage2"),
    Run("stf", (*_STEPS[:3], "fused+graphs+head", _STEPS[3]), 8, 128, stage="finetune"),
)
OTHERS = (
    Run("laco", _BEST, 1, 64, 128, depths=cases.DEFAULT_DEPTHS),
    Run("stf", _BEST, 1, 64, 128),
    Run("laco", _BEST, 16, 64, 32),
    Run("stf", _BEST, 16, 64, 32, llm="llama-3.1-8b"),
    Run("stf", _BEST, 16, 64, 32, llm="vicuna-13b"),
    Run("laco", _STEPS[:3], 8, 128, stage="stage1"),
    Run("stf", _STEPS[:3], 8, 128, stage="pretrain"),
    Run("laco", ("eager", "compile"), 1, 64, 128),
    Run("stf", ("eager", "compile"), 16, 64, 32),
)


def llava_units(
    device: torch.device, dtype: str, *, small: bool, rounds: int | None, seconds: float, goals: bool = True
) -> list[Unit]:
    """Return one unit for every run, of those with a goal or of the others; ``small`` makes one of each kind, shrunken.

    Without a GPU there are few of them: a model cut in depth says little, and another one cut like it no more.
    """
    runs: tuple[Run, ...] = GOALS if goals else OTHERS
    if small:
        runs = (GOALS[0], GOALS[3])
    elif device.type != "cuda" and not goals:
        runs = ()
    return [_unit(run, device, dtype, small, rounds, seconds) for run in runs]


def _unit(run: Run, device: torch.device, dtype: str, small: bool, rounds: int | None, seconds: float) -> Unit:
    if device.type != "cuda":
        modes = generate.modes_for(device) if run.stage is None else step.modes_for(device, run.method)
        run = replace(run, modes=tuple(modes), batch=1, new_tokens=min(run.new_tokens, 16))
    if small:
        run = replace(run, text_tokens=8, new_tokens=min(run.new_tokens, 6))
    setting = llava_cases.setting(run.method, device, llm=run.llm, tiny=small)
    names = llava_cases.subjects(run.method, cases.parse_depths(run.depths))
    facts = tuple(_case(run, setting, name, dtype) for name in names)

    def measure() -> Measured:
        gc.collect()  # what the unit before left in circles
        torch.cuda.empty_cache()
        try:
            return _measure(run, setting, device, dtype, facts, rounds, seconds)
        except torch.OutOfMemoryError as error:
            reason = f"does not fit: {str(error).partition(chr(10))[0]}"
            return [(case, mode, {**operators.EMPTY, "reason": reason}) for case in facts for mode in run.modes]

    kind = f"{run.suite} {run.method}" + " compile" * ("compile" in run.modes)
    return Unit(f"{run} {dtype}", "tiny" if small else run.suite, facts, measure, run.modes, kind)


def _case(run: Run, setting: Setting, subject: str, dtype: str) -> dict[str, Any]:
    tiny = "tiny-" * setting.tiny
    case: dict[str, Any] = {"encoder": f"{tiny}{setting.encoder}", "llm": setting.llm, "subject": subject}
    case |= {"batch": run.batch, "text_tokens": run.text_tokens, "dtype": dtype}
    case |= {"new_tokens": run.new_tokens} if run.stage is None else {"stage": run.stage}
    reduced = llava_cases.reduction(setting.depth)
    return {**case, "reduced": reduced} if reduced else case


def _measure(
    run: Run,
    setting: Setting,
    device: torch.device,
    dtype: str,
    facts: Sequence[dict[str, Any]],
    rounds: int | None,
    seconds: float,
) -> Measured:
    depths, precision = cases.parse_depths(run.depths), getattr(torch, dtype)
    common: dict[str, Any] = {"depths": depths, "modes": run.modes, "batch": run.batch, "text_tokens": run.text_tokens}
    common |= {"rounds": rounds, "seconds": seconds}
    result: GenerateResult | StepResult
    if run.stage is None:
        result = generate.measure_generate(setting, device, precision, new_tokens=run.new_tokens, **common)
    else:
        result = step.measure_step(setting, device, precision, stages=[run.stage], **common)
    by_subject = {case["subject"]: case for case in facts}
    goal = llava_cases.goal(run.suite, setting, **facts[0])
    found: Measured = [(by_subject[row.subject], row.mode, _values(row, goal)) for row in result.rows]
    for key, reason in result.left_out.items():
        *_, subject, mode = key.split()
        found.append((by_subject[subject], mode, {**operators.EMPTY, "reason": f"does not fit: {reason}"}))
    return found


def _values(row: GenerateRow | StepRow, goal: dict[str, Any] | None) -> dict[str, Any]:
    """Return a row's values, times in microseconds; one that is wrong has none."""
    plain: dict[str, Any] = dataclasses.asdict(row)
    whole = "generate_ms" if "generate_ms" in plain else "step_ms"
    times = {name.removesuffix("_ms"): getattr(row, name) for name in plain if name.endswith("_ms") and name != whole}
    ratios = {name: plain[name] if row.correct else None for name in plain if name.endswith("ratio")}
    values = {
        "ok": row.correct,
        "error": row.error,
        "budget": row.error_budget,
        "reason": None if row.correct else "wrong: further from float64 than twice eager",
        "timings": {name: microseconds(time) for name, time in {"wall": getattr(row, whole), **times}.items()},
        "peak_bytes": None if row.peak_mib is None else round(row.peak_mib * 2**20),
        "goal": goal,
        **ratios,
    }
    for name in ("image_tokens", "agreement", "trained_parameters", "held_mib"):
        values |= {name: plain[name]} if name in plain else {}
    return values if row.correct else {**values, "timings": {}}
