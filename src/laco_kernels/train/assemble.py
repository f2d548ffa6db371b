"""From a recipe to a model whose parts are frozen or trained, and its processor: :func:`load_model`, :func:`prepare_parts`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import LlavaForConditionalGeneration, set_seed

import laco_kernels.hf as hf
from laco_kernels.errors import complaint
from laco_kernels.hf.answer import load_pair
from laco_kernels.hf.build_llava import STOCK_PROJECTOR
from laco_kernels.hf.points import CompressionConfig, as_list, points_of
from laco_kernels.train.parts import freeze, part_of

if TYPE_CHECKING:
    from transformers import LlavaProcessor

    from laco_kernels.train.recipe import LoraRecipe, ModelRecipe, Recipe

#: Where PEFT keeps the weights that a module had before it was trained whole.
ORIGINAL = "original_module"


def load_model(recipe: ModelRecipe, seed: int) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Return the model in float32, new parts drawn with ``seed``, and its processor.

    Raises:
        TypeError, ValueError: the recipe or a checkpoint does not describe a LLaVA-style model with a known encoder and LLM.
        RuntimeError: a checkpoint cannot be read.
    """
    set_seed(seed)  # the same on all devices
    if recipe.checkpoint is not None:
        return load_pair(recipe.checkpoint, argument="checkpoint")
    assert recipe.vision is not None
    assert recipe.text is not None  # load_recipe refuses it otherwise
    model = hf.build_llava(recipe.vision, recipe.text, dtype=torch.float32, **build_options(recipe))
    processor = hf.build_processor(model, recipe.text, recipe.image_processor, chat_format=recipe.chat_format)
    return model, processor


def build_options(recipe: ModelRecipe) -> dict[str, Any]:
    """Return what a recipe says to :func:`laco_kernels.hf.build_llava` beside encoder and LLM."""
    layers = recipe.vision_feature_layer
    names = ("compressor", "depth", "layer", "ratio", "compressor_options", "projector_options")
    return {name: getattr(recipe, name) for name in names} | {
        "projector": recipe.projector or STOCK_PROJECTOR,
        "vision_feature_layer": list(layers) if isinstance(layers, tuple) else layers,
    }


def prepare_parts(model: LlavaForConditionalGeneration, recipe: Recipe) -> Any:
    """Freeze the parts without a rate, put adapters into the LLM where the recipe has ``lora``, and return the model to train.

    With adapters it is a ``PeftModel``, and the other trained parts are among its ``modules_to_save``.

    Raises:
        ValueError: the model has no such part, or LoRA no such layers.
        ModuleNotFoundError: there is no PEFT.
    """
    freeze(model, recipe.train.rates)
    return model if recipe.lora is None else _adapt(model, recipe.lora, set(recipe.train.rates))


def _adapt(model: LlavaForConditionalGeneration, lora: LoraRecipe, trained: set[str]) -> Any:
    from peft import LoraConfig, get_peft_model

    whole = {"projector": "multi_modal_projector"} | (
        {"encoder": "vision_tower"} if "encoder" in trained else {"merge": "merge"}  # the encoder has the merge in it
    )
    targets = rf".*language_model\..*\b({'|'.join(lora.targets)})"
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        modules_to_save=[name for part, name in whole.items() if part in trained] or None,
    )
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:  # "Target modules ... not found in the base model."
        given, expected = ", ".join(lora.targets), "names of linear layers of the LLM"
        raise ValueError(complaint("lora.targets", f"{given} ({error})", expected, "Correct them")) from error
    for name, parameter in adapted.named_parameters():
        part = part_of(name)
        adapter = ".lora_" in name
        parameter.requires_grad_(adapter if part == "llm" else part in trained and ORIGINAL not in name.split("."))
    return adapted


def describe(model: LlavaForConditionalGeneration) -> str:
    """Return what reduces the tokens of a model's images, and where."""
    vision, inside = model.config.vision_config, ""
    if isinstance(vision, CompressionConfig):
        name = vision.compression["compressor"]
        places = [f"{ratio} x {ratio} after layer {layer}" for layer, ratio in points_of(vision)]
        inside = f"{name}, {' and '.join(places)} of {vision.num_hidden_layers}; "
    projector = getattr(model.config, "projector", None) or {"compressor": STOCK_PROJECTOR, "ratio": 1}
    blocks = as_list(model.config.vision_feature_layer)
    reading = f", reading layers {', '.join(map(str, blocks))}" if len(blocks) > 1 else ""
    ratio = f", {projector['ratio']} x {projector['ratio']}" if projector["ratio"] > 1 else ""
    return f"{inside}projector {projector['compressor']}{ratio}{reading}"
