"""``laco bench all``: the most telling first, under a budget, resumed and never redone."""

import json

import pytest
import torch

from laco_kernels.bench import campaign, llava_units, plan, vec_units
from laco_kernels.bench.campaign import Unit, furthest, run
from laco_kernels.bench.page import vec as page_vec
from laco_kernels.bench.results import Results, Row
from tests.bench.rows import GPU, op_row

CPU = torch.device("cpu")
VALUES = {"ok": True, "reason": None, "timings": {}}


class Clock:
    def __init__(self):
        self.time = 0.0

    def __call__(self):
        return self.time


def units(clock, *costs, suite="ops", log=None):
    def unit(i, cost):
        def measure():
            if log is not None:
                log.append(i)
            clock.time += cost
            return [({"case": i}, "eager", VALUES)]

        return Unit(f"unit {i}", suite, ({"case": i},), measure, ("eager",))

    return [unit(i, cost) for i, cost in enumerate(costs)]


def opened(folder, commit="c"):
    results = Results.open(folder)
    return results, results.begin({"commit": commit, "date": "2026-01-01"})


def test_a_budget_ends_before_a_unit_that_would_not_fit(tmp_path):
    clock = Clock()
    results, name = opened(tmp_path)
    report = run(units(clock, 10, 30, 10, 10), results, name, CPU, budget=65, now=clock)
    # The third could take 30 as the second did: 40 + 30 > 65.
    assert report.measured == ["unit 0", "unit 1"]
    assert report.left == ["unit 2", "unit 3"]
    assert len(Results.open(tmp_path).rows) == 2


def test_what_was_measured_is_skipped_and_a_killed_run_goes_on(tmp_path):
    clock, log = Clock(), []
    results, name = opened(tmp_path)

    def killed():
        raise KeyboardInterrupt

    first = units(clock, 1, 1, log=log)
    with pytest.raises(KeyboardInterrupt):
        run([first[0], Unit("x", "ops", ({"case": "x"},), killed, ("eager",)), first[1]], results, name, CPU, now=clock)
    assert len(Results.open(tmp_path).rows) == 1
    results, name = opened(tmp_path)
    report = run(first, results, name, CPU, now=clock)
    assert (report.skipped, report.measured, log) == (["unit 0"], ["unit 1"], [0, 1])


@pytest.mark.parametrize("commit", ["d", "c*"])
def test_another_commit_and_a_changed_checkout_are_measured_anew(tmp_path, commit):
    clock = Clock()
    for version in ("c", commit, commit):
        results, name = opened(tmp_path, version)
        report = run(units(clock, 1), results, name, CPU, now=clock)
    assert report.skipped == ([] if commit.endswith("*") else ["unit 0"])
    assert {row.commit for row in results.rows.values()} == {"c", commit}


def test_a_unit_that_breaks_is_named_and_the_rest_goes_on(tmp_path):
    def broken():
        raise RuntimeError("no kernel image\nfor this device")

    clock = Clock()
    results, name = opened(tmp_path)
    todo = [Unit("bad", "ops", ({"case": "bad"},), broken, ("eager",)), *units(clock, 1)]
    report = run(todo, results, name, CPU, now=clock)
    assert report.failed == {"bad": "RuntimeError: no kernel image"}
    assert report.measured == ["unit 0"]


def test_a_device_that_no_longer_answers_ends_the_run(tmp_path, monkeypatch):
    def broken():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(campaign, "answers", lambda _: False)
    clock = Clock()
    results, name = opened(tmp_path)
    report = run(
        [Unit("bad", "ops", ({"case": "bad"},), broken, ("eager",)), *units(clock, 1, 1)], results, name, CPU, now=clock
    )
    assert report.left == ["unit 0", "unit 1"]
    assert report.lost
    (row,) = Results.open(tmp_path).rows.values()
    assert row.values["reason"].startswith("RuntimeError: CUDA error: an illegal")
    again = run(
        [Unit("bad", "ops", ({"case": "bad"},), broken, ("eager",)), *units(clock, 1, 1)], results, name, CPU, now=clock
    )
    assert again.skipped == ["bad"], "a new run goes on behind it"


def test_the_plan_begins_with_the_goals_then_encoders_then_what_runs_in_them():
    units = plan.plan(CPU, "bfloat16")
    suites = [unit.suite for unit in units]
    assert suites[:10] == ["ops"] * 10
    assert suites[10:14] == ["generate", "generate", "step", "step"], "whole models with a goal"
    assert suites[14:21] == ["vec"] * 7
    assert suites[21:77] == ["tower"] * 56
    assert [unit.cases[0]["layout"] for unit in units[77:107]] == 3 * [*["block"] * 9, "raster"]
    assert "backward" in {unit.cases[0]["direction"] for unit in units[107:121]}, "what the selection needs comes early"
    assert suites[121:134] == ["sweep"] * 13
    kinds = [unit.kind for unit in units]
    assert kinds.index("max-autotune") == kinds.index("vec compile") + 1 == len(units) - 10, "what eats the budget comes last"
    names = [unit.name for unit in units]
    assert len(set(names)) == len(names) == 168 + 27 + 10 + 8 + 13 + 56 + 4
    assert suites.count("sweep") == 13


