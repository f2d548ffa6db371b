"""Checkpoints that are whole or are not picked: :func:`save`, :func:`latest`, :func:`verify`.

A checkpoint is written beside its place, as ``checkpoint-<step>.part``. Its files are brought to the disk, then a manifest with
their sizes and SHA-256, and only then is the folder renamed to ``checkpoint-<step>``. Whatever stops a process in between,
what carries that name is complete; what was damaged later does not fit its manifest. Older checkpoints are deleted only when
the new one is in its place. One process writes to a folder at a time; any number may read.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from laco_kernels.errors import complaint
from laco_kernels.geometry import integer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT = 1
#: Being written, being replaced by another of the same step, being deleted.
PART, REPLACED, DELETED = ".part", ".replaced", ".deleted"
_NAME = re.compile(r"checkpoint-(\d+)(\.part|\.replaced|\.deleted)?")


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written; those before it are as they were."""


class DamagedCheckpointError(RuntimeError):
    """A checkpoint that is not what was written."""


@dataclass(frozen=True)
class Survey:
    """What lies in a folder of checkpoints.

    Args:
        latest: the complete checkpoint with the highest step, ``None`` where there is none.
        passed_over: what is newer or incomplete, and why it was not picked.
    """

    latest: Path | None
    passed_over: dict[Path, str]


def save(folder: Path, step: int, write: Callable[[Path], None], keep: int | None = None) -> Path:
    """Write a checkpoint, and return where it is once it is complete and on the disk.

    Args:
        folder: where checkpoints lie; made where there is none.
        step: the optimiser step, in the checkpoint's name. One of the same step is replaced.
        write: writes files into the folder it is given.
        keep: how many checkpoints stay, this one and the newest complete ones before it; all unless given.

    Raises:
        TypeError, ValueError: ``step`` is no integer from 0 on, or ``keep`` none from 1 on.
        CheckpointError: a full disk, a folder that cannot be written to, or whatever ``write`` raised. What was written is
            taken away, and the complete checkpoints are as they were.
    """
    if keep is not None:
        integer("keep", keep, 1)
    part = begin(folder, step)
    try:
        write(part)
    except Exception as error:  # safetensors and torch.save have errors of their own for a full disk
        raise give_up(part, error) from error
    return commit(part, keep)


def begin(folder: Path, step: int) -> Path:
    """Make and return the empty folder to write a checkpoint into, for :func:`commit` to complete.

    For several processes that write together: one begins, all write, and after a barrier one commits, or gives up where one
    of them failed (:func:`give_up`). Otherwise :func:`save`.

    Raises:
        TypeError, ValueError: ``step`` is no integer from 0 on.
        CheckpointError: the folder cannot be made.
    """
    part = Path(folder) / f"checkpoint-{integer('step', step, 0)}{PART}"
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        if part.exists():  # of a process that was killed
            shutil.rmtree(part)
        part.mkdir()
    except OSError as error:
        raise _failure(part, error) from error
    return part


def commit(part: Path, keep: int | None = None) -> Path:
    """Complete what was written into a folder of :func:`begin`, and return where it is now.

    Args:
        part: that folder.
        keep: as in :func:`save`.

    Raises:
        CheckpointError: it could not be brought to the disk, or contains something else than files and folders.
    """
    folder, final = part.parent, part.with_suffix("")
    replaced = final.with_name(final.name + REPLACED)
    try:
        _seal(part)
        if final.exists():
            # Without a name for this moment, a process killed between two renames would lose both.
            if replaced.exists():
                _delete(replaced)
            final.rename(replaced)
        part.rename(final)
        sync(folder)
    except Exception as error:
        if not final.exists() and replaced.exists():
            replaced.rename(final)
        raise give_up(part, error) from error
    # The checkpoint is safe: that something old stays where it is must not end the run.
    try:
        _clean(folder, final, keep)
    except OSError as error:
        logger.warning("%s: old checkpoints could not be deleted (%s).", folder, error)
    return final


def give_up(part: Path, error: Exception) -> CheckpointError:
    """Take away what was written into a folder of :func:`begin`, and return what to raise from ``error``."""
    shutil.rmtree(part, ignore_errors=True)
    return _failure(part, error)


def survey(folder: Path) -> Survey:
    """Find the latest complete checkpoint, reading every file of it, and say of all others why they were passed over.

    Those older than the latest complete one are not looked at. A folder that does not exist has no checkpoints.
    """
    passed_over: dict[Path, str] = {}
    candidates = []
    for path, step, suffix in _checkpoints(folder):
        if suffix in (PART, DELETED):
            what = "written" if suffix == PART else "deleted"
            passed_over[path] = f"incomplete: it is being {what}, or was when a process ended"
        else:
            candidates.append((step, suffix is None, path))
    for _, _, path in sorted(candidates, reverse=True):
        try:
            verify(path)
        except DamagedCheckpointError as error:
            if not path.exists():  # deleted since its name was read, hence there is a newer one
                return survey(folder)
            passed_over[path] = str(error)
        else:
            return Survey(path, passed_over)
    return Survey(None, passed_over)


def latest(folder: Path) -> Path | None:
    """Return the latest complete checkpoint, ``None`` where there is none; what is passed over is logged with the reason."""
    found = survey(folder)
    for path, reason in found.passed_over.items():
        logger.warning("Passed over %s: %s", path, reason)
    return found.latest


