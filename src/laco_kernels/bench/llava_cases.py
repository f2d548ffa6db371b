"""The multimodal models that are generated with and trained in the benchmark, and what the papers report for them.

LaCo's are AIMv2-L in front of Qwen2.5-0.5B with a merge inside; STF's are LLaVA-1.5, CLIP-L-336 in front of Vicuna or Llama,
against MBTF + STF as the projector. Weights are random, on which time does not depend. Without a GPU both are cut in depth.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from laco_kernels.bench import cases, prefill
from laco_kernels.bench.cases import LLAVA, STF
from laco_kernels.errors import complaint
from laco_kernels.hf.build_llava import build_llava
from laco_kernels.hf.compress import layer_at
from laco_kernels.hf.points import sides
from laco_kernels.ops.checks import check_choice

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import LlavaForConditionalGeneration

METHODS = {"laco": ("aimv2-l-336", "qwen2.5-0.5b"), "stf": ("clip-l-336", "vicuna-7b")}
IMAGE_TOKEN = 5  # any number of the vocabulary: prompts are drawn from those behind it

# Layers of encoder and LLM where there is no GPU: depths of 1/12 need twelve layers, MBTF reads eight blocks.
WITHOUT_GPU = {"laco": (12, 2), "stf": (8, 1)}
TINY_VISION = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "image_size": 56}
TINY_TEXT = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 384}


@dataclass(frozen=True)
class Setting:
    """Which model, and how much of it.

    Args:
        method: ``"laco"`` or ``"stf"``: where tokens are compressed.
        encoder, llm: names of shapes that the package carries.
        encoder_layers, llm_layers: how many of their layers are there; ``None`` is all.
        tiny: shrunken in every other respect, too.
    """

    method: str
    encoder: str
    llm: str
    encoder_layers: int | None = None
    llm_layers: int | None = None
    tiny: bool = False

    @property
    def name(self) -> str:
        """What rows and files are called by."""
        return f"{'tiny-' if self.tiny else ''}{self.encoder}+{self.llm}"

    @property
    def configs(self) -> tuple[Any, Any]:
        """The configs of encoder and LLM."""
        vision = AutoConfig.from_pretrained(cases.FOLDER / self.encoder)
        text = AutoConfig.from_pretrained(prefill.FOLDER / self.llm)
        for config, layers, small in ((vision, self.encoder_layers, TINY_VISION), (text, self.llm_layers, TINY_TEXT)):
            config.update({**(small if self.tiny else {}), **({"num_hidden_layers": layers} if layers else {})})
        text.update({"layer_types": None} if text.model_type == "qwen2" else {})
        return vision, AutoConfig.for_model(**text.to_dict())

    @property
    def depth(self) -> dict[str, list[int]]:
        """Layers that are there, and layers that the model has, of encoder and LLM."""
        whole = Setting(self.method, self.encoder, self.llm).configs
        return {
            part: [here.num_hidden_layers, full.num_hidden_layers]
            for part, here, full in zip(("encoder", "llm"), self.configs, whole, strict=True)
        }

    @property
    def is_reduced(self) -> bool:
        """Whether layers are missing."""
        return any(here < full for here, full in self.depth.values())


def setting(
    method: str,
    device: torch.device,
    *,
    encoder: str | None = None,
    llm: str | None = None,
    encoder_layers: int | None = None,
    llm_layers: int | None = None,
    tiny: bool = False,
) -> Setting:
    """Return a setting: the papers' shapes unless others are named, cut in depth where ``device`` is no GPU.

    Raises:
        ValueError: the method or a shape is unknown, or layers are fewer than the method needs or more than the shape has.
    """
    check_choice("method", method, tuple(METHODS))
    shapes = METHODS[method]
    encoder, llm = encoder or shapes[0], llm or shapes[1]
    check_choice("encoder", encoder, tuple(cases.encoder_names()))
    check_choice("llm", llm, tuple(prefill.llm_names()))
    cut = (None, None) if device.type == "cuda" and not tiny else WITHOUT_GPU[method]
    chosen = Setting(method, encoder, llm, encoder_layers or cut[0], llm_layers or cut[1], tiny)
    for name, (here, full), least in zip(chosen.depth, chosen.depth.values(), (8 if method == "stf" else 2, 1), strict=True):
        if not least <= here <= full:
            raise ValueError(complaint(f"{name}_layers", here, f"{least} to {full} layers", "Leave it out"))
    return chosen


def reduction(depth: dict[str, list[int]]) -> str:
    """Say which layers are missing, such as ``8 of 24 encoder layers and 1 of 32 LLM layers``; empty where none is."""
    if all(here == full for here, full in depth.values()):
        return ""
    named = {"encoder": "encoder", "llm": "LLM"}
    return " and ".join(f"{here} of {full} {named[part]} layers" for part, (here, full) in depth.items())


def subjects(method: str, depths: Sequence[Fraction] = ()) -> tuple[str, ...]:
    """Return what is compared, first what the others are measured against: ``@1`` and other depths, or LLaVA-1.5 and STF."""
    if method == "stf":
        return (LLAVA, STF)
    return tuple(f"@{depth}" for depth in sorted({*depths, Fraction(1)}, reverse=True))


def build(
    chosen: Setting, names: Sequence[str], device: torch.device, dtype: torch.dtype
) -> dict[str, LlavaForConditionalGeneration]:
    """Return a model for each subject, in evaluation mode; encoder and LLM have the same weights in all of them."""
    vision, text = chosen.configs
    torch.manual_seed(0)
    with torch.device(device):  # weights are drawn where and in the precision in which they stay
        tower = AutoModel.from_config(vision, dtype=dtype).eval()
        language = AutoModelForCausalLM.from_config(text, dtype=dtype).eval()
        _sharpen(language)
        models = {name: _model(chosen, name, tower, language).eval() for name in names}
    for model in models.values():
        model.generation_config.eos_token_id = None  # as many tokens as asked for
    return models


@torch.no_grad()
def _sharpen(language: Any) -> None:
    """Draw queries and keys so that scores of attention are spread by 1.4, whatever the width.

    In narrow LLMs, as they are drawn, every token attends to all others nearly alike: a wrong position or a gap in the cache
    would lie below bfloat16's rounding, where the correctness tick could not see it.
    """
    for layer in language.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            projection.weight.normal_(std=1.2 * projection.in_features**-0.5)


def _model(chosen: Setting, name: str, tower: Any, language: Any) -> LlavaForConditionalGeneration:
    inside: dict[str, Any] = {}
    if chosen.method == "laco":
        # Not the zero start: the correctness tick shall see the MLP.
        inside = {"layer": layer_at(Fraction(name[1:]), tower.config.num_hidden_layers)}
        inside["compressor_options"] = {"zero_init_last": False}
    inside |= {"projector": "mbtf+stf"} if name == STF else {}
    # A shell takes the tower for its own, and sets things in the config.
    return build_llava(twin(tower), language, **inside, image_token_id=IMAGE_TOKEN)


def twin(module: Any) -> Any:
    """Copy a module's structure and share its tensors."""
    return copy.deepcopy(module, {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())})


