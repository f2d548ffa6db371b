"""Small runs of the trainer."""

import dataclasses
import re

import pytest
import torch
from peft import PeftModel
from transformers import TrainerCallback, TrainingArguments

import laco_kernels as lk
from laco_kernels.train.data import Sample, inspect
from laco_kernels.train.parts import freeze
from laco_kernels.train.skipping import Cause, Skipped
from laco_kernels.train.trainer import LacoTrainer

from ..hf.llava import llava, picture, tokenizer
from .samples import dataset, sample

RATES = {"merge": 1e-2, "projector": 5e-3, "llm": 1e-3}
ANSWERS = ("A red square.", "Two blue circles.", "In this picture? A red square, and two blue circles.")


def data(folder, count=6):
    """Samples of different lengths, every third of them without an image."""
    folder.mkdir(parents=True, exist_ok=True)
    picture().save(folder / "a.png")
    picture(50, 60, (20, 150, 60)).save(folder / "b.png")
    samples = []
    for number in range(count):
        image = "ab"[number % 2] + ".png" if number % 3 != 2 else None
        question = "<image>\nWhat is it?" if image else "What is in this picture?"
        samples.append(sample(image, question, ANSWERS[number % 3]) | {"id": f"s{number}"})
    return samples


def model(dropout=0.0, rates=RATES, **options):
    made = llava(**{"depth": 0.5} | options)
    made.config.text_config.attention_dropout = made.model.language_model.config.attention_dropout = dropout
    for module in made.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = dropout
    freeze(made, rates)
    return made


def trainer(folder, samples=None, *, made=None, rates=RATES, out="out", cap=0.01, run=None, change=None, **options):
    """A trainer on few samples; ``run`` are options of LacoTrainer, the others are of its arguments."""
    samples = data(folder) if samples is None else samples
    made = model(rates=rates) if made is None else made
    base = made.get_base_model() if isinstance(made, PeftModel) else made
    processor = lk.hf.build_processor(base, tokenizer())
    settings = {"per_device_train_batch_size": 2, "num_train_epochs": 2, "logging_steps": 1, "save_steps": 2}
    settings |= {"use_cpu": True, "report_to": [], "disable_tqdm": True, "dataloader_pin_memory": False, "weight_decay": 0.1}
    args = TrainingArguments(str(folder / out), **settings | options)
    inspection = inspect(dataset(folder, samples, processor), cap)
    if change:
        inspection = change(inspection)
    return LacoTrainer(made, args, processor=processor, inspection=inspection, rates=rates, **run or {})


def poison(inspection, identifier, value=float("nan"), skip=False):
    """Have loading a sample give pixels of this value, or leave it out as damaged."""
    data = inspection.dataset

    class Poisoned(type(data)):
        def __getitem__(self, place):
            found = super().__getitem__(place)
            if not isinstance(found, Sample) or found.id != identifier:
                return found
            if skip:
                return Skipped(found.index, found.id, Cause.DAMAGED, "a.png")
            pixels = found.pixel_values
            return dataclasses.replace(found, pixel_values=None if pixels is None else torch.full_like(pixels, value))

    poisoned = data.only(list(data.indices))
    poisoned.__class__ = Poisoned
    return dataclasses.replace(inspection, dataset=poisoned)


def raises(kind, action, *words):
    """An error whose message has all of these words."""
    with pytest.raises(kind) as raised:
        action()
    for word in words:
        assert re.sub(r"\s+", " ", word) in str(raised.value), str(raised.value)


class StopError(Exception):
    """As if the process had died."""


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            raise StopError


def state_of(trained):
    """All that a run leaves behind, but for how long it took."""
    optimizer = trained.optimizer.state_dict()
    lines = [
        {key: value for key, value in line.items() if key not in ("seconds", "samples_per_second")}
        for line in trained.metrics.read()
    ]
    weights = {name: tensor.clone() for name, tensor in trained.model.state_dict().items()}
    return {"weights": weights, "optimizer": optimizer, "scheduler": trained.lr_scheduler.state_dict(), "lines": lines}


def assert_equal(one, other):
    assert one["weights"].keys() == other["weights"].keys()
    for name, tensor in one["weights"].items():
        assert torch.equal(tensor, other["weights"][name]), name
    assert one["lines"] == other["lines"]
    assert one["optimizer"]["param_groups"] == other["optimizer"]["param_groups"]
    assert one["optimizer"]["state"].keys() == other["optimizer"]["state"].keys()
    for index, parts in one["optimizer"]["state"].items():
        for key, value in parts.items():
            assert torch.equal(value, other["optimizer"]["state"][index][key]), (index, key)
    assert one["scheduler"] == other["scheduler"]
