"""A run of a recipe: :func:`prepare` builds all of it and starts nothing, :func:`execute` trains and leaves the result."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import PrinterCallback, TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from laco_kernels.errors import complaint
from laco_kernels.hf import check_processor
from laco_kernels.train.assemble import ORIGINAL, describe, load_model, prepare_parts
from laco_kernels.train.data import ConversationDataset, inspect
from laco_kernels.train.mixture import read_data
from laco_kernels.train.output import check_output, claim, write_result
from laco_kernels.train.parts import parts_of
from laco_kernels.train.resuming import model_state
from laco_kernels.train.trainer import LacoTrainer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from transformers import LlavaProcessor, TrainerCallback

    from laco_kernels.hf.image_tokens import ImageTokens
    from laco_kernels.train.data import Inspection
    from laco_kernels.train.mixture import Source
    from laco_kernels.train.recipe import Recipe, TrainRecipe


@dataclass(frozen=True)
class PartPlan:
    """A part of the model: how many parameters it has, how many of them are trained, and at which rate if any."""

    name: str
    parameters: int
    trained: int
    rate: float | None


@dataclass(frozen=True)
class Plan:
    """What is about to happen.

    Args:
        parts: of the model.
        compressor: what reduces tokens, and where.
        image: what becomes of an image.
        devices, per_device, accumulation: whose product is the global batch.
        steps: optimiser steps.
        warmup: those of them in which rates rise.
    """

    parts: tuple[PartPlan, ...]
    compressor: str
    image: ImageTokens
    devices: int
    per_device: int
    accumulation: int
    steps: int
    warmup: int


@dataclass(frozen=True)
class Run:
    """All that a run needs, built."""

    recipe: Recipe
    model: Any
    processor: LlavaProcessor
    sources: tuple[Source, ...]
    inspection: Inspection
    args: TrainingArguments
    plan: Plan


def prepare(recipe: Recipe, resume: bool = False, on_step: Callable[[str, float], object] | None = None) -> Run:
    """Build the model, its processor and its data, look at every sample, and write nothing.

    Args:
        recipe: of :func:`~laco_kernels.train.recipe.load_recipe`.
        resume: whether the output folder may have an earlier part of this run.
        on_step: is told what is done and how much of all is.

    Raises:
        TypeError, ValueError, RuntimeError, OSError: the recipe cannot be carried out, here or at all;
            ``TooManySkippedError`` with the causes where too many samples cannot be used.
    """
    tell = on_step or (lambda *_: None)
    if is_main():  # the others would see what this one writes
        check_output(recipe, resume)
    args = training_arguments(recipe)
    tell("reading the data", 0.0)
    records = read_data(recipe.data.path, recipe.data.image_folder, recipe.data.seed)
    tell("building the model", 0.1)
    model, processor = load_model(recipe.model, recipe.train.seed)
    image, compressor = check_processor(model, processor), describe(model)
    model = prepare_parts(model, recipe)
    tell("looking at the data", 0.5)
    inspection = inspect(ConversationDataset(records, processor, recipe.data.max_length), recipe.data.cap)
    if not len(inspection.dataset):
        given = f"{str(recipe.data.path)!r} with no sample to train on ({inspection.tally})"
        raise ValueError(complaint("data.path", given, "some", "Pass other data"))
    steps = _steps(recipe.train, len(inspection.dataset), args)
    plan = Plan(
        parts=tuple(_part_plans(model, recipe)),
        compressor=compressor,
        image=image,
        devices=devices(),
        per_device=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        steps=steps,
        warmup=args.get_warmup_steps(steps),
    )
    return Run(recipe, model, processor, records.sources, inspection, args, plan)


def execute(run: Run, resume: bool = False, callbacks: Sequence[TrainerCallback] = ()) -> Path:
    """Train, and return the folder with the result.

    ``AutoModelForImageTextToText`` and ``AutoProcessor`` read it wherever :mod:`laco_kernels.hf` has been imported; an adapter
    that was not merged is read by ``PeftModel.from_pretrained(model, folder)``, on the model that the run began with.

    Args:
        run: of :func:`prepare`.
        resume: go on from the latest complete checkpoint in the output folder; from the beginning where there is none.
        callbacks: of transformers' Trainer, told of every step.

    Raises:
        OSError: the output folder cannot be written to, or the disk is full; checkpoints are as they were.
        RuntimeError: the run was stopped: a loss that is no number, or too many samples that cannot be used.
    """
    recipe = run.recipe
    config = vars(run.model.config)
    use_cache = config.get("use_cache")
    trainer = LacoTrainer(
        run.model,
        run.args,
        processor=run.processor,
        inspection=run.inspection,
        rates=recipe.train.rates,
        min_lr=recipe.train.min_lr,
        keep=recipe.train.keep,
        non_finite_budget=recipe.train.non_finite_budget,
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    if is_main():
        claim(recipe)
    trainer.train(resume_from_checkpoint=resume and _has_checkpoint(recipe.output))
    model = trainer.accelerator.unwrap_model(trainer.model)
    state = model_state(model, keep=is_main())  # all processes together, over which it may be spread
    config["use_cache"] = use_cache  # which the Trainer turns off, and a saved model is to generate with
    if use_cache is None:
        del config["use_cache"]
    if is_main():
        write_result(recipe.output, lambda folder: _save(model, state, run, folder))
    trainer.accelerator.wait_for_everyone()
    return recipe.output


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """Return a recipe as transformers' arguments for the processes and the device that there are.

    Raises:
        ValueError: the batch does not divide among them, or ``trainer`` has what transformers does not know.
    """
    train = recipe.train
    per_device, accumulation = _divide(train)
    known = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    for name in recipe.trainer:
        if name not in known:
            expected, remedy = "an argument of transformers.TrainingArguments", "Correct or remove it"
            raise ValueError(complaint(f"trainer.{name}", "an unknown key", expected, remedy))
    if missing := [name for name in train.report_to if name not in (*get_available_reporting_integrations(), "all", "none")]:
        remedy = "Install it, or drop it: metrics.jsonl is written in any case"
        raise ValueError(complaint("train.report_to", ", ".join(missing), "a tracker that is installed", remedy))
    on_cpu = not torch.cuda.is_available()
    own: dict[str, Any] = {
        "output_dir": str(recipe.output),
        "learning_rate": max(train.rates.values()),
        "lr_scheduler_type": "cosine",
        "per_device_train_batch_size": per_device,
        "gradient_accumulation_steps": accumulation,
        "num_train_epochs": 1.0 if train.epochs is None else train.epochs,
        "max_steps": -1 if train.max_steps is None else train.max_steps,
        "warmup_steps": train.warmup,
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        "bf16": train.precision == "bfloat16",
        "gradient_checkpointing": train.gradient_checkpointing,
        "seed": train.seed,
        "data_seed": train.seed,
        "logging_steps": train.log_every,
        "logging_nan_inf_filter": False,  # which logs a loss that is no number as 0
        "save_strategy": "no" if train.save_every is None else "steps",
        "save_steps": train.save_every or 1,
        "report_to": list(train.report_to) or "none",
        "remove_unused_columns": False,  # a batch's notes are no argument of a model
        "label_names": ["labels"],
        "use_cpu": on_cpu,
    }
    defaults: dict[str, Any] = {
        "disable_tqdm": True,
        "log_level_replica": "error",
        "dataloader_pin_memory": not on_cpu,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if train.gradient_checkpointing else None,
    }
    try:
        args = TrainingArguments(**{**defaults, **recipe.trainer, **own})
    except (TypeError, ValueError, ImportError) as error:  # the last where DeepSpeed is wanted and not installed
        given = f"{recipe.trainer} ({' '.join(str(error).split())})"
        expected = "what TrainingArguments takes here"
        raise ValueError(complaint("trainer", given, expected, "Correct it, or install what it needs")) from error
    if args.n_gpu > 1:
        remedy = f"Run torchrun --nproc-per-node {args.n_gpu} -m laco_kernels.cli train ..., or set CUDA_VISIBLE_DEVICES=0"
        raise ValueError(complaint("devices", f"{args.n_gpu} GPUs in one process", "one GPU a process", remedy))
    return args


def _has_checkpoint(folder: Path) -> bool:
    """Return whether a run got as far as its first checkpoint, complete or damaged."""
    return any(re.fullmatch(r"checkpoint-\d+", path.name) for path in folder.iterdir())


def devices() -> int:
    """Return how many processes compute together, as torchrun says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Return whether this is the process that prints and writes."""
    return int(os.environ.get("RANK", "0")) == 0


def _divide(train: TrainRecipe) -> tuple[int, int]:
    """Return the samples that a device computes at once, and how often before an optimiser step."""
    count, batch = devices(), train.batch_size
    at_once = batch // count if train.per_device_batch_size is None else train.per_device_batch_size
    accumulation = batch // (count * at_once) if at_once else 0
    if accumulation * count * at_once != batch or not batch:
        expected = f"a multiple of {count} device{'s' * (count > 1)} x {at_once or 1} samples at once"
        remedy = "Change train.batch_size or train.per_device_batch_size, or the number of devices"
        raise ValueError(complaint("train.batch_size", batch, expected, remedy))
    return at_once, accumulation


def _steps(train: TrainRecipe, samples: int, args: TrainingArguments) -> int:
    """Return how many optimiser steps the Trainer takes: of each epoch's last batches it makes a step, too."""
    at_once, together = args.per_device_train_batch_size, args.per_device_train_batch_size * devices()
    if args.dataloader_drop_last and samples < together:
        remedy = "Drop trainer.dataloader_drop_last, or lower the batch size"
        raise ValueError(complaint("data.path", f"{samples} samples", f"{together} or more, for one batch", remedy))
    if train.max_steps is not None:
        return train.max_steps
    batches = samples // together if args.dataloader_drop_last else math.ceil(math.ceil(samples / at_once) / devices())
    return math.ceil(args.num_train_epochs * math.ceil(batches / args.gradient_accumulation_steps))


def _part_plans(model: Any, recipe: Recipe) -> list[PartPlan]:
    plans = []
    for part, parameters in parts_of(model).items():
        counted = [parameter for name, parameter in parameters.items() if ORIGINAL not in name.split(".")]
        trained = sum(parameter.numel() for parameter in counted if parameter.requires_grad)
        total = sum(parameter.numel() for parameter in counted)
        plans.append(PartPlan(part, total, trained, recipe.train.rates.get(part)))
    return plans


def _save(model: Any, state: dict[str, Any], run: Run, folder: Path) -> None:
    """Write the result: a model, an adapter, or a model with its adapter beside it; and the processor."""
    run.processor.save_pretrained(folder)
    if run.recipe.lora is None:
        model.save_pretrained(folder, state_dict=state)
        return
    adapter = folder / "adapter" if run.recipe.lora.merge else folder
    # Else PEFT looks for the base model's vocabulary on the hub.
    model.save_pretrained(adapter, state_dict=state, save_embedding_layers=False)
    if run.recipe.lora.merge:
        model.merge_and_unload().save_pretrained(folder)
