"""``laco bench compressors``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from laco_kernels.bench.cases import DEFAULT_ENCODER
from laco_kernels.cli.common import (
    Device,
    Json,
    bench,
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
def compressors(
    images: Annotated[list[Path] | None, typer.Argument(help="Photos or folders of photos; default: a bundled one.")] = None,
    encoder: Annotated[str, typer.Option(help="A known encoder, a checkpoint's folder, or a hub name.")] = DEFAULT_ENCODER,
    layer: Annotated[int | None, typer.Option(min=1, help="Whose tokens; default: at a quarter of the depth.")] = None,
    ratio: Annotated[str, typer.Option(help="Sides of windows, e.g. 2,3,4.")] = "2",
    batch: Annotated[int, typer.Option(min=1, help="Images a batch.")] = 1,
    llm: Annotated[str, typer.Option(help="Whose width those behind the encoder project to.")] = "vicuna-7b",
    only: Annotated[str | None, typer.Option(help="Some compressors, e.g. laco,avg_pool; default: all.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: bfloat16 on a GPU.")] = None,
    device: Device = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds to time; default: as many as --seconds allow.")] = None,
    seconds: Annotated[float, typer.Option(min=0, help="Time for the rounds; at least 5, at most 200 are run.")] = 60,
    out: Annotated[Path | None, typer.Option(help="Folder for JSON, Markdown and a picture.")] = None,
    as_json: Json = False,
) -> None:
    """Compare all compressors on the same tokens of the same photos: what comes out, and what it costs.

    Each stands where its authors put it, with random weights, on which time does not depend.
    """
    with usage_errors():
        import laco_kernels.hf  # noqa: F401 - says what to install where transformers is missing
        from laco_kernels.bench import compressor_report, report
        from laco_kernels.bench import compressors as measuring
        from laco_kernels.bench.prefill import llm_names
        from laco_kernels.hf.compress import DEFAULT_DEPTH, layer_at
        from laco_kernels.ops.checks import check_choice

        quiet_transformers()
        ratios, names = _numbers(ratio), measuring.check_names(only)
        check_choice("llm", llm, tuple(llm_names()))
        place, precision = parse_device(device), parse_dtype(dtype, device)
        if out is not None:
            report.check_folder(out)
        with progress_bar() as step:
            model, weights, pixels, opened, failures = load_work(encoder, images, batch, step)
            count = model.config.num_hidden_layers
            if layer is not None and layer > count:
                raise ValueError(complaint("layer", layer, f"1 to {count}, the layers of this encoder", "Pass fewer"))
            model.to(place, precision)
            result = measuring.measure_compressors(
                model,
                encoder,
                pixels[0],
                layer=layer or layer_at(DEFAULT_DEPTH, count),
                ratios=ratios,
                llm=llm,
                weights=weights,
                images=min(opened, batch),
                names=names,
                rounds=rounds,
                seconds=seconds,
                on_step=step,
            )

    def show() -> None:
        out_console.print(compressor_report.headline(result), style="bold", markup=False, highlight=False)
        explained = (compressor_report.legend(result), compressor_report.whole_legend(result))
        for table, text in zip(compressor_report.tables(result), explained, strict=True):
            out_console.print(table)
            out_console.print(text, style="dim", markup=False, highlight=False)
        for key, reason in result.left_out.items():
            out_console.print(f"left out: {key.replace(' ', ', ratio ')}: {reason}", style="dim", markup=False, highlight=False)
        out_console.print(f"On {report.machine(result)}", style="dim", markup=False, highlight=False)

    correct = all(row.correct for row in result.rows)
    deliver(result, failures, show, compressor_report.write, out, as_json=as_json, correct=correct)


def _numbers(text: str) -> list[int]:
    try:
        numbers = sorted({int(part) for part in text.split(",")})
    except ValueError:
        numbers = []
    if not numbers or numbers[0] < 2:
        raise ValueError(
            complaint("ratio", repr(text), "integers of at least 2, separated by commas", "Pass for instance 2,3,4")
        )
    return numbers
