"""What ``laco train`` shows: what is about to happen, and how far it is."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers import TrainerCallback

from laco_kernels.cli.common import err_console, out_console

if TYPE_CHECKING:
    from collections.abc import Iterator

    from laco_kernels.train.run import Run


def show(run: Run) -> None:
    """Print what is trained, on what, and for how long."""
    out_console.print(_parts(run))
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    for name, text in _facts(run):
        table.add_row(name, text)
    out_console.print(table)
    if run.recipe.trainer.get("deepspeed"):
        out_console.print("DeepSpeed's configuration is handed on; this package has not been tested with it.", style="yellow")


def _parts(run: Run) -> Table:
    table = Table(title="What is trained")
    table.add_column("part")
    for name in ("parameters", "trained", "rate", "weight decay"):
        table.add_column(name, justify="right")
    for part in run.plan.parts:
        frozen = part.rate is None
        table.add_row(
            part.name,
            f"{part.parameters:,}",
            "frozen" if frozen else f"{part.trained:,}",
            "" if frozen else f"{part.rate:g}",
            "" if frozen else f"{run.recipe.train.weight_decay:g}",
        )
    return table


def _facts(run: Run) -> Iterator[tuple[str, str]]:
    plan, train, found = run.plan, run.recipe.train, run.inspection
    height, width = plan.image.patches
    yield "tokens", f"{height} x {width} patches of an image become {plan.image.tokens} tokens: {plan.compressor}"
    if (lora := run.recipe.lora) is not None:
        yield "LoRA", f"r {lora.r}, alpha {lora.alpha:g}, dropout {lora.dropout:g} on {', '.join(lora.targets)}"
    yield "data", f"{len(found.dataset):,} samples, {found.images:,} images; the longest sample has {found.longest:,} tokens"
    if len(run.sources) > 1:
        for source in run.sources:
            yield "", f"{source.path.name}: {source.taken:,} of {source.total:,} ({source.strategy})"
    for cause, count in found.tally.counts().items():
        yield "left out", f"{count:,} {cause.value}"
    if found.converted:
        yield "made RGB", ", ".join(f"{count:,} {mode}" for mode, count in found.converted.items())
    each = f"{plan.devices} device{'s' * (plan.devices > 1)} x {plan.per_device} at once x {plan.accumulation} accumulated"
    yield "batch", f"{plan.devices * plan.per_device * plan.accumulation} = {each}"
    yield "steps", f"{plan.steps:,}, {plan.warmup:,} of them warming up, then a cosine down to {train.min_lr:g}"
    checkpointing = ", gradient checkpointing" if train.gradient_checkpointing else ""
    yield "precision", f"{train.precision}, parameters float32{checkpointing}"
    yield "output", str(run.recipe.output)


class _Follow(TrainerCallback):
    """Moves the bar; where there is no terminal, prints a line for each logged step."""

    def __init__(self, bar: Progress, steps: int, resume: bool) -> None:
        self.bar, self.resume = bar, resume
        self.task = bar.add_task("training", total=steps)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.resume:
            where = f"after step {state.global_step}" if state.global_step else "at the beginning, as there is no checkpoint"
            err_console.print(f"going on {where}", highlight=False)
        self.bar.update(self.task, completed=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if not logs or "loss" not in logs:
            return
        self.bar.update(self.task, description=f"loss {float(logs['loss']):.4f}")
        if not err_console.is_terminal:
            line = f"step {state.global_step} of {state.max_steps}: loss {float(logs['loss']):.4f}"
            err_console.print(line, highlight=False)


@contextlib.contextmanager
def progress(steps: int, resume: bool) -> Iterator[TrainerCallback]:
    """Show a bar on a terminal's standard error while training, and lines elsewhere; yields what the Trainer tells of it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    quiet = err_console.quiet or not err_console.is_terminal
    with Progress(*columns, console=err_console, disable=quiet) as bar:
        yield _Follow(bar, steps, resume)


def show_left_out(run: Run) -> None:
    """Print what was left out, where that is more than was known before the first step."""
    found = run.inspection.tally
    if len(found.skipped) > found.samples - len(run.inspection.dataset):
        out_console.print(str(found), markup=False, highlight=False)
