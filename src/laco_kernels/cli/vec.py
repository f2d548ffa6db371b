"""``laco bench vec``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from laco_kernels.bench.cases import DEFAULT_DEPTHS, DEFAULT_ENCODER
from laco_kernels.cli.common import (
    Device,
    Json,
    bench,
    complain,
    deliver,
    out_console,
    parse_device,
    parse_dtype,
    progress_bar,
    quiet_transformers,
    usage_errors,
)
from laco_kernels.cli.photos import load_work
from laco_kernels.errors import complaint


@bench.command()
def vec(
    images: Annotated[list[Path] | None, typer.Argument(help="Photos or folders of photos; default: a bundled one.")] = None,
    encoder: Annotated[str, typer.Option(help="A known encoder, a checkpoint's folder, or a hub name.")] = DEFAULT_ENCODER,
    depths: Annotated[str, typer.Option(help="Where to merge, as fractions of the depth.")] = DEFAULT_DEPTHS,
    batch: Annotated[int, typer.Option(min=1, help="Images a batch.")] = 1,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: bfloat16 on a GPU.")] = None,
    device: Device = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Time torch.compile'd encoders.")] = False,
    optimized: Annotated[bool, typer.Option("--optimize", help="Time every way of making them faster beside eager.")] = False,
    impl: Annotated[str | None, typer.Option(help="Who runs what is fused, e.g. triton; default: the measured choice.")] = None,
    training: Annotated[bool, typer.Option("--training", help="Time a forward and a backward pass.")] = False,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds to time; default: as many as --seconds allow.")] = None,
    seconds: Annotated[float, typer.Option(min=0, help="Time for the rounds; at least 5, at most 200 are run.")] = 45,
    out: Annotated[Path | None, typer.Option(help="Folder for JSON, Markdown and a picture.")] = None,
    as_json: Json = False,
) -> None:
    """Measure what compressing at each depth does to the vision encoding cost (VEC) of a real encoder on real photos.

    Known encoders: aimv2-l-336, siglip-so400m-384, internvit-300m-448, clip-l-336; they run with random weights, on which
    time does not depend.
    """
    with usage_errors():
        import laco_kernels.hf  # noqa: F401 - says what to install where transformers is missing
        from laco_kernels.bench import cases, report, system
        from laco_kernels.kernels import select

        quiet_transformers()
        wanted = cases.parse_depths(depths)
        place, precision = parse_device(device), parse_dtype(dtype, device)
        if impl is not None:
            for op in select.TOWER_OPERATORS:
                select.check(impl, place, precision, op)
        modes = _modes(compiled=compiled, optimized=optimized, can_graph=place.type == "cuda" and not training)
        if out is not None:
            report.check_folder(out)
        with progress_bar() as step:
            model, weights, pixels, opened, failures = load_work(encoder, images, batch, step)
        model.to(place, precision)
    try:
        with progress_bar() as step:
            result = system.measure_vec(
                model,
                encoder,
                wanted,
                pixels,
                weights=weights,
                images=opened,
                modes=modes,
                impl=impl,
                training=training,
                rounds=rounds,
                seconds=seconds,
                on_step=step,
            )
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError on a GPU, a RuntimeError on a CPU
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "can't allocate memory" not in str(error):
            raise
        complain(complaint("batch", batch, f"a batch that fits into the memory of {place}", "Pass a smaller --batch"))
        raise typer.Exit(2) from None

    def show() -> None:
        out_console.print(report.headline(result), style="bold", markup=False, highlight=False)
        out_console.print(report.table(result))
        out_console.print(report.legend(result), style="dim", markup=False, highlight=False)
        out_console.print(f"On {report.machine(result)}", style="dim", markup=False, highlight=False)

    correct = all(row.correct for row in result.rows)
    deliver(result, failures, show, report.write, out, as_json=as_json, correct=correct)


def _modes(*, compiled: bool, optimized: bool, can_graph: bool) -> list[str]:
    from laco_kernels.bench import system

    if compiled and optimized:
        raise ValueError(complaint("optimize", "it together with --compile", "one of the two", "--optimize compiles too"))
    if optimized:
        return [mode for mode in system.MODES if can_graph or "graphs" not in mode]
    return ["compile" if compiled else "eager"]
