"""``laco bench generate`` and ``laco bench step``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from laco_kernels.cli.common import (
    Device,
    Json,
    bench,
    complain,
    deliver,
    err_console,
    out_console,
    parse_device,
    parse_dtype,
    progress_bar,
    quiet_transformers,
    usage_errors,
)
from laco_kernels.errors import complaint

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from laco_kernels.bench.llava_cases import Setting

Method = Annotated[str, typer.Option(help="laco: a merge inside AIMv2-L; stf: LLaVA-1.5 against MBTF + STF.")]
Encoder = Annotated[str | None, typer.Option(help="A known encoder; default: the method's.")]
Llm = Annotated[str | None, typer.Option(help="qwen2.5-0.5b, vicuna-7b, vicuna-13b, llama-3.1-8b; default: the method's.")]
EncoderLayers = Annotated[int | None, typer.Option(min=1, help="How many of the encoder's layers; default: all on a GPU.")]
LlmLayers = Annotated[int | None, typer.Option(min=1, help="How many of the LLM's layers; default: all on a GPU.")]
Batch = Annotated[int, typer.Option(min=1, help="Rows, each with one image.")]
Text = Annotated[int, typer.Option(min=2, help="Text tokens a row.")]
Modes = Annotated[str | None, typer.Option(help="Some ways to run them, eager first; default: all that suit the device.")]
Compile = Annotated[bool, typer.Option("--compile", help="Measure torch.compile, too; takes minutes.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: bfloat16 on a GPU.")]
Tiny = Annotated[bool, typer.Option("--tiny", help="Shrunken models, to try the command.")]
Rounds = Annotated[int | None, typer.Option(min=1, help="Rounds to time; default: as many as --seconds allow.")]
Seconds = Annotated[float, typer.Option(min=0, help="Time for the rounds; at least 5, at most 200 are run.")]
Out = Annotated[Path | None, typer.Option(help="Folder for JSON, Markdown and a picture.")]


@bench.command()
def generate(
    method: Method = "laco",
    depths: Annotated[str | None, typer.Option(help="Where LaCo merges; default: 1/12,1/6,1/4,1/2,1.")] = None,
    encoder: Encoder = None,
    llm: Llm = None,
    encoder_layers: EncoderLayers = None,
    llm_layers: LlmLayers = None,
    batch: Batch = 1,
    text_tokens: Text = 64,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate; none ends an answer.")] = 128,
    modes: Modes = None,
    compiled: Compile = False,
    dtype: Dtype = None,
    device: Device = None,
    tiny: Tiny = False,
    rounds: Rounds = None,
    seconds: Seconds = 45,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Measure generation by a LLaVA-style model: time to first token (TTFT) and its parts, tokens a second, memory.

    Weights are random, on which time does not depend. Without a GPU encoder and LLM are cut in depth, and it says so.
    """
    with usage_errors():
        import laco_kernels.hf  # noqa: F401 - says what to install where transformers is missing
        from laco_kernels.bench import cases, generate_report, llava_cases
        from laco_kernels.bench import generate as measuring

        place, precision, chosen = _setting(method, device, dtype, encoder, llm, encoder_layers, llm_layers, tiny, out)
        wanted = cases.parse_depths(_depths(method, depths, cases.DEFAULT_DEPTHS))
        names = _modes(modes, measuring.MODES, measuring.modes_for(place, compiled=compiled), place)
    _warn(llava_cases.reduction(chosen.depth))
    with _memory_errors(place), progress_bar() as step:
        result = measuring.measure_generate(
            chosen,
            place,
            precision,
            depths=wanted,
            modes=names,
            batch=batch,
            text_tokens=text_tokens,
            new_tokens=new_tokens,
            rounds=rounds,
            seconds=seconds,
            on_step=step,
        )

    def show() -> None:
        tables, report = generate_report.tables(result), generate_report
        _show(report.headline(result), tables, report.legend(result), result)

    correct = all(row.correct for row in result.rows)
    deliver(result, {}, show, generate_report.write, out, as_json=as_json, correct=correct)


