"""The trainer in one process: what it resumes, keeps, refuses and writes down."""

import errno
import json
import os
import resource
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor

import laco_kernels as lk
from laco_kernels.train import trainer as engine
from laco_kernels.train.checkpoint import CheckpointError, DamagedCheckpointError, latest, verify
from laco_kernels.train.parts import parts_of
from laco_kernels.train.resuming import save_state

from ..hf.llava import llm
from .runs import RATES, StopAt, StopError, assert_equal, data, model, poison, raises, state_of, trainer


@pytest.fixture(autouse=True, scope="module")
def _no_disk_is_unplugged():
    """Bringing files to the disk takes most of the time, and nothing here depends on it."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", lambda _: None)
        yield


def stopped(folder, at, **options):
    """A run that dies before this step, as if killed, and is resumed by a new one."""
    options = {"out": "stopped"} | options
    first = trainer(folder, **options, run={"callbacks": [StopAt(at)]}, made=options_model(options))
    with pytest.raises(StopError):
        first.train()
    second = trainer(folder, **options, made=options_model(options))
    torch.rand(7)  # whatever was drawn in between
    second.train(resume_from_checkpoint=True)
    return second


def options_model(options):
    return model(dropout=0.3, rates=options.get("rates", RATES))


CASES = {
    "in the middle of an epoch": ({}, 3),
    "where an epoch ends": ({"save_strategy": "epoch"}, 4),
    "while gradients accumulate, between logged steps": (
        {"gradient_accumulation_steps": 2, "logging_steps": 2, "save_steps": 3, "num_train_epochs": 3},
        4,
    ),
    "with workers, recomputing, in bfloat16": (
        {"dataloader_num_workers": 2, "gradient_checkpointing": True, "bf16": True},
        3,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(case, tmp_path):
    options, at = CASES[case]
    whole = trainer(tmp_path, made=options_model(options), out="whole", **options)
    start = {name: tensor.clone() for name, tensor in whole.model.state_dict().items()}
    whole.train()
    state = state_of(whole)
    assert len(state["lines"]) == 3 if "logging_steps" in options else 6
    assert sum(not torch.equal(tensor, start[name]) for name, tensor in state["weights"].items()) > 20
    assert_equal(state, state_of(stopped(tmp_path, at, **options)))


def adapted():
    config = LoraConfig(r=2, target_modules=r".*language_model.*\.(q_proj|v_proj)", lora_dropout=0.3)
    made = get_peft_model(model(rates={}), config)
    for parameter in parts_of(made)["projector"].values():  # as who trains it beside the adapters may do, too
        parameter.requires_grad_(True)
    return made


def test_adapters_and_what_is_trained_beside_them_are_resumed(tmp_path):
    rates = {"projector": 1e-2, "llm": 1e-2}
    whole = trainer(tmp_path, made=adapted(), rates=rates, out="whole")
    whole.train()
    options = {"rates": rates, "out": "stopped"}
    with pytest.raises(StopError):
        trainer(tmp_path, made=adapted(), run={"callbacks": [StopAt(3)]}, **options).train()
    again = trainer(tmp_path, made=adapted(), **options)
    again.train(resume_from_checkpoint=tmp_path / "stopped" / "checkpoint-2")
    assert_equal(state_of(whole), state_of(again))
    files = {path.name for path in (tmp_path / "whole" / "checkpoint-6").iterdir()}
    assert {"adapter_model.safetensors", "trained.safetensors"} < files
    assert "model.safetensors" not in files


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A run that has ended, and its folder."""
    folder = tmp_path_factory.mktemp("done")
    run = trainer(folder, logging_steps=2, warmup_steps=2, run={"min_lr": 1e-4, "keep": 2})
    return run, run.train(), folder


def test_a_checkpoint_is_a_model_with_its_processor(done):
    run, _, folder = done
    path = folder / "out" / "checkpoint-6"
    reloaded = AutoModelForImageTextToText.from_pretrained(path)
    weights = run.model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in reloaded.state_dict().items())
    lk.hf.check_processor(reloaded, AutoProcessor.from_pretrained(path))
    assert {p.name for p in (folder / "out").iterdir() if p.is_dir()} == {"checkpoint-4", "checkpoint-6"}


