"""Two processes that train together: ``torchrun --nproc-per-node 2 -m tests.train.together FOLDER``.

What they find wrong is written as ``FOLDER/<rank>.json``; what they leave behind is looked at by the test that started them.
"""

import json
import os
import sys
import traceback
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch

from .runs import data, model, trainer

STEPS = 3
FSDP = {"fsdp": True}


def made():
    return model().double()


def common(folder, batch, **options):
    """Runs whose results are equal however many processes share them."""
    settings = {"max_steps": STEPS, "per_device_train_batch_size": batch, "save_steps": 2} | options
    return trainer(folder, json.loads((folder / "samples.json").read_text()), made=made(), **settings)


def prepare(folder):
    samples = data(folder, 16)
    (folder / "samples.json").write_text(json.dumps(samples))


def ddp(folder):
    trained = common(folder, 2, out="ddp")
    trained.train()


def fsdp(folder):
    trained = common(folder, 2, out="fsdp", **FSDP)
    trained.train()
    from torch.distributed.fsdp import FSDPModule

    print([n for n, m in trained.model.named_modules() if isinstance(m, FSDPModule)])
    print({type(p) for p in trained.model.parameters()})


CHECKS = [ddp, fsdp]


def main(folder):
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    failures = {}
    for check in CHECKS:
        try:
            check(folder)
        except Exception:
            failures[check.__name__] = traceback.format_exc()
    (folder / f"{rank}.json").write_text(json.dumps(failures))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