@bench.command()
def step(
    method: Method = "laco",
    stages: Annotated[
        str | None, typer.Option(help="laco: stage1,stage2; stf: pretrain,finetune; default: all of them.")
    ] = None,
    depths: Annotated[str | None, typer.Option(help="Where LaCo merges; default: 1/4,1.")] = None,
    encoder: Encoder = None,
    llm: Llm = None,
    encoder_layers: EncoderLayers = None,
    llm_layers: LlmLayers = None,
    batch: Batch = 1,
    text_tokens: Text = 128,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Recompute activations in the backward.")] = False,
    modes: Modes = None,
    compiled: Compile = False,
    dtype: Dtype = None,
    device: Device = None,
    tiny: Tiny = False,
    rounds: Rounds = None,
    seconds: Seconds = 90,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Measure an optimiser step of a LLaVA-style model, stage by stage of the papers' training: time and peak memory.

    Weights are random, on which time does not depend. Without a GPU encoder and LLM are cut in depth, and it says so.
    """
    with usage_errors():
        import laco_kernels.hf  # noqa: F401 - says what to install where transformers is missing
        from laco_kernels.bench import cases, llava_cases, step_report
        from laco_kernels.bench import step as measuring

        place, precision, chosen = _setting(method, device, dtype, encoder, llm, encoder_layers, llm_layers, tiny, out)
        wanted = cases.parse_depths(_depths(method, depths, "1/4,1"))
        names = _modes(modes, measuring.MODES, measuring.modes_for(place, method, compiled=compiled), place)
        parts = measuring.check_stages(method, stages.split(",") if stages else ())
    _warn(llava_cases.reduction(chosen.depth))
    with _memory_errors(place), progress_bar() as progress:
        result = measuring.measure_step(
            chosen,
            place,
            precision,
            stages=parts,
            depths=wanted,
            modes=names,
            batch=batch,
            text_tokens=text_tokens,
            checkpointing=checkpointing,
            rounds=rounds,
            seconds=seconds,
            on_step=progress,
        )

    def show() -> None:
        _show(step_report.headline(result), [step_report.table(result)], step_report.legend(result), result)

    correct = all(row.correct for row in result.rows)
    deliver(result, {}, show, step_report.write, out, as_json=as_json, correct=correct)


def _setting(
    method: str,
    device: str | None,
    dtype: str | None,
    encoder: str | None,
    llm: str | None,
    encoder_layers: int | None,
    llm_layers: int | None,
    tiny: bool,
    out: Path | None,
) -> tuple[torch.device, torch.dtype, Setting]:
    from laco_kernels.bench import llava_cases, report

    quiet_transformers()
    place, precision = parse_device(device), parse_dtype(dtype, device)
    shapes: dict[str, Any] = {"encoder": encoder, "llm": llm, "encoder_layers": encoder_layers, "llm_layers": llm_layers}
    chosen = llava_cases.setting(method, place, tiny=tiny, **shapes)
    if out is not None:
        report.check_folder(out)
    return place, precision, chosen


def _depths(method: str, given: str | None, default: str) -> str:
    if method == "stf" and given is not None:
        raise ValueError(complaint("depths", given, "none for stf, which compresses behind the encoder", "Drop --depths"))
    return given or default


def _modes(given: str | None, known: dict[str, Any], default: Sequence[str], place: torch.device) -> list[str]:
    """Return the modes named, eager in front of them."""
    names = list(dict.fromkeys(["eager", *given.split(",")])) if given else list(default)
    for name in names:
        if name not in known:
            raise ValueError(complaint("modes", repr(name), f"names among {', '.join(known)}", "Separate them with commas"))
        if "graphs" in name and place.type != "cuda":
            raise ValueError(complaint("modes", repr(name), "no CUDA graphs without a GPU", "Leave --modes out"))
    return names


def _warn(reduced: str) -> None:
    if reduced:
        text = f"no whole models here: {reduced}; see --encoder-layers and --llm-layers"
        err_console.print(text, markup=False, highlight=False, soft_wrap=True)


class _memory_errors:  # noqa: N801 - a context manager that reads as a statement
    """Turn memory that does not suffice, and what cannot be measured, into one line and exit code 2."""

    def __init__(self, place: torch.device) -> None:
        self.place = place

    def __enter__(self) -> None:
        """Nothing."""

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        """Complain."""
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
            given = f"a model and a batch beyond the memory of {self.place}"
            complain(complaint("batch", given, "what fits", "Pass a smaller --batch, or fewer --llm-layers"))
            raise typer.Exit(2) from None
        if isinstance(error, ImportError):
            complain(str(error))
            raise typer.Exit(2) from None


def _show(headline: str, tables: Sequence[Table], legend: str, result: Any) -> None:
    from laco_kernels.bench import report

    out_console.print(headline, style="bold", markup=False, highlight=False)
    for table in tables:
        out_console.print(table)
    for key, reason in result.left_out.items():
        out_console.print(f"left out: {key}: {reason}", markup=False, highlight=False)
    out_console.print(legend, style="dim", markup=False, highlight=False)
    out_console.print(f"On {report.machine(result)}", style="dim", markup=False, highlight=False)