def test_nothing_in_a_checkpoint_has_to_be_executed(done):
    _, _, folder = done
    for path in (folder / "out" / "checkpoint-6").rglob("*"):
        if path.suffix == ".pt":
            torch.load(path, weights_only=True)
        else:
            assert path.suffix in (".json", ".safetensors", ".jinja"), path


def test_a_line_a_logged_step(done):
    run, output, folder = done
    lines = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert lines[0].keys() == {
        *("step", "epoch", "loss", "grad_norm", "lr", "skipped", "non_finite"),
        *("tokens", "samples", "samples_per_second", "seconds"),
    }
    assert lines[0]["lr"] == pytest.approx({part: rate / 2 for part, rate in RATES.items()})  # of the step just taken
    assert lines[-1]["samples"] == 12
    losses = [line["loss"] for line in lines]
    assert losses[-1] < losses[0]
    assert output.training_loss == pytest.approx(sum(losses) / 3)
    history = [entry for entry in run.state.log_history if "loss" in entry]
    assert [entry["loss"] for entry in history] == losses
    assert history[0]["learning_rate_merge"] == lines[0]["lr"]["merge"]
    assert (folder / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_new_run_is_not_begun_among_anothers_checkpoints(done):
    _, _, folder = done
    raises(ValueError, trainer(folder).train, "output_dir: got", "with checkpoint-6, expected a folder without checkpoints")


CHANGES = {
    "rates {'merge': 0.01, 'projector': 0.02, 'llm': 0.001}": {"rates": RATES | {"projector": 2e-2}},
    "accumulation 2; steps 4": {"gradient_accumulation_steps": 2},
    "batch size 1; steps 12": {"per_device_train_batch_size": 1},
    "seed 7": {"data_seed": 7},
    "min_lr 0.0": {"run": {}},
    "weight decay 0.0": {"weight_decay": 0.0},
    "optimizer sgd, betas": {"optim": "sgd"},
    "optimizer adamw_torch_fused, betas 0.5 and 0.999, epsilon 1e-08": {"adam_beta1": 0.5},
}


@pytest.mark.parametrize("words", CHANGES)
def test_another_run_is_refused_naming_the_difference(words, done):
    _, _, folder = done
    options = {"warmup_steps": 2, "run": {"min_lr": 1e-4}} | CHANGES[words]
    run = trainer(folder, **options)
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    raises(ValueError, lambda: run.train(resume_from_checkpoint=True), f"resume_from_checkpoint: got {words}", ", expected ")
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.model.state_dict().items())


def test_other_data_and_other_parameters_are_refused(done):
    _, _, folder = done
    options = {"warmup_steps": 2, "run": {"min_lr": 1e-4}}
    samples = data(folder)
    samples[3]["conversations"][1]["value"] = "A green square."
    resume = {"resume_from_checkpoint": True}
    raises(ValueError, lambda: trainer(folder, samples, **options).train(**resume), "got data ")
    frozen = model()
    frozen.model.multi_modal_projector.linear_1.bias.requires_grad_(False)
    raises(
        ValueError, lambda: trainer(folder, made=frozen, **options).train(**resume), "got parameters", "1 of projector without"
    )
    wider = model(text=llm(vocab_size=352))
    words = "model: got lm_head.weight [320, 16] in checkpoint-6, expected the model that was trained"
    raises(ValueError, lambda: trainer(folder, made=wider, **options).train(**resume), words)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(tmp_path, caplog):
    with pytest.raises(StopError):
        trainer(tmp_path, run={"callbacks": [StopAt(5)]}).train()
    weights = tmp_path / "out" / "checkpoint-4" / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 1)
    run = trainer(tmp_path)
    with pytest.raises(DamagedCheckpointError, match=r"checkpoint-4: got model\.safetensors of"):
        run.train(resume_from_checkpoint=weights.parent)
    run.train(resume_from_checkpoint=True)
    assert "Passed over" in caplog.text
    assert [line["step"] for line in run.metrics.read()] == list(range(1, 7))


