"""``laco study``."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from laco_kernels.cli.common import (
    Device,
    Json,
    app,
    deliver,
    err_console,
    out_console,
    parse_device,
    progress_bar,
    quiet_transformers,
    usage_errors,
)
from laco_kernels.errors import complaint

if TYPE_CHECKING:
    from laco_kernels.train.study_runs import Run

DEPTHS, STEPS = "1/12,1/6,1/4,1/2,1", "50,400"
WORK = Path("laco-study")


@app.command()
def study(
    only: Annotated[str | None, typer.Option(help="Some compressors, such as laco,avg_pool; default: five.")] = None,
    depths: Annotated[str, typer.Option(help="Where LaCo stands, besides 1/4.")] = DEPTHS,
    steps: Annotated[str, typer.Option(help="Fine-tuning steps, each number in runs of its own.")] = STEPS,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each kind.")] = 3,
    tower_steps: Annotated[int, typer.Option(min=1, help="Pretraining steps of the tower.")] = 1500,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at once, on one thread each.")] = 2,
    work: Annotated[Path, typer.Option(help="Folder that keeps the tower and finished runs.")] = WORK,
    device: Device = None,
    out: Annotated[Path | None, typer.Option(help="Folder for JSON, Markdown and a picture.")] = None,
    as_json: Json = False,
) -> None:
    """Fine-tune a tiny pretrained tower with each compressor inside, and say what it reads afterwards.

    LaCo's claim at a size anybody can rerun: 108 runs, which take forty minutes of a core. An interrupted study goes on where
    it stopped.
    """
    with usage_errors():
        import laco_kernels.hf  # noqa: F401 - says what to install where transformers is missing
        from laco_kernels.bench import cases, environment, report, study_report
        from laco_kernels.bench.study import summarise
        from laco_kernels.train import study as experiment
        from laco_kernels.train import study_runs

        quiet_transformers()
        names = experiment.NAMES if only is None else tuple(name.strip() for name in only.split(","))
        arms = experiment.list_arms(names, cases.parse_depths(depths, yardstick=None))
        place = parse_device(device)
        report.check_folder(work, "work")
        if out is not None:
            report.check_folder(out)
        settings = [experiment.Settings(steps=number) for number in _numbers(steps)]
        with progress_bar() as step:
            tower, path = study_runs.prepare_tower(work, tower_steps, on_step=step)
        runs = []
        for one in settings:
            told = _Progress(f"{one.steps} steps", len(arms) * seeds, jobs)
            runs.append(study_runs.carry_out(path, arms, seeds, one, work, jobs=jobs, device=str(place), on_run=told.tell))
        command = f"laco study --steps {steps} --seeds {seeds} --tower-steps {tower_steps} --depths {depths}"
        result = summarise(
            runs,
            settings,
            tower,
            command=f"{command} --only {','.join(names)}",
            device=place.type,
            environment=environment.environment(place),
        )

    def show() -> None:
        out_console.print(study_report.headline(result), style="bold", markup=False, highlight=False)
        out_console.print(study_report.table(result))
        out_console.print()
        for line in study_report.findings(result):
            out_console.print(line, markup=False, highlight=False)
        out_console.print(study_report.legend(result), style="dim", markup=False, highlight=False)
        out_console.print(f"On {report.machine(result)}", style="dim", markup=False, highlight=False)

    deliver(result, {}, show, study_report.write, out, as_json=as_json, correct=True)


def _numbers(text: str) -> list[int]:
    """Read ``"50,400"``; ascending, each once."""
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if not part.isdecimal() or int(part) < 1:
            raise ValueError(complaint("steps", repr(part), "positive integers", f"Pass a list such as {STEPS}"))
    return sorted({int(part) for part in parts})


class _Progress:
    """Says on standard error what has finished, and how long the rest will take: it is written into a log, too."""

    def __init__(self, what: str, total: int, jobs: int) -> None:
        self.what, self.total, self.jobs = what, total, jobs
        self.kept, self.seconds = 0, list[float]()

    def tell(self, run: Run, kept: bool) -> None:
        """Count ``run``; print it unless it was kept from before."""
        self.seconds.append(run.outcome.seconds)
        self.kept += kept
        if kept:
            return
        done = len(self.seconds)
        if 0 < self.kept == done - 1:
            err_console.print(f"{self.what}: {self.kept} of {self.total} runs are kept from before", highlight=False)
        left = statistics.mean(self.seconds) * (self.total - done) / self.jobs / 60
        read = f"{run.outcome.before:.1%} before, {run.outcome.after:.1%} after {run.outcome.seconds:.0f} s"
        text = f"{self.what} {done}/{self.total}: {run.arm}, seed {run.seed}: {read}; about {left:.0f} min left"
        err_console.print(text, markup=False, highlight=False, soft_wrap=True)
