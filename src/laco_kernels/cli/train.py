"""``laco train``."""

from __future__ import annotations

import importlib.util
import logging
from typing import Annotated

import torch
import typer

from laco_kernels.cli.common import app, complain, err_console, out_console, progress_bar, quiet_transformers, usage_errors
from laco_kernels.errors import complaint

NEEDED = {"yaml": "pyyaml", "accelerate": "accelerate", "peft": "peft"}


@app.command()
def train(
    recipe: Annotated[str | None, typer.Argument(help="A YAML file, or a recipe of the package.")] = None,
    changes: Annotated[list[str] | None, typer.Option("--set", help="key=value, e.g. data.path=my.json.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the output folder.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")] = False,
    show: Annotated[bool, typer.Option("--show", help="Print the recipe's YAML, to copy it.")] = False,
    names: Annotated[bool, typer.Option("--list", help="List the recipes of the package.")] = False,
) -> None:
    """Train a model as a recipe says: laco train laco-stage1 --set data.path=my.json.

    Several GPUs: torchrun --nproc-per-node 8 -m laco_kernels.cli train ...
    """
    with usage_errors():
        require_extra("laco train")
        from laco_kernels.train.recipe import load_recipe, packaged

        if names:
            _list()
            return
        if recipe is None:
            remedy = "laco train --list names those of the package"
            raise ValueError(complaint("recipe", "nothing", "a YAML file or the name of a recipe", remedy))
        if show:
            known = packaged()
            if recipe not in known:
                raise ValueError(complaint("recipe", repr(recipe), f"one of {', '.join(known)}", "--show shows these"))
            print(known[recipe].read_text(encoding="utf-8"), end="")
            return
        loaded = load_recipe(recipe, changes or [])

        quiet_transformers()
        from laco_kernels.cli import train_view
        from laco_kernels.train import run

        for console in (out_console, err_console):
            console.quiet = not run.is_main()
        if not run.is_main():
            logging.getLogger("laco_kernels").setLevel(logging.CRITICAL)  # what the main process says, too
        with progress_bar() as step:
            prepared = run.prepare(loaded, resume, step)
    train_view.show(prepared)
    if dry_run:
        return

    from laco_kernels.train.checkpoint import CheckpointError, DamagedCheckpointError
    from laco_kernels.train.finite import NonFiniteError
    from laco_kernels.train.skipping import TooManySkippedError

    try:
        with train_view.progress(prepared.plan.steps, resume) as callback:
            folder = run.execute(prepared, resume, [callback])
    except (NonFiniteError, TooManySkippedError) as error:
        complain(str(error))
        raise typer.Exit(1) from None
    except torch.cuda.OutOfMemoryError as error:
        remedy = "Lower train.per_device_batch_size, or set train.gradient_checkpointing to true"
        complain(complaint("memory", str(error).splitlines()[0], "a model and a batch that fit the GPU", remedy))
        raise typer.Exit(1) from None
    except (CheckpointError, DamagedCheckpointError, OSError, ValueError, ImportError):
        with usage_errors():
            raise
    if torch.distributed.is_initialized():  # not after an error, where it would wait for the others
        torch.distributed.destroy_process_group()
    train_view.show_left_out(prepared)
    out_console.print(f"The model and its processor are in {folder}", markup=False, highlight=False, soft_wrap=True)


def require_extra(command: str) -> None:
    """Raise ``ModuleNotFoundError``, saying what to install, where something that training needs is missing."""
    import laco_kernels.hf  # noqa: F401 - says what to install where transformers is missing

    for module, package in NEEDED.items():
        if importlib.util.find_spec(module) is None:
            message = f"{command} needs {package}, which is not installed. Run: pip install 'laco_kernels[train]'"
            raise ModuleNotFoundError(message)


def _list() -> None:
    from rich.table import Table

    from laco_kernels.train.recipe import packaged, summary

    table = Table.grid(padding=(0, 2))
    for name, path in packaged().items():
        table.add_row(name, summary(path))
    out_console.print(table)
