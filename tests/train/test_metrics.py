"""What a run writes down."""

import errno
import json
import math
import os

import pytest

from laco_kernels.train.loss_picture import draw_loss
from laco_kernels.train.metrics import Ledger, MetricsFile


def lines(*steps):
    return [{"step": step, "loss": 1.5 / step} for step in steps]


@pytest.fixture
def file(tmp_path):
    made = MetricsFile(tmp_path / "metrics.jsonl")
    for line in lines(1, 2, 3):
        made.write(line)
    return made


def test_going_on_drops_what_came_after_and_what_is_torn(file):
    with file.path.open("a") as stream:
        stream.write('{"step": 4, "lo')
    assert file.read() == lines(1, 2, 3)
    file.resume(2)
    file.write({"step": 3, "loss": 7.0})
    assert file.read() == [*lines(1, 2), {"step": 3, "loss": 7.0}]


def test_the_old_file_stays_until_the_new_one_is_written(file, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        file.resume(1)
    assert file.read() == lines(1, 2, 3)


def test_another_runs_lines_are_set_aside(file):
    for number in (1, 2):
        file.begin()
        assert file.read() == []
        file.write({"step": number, "loss": 0.0})
    assert MetricsFile(file.path.with_name("metrics.jsonl.1")).read() == lines(1, 2, 3)
    assert MetricsFile(file.path.with_name("metrics.jsonl.2")).read() == [{"step": 1, "loss": 0.0}]


def test_what_is_no_number_is_null_and_never_0(file):
    file.write({"step": 4, "loss": math.nan, "lr": {"llm": math.inf}})
    assert file.path.read_text().splitlines()[-1] == '{"step": 4, "loss": null, "lr": {"llm": null}}'


def test_a_file_that_cannot_be_written_to(tmp_path):
    with pytest.raises(
        OSError, match=r"metrics: got .*could not be written to \(.*\), expected a place for another line\. Free"
    ):
        MetricsFile(tmp_path / "missing" / "metrics.jsonl").write({"step": 1})


def test_a_ledger_goes_on_from_what_a_checkpoint_keeps():
    ledger = Ledger()
    for loss in (0.1, 0.2, 0.7):
        ledger.count(tokens=10, samples=2)
        ledger.add(loss)
    assert ledger.close_window()[0] == pytest.approx(1.0 / 3)
    assert ledger.close_window()[0] is None
    ledger.add(0.3)
    again = Ledger(**json.loads(json.dumps(ledger.state_dict())))
    again.add(0.4)
    assert again.close_window()[0] == pytest.approx(0.35)
    assert (again.steps, again.tokens, again.samples) == (5, 30, 6)
    assert again.loss == pytest.approx(1.7)
    assert again.seconds >= ledger.seconds


def test_a_picture_of_losses_and_of_none(tmp_path):
    for name, drawn in (("many", lines(*range(1, 200))), ("none", []), ("null", [{"step": 1, "loss": None}])):
        draw_loss(drawn, tmp_path / f"{name}.png", "what was trained")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
