"""The folder of a run: one run has it to itself, and its result is there whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from laco_kernels.errors import complaint
from laco_kernels.train.checkpoint import sync, write_whole
from laco_kernels.train.recipe import to_yaml
from laco_kernels.train.strict import plain, read_yaml

if TYPE_CHECKING:
    from collections.abc import Callable

    from laco_kernels.train.recipe import Recipe

#: The recipe of the run that a folder belongs to, complete; running it again repeats the run.
RECORD = "recipe.yaml"
#: Where a result is written before it is in its place.
PART = "result.part"
#: What makes a folder a model or an adapter for ``from_pretrained``: it comes last.
LAST = ("config.json", "adapter_config.json")
#: What an earlier result may have that a later one has not, as another number of weight files, and would be read beside it.
STALE = ("adapter_config.json", "adapter_model*", "config.json", "model*.safetensors", "model.safetensors.index.json")
#: What may change when a run goes on: what is said and kept, and how it is computed, where that is the Trainer's to know.
CHANGEABLE = (
    "train.gradient_checkpointing",
    "train.log_every",
    "train.save_every",
    "train.keep",
    "train.non_finite_budget",
    "train.report_to",
    "data.cap",
    "lora.merge",
    "trainer",
)


def check_output(recipe: Recipe, resume: bool) -> None:
    """Refuse a folder that has anything in it, or, to resume, the things of another run. Nothing is written.

    Raises:
        ValueError: the folder is not this run's.
        OSError: it cannot be read.
    """
    folder = recipe.output
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not resume:
        remedy = "Pass --resume to go on with that run, or --set output=... for another folder"
        raise ValueError(complaint("output", f"{str(folder)!r}, which has things in it", "an empty folder", remedy))
    if not (folder / RECORD).exists():
        given = f"{str(folder)!r}, which has no {RECORD}"
        raise ValueError(complaint("output", given, "a folder of this command", "Pass --set output=... for another folder"))
    before, now = _entries(read_yaml(folder / RECORD)), _entries(plain(recipe))
    names = dict.fromkeys([*before, *now])
    changed = [name for name in names if before.get(name) != now.get(name) and not _may_change(name)]
    if changed:
        given = ", ".join(f"{name} {now.get(name)} instead of {before.get(name)}" for name in changed)
        remedy = f"Run laco train {folder / RECORD} --resume, or begin anew in another folder"
        raise ValueError(complaint("--resume", given, f"the recipe in {folder}", remedy))


def claim(recipe: Recipe) -> None:
    """Make the folder this run's, by leaving its recipe there.

    Raises:
        OSError: it cannot be written to.
    """
    write_whole(recipe.output / RECORD, to_yaml(recipe).encode())


def write_result(folder: Path, write: Callable[[Path], None]) -> None:
    """Have a result written beside its place, bring it to the disk, and move it into ``folder``, what names it last.

    Whatever stops a process before it is on the disk, an earlier result is as it was. Of that nothing stays that would be read
    beside this one, and what names it goes first: a folder that is half moved is no model.

    Args:
        folder: there is one already.
        write: writes into the folder that it is given.

    Raises:
        OSError: a full disk, a folder that cannot be written to.
    """
    part = folder / PART
    try:
        if part.exists():  # of a process that was killed
            shutil.rmtree(part)
        part.mkdir()
        write(part)
        for file in part.rglob("*"):
            sync(file)
    except Exception as error:
        shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, OSError) or os.strerror(errno.ENOSPC) not in str(error):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error  # safetensors has an error of its own
    new = {file.name for file in part.iterdir()}
    stale = [file for pattern in STALE for file in folder.glob(pattern) if file.name not in new or file.name in LAST]
    for file in sorted(stale, key=lambda file: file.name not in LAST):
        file.unlink()
    for file in sorted(part.iterdir(), key=lambda file: file.name in LAST):
        target = folder / file.name
        if target.is_dir():
            shutil.rmtree(target)
        file.replace(target)
    part.rmdir()
    sync(folder)


def _entries(content: dict[str, Any], key: str = "") -> dict[str, Any]:
    """Return the values of all sections by dotted key."""
    found: dict[str, Any] = {}
    for name, value in content.items():
        place = f"{key}.{name}" if key else name
        found.update(_entries(value, place) if isinstance(value, dict) else {place: value})
    return found


def _may_change(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in CHANGEABLE)
