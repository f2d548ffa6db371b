"""``laco bench generate`` and ``laco bench step`` at tiny size."""

import json

import pytest
from typer.testing import CliRunner

from laco_kernels.bench import generate
from laco_kernels.cli import app

TINY = ("--tiny", "--device", "cpu", "--rounds", 1)


def laco(*arguments):
    return CliRunner(env={"COLUMNS": "80", "TERM": "dumb"}).invoke(app, [str(argument) for argument in arguments])


def test_generate_shows_tables_and_says_that_models_are_cut(tmp_path):
    done = laco("bench", "generate", *TINY, "--depths", "1/4", "--new-tokens", 3, "--out", tmp_path)
    assert done.exit_code == 0, done.output
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "REDUCED to 12 of 24 encoder layers" in " ".join(done.stdout.split())
    assert "no whole models here: 12 of 24 encoder layers and 2 of 24 LLM layers" in done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines() if line.endswith(" yes ")] == ["eager", "static"] * 2
    assert len(list(tmp_path.iterdir())) == 3


def test_step_prints_json():
    done = laco("bench", "step", *TINY, "--method", "stf", "--stages", "pretrain", "--modes", "head", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["modes"] == ["eager", "head"]
    assert [row["subject"] for row in found["rows"]] == ["LLaVA-1.5"] * 2 + ["STF"] * 2
    assert found["depth"] == {"encoder": [8, 24], "llm": [1, 32]}
    assert found["files"] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "--method", "both"), "method: got 'both'"),
        (("generate", "--modes", "fused+graphs"), "modes: got 'fused+graphs', expected no CUDA graphs without a GPU"),
        (("generate", "--modes", "magic"), "modes: got 'magic', expected names among eager, fused"),
        (("generate", "--method", "stf", "--depths", "1/4"), "depths: got 1/4, expected none for stf"),
        (("generate", "--depths", "2"), "depths: got '2'"),
        (("generate", "--llm", "gpt"), "llm: got 'gpt'"),
        (("generate", "--out", "/proc/nowhere"), "out: got '/proc/nowhere'"),
        (("step", "--stages", "stage9"), "stages: got 'stage9', expected some of stage1, stage2"),
        (("step", "--encoder-layers", "99"), "encoder_layers: got 99, expected 2 to 24 layers"),
        (("step", "--dtype", "int8"), "dtype: got 'int8'"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(arguments, message):
    done = laco("bench", *arguments, "--device", "cpu")
    assert done.exit_code == 2
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1


def test_memory_that_does_not_suffice_is_said_in_one_line(monkeypatch):
    def full(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")

    monkeypatch.setattr(generate, "measure_generate", full)
    done = laco("bench", "generate", *TINY)
    assert done.exit_code == 2
    assert "error: batch: got a model and a batch beyond the memory of cpu" in done.stderr
