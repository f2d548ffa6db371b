"""Checkpoints: whole or not picked, whatever happens to processes, disks and files."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers.trainer_utils import get_last_checkpoint

from laco_kernels.train import checkpoint
from laco_kernels.train.checkpoint import (
    MANIFEST,
    CheckpointError,
    DamagedCheckpointError,
    begin,
    commit,
    latest,
    save,
    survey,
    verify,
)

from . import kills

ROOT = Path(__file__).parents[2]


def write(part):
    (part / "model.safetensors").write_bytes(bytes(range(256)) * 10)
    (part / "state").mkdir()
    (part / "state" / "rng.pth").write_bytes(b"random")
    (part / "empty").touch()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_was_written_is_there_with_its_manifest(tmp_path):
    path = save(tmp_path / "new" / "run", 20, write)
    assert path == tmp_path / "new" / "run" / "checkpoint-20"
    verify(path)
    assert latest(path.parent) == path
    manifest = json.loads((path / MANIFEST).read_text())
    assert manifest["step"] == 20
    assert manifest["files"]["state/rng.pth"]["size"] == 6
    assert manifest["files"].keys() == {"model.safetensors", "state/rng.pth", "empty"}
    assert get_last_checkpoint(path.parent) == str(path)  # as transformers' Trainer names them


def test_steps_are_numbers_and_the_newest_stay(tmp_path):
    for step in (8, 9, 10, 11):
        save(tmp_path, step, write, keep=2)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-11"]
    assert latest(tmp_path).name == "checkpoint-11"
    assert latest(tmp_path / "nothing") is None


def test_what_lies_beside_checkpoints_stays(tmp_path):
    for name in ("checkpoint-best", "checkpoint-3-old", "runs"):
        (tmp_path / name).mkdir()
    save(tmp_path, 4, write, keep=1)
    assert names(tmp_path) == ["checkpoint-3-old", "checkpoint-4", "checkpoint-best", "runs"]


def test_the_one_just_written_stays_although_others_carry_a_later_step(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step, write)
    (tmp_path / "checkpoint-30" / "empty").write_text("damaged")
    (tmp_path / "checkpoint-20" / "empty").write_text("damaged")
    assert latest(tmp_path).name == "checkpoint-10"
    save(tmp_path, 15, write, keep=1)
    assert names(tmp_path) == ["checkpoint-15", "checkpoint-20", "checkpoint-30"]
    assert latest(tmp_path).name == "checkpoint-15"
    save(tmp_path, 20, write, keep=2)
    assert latest(tmp_path).name == "checkpoint-20"


def flip(path):
    data = bytearray((path / "model.safetensors").read_bytes())
    data[1000] ^= 1
    (path / "model.safetensors").write_bytes(data)


DAMAGES = {
    "model.safetensors with another content": flip,
    "model.safetensors of 2559 bytes, not 2560": lambda path: os.truncate(path / "model.safetensors", 2559),
    "no empty": lambda path: (path / "empty").unlink(),
    "no state/rng.pth": lambda path: shutil.rmtree(path / "state"),
    "state/more.pth, which is not in the manifest": lambda path: (path / "state" / "more.pth").touch(),
    "no manifest.json": lambda path: (path / MANIFEST).unlink(),
    "a manifest.json that cannot be read": lambda path: os.truncate(path / MANIFEST, 40),
    "a manifest.json that cannot be read (ValueError: step 20)": lambda path: path.rename(path.with_name("checkpoint-30")),
    "is a link or a special file": lambda path: (path / "link").symlink_to("empty"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_never_picked(damage, tmp_path, caplog):
    good = save(tmp_path, 10, write)
    bad = save(tmp_path, 20, write)
    DAMAGES[damage](bad)
    bad = max(tmp_path.iterdir())
    assert bad != good
    with pytest.raises(DamagedCheckpointError, match=bad.name) as raised:
        verify(bad)
    assert damage in str(raised.value)
    assert latest(tmp_path) == good
    assert f"Passed over {bad}: " in caplog.text
    assert damage in caplog.text


def test_no_flipped_bit_of_a_manifest_makes_it_fit_other_files(tmp_path):
    path = save(tmp_path, 20, lambda part: (part / "a.bin").write_bytes(b"weights"))
    whole = (path / MANIFEST).read_bytes()
    meaning, passed = json.loads(whole), 0
    for position in range(len(whole)):
        data = bytearray(whole)
        data[position] ^= 1 << (position % 8)
        (path / MANIFEST).write_bytes(data)
        try:
            verify(path)
        except DamagedCheckpointError:
            continue
        passed += 1
        assert json.loads(data) == meaning
    assert passed < len(whole) // 10


def test_unfinished_ones_are_named_and_taken_away_by_the_next(tmp_path):
    save(tmp_path, 10, write)
    write(begin(tmp_path, 20))
    (tmp_path / "checkpoint-5.deleted").mkdir()
    found = survey(tmp_path)
    assert found.latest.name == "checkpoint-10"
    assert {path.name: reason.split(":")[0] for path, reason in found.passed_over.items()} == {
        "checkpoint-20.part": "incomplete",
        "checkpoint-5.deleted": "incomplete",
    }
    part = begin(tmp_path, 20)
    assert not any(part.iterdir())  # nothing of the one before
    write(part)
    assert commit(part).name == "checkpoint-20"
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-20"]


class KilledError(BaseException):
    """What nothing catches."""


CALLS = [(os, "fsync"), (Path, "rename"), (Path, "mkdir"), (shutil, "rmtree"), (os, "open")]


def die(monkeypatch, die_at):
    """Die instead of a call that changes the disk, after so many of them."""
    made = []

    def deadly(original):
        def call(*arguments, **options):
            if len(made) == die_at:
                raise KilledError
            made.append(original)
            return original(*arguments, **options)

        return call

    for owner, name in CALLS:
        monkeypatch.setattr(owner, name, deadly(getattr(owner, name)))


def again(part):
    write(part)
    (part / "generation").write_text("2")


@pytest.mark.parametrize("step", [20, 30])
def test_death_between_any_two_steps_loses_nothing(step, tmp_path, monkeypatch):
    """A new checkpoint, and one of a step that is there already: at any time one of the two is complete."""
    deaths = 0
    while True:
        folder = tmp_path / str(deaths)
        save(folder, 10, write)
        save(folder, 20, write)
        with monkeypatch.context() as patched:
            die(patched, deaths)
            try:
                save(folder, step, again, keep=1)
                break
            except KilledError:
                deaths += 1
        found = survey(folder)
        assert found.latest is not None
        assert found.latest.name in ("checkpoint-20", "checkpoint-20.replaced", "checkpoint-30")
        assert all("incomplete" in reason for reason in found.passed_over.values())
        after = save(folder, step + 1, write, keep=1)
        assert names(folder) == [after.name]
    assert deaths > 15
    assert names(folder) == [f"checkpoint-{step}"]


def test_all_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    order = []
    fsync, rename = os.fsync, Path.rename

    def sync(descriptor):
        order.append(Path(f"/proc/self/fd/{descriptor}").readlink().relative_to(tmp_path).as_posix())
        fsync(descriptor)

    def move(path, target):
        order.append(f"rename to {target.name}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "rename", move)
    save(tmp_path, 1, write)
    part = "checkpoint-1.part"
    written, closing = order[:3], order[3:]
    assert sorted(written) == [f"{part}/empty", f"{part}/model.safetensors", f"{part}/state/rng.pth"]
    assert closing == [f"{part}/{MANIFEST}", f"{part}/state", part, "rename to checkpoint-1", "."]


@pytest.mark.parametrize("times", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_processes_killed_while_they_save(times, tmp_path):
    command = [sys.executable, "-m", "tests.train.kills", str(tmp_path), str(times), "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["interrupted"] > times // 4, result  # else nothing was tried
    if times == 50:
        assert result["saved"] > 10


def full_disk(part):
    write(part)
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(part / "optimizer.pt"))


def test_a_full_disk_is_named_and_leaves_the_last_one_intact(tmp_path):
    save(tmp_path, 10, write)
    with pytest.raises(
        CheckpointError, match=r"checkpoint-20 in .*No space left on device.*; checkpoint-10 is as it was\. Free"
    ):
        save(tmp_path, 20, full_disk, keep=1)
    assert names(tmp_path) == ["checkpoint-10"]
    verify(tmp_path / "checkpoint-10")
    with pytest.raises(CheckpointError, match=r"could not be written .*; checkpoint-10 is as it was"):
        save(tmp_path, 10, full_disk)
    verify(tmp_path / "checkpoint-10")
    save(tmp_path, 20, write)


def test_a_disk_that_says_so_late_leaves_the_last_one_intact(tmp_path, monkeypatch):
    save(tmp_path, 10, write)
    fsync = os.fsync

    def full_at(failing):
        calls = []

        def full(descriptor):
            calls.append(descriptor)
            if len(calls) == failing:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(descriptor)

        return full

    for step in (10, 20):
        for failing in range(1, 8):
            monkeypatch.setattr(os, "fsync", full_at(failing))
            with pytest.raises(CheckpointError, match="No space left on device"):
                save(tmp_path, step, again)
            assert names(tmp_path) in (["checkpoint-10"], ["checkpoint-10", "checkpoint-20"])
            assert latest(tmp_path) is not None
    assert not survey(tmp_path).passed_over


def save_tensors(kind, part):
    tensors = {"weight": torch.arange(1 << 18, dtype=torch.float32)}
    if kind == "torch":
        torch.save(tensors, part / "optimizer.pt")
    else:
        save_file(tensors, part / "model.safetensors")


def limited(folder, kind):
    """In a process of its own: files may not grow beyond 64 KiB, which is how a quota looks."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
    try:
        save(folder, 20, lambda part: save_tensors(kind, part))
    except CheckpointError as error:
        print(error)


