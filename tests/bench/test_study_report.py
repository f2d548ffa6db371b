"""How the study is told: figures by hand, sentences whichever way it falls, files."""

import dataclasses
import json

import pytest
import torch
from PIL import Image
from rich.console import Console

from laco_kernels.bench import study_report
from laco_kernels.bench.environment import environment
from laco_kernels.bench.study import Share, summarise
from laco_kernels.train.study import DEPTHS, NONE, ON, Outcome, Settings, list_arms
from laco_kernels.train.study_runs import Run
from laco_kernels.train.tiny_tower import TinyTower


def made_up(gains, names=("laco", "pixel_shuffle", "avg_pool"), seeds=3, depths=DEPTHS):
    """A result in which the residual gains ``gains[i]`` after the i-th number of steps, and seeds differ by 0.01."""
    settings, found = [Settings(steps=50 * 8**i) for i in range(len(gains))], []
    for i, gain in enumerate(gains):
        found.append([])
        for arm in list_arms(names, depths):
            for seed in range(seeds):
                on, deep = arm.residual == ON, (arm.layer or 12) / 100
                after = 0.4 + 0.1 * i + gain * on + deep + 0.01 * seed * (1 + on)
                outcome = Outcome(0.2 if on else 0.1, after, 1.0, 10.0 * (arm.layer or 12), 64, "")
                found[-1].append(Run(arm, seed, outcome))
    tower = TinyTower(None, None, 0.85, 1500, 0)
    return summarise(found, settings, tower, command="laco study", device="cpu", environment=environment(torch.device("cpu")))


def test_figures_by_hand():
    result = made_up([0.2, -0.1])
    row = result.find("laco", ON)
    assert row.after[0].by_seed == pytest.approx([0.63, 0.65, 0.67])
    assert (row.after[0].mean, row.after[0].std) == pytest.approx((0.65, 0.02))
    assert row.before == Share(pytest.approx(0.2), 0.0, [0.2] * 3)
    assert (row.token_layers, row.seconds) == ((3 * 64 + 9 * 16) / (12 * 64), [30.0, 30.0])
    assert result.steps == [50, 400]
    assert result.find(None, NONE).depth is None
    assert len(result.rows) == 14


def test_findings_say_what_is_so_whichever_way_it_falls():
    lines = study_report.findings(made_up([0.2, -0.1]))
    assert lines[0].startswith(
        "The uncompressed tower, fine-tuned alike, reads 10.0±0.0 % before, 53.0±1.0 after 50, 63.0±1.0 "
    )
    assert lines[1] == (
        "What the residual adds to laco at 1/4: +10.0±0.0 points before, +21.0±1.0 (better with 3 of 3 seeds) after 50, "
        "-9.0±1.0 (better with 0 of 3 seeds) after 400 steps."
    )
    assert (
        "After 50 steps: LaCo at 1/4 reads 65.0±2.0 %, in points +21.0±1.0 to laco off, +21.0±1.0 to pixel_shuffle off, "
        "+21.0±1.0 to avg_pool: with every seed it is above 3 of the 3 that are free of a residual (paper: far above them)."
    ) in lines
    assert any(line.startswith("After 400 steps: LaCo") and "above 0 of the 3 that are free" in line for line in lines)
    assert (
        "After 50 steps: LaCo with the residual reads, in per cent by depth, 63.0±2.0 @1/12, 64.0±2.0 @1/6, 65.0±2.0 @1/4, "
        "68.0±2.0 @1/2, 74.0±2.0 @1: more at 4 of 4 steps deeper, and @1/12 takes 8% of the training time of @1 "
        "(paper: depth trades accuracy for time)."
    ) in lines
    assert any(
        line.endswith("lead at 1/4 is, in points, +0.0±0.0 to pixel_shuffle (better with 0 of 3 seeds).") for line in lines
    )


def test_what_was_not_run_is_not_told():
    result = made_up([0.1], names=["avg_pool"], seeds=1)
    assert [row.compressor for row in result.rows] == [None, "avg_pool"]
    assert len(study_report.findings(result)) == 1
    without = dataclasses.replace(result, rows=result.rows[1:])
    assert study_report.findings(without) == []
    assert "avg_pool is LaCo's residual alone" in study_report.legend(result)


def test_the_table_fits_into_80_columns():
    console = Console(width=80, record=True)
    console.print(study_report.table(made_up([0.2, 0.1])))
    text = console.export_text()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("pixel_shuffle") == 2


def test_files_hold_everything_and_overwrite_nothing(tmp_path):
    result = made_up([0.2, -0.1])
    paths = study_report.write(result, tmp_path)
    assert [path.name for path in paths] == [f"study-tiny-tower-ratio2.{suffix}" for suffix in ("json", "md", "png")]
    assert json.loads(paths[0].read_text()) == json.loads(json.dumps(result.to_dict()))
    markdown = paths[1].read_text()
    assert "| laco | on | @1/4 | 44% | 20.0±0.0 | 65.0±2.0 | 45.0±2.0 | 30 |" in markdown
    assert "`laco study`" in markdown
    assert all(f"* {line}" in markdown for line in study_report.findings(result))
    with Image.open(paths[2]) as picture:
        assert picture.size[0] > 1000
    assert [path.stem for path in study_report.write(made_up([0.1], ["laco"]), tmp_path)] == ["study-tiny-tower-ratio2-2"] * 3
