"""Compiling ahead: the caches know what measuring compiles, and nothing that happens there ends a campaign."""

import functools
import os
import random
import time
from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters

from laco_kernels.bench import plan, warm
from laco_kernels.bench.op_cases import op_cases, tiny

CPU = torch.device("cpu")


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """Empty caches of Inductor, here and in the processes started."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    return tmp_path


def test_what_is_compiled_ahead_is_not_compiled_again():
    width = random.SystemRandom().randrange(16, 4096)  # that no run has compiled for before
    torch.use_deterministic_algorithms(False)  # as in the processes: this is part of what the caches know a program by
    shapes = [replace(case, hidden=width) for case in tiny(op_cases("float32")) if case.op == "strided_conv_gelu"]
    cases = {case.direction: case for case in shapes}
    units = [plan.op_unit(cases[name], CPU, variants=["eager", "compile"], rounds=1) for name in ("forward", "backward")]
    assert warm.warm([unit.compile for unit in units], 1, CPU, 300) == (2, 0)
    counters.clear()
    assert all(values["timings"] for unit in units for *_, values in unit.measure())
    assert counters["inductor"]["fxgraph_cache_hit"] == 3, "two forward passes and a backward pass"
    assert counters["inductor"]["fxgraph_cache_miss"] == 0


def test_max_autotune_is_not_compiled_ahead():
    (case, *_) = tiny(op_cases("float32"))
    assert plan.op_unit(case, CPU, autotune=True).compile is None
    assert plan.op_unit(case, CPU).compile is not None


def test_what_breaks_or_dies_breaks_nothing(caches):
    jobs = [functools.partial(int, "no number"), functools.partial(os._exit, 3), int]
    assert warm.warm(jobs, 2, CPU, 300) == (2, 1)


def test_what_takes_too_long_is_ended(caches):
    begin = time.monotonic()
    assert warm.warm([functools.partial(time.sleep, 600)], 1, CPU, 0.5) == (0, 0)
    assert time.monotonic() - begin < 60


def test_choices_made_among_other_processes_are_forgotten(caches):
    file, older = caches / "ab" / "x.best_config", caches / "ab" / "y.best_config"
    file.parent.mkdir()
    for path in (file, older):
        path.write_text("{}")
    os.utime(older, (0, 0))
    assert warm.warm([], 2, CPU, 5) == (0, 0)
    assert not file.exists()
    assert older.exists()


def test_only_a_gpu_has_processes_by_itself_and_a_short_budget_none():
    assert warm.processes(CPU) == 0
    assert 0 <= warm.processes(torch.device("cuda")) <= 14
    assert [warm.time_for(budget) for budget in (None, 3600, 300, 60, 0)] == [90, 90, 60, 0, 0]