def test_a_run_that_has_come_to_its_end_takes_no_step_more(tmp_path):
    """Also in the middle of an epoch: it may be killed after its last checkpoint and before its result is written."""
    options = {"max_steps": 5, "run": {"min_lr": 1e-4}}
    whole = trainer(tmp_path, **options)
    whole.train()
    before = state_of(whole)
    again = trainer(tmp_path, **options)
    output = again.train(resume_from_checkpoint=True)
    assert_equal(before, state_of(again))
    assert (output.global_step, output.training_loss) == (5, whole._mean_loss())
    assert latest(tmp_path / "out").name == "checkpoint-5"


def test_what_torch_writes_says_that_the_disk_is_full(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as raised:
            save_state({"state": torch.zeros(10_000)}, tmp_path / "optimizer.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert raised.value.errno == errno.EFBIG


def test_there_is_nothing_to_resume_from(tmp_path):
    run = trainer(tmp_path)
    raises(ValueError, lambda: run.train(resume_from_checkpoint=True), "resume_from_checkpoint: got True, expected a complete")


def test_a_full_disk_ends_with_a_clear_error_and_the_last_checkpoint_intact(tmp_path):
    run = trainer(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(*_, **__):
        if run.state.global_step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))

    run.add_callback(type("Fill", (engine.TrainerCallback,), {"on_step_end": fill}))
    try:
        raises(CheckpointError, run.train, "checkpoint-4 in", "checkpoint-2 is as it was")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    verify(tmp_path / "out" / "checkpoint-2")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"checkpoint-2", "metrics.jsonl"}
    trainer(tmp_path).train(resume_from_checkpoint=True)


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    run = trainer(tmp_path)
    mkdir = Path.mkdir

    def refuse(path, *arguments, **options):
        if path.name == "checkpoint-4.part":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return mkdir(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)
    raises(
        CheckpointError,
        run.train,
        "checkpoint-4 in",
        "Permission denied",
        "checkpoint-2 is as it was. Make the folder writable",
    )
    assert latest(tmp_path / "out").name == "checkpoint-2"


def test_a_folder_that_cannot_be_made_is_refused_before_the_first_step(tmp_path):
    (tmp_path / "file").touch()
    words = ["output_dir: got", "which cannot be written to (Not a directory)", "Make it writable"]
    raises(CheckpointError, lambda: trainer(tmp_path, out="file/out"), *words)


def test_what_loading_leaves_out_is_counted_and_resumed(tmp_path):
    change = {"change": lambda inspection: poison(inspection, "s3", skip=True), "cap": 1}
    whole = trainer(tmp_path, out="whole", **change)
    whole.train()
    assert [line["skipped"] for line in whole.metrics.read()][-1] == 1
    with pytest.raises(StopError):
        trainer(tmp_path, run={"callbacks": [StopAt(5)]}, **change).train()
    again = trainer(tmp_path, **change)
    again.train(resume_from_checkpoint=True)
    assert_equal(state_of(whole), state_of(again))
    assert again.inspection.tally.state_dict() == whole.inspection.tally.state_dict()


BREAKING = {
    "auto_find_batch_size": {"auto_find_batch_size": True},
    "ignore_data_skip": {"ignore_data_skip": True},
    "save_only_model": {"save_only_model": True},
    "label_smoothing_factor": {"label_smoothing_factor": 0.1},
    "split_batches": {"accelerator_config": {"split_batches": True}},
    "even_batches=False": {"accelerator_config": {"even_batches": False}},
}


@pytest.mark.parametrize("name", BREAKING)
def test_arguments_that_would_break_a_promise(name, tmp_path):
    raises(ValueError, lambda: trainer(tmp_path, **BREAKING[name]), f"args: got {name}, expected training that can be resumed")


def test_rates_that_do_not_fit_are_refused_at_once(tmp_path):
    raises(ValueError, lambda: trainer(tmp_path, made=model(), rates={"projector": 1e-3}), "rates: got none for merge")
    raises(ValueError, lambda: trainer(tmp_path, run={"min_lr": 5e-3}), "min_lr: got 0.005")
    assert not (tmp_path / "out").exists()
