"""Losses and gradients that are no number, and batches of nothing."""

import dataclasses
import os

import pytest
import torch

from laco_kernels.train.data import EpochSampler
from laco_kernels.train.finite import NonFiniteError
from laco_kernels.train.skipping import TooManySkippedError

from .runs import RATES, model, poison, raises, trainer

SEED = 42
ORDER = [f"s{index}" for index in EpochSampler(6, SEED)]


@pytest.fixture(autouse=True, scope="module")
def _no_disk_is_unplugged():
    """Bringing files to the disk takes most of the time, and nothing here depends on it."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", lambda _: None)
        yield


def infect(which, value=float("nan")):
    """The change that makes a sample's pixels this."""
    return {"change": lambda inspection: poison(inspection, which, value)}


def with_image(start):
    """The first sample from a place in the order on that has an image."""
    return next(name for name in ORDER[start:] if int(name[1:]) % 3 != 2)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_loss_that_is_no_number_stops_naming_step_samples_and_module(accumulation, tmp_path):
    bad = with_image(2)
    place = ORDER.index(bad) // 2
    run = trainer(tmp_path, **infect(bad, 3e38), gradient_accumulation_steps=accumulation, save_strategy="no")
    step = place // accumulation + 1
    samples = ", ".join(ORDER[2 * place : 2 * place + 2])
    words = ["loss: got nan at step", f"step {step}, samples: {samples}, beginning in the output of model.vision_tower."]
    raises(NonFiniteError, run.train, *words)
    assert all(line["loss"] > 0 for line in run.metrics.read())
    assert len(run.metrics.read()) == step - 1


def test_the_forward_pass_is_repeated_with_the_random_numbers_it_had(tmp_path):
    """A fault that only one draw shows, as of a mask of dropout, is found."""

    def drawn(unlucky, out):
        made, draws = model(), []

        def hook(_module, _arguments, output):
            draws.append(float(torch.rand(())))
            return output * torch.inf if draws[-1] == unlucky else output

        made.model.multi_modal_projector.linear_2.register_forward_hook(hook)
        return trainer(tmp_path, made=made, out=out, num_train_epochs=1, save_strategy="no"), draws

    run, draws = drawn(None, "lucky")
    run.train()
    assert len(set(draws)) == 3
    run, _ = drawn(draws[1], "unlucky")
    raises(NonFiniteError, run.train, "at step 2", "beginning in the output of model.multi_modal_projector.linear_2 (")


def test_a_budget_leaves_steps_out_counted_and_never_as_0(tmp_path, caplog):
    bad = with_image(0)
    made = model()
    run = trainer(tmp_path, made=made, **infect(bad), run={"non_finite_budget": 2}, logging_steps=3)
    output = run.train()
    assert all(bool(p.isfinite().all()) for p in made.parameters())
    lines = run.metrics.read()
    assert [line["non_finite"] for line in lines] == [1, 2]
    assert all(5 < line["loss"] < 6 for line in lines)  # the mean of the two other steps
    assert output.training_loss == pytest.approx(sum(line["loss"] for line in lines) / 2)
    assert output.metrics["train_loss"] == output.training_loss
    assert f"Left out step {ORDER.index(bad) // 2 + 1}: loss nan, samples: " in caplog.text
    assert "1 more may be left out" in caplog.text
    again = trainer(tmp_path, out="again", **infect(bad), run={"non_finite_budget": 1}, save_strategy="no")
    raises(NonFiniteError, again.train, "loss: got nan at step ")


def test_a_step_that_is_left_out_changes_nothing_and_is_not_logged_as_0(tmp_path):
    bad = with_image(0)
    made = model()
    before = {name: p.detach().clone() for name, p in made.named_parameters()}
    step = ORDER.index(bad) // 2 + 1
    assert step == 1
    run = trainer(tmp_path, made=made, **infect(bad), run={"non_finite_budget": 1}, max_steps=1, save_strategy="no")
    output = run.train()
    assert all(torch.equal(p, before[name]) for name, p in made.named_parameters())
    (line,) = run.metrics.read()
    assert line["loss"] is None
    assert line["grad_norm"] is None
    assert output.training_loss != output.training_loss


def test_a_gradient_that_is_no_number_counts_and_is_found(tmp_path):
    made = model()

    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(_context, x):
            return x.clone()

        @staticmethod
        def backward(_context, gradient):
            return gradient * torch.inf

    layer = made.model.language_model.layers[0].mlp.up_proj
    layer.register_forward_hook(lambda _module, _arguments, output: Poison.apply(output))
    words = [
        "gradient norm: got nan at step 1",
        "beginning in the gradient of model.language_model.layers.0.mlp.up_proj.weight",
    ]
    raises(NonFiniteError, trainer(tmp_path, made=made, save_strategy="no").train, *words, ", ".join(ORDER[:2]))


def test_a_batch_of_nothing_has_a_loss_and_a_gradient_of_0(tmp_path):
    def change(inspection):
        for name in ORDER:
            inspection = poison(inspection, name, skip=True)
        return inspection

    made = model()
    before = {name: p.detach().clone() for name, p in made.named_parameters()}
    run = trainer(tmp_path, made=made, change=change, cap=6, weight_decay=0.0, num_train_epochs=1, save_strategy="no")
    run.train()
    assert [(line["loss"], line["grad_norm"], line["skipped"]) for line in run.metrics.read()] == [
        (0, 0, 2),
        (0, 0, 4),
        (0, 0, 6),
    ]
    assert run.ledger.tokens == run.ledger.samples == 0
    assert all(torch.equal(p, before[name]) for name, p in made.named_parameters())


def test_more_samples_left_out_than_the_cap_stop_the_run(tmp_path):
    run = trainer(tmp_path, change=lambda inspection: poison(inspection, ORDER[3], skip=True), cap=0, save_strategy="no")
    raises(TooManySkippedError, run.train, f"1 of 6 samples left out: 1 damaged image ({ORDER[3]})", "at most 0 left out")


def test_a_trainer_that_would_not_ask_is_noticed(tmp_path, monkeypatch):
    run = trainer(tmp_path, save_strategy="no")
    monkeypatch.setattr(run, "_get_grad_norm", lambda *_, **__: 1.0)
    raises(RuntimeError, run.train, "transformers: got a version that takes a step without")


def test_notes_never_reach_the_model(tmp_path):
    run = trainer(tmp_path, max_steps=1, save_strategy="no")
    names = set()
    run.model.register_forward_pre_hook(lambda _m, _a, options: names.update(options), with_kwargs=True)
    run.train()
    assert names == {"input_ids", "attention_mask", "labels", "pixel_values", "num_items_in_batch"}
    assert RATES.keys() == run._step_rates.keys()
    assert not dataclasses.fields(run._step)[0].init or not run._step.batches
