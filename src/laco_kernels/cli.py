"""The command line, ``laco``. Exit codes: 0 done, 1 a check failed, 2 wrong use."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

try:
    import typer
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
except ModuleNotFoundError as missing:
    raise SystemExit(f"laco needs {missing.name}, which is not installed. Run: pip install 'laco_kernels[bench]'") from None

import torch

from laco_kernels.bench.cases import DEFAULT_DEPTHS, DEFAULT_ENCODER
from laco_kernels.errors import complaint

if TYPE_CHECKING:
    from collections.abc import Iterator

app = typer.Typer(
    help="Visual-token compression for multimodal LLMs: look at the machine, measure.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
bench = typer.Typer(help="Measure.", no_args_is_help=True)
app.add_typer(bench, name="bench")

out_console, err_console = Console(), Console(stderr=True)
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Turn a refusal of what the user asked for into one line and exit code 2."""
    try:
        yield
    except typer.Exit:
        raise
    except (TypeError, ValueError, RuntimeError, OSError, ImportError) as error:
        _complain(str(error))
        raise typer.Exit(2) from None


def _complain(message: str) -> None:
    err_console.print(f"error: {message}", style="red", markup=False, highlight=False, soft_wrap=True)


def _print_json(data: Any) -> None:
    print(json.dumps(data, indent=2))


@app.command()
def env(as_json: Json = False) -> None:
    """Print versions, devices, and which implementations are available."""
    from laco_kernels.bench.environment import automatic_choices, environment, implementations

    report = environment()
    if as_json:
        choices = {name: choice._asdict() for name, choice in automatic_choices().items()}
        _print_json({**report, "implementations": implementations(), "automatic_choice": choices})
        return
    for name, value in report.items():
        text = ", ".join(value) if isinstance(value, list) else value
        out_console.print(f"{name:<14} {text or 'none'}", markup=False, highlight=False, soft_wrap=True)
    out_console.print("\nimplementations")
    for name, reason in implementations().items():
        text = "available" if reason is None else f"not available: {reason}"
        out_console.print(f"  {name:<12} {text}", markup=False, highlight=False, soft_wrap=True)
    out_console.print("\nautomatic choice")
    for name, (impl, reason) in automatic_choices().items():
        out_console.print(f"  {name:<24} {impl}: {reason}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def check(
    op: Annotated[str | None, typer.Option(help="patch_merge, strided_conv_gelu or multi_block_linear_gelu.")] = None,
    impl: Annotated[str | None, typer.Option(help="composite, triton or cuda; default: all that can run.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: all three.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: a GPU if there is one.")] = None,
    as_json: Json = False,
) -> None:
    """Check output and gradients of every implementation that can run here against float64, on a spread of shapes.

    Without a GPU set TRITON_INTERPRET=1 to check the Triton kernels in the interpreter. On a GPU the verdict is kept for
    the automatic choice.
    """
    with usage_errors():
        from laco_kernels import testing
        from laco_kernels.kernels import select

        place = _device(device)
        dtypes = [_dtype(dtype, device)] if dtype is not None else list(DTYPES.values())
        for name, value, known in (("op", op, select.OPERATORS), ("impl", impl, select.IMPLEMENTATIONS)):
            if value is not None and value not in known:
                raise ValueError(complaint(name, repr(value), f"one of {', '.join(known)}", f"Drop --{name} to check all"))
        if impl is not None:
            reasons = [reason for precision in dtypes if (reason := select.unavailable(impl, place, precision))]
            if len(reasons) == len(dtypes):
                raise RuntimeError(complaint("impl", repr(impl), f"one that can run, but {reasons[0]}", "Drop --impl"))
    impls = [impl] if impl is not None else [name for name in select.IMPLEMENTATIONS if name != "reference"]
    cases = [case for case in testing.CASES if op in (None, case.op)]
    if place.type == "cuda":
        cases += [case for case in testing.LARGE_CASES if op in (None, case.op)]
    rows: list[testing.Row] = []
    with _progress() as step:
        for i, case in enumerate(cases):
            step(f"checking {case.op}", i / len(cases))
            rows += testing.check([case], impls, dtypes, place)
    if place.type == "cuda" and impl is None:
        for name in {case.op for case in cases}:
            for precision in dtypes:
                mine = [row.ok for row in rows if row.op == name and row.dtype == str(precision).removeprefix("torch.")]
                select.record(torch.cuda.get_device_name(place), name, str(precision), ok=bool(mine) and all(mine))
    if as_json:
        _print_json([dataclasses.asdict(row) for row in rows])
    elif rows:
        for row in rows:
            tick = "ok  " if row.ok else "FAIL"
            text = f"{tick} {row.impl:<9} {row.dtype:<8} {row.tensor:<8} {row.error:8.1e} of {row.budget:.1e}  {row.case}"
            out_console.print(text, style=None if row.ok else "red", markup=False, highlight=False, soft_wrap=True)
        failed = sum(not row.ok for row in rows)
        out_console.print(f"{len(rows) - failed} passed, {failed} failed", style="bold", highlight=False)
    else:
        out_console.print("Nothing but the reference can run here:", highlight=False)
        for name in impls:
            out_console.print(f"  {name:<12} {select.unavailable(name, place)}", markup=False, highlight=False, soft_wrap=True)
    if not all(row.ok for row in rows):
        raise typer.Exit(1)


