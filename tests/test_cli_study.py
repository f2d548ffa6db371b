"""``laco study`` through its runner."""

import json

import pytest

from .test_cli import laco


def study(folder, *arguments):
    fixed = ["--tower-steps", 1, "--jobs", 1, "--device", "cpu", "--seeds", 1, "--work", folder / "work"]
    return laco("study", *fixed, *arguments)


@pytest.fixture
def small(monkeypatch):
    """Few held-out pictures."""
    from laco_kernels.train import study as experiment

    settings = experiment.Settings
    monkeypatch.setattr(experiment, "Settings", lambda **changes: settings(batch=2, held_out=4, **changes))


def test_a_study_goes_on_where_it_stopped(tmp_path, small):
    first = study(tmp_path, "--steps", 2, "--only", "avg_pool")
    assert first.exit_code == 0, first.output
    assert "2 steps 2/2: avg_pool @1/4, seed 0: " in first.stderr
    arguments = ["--steps", "2,1", "--only", "avg_pool, laco", "--depths", "1/4,1", "--out", tmp_path / "out"]
    second = study(tmp_path, *arguments)
    assert second.exit_code == 0, second.output
    assert "2 steps: 2 of 6 runs are kept from before" in second.stderr
    assert "1 steps 6/6: " in second.stderr
    assert max(map(len, second.stdout.splitlines())) <= 80
    assert "What the residual adds to laco at 1/4: " in " ".join(second.stdout.split())
    result = json.loads((tmp_path / "out" / "study-tiny-tower-ratio2.json").read_text())
    assert result["steps"] == [1, 2]
    assert [(row["compressor"], row["residual"], row["depth"]) for row in result["rows"]] == [
        (None, "-", None),
        ("avg_pool", "-", "1/4"),
        *(("laco", residual, depth) for residual in ("on", "off") for depth in ("1/4", "1")),
    ]
    command = "laco study --steps 2,1 --seeds 1 --tower-steps 1 --depths 1/4,1 --only avg_pool,laco"
    assert result["command"] == command
    third = study(tmp_path, *arguments[:-2], "--json")
    assert "seed 0" not in third.stderr
    assert json.loads(third.stdout)["rows"] == result["rows"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "lacoo"], "only: got 'lacoo', expected one of laco"),
        (["--depths", "2"], "depths: got '2', expected fractions in (0, 1]"),
        (["--steps", "50,x"], "steps: got 'x', expected positive integers"),
        (["--out", "/proc/nowhere"], "out: got '/proc/nowhere'"),
        (["--work", "/proc/nowhere"], "work: got '/proc/nowhere'"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(tmp_path, arguments, message):
    done = study(tmp_path, *arguments)
    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert not (tmp_path / "work").exists()
