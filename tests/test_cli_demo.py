"""``laco task`` and ``laco train-demo`` through their runner, as small as they get."""

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from laco_kernels.train.questions import TYPES

from .test_cli import laco

SMALL = {
    "samples": 16,
    "held_out": 16,
    "tower_steps": 2,
    "tower_batch": 2,
    "llm_steps": 2,
    "llm_batch": 2,
    "stage1_steps": 2,
    "stage2_steps": 2,
    "batch": 4,
}


def demo(out, *arguments, **changes):
    sizes = [word for name, value in (SMALL | changes).items() for word in ("--set", f"{name}={value}")]
    return laco("train-demo", "--out", out, *sizes, *arguments)


def test_the_demo_from_nothing_to_a_model_stopped_on_its_way(tmp_path, monkeypatch):
    from laco_kernels.train import demo as module

    out = tmp_path / "out"

    def full(self, *_, **__):
        if self.stage == "stage2":
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module._Tell, "on_step_end", full)
        stopped = demo(out)
        assert stopped.exit_code == 2
        assert "No space left on device" in stopped.stderr
    with monkeypatch.context() as patch:  # what is done is not done again
        for name in ("_drawn", "_tower", "_llm"):
            patch.setattr(module, name, lambda *_: pytest.fail("done again"))
        done = demo(out)
    assert done.exit_code == 0, done.output
    assert max(map(len, done.stdout.splitlines())) <= 80
    for kind in TYPES:
        assert f"\n{kind} " in done.stdout
    result = json.loads((out / "accuracy.json").read_text())
    assert list(result["stages"]) == ["stage1", "stage2"]
    assert [score["kind"] for score in result["stages"]["stage2"]] == list(TYPES)
    assert sum(score["asked"] for score in result["stages"]["stage2"]) >= 16
    assert [step["name"] for step in result["steps"]][:3] == ["task", "tower", "llm"]
    assert result["environment"]["torch"] == torch.__version__
    assert "| new word |" in (out / "accuracy.md").read_text()

    model, processor = (
        AutoModelForImageTextToText.from_pretrained(out / "stage2"),
        AutoProcessor.from_pretrained(out / "stage2"),
    )
    assert [type(module).__name__ for name, module in model.named_modules() if name.endswith(".merge")]
    prompt = processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}])
    assert prompt.count("<image>") == 1
    assert (out / "stage1.yaml").read_text().startswith("# Stage 1")

    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    again = demo(out, "--json")  # all of it is done
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["stages"] == result["stages"]
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before

    other = demo(out, stage2_steps=3)
    assert other.exit_code == 2
    assert "out: got stage2_steps 3, expected stage2_steps 2, as in" in other.stderr
    (out / "train-demo.json").write_text("{")
    assert "which is damaged" in demo(out).stderr


def test_a_folder_with_other_things_stays_as_it_is(tmp_path):
    (tmp_path / "mine").write_text("my own")
    done = demo(tmp_path)
    assert done.exit_code == 2
    assert "out: got" in done.stderr
    assert "which has other things in it" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("text", ["samples", "samples=-1", "nonsense=3", "samples=0", "samples=a", "seed=1"])
def test_sizes_that_are_none(tmp_path, text):
    done = laco("train-demo", "--out", tmp_path / "out", "--set", text)
    assert done.exit_code == 2
    assert ("samples: got 0" if text == "samples=0" else "--set: got") in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_task_of_ones_own(tmp_path):
    done = laco("task", tmp_path / "task", "--count", 3, "--held-out", 2, "--format", "jsonl")
    assert done.exit_code == 0, done.output
    assert len((tmp_path / "task" / "train.jsonl").read_text().splitlines()) == 3
    assert str(tmp_path / "task" / "held_out.jsonl") in "".join(done.stdout.splitlines())
    again = laco("task", tmp_path / "task")
    assert again.exit_code == 2
    assert "which has something in it" in again.stderr