def unwritable(folder):
    """In a process of its own, without the rights of root."""
    os.chdir(folder)
    if os.geteuid() == 0:
        os.setegid(65534)
        os.seteuid(65534)
    try:
        save(Path(), 20, write)
    except CheckpointError as error:
        print(error)


def elsewhere(call):
    code = f"from pathlib import Path; from tests.train import test_checkpoint; test_checkpoint.{call}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("kind", ["torch", "safetensors"])
def test_files_that_may_not_grow(kind, tmp_path):
    save(tmp_path, 10, write)
    said = elsewhere(f"limited(Path({str(tmp_path)!r}), {kind!r})")
    assert "checkpoint: got checkpoint-20 in" in said
    assert "checkpoint-10 is as it was" in said
    assert names(tmp_path) == ["checkpoint-10"]
    verify(tmp_path / "checkpoint-10")


def test_an_unwritable_folder(tmp_path):
    save(tmp_path, 10, write)
    tmp_path.chmod(0o555)
    try:
        said = elsewhere(f"unwritable({str(tmp_path)!r})")
    finally:
        tmp_path.chmod(0o755)
    assert "checkpoint: got checkpoint-20 in ., which could not be written ([Errno 13] Permission denied" in said
    assert "Make the folder writable, or pass another one." in said
    verify(tmp_path / "checkpoint-10")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="there was none before"):
        save(tmp_path / "file" / "run", 1, write)


