"""What all commands share: consoles, refusals, devices, progress."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from laco_kernels.errors import complaint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

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
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: a GPU if there is one.")]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Turn a refusal of what the user asked for into one line and exit code 2."""
    try:
        yield
    except typer.Exit:
        raise
    except (TypeError, ValueError, RuntimeError, OSError, ImportError) as error:
        text = str(error)
        if isinstance(error, OSError) and error.filename is not None and error.strerror:
            given = f"{str(error.filename).removesuffix('.part')!r} ({error.strerror})"
            text = complaint("path", given, "a file that can be read and written", "Choose another one")
        complain(text)
        raise typer.Exit(2) from None


def complain(message: str) -> None:
    """Print one error."""
    err_console.print(f"error: {message}", style="red", markup=False, highlight=False, soft_wrap=True)


def print_json(data: Any) -> None:
    """Print ``data`` on standard output."""
    print(json.dumps(data, indent=2))


def deliver(
    result: Any,
    failures: Mapping[str, str],
    show: Callable[[], None],
    write: Callable[[Any, Path], list[Path]],
    out: Path | None,
    *,
    as_json: bool,
    correct: bool,
) -> None:
    """Print a result and write its files; where these cannot be written it has been printed all the same.

    Exits with 2 where it could not be written, and with 1 where a photo could not be read or a row is not ``correct``.
    """
    if not as_json:
        show()
    paths: list[Path] = []
    unwritten = None
    try:
        paths = write(result, out) if out is not None else []
    except OSError as error:
        unwritten = complaint("out", f"{str(out)!r} ({error.strerror})", "a folder that can be written to", "Choose another")
    if as_json:
        print_json({**result.to_dict(), "failed_images": failures, "files": [str(path) for path in paths]})
    for path in paths:
        err_console.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)
    if unwritten is not None:
        complain(unwritten)
        raise typer.Exit(2)
    if failures or not correct:
        raise typer.Exit(1)


def parse_device(name: str | None) -> torch.device:
    """Return the device named, a GPU if there is one where none is; ValueError if it does not exist."""
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
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # events and streams are of the current one
    return device


def parse_dtype(name: str | None, device: str | None) -> torch.dtype:
    """Return the precision named, else bfloat16 on a GPU and float32 elsewhere; ValueError if it is unknown."""
    if name is None:
        return torch.bfloat16 if parse_device(device).type == "cuda" else torch.float32
    if name not in DTYPES:
        raise ValueError(complaint("dtype", repr(name), f"one of {', '.join(DTYPES)}", "Pass --dtype float32"))
    return DTYPES[name]


def quiet_transformers() -> None:
    """Keep transformers from writing between our lines."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hub_logging.set_verbosity_error()  # it reports every attempt to reach the hub


@contextlib.contextmanager
def progress_bar() -> Iterator[Any]:
    """Show the current step and how much is done on a terminal's standard error, and nothing elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err_console, transient=True, disable=not err_console.is_terminal) as progress:
        task = progress.add_task("starting", total=1.0)
        yield lambda description, done: progress.update(task, description=description, completed=done)
