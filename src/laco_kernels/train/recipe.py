"""A run of ``laco train``, written down: :func:`load_recipe`, and the recipes in the package.

A recipe is YAML with the sections ``model``, ``data``, ``train`` and, where wanted, ``lora`` and ``trainer``, and the folder
``output``. Nothing in it is guessed: what is unknown, of the wrong type or contradictory is refused, naming file and key.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from laco_kernels.errors import complaint
from laco_kernels.train.parts import PARTS
from laco_kernels.train.strict import UNSET, build, override, plain, read_yaml, refusal

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

#: The recipes in the package.
FOLDER = Path(__file__).parent / "recipes"
#: What is a path, and what may be a path or a hub name.
PATHS = ("output", "data.path", "data.image_folder")
SOURCES = ("model.checkpoint", "model.vision", "model.text", "model.image_processor")
#: The linear layers of Qwen2 and Llama, which LoRA adapts unless told otherwise, as LLaVA-1.5 does.
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
#: What an override takes the place of beside its own key, as the two contradict each other.
REPLACED = {
    "train.max_steps": "train.epochs",
    "train.epochs": "train.max_steps",
    "model.depth": "model.layer",
    "model.layer": "model.depth",
}
#: Fields of transformers' TrainingArguments that a recipe says elsewhere, or that are not the user's to choose.
DECIDED = {
    "output_dir": "output",
    "learning_rate": "train.rates",
    "per_device_train_batch_size": "train.per_device_batch_size",
    "gradient_accumulation_steps": "train.batch_size",
    "auto_find_batch_size": "train.per_device_batch_size",
    "num_train_epochs": "train.epochs",
    "max_steps": "train.max_steps",
    "warmup_steps": "train.warmup",
    "lr_scheduler_type": "train.min_lr",
    "lr_scheduler_kwargs": "train.min_lr",
    "weight_decay": "train.weight_decay",
    "max_grad_norm": "train.max_grad_norm",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "gradient_checkpointing": "train.gradient_checkpointing",
    "seed": "train.seed",
    "data_seed": "train.seed",
    "save_strategy": "train.save_every",
    "save_steps": "train.save_every",
    "save_total_limit": "train.keep",
    "save_only_model": "train.save_every",
    "logging_strategy": "train.log_every",
    "logging_steps": "train.log_every",
    "logging_nan_inf_filter": "train.non_finite_budget",
    "report_to": "train.report_to",
    "remove_unused_columns": "data",
    "label_names": "data",
    "train_sampling_strategy": "train.seed",
    "ignore_data_skip": "--resume",
    "resume_from_checkpoint": "--resume",
    "use_cpu": "the machine",
    "push_to_hub": "nothing, as a run uploads nothing",
}


@dataclass(frozen=True)
class ModelRecipe:
    """A model: an earlier stage's, or one put together as :func:`laco_kernels.hf.build_llava` does.

    Args:
        checkpoint: the output folder of an earlier stage, or a hub name; then nothing else is given.
        vision, text: folder or hub name of the encoder and of the LLM.
        compressor, depth, layer, ratio, projector, compressor_options, projector_options, vision_feature_layer: as
            :func:`laco_kernels.hf.build_llava`; a depth may be a fraction such as ``1/4``.
        image_processor: folder or hub name of one; that of the encoder's family unless given.
        chat_format: as :func:`laco_kernels.hf.build_processor`.
    """

    checkpoint: str | None = None
    vision: str | None = None
    text: str | None = None
    compressor: str | None = None
    depth: Fraction | None = None
    layer: int | None = None
    ratio: int | None = None
    projector: str | None = None
    compressor_options: dict[str, Any] | None = None
    projector_options: dict[str, Any] | None = None
    vision_feature_layer: int | tuple[int, ...] | None = None
    image_processor: str | None = None
    chat_format: str | None = None


@dataclass(frozen=True)
class DataRecipe:
    """Samples in LLaVA's format.

    Args:
        path: JSON, JSONL, or a mixture of them in YAML, as :func:`laco_kernels.train.mixture.read_data`.
        image_folder: where images lie; the folder that the samples are in unless given.
        max_length: in tokens, those of images included; longer samples are left out. No limit unless given.
        cap: how many samples may be left out before the run stops: a number, or as 0.01 a share.
        seed: of what a mixture draws.
    """

    path: Path
    image_folder: Path | None = None
    max_length: int | None = None
    cap: int | float = 0.01
    seed: int = 0


@dataclass(frozen=True)
class TrainRecipe:
    """How it is trained: AdamW, a linear warm-up, and a cosine from each part's rate to ``min_lr``.

    Args:
        rates: learning rate by part of the model (:data:`laco_kernels.train.parts.PARTS`); parts without one are frozen.
        batch_size: samples an optimiser step, over all devices.
        per_device_batch_size: samples that a device computes at once; gradients are accumulated over as many of these as
            ``batch_size`` takes. Unless given, all at once.
        epochs, max_steps: how long, one of the two; one epoch unless given.
        warmup: optimiser steps, or below 1 their share.
        precision: what is computed in; parameters are float32 in either case.
        log_every, save_every: in optimiser steps. A run that is to save nothing on its way has ``save_every: null``.
        keep: how many checkpoints stay.
        non_finite_budget: how many steps whose loss is no number may be skipped before the run stops.
        report_to: trackers of transformers, such as tensorboard or wandb.
    """

    rates: dict[str, float]
    batch_size: int
    per_device_batch_size: int | None = None
    epochs: float | None = None
    max_steps: int | None = None
    warmup: int | float = 0.03
    min_lr: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    gradient_checkpointing: bool = False
    seed: int = 0
    log_every: int = 1
    save_every: int | None = 500
    keep: int = 2
    non_finite_budget: int = 0
    report_to: tuple[str, ...] = ()


@dataclass(frozen=True)
class LoraRecipe:
    """Low-rank adapters in the LLM, by PEFT, instead of its own weights; the other parts are trained whole beside them.

    Args:
        r, alpha, dropout: as PEFT's ``LoraConfig``.
        targets: names of the LLM's layers that are adapted.
        merge: whether the result is a model with the adapters merged into it, and the adapter beside it in ``adapter/``;
            else it is the adapter, which needs ``model.checkpoint`` where it lies.
    """

    r: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] = LINEAR
    merge: bool = False


@dataclass(frozen=True)
class Recipe:
    """A run.

    Args:
        output: the folder for checkpoints, metrics and the result.
        model, data, train, lora: the sections.
        trainer: further arguments of transformers' ``TrainingArguments``, such as ``fsdp`` or ``dataloader_num_workers``.
    """

    output: Path
    model: ModelRecipe
    data: DataRecipe
    train: TrainRecipe
    lora: LoraRecipe | None = None
    trainer: dict[str, Any] = field(default_factory=dict)


def packaged() -> dict[str, Path]:
    """Return the recipes in the package by name, with their files."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"), key=lambda path: path.stem)}