def test_whatever_is_raised_while_writing_is_kept(tmp_path):
    def fail(part):
        write(part)
        raise ZeroDivisionError("a mistake of the caller")

    with pytest.raises(CheckpointError, match=r"a mistake of the caller.*See the error it came from") as raised:
        save(tmp_path, 1, fail)
    assert isinstance(raised.value.__cause__, ZeroDivisionError)
    with pytest.raises(CheckpointError, match="nothing was written"):
        save(tmp_path, 1, lambda part: None)
    with pytest.raises(CheckpointError, match="is a link or a special file; write the file itself"):
        save(tmp_path, 1, lambda part: (part / "link").symlink_to("/etc/hostname"))
    assert names(tmp_path) == []


def test_old_ones_that_cannot_be_deleted_do_not_end_the_run(tmp_path, monkeypatch, caplog):
    save(tmp_path, 1, write)
    monkeypatch.setattr(checkpoint, "_delete", lambda path: (_ for _ in ()).throw(OSError("busy")))
    assert save(tmp_path, 2, write, keep=1).name == "checkpoint-2"
    assert "old checkpoints could not be deleted (busy)" in caplog.text


def test_steps_and_counts_are_looked_at_before_anything_is_written(tmp_path):
    for options in ({"step": -1}, {"step": 1, "keep": 0}):
        with pytest.raises(ValueError, match="expected an integer of at least"):
            save(tmp_path, write=write, **options)
    with pytest.raises(TypeError, match=r"step: got 1\.5"):
        save(tmp_path, 1.5, write)
    assert names(tmp_path) == []


def test_readers_meet_only_whole_checkpoints_while_others_come_and_go(tmp_path):
    kills.write(begin(tmp_path, 1), 1, 0)
    commit(tmp_path / "checkpoint-1.part")
    failures, ended = [], threading.Event()

    def read():
        while not ended.is_set():
            try:
                found = survey(tmp_path)
                assert found.latest is not None
            except Exception as error:
                failures.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for step in range(2, 30):
        save(tmp_path, step, lambda part: kills.write(part, step, 0), keep=1)  # noqa: B023
    ended.set()
    reader.join()
    assert not failures
