"""``laco task`` and ``laco train-demo``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from laco_kernels.cli.common import (
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
from laco_kernels.cli.train import require_extra
from laco_kernels.errors import complaint


@app.command()
def task(
    folder: Annotated[Path, typer.Argument(help="Where to; made, or empty.")],
    count: Annotated[int, typer.Option(help="Training samples.")] = 4000,
    held_out: Annotated[int, typer.Option(help="Held-out samples.")] = 640,
    seed: Annotated[int, typer.Option(help="The same one draws the same task.")] = 0,
    form: Annotated[str, typer.Option("--format", help="json or jsonl.")] = "json",
) -> None:
    """Draw pictures of shapes, digits and words, with questions and answers as LLaVA's data has them."""
    with usage_errors():
        import laco_kernels.hf  # noqa: F401 - says what to install where transformers is missing
        from laco_kernels.train.task import write_task

        with progress_bar() as step:
            written = write_task(folder, count, held_out, seed, form, step)
    for path in (written.train, written.held_out):
        out_console.print(str(path), markup=False, highlight=False, soft_wrap=True)


@app.command("train-demo")
def train_demo(
    out: Annotated[Path, typer.Option(help="Folder for all of it; one that was begun is gone on with.")] = Path("train-demo"),
    sizes: Annotated[list[str] | None, typer.Option("--set", help="name=number, e.g. stage2_steps=100.")] = None,
    seed: Annotated[int, typer.Option(help="Of everything.")] = 0,
    as_json: Json = False,
) -> None:
    """Train a tiny multimodal LLM in LaCo's stages on drawn pictures, and ask it held-out questions.

    About ten minutes on two idle CPU cores. The model is OUT/stage2, with its recipes beside it.
    """
    with usage_errors():
        require_extra("laco train-demo")
        from laco_kernels.bench import demo_report, report
        from laco_kernels.bench.environment import environment
        from laco_kernels.train.demo import Settings, run_demo

        quiet_transformers()
        names = [field.name for field in dataclasses.fields(Settings) if field.name != "seed"]
        settings = Settings(**_numbers(sizes or [], names), seed=seed)
        report.check_folder(out)
        with progress_bar() as step:
            result = run_demo(out, settings, environment(parse_device(None)), step)

    def show() -> None:
        out_console.print(demo_report.headline(result), style="bold", markup=False, highlight=False)
        out_console.print(demo_report.table(result))
        for line in (*demo_report.findings(result), demo_report.times(result)):
            out_console.print(line, markup=False, highlight=False)
        out_console.print(demo_report.legend(), style="dim", markup=False, highlight=False)
        out_console.print(f"On {report.machine(result)}", style="dim", markup=False, highlight=False)

    deliver(result, {}, show, demo_report.write, out, as_json=as_json, correct=True)
    err_console.print(f"the model and its processor are in {out / 'stage2'}", markup=False, highlight=False, soft_wrap=True)


def _numbers(texts: list[str], names: list[str]) -> dict[str, int]:
    found = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name not in names or not value.isdecimal():
            expected = f"name=number, with one of {', '.join(names)}"
            raise ValueError(complaint("--set", repr(text), expected, "Pass for instance --set stage2_steps=100"))
        found[name] = int(value)
    return found