@bench.command()
def vec(
    images: Annotated[list[Path] | None, typer.Argument(help="Photos or folders of photos; default: a bundled one.")] = None,
    encoder: Annotated[str, typer.Option(help="A known encoder, a checkpoint's folder, or a hub name.")] = DEFAULT_ENCODER,
    depths: Annotated[str, typer.Option(help="Where to merge, as fractions of the depth.")] = DEFAULT_DEPTHS,
    batch: Annotated[int, typer.Option(min=1, help="Images a batch.")] = 1,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: bfloat16 on a GPU.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: a GPU if there is one.")] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Time torch.compile'd encoders.")] = False,
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
        from laco_kernels.bench import images as photos

        _quiet_transformers()
        wanted = cases.parse_depths(depths)
        place, precision = _device(device), _dtype(dtype, device)
        if out is not None:
            report.check_folder(out)
        files = photos.find_images(images or [])
        with _progress() as step:
            step("loading the encoder", 0.0)
            model, weights = system.load_encoder(encoder)
            known = encoder in cases.encoder_names()
            processor = photos.load_processor(str(cases.FOLDER / encoder) if known else encoder)
            step(f"reading {len(files)} photos", 0.0)
            opened, failures = photos.read_pixels(files, processor)
        for file, reason in failures.items():
            _complain(f"{file}: {reason}")
        if not opened:
            raise typer.Exit(1)
        pixels = photos.batches(opened, batch)
        system.check_pixels(model, pixels[0])
        model.to(place, precision)
    try:
        with _progress() as step:
            result = system.measure_vec(
                model,
                encoder,
                wanted,
                pixels,
                weights=weights,
                images=len(opened),
                compiled=compiled,
                rounds=rounds,
                seconds=seconds,
                on_step=step,
            )
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError on a GPU, a RuntimeError on a CPU
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "can't allocate memory" not in str(error):
            raise
        _complain(complaint("batch", batch, f"a batch that fits into the memory of {place}", "Pass a smaller --batch"))
        raise typer.Exit(2) from None
    if not as_json:
        out_console.print(report.headline(result), style="bold", markup=False, highlight=False)
        out_console.print(report.table(result))
        out_console.print(report.legend(result), style="dim", markup=False, highlight=False)
        out_console.print(f"On {report.machine(result)}", style="dim", markup=False, highlight=False)
    paths: list[Path] = []
    unwritten = None
    try:
        paths = report.write(result, out) if out is not None else []
    except OSError as error:
        unwritten = complaint("out", f"{str(out)!r} ({error.strerror})", "a folder that can be written to", "Choose another")
    if as_json:
        _print_json({**result.to_dict(), "failed_images": failures, "files": [str(path) for path in paths]})
    for path in paths:
        err_console.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)
    if unwritten is not None:
        _complain(unwritten)
        raise typer.Exit(2)
    if failures or not all(row.correct for row in result.rows):
        raise typer.Exit(1)


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    expected = "cpu, cuda or cuda:N"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(complaint("device", repr(name), expected, "Pass --device cpu")) from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(complaint("device", repr(name), expected, "Pass --device cpu"))
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        given = f"{name!r} with {torch.cuda.device_count()} GPUs in this machine"
        raise ValueError(complaint("device", given, "a device that exists", "Pass --device cpu"))
    return device


def _dtype(name: str | None, device: str | None) -> torch.dtype:
    if name is None:
        return torch.bfloat16 if _device(device).type == "cuda" else torch.float32
    if name not in DTYPES:
        raise ValueError(complaint("dtype", repr(name), f"one of {', '.join(DTYPES)}", "Pass --dtype float32"))
    return DTYPES[name]


def _quiet_transformers() -> None:
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hub_logging.set_verbosity_error()  # it reports every attempt to reach the hub


@contextlib.contextmanager
def _progress() -> Iterator[Any]:
    """Show the current step and how much is done on a terminal's standard error, and nothing elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err_console, transient=True, disable=not err_console.is_terminal) as progress:
        task = progress.add_task("starting", total=1.0)
        yield lambda description, done: progress.update(task, description=description, completed=done)


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
