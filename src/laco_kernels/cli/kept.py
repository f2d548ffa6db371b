"""``laco bench kept``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from laco_kernels.cli.common import (
    Device,
    Json,
    bench,
    deliver,
    out_console,
    parse_device,
    progress_bar,
    quiet_transformers,
    usage_errors,
)
from laco_kernels.cli.photos import load_work
from laco_kernels.errors import complaint

TINY_TOWER = "tiny-tower"
DEPTHS = "1/12,1/6,1/4,1/2"
PHOTOS_AT_ONCE, PICTURES = 8, 64


@bench.command()
def kept(
    images: Annotated[
        list[Path] | None, typer.Argument(help="Photos or folders, for --encoder; default: a bundled one.")
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option(
            help="A checkpoint's folder, a hub name, or a known encoder; default: a tiny one, pretrained on the spot."
        ),
    ] = None,
    depths: Annotated[str, typer.Option(help="Where to compress, as fractions of the depth.")] = DEPTHS,
    ratio: Annotated[int, typer.Option(min=2, help="Side of the windows.")] = 2,
    seeds: Annotated[int, typer.Option(min=1, help="Draws of each compressor's weights.")] = 3,
    only: Annotated[str | None, typer.Option(help="Some compressors, such as laco,avg_pool; default: all.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps of the tiny encoder; default: 1500.")] = None,
    device: Device = None,
    out: Annotated[Path | None, typer.Option(help="Folder for JSON, Markdown and a picture.")] = None,
    as_json: Json = False,
) -> None:
    """Show how far an untrained compressor inside a frozen encoder moves its final features, residual on and off.

    The encoder runs in float32. Known encoders have random weights here, and show nothing but that the command runs.
    """
    with usage_errors():
        import laco_kernels.hf  # noqa: F401 - says what to install where transformers is missing
        from laco_kernels.bench import cases, compressors, kept_report, report
        from laco_kernels.bench.kept import measure_kept

        quiet_transformers()
        wanted = cases.parse_depths(depths, yardstick=None)
        failures: dict[str, str] = {}
        names = compressors.check_names(only)
        place = parse_device(device)
        if out is not None:
            report.check_folder(out)
        if encoder is None:
            if images:
                remedy = "Pass --encoder too, the encoder to show them to"
                raise ValueError(complaint("images", images[0], "none for the tiny encoder, which reads digits", remedy))
            found = _tiny_tower(steps)
        else:
            if steps is not None:
                raise ValueError(complaint("steps", steps, "none with --encoder, which is not trained", "Drop --steps"))
            found, failures = _checkpoint(encoder, images or [])
        found["encoder"].to(place)
        with progress_bar() as step:
            result = measure_kept(**found, depths=wanted, ratio=ratio, seeds=seeds, names=names, on_step=step)

    def show() -> None:
        out_console.print(kept_report.headline(result), style="bold", markup=False, highlight=False)
        for table in kept_report.tables(result):
            out_console.print(table)
            out_console.print()
        for line in kept_report.findings(result):
            out_console.print(line, markup=False, highlight=False)
        out_console.print(kept_report.legend(result), style="dim", markup=False, highlight=False)
        out_console.print(f"On {report.machine(result)}", style="dim", markup=False, highlight=False)

    deliver(result, failures, show, kept_report.write, out, as_json=as_json, correct=True)


def _tiny_tower(steps: int | None) -> dict[str, Any]:
    """Pretrain the tiny encoder and return what is to be measured."""
    from laco_kernels.train import tiny_tower

    with progress_bar() as step:
        tower = tiny_tower.pretrain_tiny_tower(steps=tiny_tower.STEPS if steps is None else steps, on_step=step)
    pixels = tiny_tower.held_out_digits(PICTURES).pixels
    return {
        "encoder": tower.encoder,
        "name": TINY_TOWER,
        "pixel_batches": [pixels],
        "weights": "pretrained here",
        "accuracy": tower.accuracy,
    }


def _checkpoint(encoder: str, images: list[Path]) -> tuple[dict[str, Any], dict[str, str]]:
    """Load the user's encoder and photos; return what is to be measured, and which photos cannot be read and why."""
    with progress_bar() as step:
        work = load_work(encoder, images, PHOTOS_AT_ONCE, step)
    pixels = torch.cat(work.batches)[: work.images]  # the last batch is filled up, and every photo is to count once
    found = {"encoder": work.encoder.float(), "name": encoder, "weights": work.weights}
    return {**found, "pixel_batches": pixels.split(PHOTOS_AT_ONCE)}, work.failures
