"""Processes killed while they save checkpoints: ``python -m tests.train.kills FOLDER TIMES SEED``.

A process saves one checkpoint after the other, some of them twice; SIGKILL ends it at a random moment; the next one resumes
from the latest complete checkpoint. Prints what happened as JSON, and fails where a checkpoint is not what was saved. The
processes are forked from one that has imported everything, so that a kill costs no import.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from laco_kernels.train.checkpoint import latest, save, survey

KEEP = 2


def content(step, generation):
    """The files of a checkpoint, so that half of one, or of two, is seen."""
    chance = random.Random(f"{step} {generation}")
    sizes = {"model.safetensors": 400_000, "optimizer.pt": 800_000, "trainer_state.json": 900, "shards/0/random.pth": 5000}
    return {name: chance.randbytes(chance.randrange(size)) for name, size in sizes.items()} | {"generation": b"%d" % generation}


def write(folder, step, generation):
    for name, data in content(step, generation).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with (folder / name).open("wb") as file:
            for start in range(0, len(data), 100_000):
                file.write(data[start : start + 100_000])
                file.flush()


def read(path):
    """The step and the generation that a checkpoint has, after a comparison of all its bytes."""
    step, generation = int(path.name.split("-")[1].split(".")[0]), int((path / "generation").read_bytes())
    found = {name: (path / name).read_bytes() for name in content(step, generation)}
    assert found == content(step, generation), path
    return step, generation


def run(folder, acknowledged):
    """Resume, and save until killed; every save that returned is told to the parent."""
    path = latest(folder)
    step, generation = (0, 0) if path is None else read(path)
    while True:
        again = path is not None and random.random() < 0.3  # as a Trainer saves at the end of an epoch and of the run
        step, generation = (step, generation + 1) if again else (step + 1, 0)
        path = save(folder, step, lambda part: write(part, step, generation), keep=KEEP)  # noqa: B023
        os.write(acknowledged, b"%d %d\n" % (step, generation))


def main(folder, times, seed):
    chance = random.Random(seed)
    done, interrupted, states = (0, -1), 0, {}
    for _ in range(times):
        reader, writer = os.pipe()
        if (child := os.fork()) == 0:
            try:
                random.seed(chance.random())
                run(folder, writer)
            finally:
                os._exit(1)
        os.close(writer)
        time.sleep(chance.uniform(0, 0.25))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, "the process ended by itself"
        with os.fdopen(reader) as lines:
            done = max([done, *(tuple(map(int, line.split())) for line in lines)])
        found = survey(folder)
        for path, reason in found.passed_over.items():
            assert "incomplete" in reason, (path, reason)  # nothing that was completed is ever damaged
            interrupted += 1
            states[path.suffix] = states.get(path.suffix, 0) + 1
        if done != (0, -1):
            assert found.latest is not None, f"{done} was saved and is lost"
            assert read(found.latest) >= done, f"{done} was saved, {found.latest} is the latest"
    print(json.dumps({"saved": done[0], "interrupted": interrupted, "states": states}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