@dataclass(frozen=True)
class Prompt:
    """Token ids ``[batch, tokens]``, the image's placeholders among them, and pixel values ``[batch, 3, height, width]``."""

    ids: torch.Tensor
    pixels: torch.Tensor

    @property
    def image(self) -> slice:
        """Where the placeholders are, the same in every row."""
        places = (self.ids[0] == IMAGE_TOKEN).nonzero().flatten().tolist()
        return slice(places[0], places[-1] + 1)

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """What a model of transformers is called with."""
        return {"input_ids": self.ids, "pixel_values": self.pixels, "attention_mask": torch.ones_like(self.ids)}


def prompt(model: LlavaForConditionalGeneration, batch: int, text_tokens: int) -> Prompt:
    """Draw a prompt for ``model``: one image a row behind the first token, ``text_tokens`` around it."""
    if text_tokens < 2:
        raise ValueError(complaint("text_tokens", text_tokens, "at least 2, one before and one behind the image", "Pass 64"))
    vision: Any = model.config.vision_config
    device, vocabulary = model.device, cast("Any", model.config.text_config).vocab_size
    drawn = torch.Generator().manual_seed(1)
    text = torch.randint(IMAGE_TOKEN + 1, vocabulary, (batch, text_tokens), generator=drawn)
    image = torch.full((batch, model.config.image_seq_length), IMAGE_TOKEN)
    pixels = torch.randn(batch, 3, *sides(vision.image_size), generator=drawn)
    ids = torch.cat([text[:, :1], image, text[:, 1:]], 1)
    return Prompt(ids.to(device), pixels.to(device, model.dtype))


def goal(suite: str, chosen: Setting, **facts: Any) -> dict[str, Any] | None:
    """Return the goal of a run on an H200 as rows keep it; ``None`` where the run is not the one that the goal is about.

    ``of`` is the ratio in question and ``against`` what it is measured against: eager, of the first subject.
    """
    standard = (chosen.encoder, chosen.llm) == METHODS[chosen.method] and not chosen.tiny and not chosen.is_reduced
    wanted: dict[tuple[str, str], tuple[dict[str, Any], str, float]] = {
        ("generate", "laco"): ({"batch": 1, "new_tokens": 128}, "tps", 10.0),
        ("generate", "stf"): ({"batch": 16, "text_tokens": 64}, "ttft", 3.5),
        ("step", "laco"): ({"stage": "stage2", "text_tokens": 128}, "step", 1.6),
        ("step", "stf"): ({"stage": "finetune", "text_tokens": 128}, "step", 2.0),
    }
    about, of, ratio = wanted[suite, chosen.method]
    if not standard or any(facts.get(name) != value for name, value in about.items()):
        return None
    return {"ratio": ratio, "of": of, "against": f"eager {subjects(chosen.method)[0]}"}