def test_a_training_step_has_rows_and_a_table_of_its_own():
    run_ = vec_units.Run("aimv2-l-336", 16, ("eager", "fused", "graphs"), training=True)
    unit = vec_units._unit(run_, CPU, "float32", True, 1, 0)
    assert unit.variants == ("eager", "fused"), "graphs need a GPU"
    measured = unit.measure()
    assert [case for case, *_ in measured[::2]] == list(unit.cases)
    assert {(case["step"], case["depth"], variant) for case, variant, _ in measured} == {
        ("training", depth, variant) for depth in ("1/4", "1") for variant in unit.variants
    }
    assert all(values["ok"] and values["timings"]["wall"]["rounds"] == 1 for *_, values in measured)
    rows = [
        Row("vec", {**case, **extra}, variant, values, "e", None)
        for case, variant, values in measured
        for extra in ({}, {"step": ""})
    ]
    assert [key[0] for key in page_vec.runs(rows)] == ["tiny-aimv2-l-336", "tiny-aimv2-l-336, training step"]


def test_whole_models_have_rows_of_every_model_and_mode():
    units = llava_units.llava_units(CPU, "float32", small=True, rounds=1, seconds=0)
    assert [(unit.suite, unit.kind) for unit in units] == [("tiny", "generate laco"), ("tiny", "step stf")]
    for unit in units:
        measured = unit.measure()
        assert {(str(case), variant) for case, variant, _ in measured} == {
            (str(case), variant) for case in unit.cases for variant in unit.variants
        }
        results = Results(None)
        results._take({"id": "e", "environment": {}})
        for case, variant, values in measured:  # refuses what is no row
            results._take(vars(Row("generate", case, variant, json.loads(json.dumps(values)), "e", None)))
        assert all(values["ok"] and values["goal"] is None and case["reduced"] for case, _, values in measured)
    assert set(measured[0][2]["timings"]) == {"wall", "forward", "backward", "update"}


def test_a_model_that_does_not_fit_keeps_that_as_its_rows_reason(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("no room\nfor details")

    monkeypatch.setattr(llava_units.generate, "measure_generate", full)
    unit = llava_units.llava_units(CPU, "float32", small=True, rounds=1, seconds=0)[0]
    measured = unit.measure()
    assert [values["reason"] for *_, values in measured] == ["does not fit: no room"] * 4
    assert {variant for _, variant, _ in measured} == set(unit.variants)


def test_on_a_gpu_whole_models_with_a_goal_come_first_and_each_run_once():
    goals, others = (
        llava_units.llava_units(torch.device("cuda"), "bfloat16", small=False, rounds=None, seconds=8, goals=goals)
        for goals in (True, False)
    )
    assert len(goals) == 4
    assert {case["llm"] for unit in others for case in unit.cases} == {
        "qwen2.5-0.5b",
        "vicuna-7b",
        "vicuna-13b",
        "llama-3.1-8b",
    }
    assert len({unit.name for unit in (*goals, *others)}) == len(goals) + len(others)
    assert not any("reduced" in case for unit in (*goals, *others) for case in unit.cases)
    assert [unit.kind.endswith("compile") for unit in others] == [False] * 7 + [True] * 2


def test_the_cases_furthest_from_their_goal_are_found():
    results = Results(None)
    name = results.begin(GPU)
    goal = {"ratio": 2.0, "against": "compile"}
    results.add(
        [
            op_row("triton", 40, environment=name, goal=goal),  # 2.5 of 2
            op_row("composite", 90, environment=name, goal=goal),
            op_row("triton", 80, environment=name, goal=goal, batch=4),  # 1.25 of 2
            op_row("eager", 10, environment=name, goal=goal, batch=4),
            op_row("triton", 10, environment=name, batch=16),
        ]
    )
    found = [(row.variant, row.case["batch"], share) for row, share in furthest(results.latest())]
    assert found == [("triton", 4, 0.625), ("triton", 1, 1.25)]


def test_an_environment_learns_the_clocks_of_the_end(tmp_path, monkeypatch):
    clock = Clock()
    results, name = opened(tmp_path)
    monkeypatch.setattr(campaign, "clocks", lambda _: {"sm_mhz": 1980.0})
    run(units(clock, 1), results, name, CPU, now=clock)
    assert Results.open(tmp_path).environments[name]["clocks_after"] == {"sm_mhz": 1980.0}