def verify(path: Path) -> None:
    """Read a checkpoint and compare every file with the manifest.

    Raises:
        DamagedCheckpointError: there is no manifest, or a file is missing, too many, of another size or with another content.
    """
    path = Path(path)
    expected = _read_manifest(path)
    try:
        found = dict(_files(path))
        missing, extra = sorted(expected.keys() - found), sorted(found.keys() - expected)
        if missing or extra:
            given = ", ".join(
                [*(f"no {name}" for name in missing), *(f"{name}, which is not in the manifest" for name in extra)]
            )
            raise _damage(path, given)
        for name, (size, _) in expected.items():
            if found[name].stat().st_size != size:
                raise _damage(path, f"{name} of {found[name].stat().st_size} bytes, not {size}")
        with ThreadPoolExecutor() as pool:  # hashing lets go of the interpreter
            hashes = pool.map(_hash, [found[name] for name in expected])
            for (name, (_, sha256)), digest in zip(expected.items(), hashes, strict=True):
                if digest != sha256:
                    raise _damage(path, f"{name} with another content")
    except OSError as error:  # also where it is deleted while it is read
        raise _damage(path, f"files that cannot be read ({error})") from error


def _seal(part: Path) -> None:
    """Bring all files to the disk, then the manifest."""
    files = dict(_files(part))
    if not files:
        raise ValueError("nothing was written")
    for file in files.values():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    with ThreadPoolExecutor() as pool:
        hashes = list(pool.map(_hash, files.values()))
    entries = {
        name: {"size": file.stat().st_size, "sha256": digest}
        for (name, file), digest in zip(files.items(), hashes, strict=True)
    }
    with (part / MANIFEST).open("x", encoding="utf-8") as stream:
        json.dump({"format": FORMAT, "step": _step(part), "files": entries}, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    for path, _, _ in os.walk(part, topdown=False):
        sync(Path(path))


def _read_manifest(path: Path) -> dict[str, tuple[int, str]]:
    try:
        content: Any = json.loads((path / MANIFEST).read_bytes())
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}, not {FORMAT}")
        if content["step"] != _step(path):
            raise ValueError(f"step {content['step']}")
        return {str(name): (entry["size"], entry["sha256"]) for name, entry in content["files"].items()}
    except FileNotFoundError as error:
        raise _damage(path, f"no {MANIFEST}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damage(path, f"a {MANIFEST} that cannot be read ({type(error).__name__}: {error})") from error


def _step(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    if match is None:
        remedy = "Pass what begin(folder, step) or latest(folder) returned"
        raise ValueError(complaint("checkpoint", repr(path.name), "checkpoint-<step>", remedy))
    return int(match[1])


def _files(path: Path) -> Iterator[tuple[str, Path]]:
    """Yield the files below a folder, but for the manifest, by their names in it."""
    for entry in sorted(path.rglob("*")):
        if entry.is_symlink() or not (entry.is_file() or entry.is_dir()):
            raise OSError(f"{entry} is a link or a special file; write the file itself")
        name = entry.relative_to(path).as_posix()
        if entry.is_file() and name != MANIFEST:
            yield name, entry


def _hash(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _checkpoints(folder: Path) -> Iterator[tuple[Path, int, str | None]]:
    """Yield what is a checkpoint by its name, with its step and what it ends with."""
    try:
        names = sorted(os.listdir(folder))  # noqa: PTH208, which wants an iterator that is read while names change
    except FileNotFoundError:
        return
    for name in names:
        if match := _NAME.fullmatch(name):
            yield Path(folder) / name, int(match[1]), match[2]


def _clean(folder: Path, new: Path, keep: int | None) -> None:
    """Delete what a complete checkpoint makes superfluous; one of a later step, which was not resumed from, stays."""
    older = []
    for path, step, suffix in _checkpoints(folder):
        if suffix in (PART, DELETED) or (suffix == REPLACED and path.with_suffix("").exists()):
            _delete(path)
        elif step < _step(new) and (path / MANIFEST).exists():
            older.append((step, path))
    if keep is not None:
        for _, path in sorted(older, reverse=True)[keep - 1 :]:
            _delete(path)


def _delete(path: Path) -> None:
    """Delete a checkpoint, first its name, so that it is never half a checkpoint."""
    doomed = path.with_name(path.name.partition(".")[0] + DELETED)
    if path != doomed:
        if doomed.exists():
            shutil.rmtree(doomed)
        path.rename(doomed)
    shutil.rmtree(doomed)


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):  # file systems that do not sync folders
            raise
    finally:
        os.close(descriptor)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file such that it is whole or as it was before, whatever stops this process; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def _damage(path: Path, given: str) -> DamagedCheckpointError:
    remedy = "Resume from another one, or restore the file from a copy"
    return DamagedCheckpointError(complaint(path.name, given, "the files as they were written", remedy))


def _failure(part: Path, error: Exception) -> CheckpointError:
    reason = str(error).strip() or type(error).__name__
    remedy = "Make the folder writable, or pass another one" if isinstance(error, OSError) else "See the error it came from"
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if getattr(error, "errno", None) in full or any(os.strerror(number) in reason for number in full):
        remedy = "Free some space, keep fewer checkpoints, or pass another folder"
    try:
        before = [(step, path.name) for path, step, suffix in _checkpoints(part.parent) if suffix is None]
    except OSError:
        before = []
    intact = f"{max(before)[1]} is as it was" if before else "there was none before"
    given = f"{part.with_suffix('').name} in {part.parent}, which could not be written ({reason})"
    return CheckpointError(complaint("checkpoint", given, f"a complete one; {intact}", remedy))
