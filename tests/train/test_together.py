"""Two processes, by DDP and by FSDP2, do what one does with the same batches, and fail together."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from . import together

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder in which two processes have run all checks, and what failed."""
    folder = tmp_path_factory.mktemp("together")
    together.prepare(folder)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "tests.train.together", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    reports = [folder / f"{rank}.json" for rank in range(2)]
    assert all(report.exists() for report in reports), done.stderr[-3000:]
    return folder, [json.loads(report.read_text()) for report in reports]


@pytest.mark.parametrize("check", together.CHECKS, ids=lambda check: check.__name__)
def test_together(check, ran):
    _, failures = ran
    assert not [failed[check.__name__] for failed in failures if check.__name__ in failed]


@pytest.fixture(scope="module")
def alone(ran):
    """The same batches in one process."""
    folder, _ = ran
    run = together.common(folder, "alone", batch=4)
    run.train()
    return run


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "fsdp from ddp"])
def test_two_processes_do_what_one_does(kind, ran, alone):
    folder, _ = ran
    expected, found = (load_file(folder / name / "checkpoint-3" / "model.safetensors") for name in ("alone", kind))
    start = together.model().double().state_dict()
    assert found.keys() == expected.keys()
    assert sum(not torch.equal(expected[name], start[name]) for name in expected) > 20
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-10, atol=1e-10)
    lines = [json.loads(line) for line in (folder / kind / "metrics.jsonl").read_text().splitlines()]
    for line, other in zip(lines, alone.metrics.read()[-len(lines) :], strict=True):
        assert {key: line[key] for key in ("step", "tokens", "samples", "epoch")} == {
            key: other[key] for key in ("step", "tokens", "samples", "epoch")
        }
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-6)  # which transformers computes in float32
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-10)


@pytest.mark.parametrize("kind", ["dropout", "fsdp", "lora"])
def test_two_processes_resume_bit_for_bit(kind, ran):
    folder, _ = ran
    one, other = (folder / name / "checkpoint-3" for name in (kind, f"{kind} again"))
    files = {path.name for path in one.iterdir()} - {"manifest.json", "run.json", "trainer_state.json", "README.md"}
    assert {"optimizer.pt", "scheduler.pt", "random-0.pt", "random-1.pt"} < files
    for name in files:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert (one / "trained.safetensors").exists() == (kind == "lora")


def test_what_two_processes_saved_is_a_model_for_one(ran):
    folder, _ = ran
    path = folder / "fsdp" / "checkpoint-3"
    model = AutoModelForImageTextToText.from_pretrained(path, dtype="auto")
    weights = load_file(path / "model.safetensors")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_another_number_of_processes_is_refused(ran):
    folder, _ = ran
    run = together.common(folder, "one")
    with pytest.raises(ValueError, match=r"got processes 1.*, expected processes 2.*as checkpoint-2 was trained with\. Resume"):
        run.train(resume_from_checkpoint=folder / "ddp" / "checkpoint-2")
