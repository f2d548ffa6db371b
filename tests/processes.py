"""Checks that take two processes which compute together."""

import faulthandler
import json
import os
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD = 2


def work(rank, folder, checks):
    faulthandler.enable()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))
    failures = {}
    for check in checks:
        try:
            check(rank)
        except Exception:
            failures[check.__name__] = traceback.format_exc()
    (folder / f"{rank}.json").write_text(json.dumps(failures))
    dist.barrier()  # leave together
    dist.destroy_process_group()
    os._exit(0)  # everything is on record; the interpreter's own end is where gloo's threads can still abort a process


def run_together(checks, folder):
    """Run all checks in one pair of processes, as starting them takes longer than the checks; return failures by rank."""
    mp.spawn(work, (folder, checks), WORLD)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]