def summary(path: Path) -> str:
    """Return what a recipe in the package says of itself in its first line."""
    return path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("#").strip()


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        source: a YAML file, or the name of a recipe in the package.
        overrides: ``key=value``, keys dotted, values in YAML, in place of what the file says. One of ``train.max_steps`` also
            takes the place of ``train.epochs`` and the other way round, as ``model.layer`` of ``model.depth``.

    Returns:
        The recipe, its paths absolute: those in a file are relative to it, those in an override or in a recipe of the package
        to the current folder. What may be a hub name is a path where it begins with ``.``, ``/`` or ``~``, or is there.

    Raises:
        ValueError: it is not a recipe that can be run, naming file and key.
        OSError: it cannot be read.
    """
    known = packaged()
    path = known.get(str(source), Path(source))
    if not path.exists():
        expected = f"a file, or one of {', '.join(known)}"
        raise ValueError(complaint("recipe", repr(str(source)), expected, "Choose one of these, or write a file"))
    content = read_yaml(path)
    _locate(content, Path.cwd() if str(source) in known else path.resolve().parent)
    for text in overrides:
        key, equals, value = text.partition("=")
        if not (equals and all(key.split("."))):
            raise ValueError(complaint("--set", repr(text), "key=value", "Pass for instance --set train.epochs=1"))
        try:
            changes: dict[str, Any] = {}
            override(changes, key, yaml.safe_load(value))
        except yaml.YAMLError:
            raise ValueError(complaint("--set", repr(text), "a value in YAML", "Put it in quotes")) from None
        _locate(changes, Path.cwd())
        if key in REPLACED and _get(content, REPLACED[key]) is not None:
            override(content, REPLACED[key], None)
        override(content, key, _get(changes, key))
    sections = {name: section for name, section in content.items() if section is not None}
    recipe = build(Recipe, sections, path.name)
    for key, given, expected, remedy in _contradictions(recipe):
        raise refusal(path.name, key, given, expected, remedy)
    return recipe


def to_yaml(recipe: Recipe) -> str:
    """Return a recipe as a file says it; :func:`load_recipe` makes an equal one of it."""
    return yaml.safe_dump(plain(recipe), sort_keys=False)


def _get(content: dict[str, Any], key: str) -> Any:
    value: Any = content
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _locate(content: dict[str, Any], base: Path) -> None:
    """Make the paths in what was read absolute, in place."""
    for key in (*PATHS, *SOURCES):
        value = _get(content, key)
        if not isinstance(value, str) or value in ("", UNSET):
            continue
        path = base / Path(value).expanduser()
        if key in PATHS or value.startswith((".", "/", "~")) or path.exists():
            override(content, key, str(path.resolve()))


def _contradictions(recipe: Recipe) -> Iterator[tuple[str, object, str, str]]:
    """Yield what does not go together or is out of range: key, given, expected, remedy."""
    yield from _model_contradictions(recipe.model)
    train, lora = recipe.train, recipe.lora
    for part, rate in train.rates.items():
        if part not in PARTS:
            yield f"train.rates.{part}", "an unknown part", f"some of {', '.join(PARTS)}", "Correct it"
        if not (rate > 0 and math.isfinite(rate)):
            yield f"train.rates.{part}", rate, "a positive number", "Leave a part out to freeze it"
        if train.min_lr > rate:
            yield "train.min_lr", train.min_lr, f"at most {rate}, the rate of {part}", "Lower it"
    if not train.rates:
        yield "train.rates", "none", f"a rate for some of {', '.join(PARTS)}", "Nothing is trained otherwise"
    if train.epochs is not None and train.max_steps is not None:
        yield "train.max_steps", f"{train.max_steps} beside train.epochs", "one of the two", "Set the other to null"
    positive = ("batch_size", "per_device_batch_size", "max_steps", "log_every", "save_every", "keep")
    for name, value in ((name, getattr(train, name)) for name in positive):
        if value is not None and value < 1:
            yield f"train.{name}", value, "an integer from 1 on", "Correct it"
    if train.epochs is not None and not (train.epochs > 0 and math.isfinite(train.epochs)):
        yield "train.epochs", train.epochs, "a positive number", "Correct it"
    for name in ("warmup", "min_lr", "weight_decay", "max_grad_norm", "non_finite_budget"):
        value = getattr(train, name)
        if not (value >= 0 and math.isfinite(value)):
            yield f"train.{name}", value, "a number from 0 on", "Correct it"
    if train.warmup > 1 and train.warmup != int(train.warmup):
        yield "train.warmup", train.warmup, "a number of steps, or a share of them below 1", "Round it"
    if recipe.data.max_length is not None and recipe.data.max_length < 1:
        yield "data.max_length", recipe.data.max_length, "an integer from 1 on", "Correct it, or set it to null"
    if recipe.data.cap < 0 or (isinstance(recipe.data.cap, float) and recipe.data.cap > 1):
        yield "data.cap", recipe.data.cap, "a number from 0 on, or a share from 0.0 to 1.0", "Write 0.01 for 1 %"
    for name in recipe.trainer:
        if name in DECIDED:
            yield f"trainer.{name}", "what the recipe decides itself", "other arguments", f"See {DECIDED[name]}"
    if lora is not None:
        yield from _lora_contradictions(recipe, lora)


def _model_contradictions(model: ModelRecipe) -> Iterator[tuple[str, object, str, str]]:
    given = [entry.name for entry in fields(model) if getattr(model, entry.name) is not None]
    if model.checkpoint is not None and len(given) > 1:
        others = ", ".join(name for name in given if name != "checkpoint")
        yield "model.checkpoint", f"one beside {others}", "it alone, as it says these itself", "Remove one or the other"
    for name in ("vision", "text"):
        if model.checkpoint is None and name not in given:
            remedy = f"Pass --set model.{name}=..., or model.checkpoint=FOLDER for an earlier stage's result"
            yield f"model.{name}", "nothing", "a folder or hub name", remedy
    if model.depth is not None and not 0 < model.depth <= 1:
        yield "model.depth", model.depth, "a fraction of the depth in (0, 1]", "Correct it"


def _lora_contradictions(recipe: Recipe, lora: LoraRecipe) -> Iterator[tuple[str, object, str, str]]:
    if "llm" not in recipe.train.rates:
        yield "lora", "adapters for a frozen LLM", "a rate in train.rates.llm", "Add one, or set lora to null"
    if lora.r < 1:
        yield "lora.r", lora.r, "an integer from 1 on", "Correct it"
    if not 0 <= lora.dropout < 1:
        yield "lora.dropout", lora.dropout, "a share in [0, 1)", "Correct it"
    if not lora.targets:
        yield "lora.targets", "none", f"names of layers, such as {', '.join(LINEAR[:2])}", "Leave it out for all linear ones"
    if not lora.merge and recipe.model.checkpoint is None:
        remedy = "Set lora.merge to true, or begin with model.checkpoint"
        yield "lora.merge", "false for a model that is put together here", "true, as its new parts lie nowhere else", remedy
    if lora.merge and (recipe.trainer.get("fsdp") or recipe.trainer.get("deepspeed")):
        yield "lora.merge", "true with sharded parameters", "false", "Merge the adapter afterwards, with PEFT"
