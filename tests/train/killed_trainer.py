"""A trainer killed at random moments: ``python -m tests.train.killed_trainer FOLDER TIMES SEED``.

Processes are forked from one that has imported everything. Each resumes where the one before was killed, which is checked
against what was saved before; the last one ends, and has to have come to what a run that was never killed comes to.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers import TrainerCallback

from laco_kernels.train.checkpoint import MANIFEST, latest, survey

from .runs import model, trainer

STEPS = 24


class Tell(TrainerCallback):
    """Tells which checkpoints were saved."""

    def __init__(self, writer):
        self.writer = writer

    def on_save(self, args, state, control, **_):
        os.write(self.writer, b"%d\n" % state.global_step)


def run(folder, out, writer=None):
    callbacks = [] if writer is None else [Tell(writer)]
    options = {"max_steps": STEPS, "save_steps": 1, "out": out, "run": {"callbacks": callbacks}}
    made = trainer(folder, made=model(dropout=0.3), **options)
    made.train(resume_from_checkpoint=latest(folder / out))


def forked(work):
    """A child that does this and ends, and what it writes."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        code = 1
        try:
            os.close(reader)
            work(writer)
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    return child, reader


def main(folder, times, seed):
    torch.set_num_threads(1)
    chance = random.Random(seed)
    child, reader = forked(lambda _: run(folder, "whole"))
    began = time.monotonic()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    length = time.monotonic() - began
    os.close(reader)
    done, kills, interrupted = 0, 0, 0
    while kills < times:
        child, reader = forked(lambda writer: run(folder, "killed", writer))
        time.sleep(chance.uniform(0.1, 0.6) * length)
        os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with os.fdopen(reader) as lines:
            done = max([done, *map(int, lines)])
        found = survey(folder / "killed")
        assert all("incomplete" in reason for reason in found.passed_over.values()), found
        interrupted += len(found.passed_over)
        if done:
            assert int(found.latest.name.split("-")[1].split(".")[0]) >= done, f"{done} was saved, {found.latest} is the latest"
        if code == 0:  # it came to its end: what follows begins anew
            break
        assert code == -signal.SIGKILL, code
        kills += 1
    child, reader = forked(lambda writer: run(folder, "killed", writer))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    os.close(reader)
    one, other = (folder / out / f"checkpoint-{STEPS}" for out in ("whole", "killed"))
    names = {path.name for path in one.iterdir()} - {MANIFEST, "run.json", "trainer_state.json"}
    equal = all((one / name).read_bytes() == (other / name).read_bytes() for name in names)
    print(json.dumps({"kills": kills, "interrupted": interrupted, "equal": equal and len(names) > 8}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
