"""Put a vision encoder, a projector and an LLM together: :func:`build_llava`."""

from __future__ import annotations

import copy
import inspect
import os
from fractions import Fraction
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
)

from laco_kernels.errors import complaint
from laco_kernels.geometry import integer
from laco_kernels.hf.compress import compress, load_stock, read_config, resolve, stock_class, unreadable
from laco_kernels.hf.encoders import LacoCLIPVisionModel
from laco_kernels.hf.image_tokens import image_tokens, patches_at, prefix_tokens_of, state_number
from laco_kernels.hf.llava import CompressingProjector, LacoLlavaConfig, LacoLlavaForConditionalGeneration, build_projecting
from laco_kernels.hf.points import CompressionConfig, as_list, points_of, sides
from laco_kernels.nn import sampled_blocks
from laco_kernels.nn.compressors import find_compressor
from laco_kernels.nn.compressors.mbtf import Mbtf, MbtfStf
from laco_kernels.nn.compressors.token_packer import HIDDEN_STATES, TokenPacker

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from laco_kernels.nn import Compressor

#: Model types of the LLMs that are supported: Qwen2 and Qwen2.5, Llama and Vicuna.
TEXT_TYPES = ("qwen2", "llama")
#: LLaVA-1.5's projector, which the stock model has; it reduces nothing.
STOCK_PROJECTOR = "mlp2x_gelu"
#: An image token's number that no token has, until there is a tokenizer.
NO_TOKEN = -1

Part: TypeAlias = PreTrainedModel | PreTrainedConfig | str | os.PathLike[str]


def build_llava(
    vision: Part,
    text: Part,
    *,
    compressor: str | None = None,
    depth: float | Fraction | None = None,
    layer: int | None = None,
    ratio: int | None = None,
    projector: str = STOCK_PROJECTOR,
    compressor_options: Mapping[str, Any] | None = None,
    projector_options: Mapping[str, Any] | None = None,
    vision_feature_layer: int | Sequence[int] | None = None,
    image_token_id: int | None = None,
    dtype: torch.dtype | None = None,
) -> LlavaForConditionalGeneration:
    """Build a LLaVA-style model whose visual tokens are compressed inside the encoder, by the projector, or by neither.

    With LLaVA-1.5's projector, ``"mlp2x_gelu"``, it is a stock ``LlavaForConditionalGeneration``, whose encoder may be a
    compressed one; with any other projector a :class:`LacoLlavaForConditionalGeneration`. Both are saved by
    ``save_pretrained`` and read by ``AutoModelForImageTextToText.from_pretrained`` wherever :mod:`laco_kernels.hf` has been
    imported. :func:`build_processor` makes what prepares images and prompts for it.

    Args:
        vision: an AIMv2, SigLIP, InternViT or CLIP vision model, compressed (:func:`compress`) or not; a config of one
            (random weights); or a local folder or hub name of a checkpoint in safetensors format, as :func:`compress`.
        text: a ``Qwen2ForCausalLM`` (Qwen2, Qwen2.5) or ``LlamaForCausalLM`` (Llama, Vicuna), a config or a checkpoint of one.
        compressor: what merges tokens inside the encoder, as :func:`compress`; ``"laco"`` where only ``depth`` or ``layer``
            is given, and where none of the three is given the encoder stays as it is.
        depth, layer: where in the encoder, as :func:`compress`.
        ratio: side of a window in patches, 2 unless given: of ``compressor``, or of the projector where nothing is
            compressed inside.
        projector: one of :data:`laco_kernels.nn.COMPRESSORS` that may stand behind an encoder and reads nothing but tokens.
            ``"mbtf+stf"`` is the STF paper's. One that keeps the width of its tokens (``"mbtf"``) gets a two-layer MLP.
        compressor_options, projector_options: options of these two. Where both reduce, ``projector_options`` has a
            ``"ratio"`` of its own.
        vision_feature_layer: which ``hidden_states`` the projector reads, as LLaVA counts them: 0 the embeddings, -1 the
            last layer's, before the final norm. Unless given, what the projector is defined on where it reads several;
            else -2 for CLIP, as LLaVA-1.5, where that is not in front of a merge; else -1.
        image_token_id: the token that stands for a piece of an image in ``input_ids``. Unless given the model takes no
            images before :func:`build_processor` has set it.
        dtype: cast all parts, in place. Needed where they differ.

    Returns:
        The model. Of ``vision`` and ``text`` the very modules are used where these are models, so weights, hooks, frozen
        parameters and training mode stay; parts made of a config are on the device and in the dtype of the other one. The
        projector is new. ``config.image_seq_length`` is the number of tokens that an image has.

    Raises:
        TypeError: a part or an option is of the wrong kind.
        ValueError: an argument is out of range or contradicts another one, parts differ in dtype or device, or the projector
            would read tokens in front of a merge.
        RuntimeError: a checkpoint cannot be read, for instance a hub name without a network.
    """
    config, source = resolve("vision", vision)
    if not isinstance(config, CompressionConfig):
        stock_class("vision", config)
    text_config = _text_config(text)
    inside = _inside(compressor, depth, layer, compressor_options)
    kind, options = find_compressor(projector, "projector"), dict(projector_options or {})
    if kind.reduces and "ratio" not in options:
        if inside or isinstance(config, CompressionConfig):
            given = f"{projector!r} behind an encoder that is compressed inside"
            remedy = f"Pass projector={STOCK_PROJECTOR!r}, or projector_options={{'ratio': 2}} to compress twice"
            raise ValueError(complaint("projector", given, "a ratio of its own", remedy))
        options["ratio"] = 2 if ratio is None else ratio
    elif inside:
        inside["ratio"] = 2 if ratio is None else ratio
    elif ratio is not None:
        given = f"{ratio} with projector={projector!r} and nothing compressed inside"
        raise ValueError(complaint("ratio", given, "none, as nothing reduces", "Pass compressor='laco', or drop ratio"))

    # Everything is looked at before weights are touched.
    with torch.device("meta"):
        sketch = compress(config, **inside) if inside else _encoder(config, None)
        common = {
            "vision_config": sketch.config,
            "text_config": copy.deepcopy(text_config),
            "image_token_index": NO_TOKEN if image_token_id is None else int(integer("image_token_id", image_token_id, 0)),
            "vision_feature_select_strategy": "default" if prefix_tokens_of(sketch.config) else "full",
        }
        model_class: type[LlavaForConditionalGeneration] = LlavaForConditionalGeneration
        if projector == STOCK_PROJECTOR and not options:
            llava_config = LlavaConfig(**common, vision_feature_layer=_layers(sketch, None, vision_feature_layer))
        else:
            description = _description(projector, kind, sketch, options)
            reader = build_projecting(description, sketch.config, text_config.hidden_size)
            layers = _layers(sketch, reader, vision_feature_layer)
            llava_config = LacoLlavaConfig(**common, vision_feature_layer=layers, projector=description)
            CompressingProjector(llava_config)
            model_class = LacoLlavaForConditionalGeneration

    tower = _encoder(config, source)
    tower = compress(tower, **inside) if inside else tower
    language = _language(text, text_config)
    made = [part for part, given in ((tower, vision), (language, text)) if isinstance(given, PreTrainedConfig)]
    _agree(tower, language, made, dtype)
    return _assemble(model_class, llava_config, tower, language)


def _inside(
    compressor: str | None, depth: float | Fraction | None, layer: int | None, options: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return the arguments of :func:`compress`; none where nothing is to be compressed inside."""
    if compressor is None and depth is None and layer is None:
        if options:
            remedy = "Pass compressor='laco', or drop compressor_options"
            raise ValueError(complaint("compressor_options", dict(options), "none without a compressor", remedy))
        return {}
    return {"compressor": "laco" if compressor is None else compressor, "depth": depth, "layer": layer, **(options or {})}


def _assemble(
    model_class: type[LlavaForConditionalGeneration], config: LlavaConfig, tower: PreTrainedModel, language: Any
) -> LlavaForConditionalGeneration:
    """Build the model around the very modules of encoder and LLM; the projector's weights are new."""
    with torch.device("meta"):
        model = model_class(config)
    # The shell's constructor sets attention and dtype in configs that it takes for its own.
    model.config.vision_config, model.config.text_config = tower.config, language.config
    model.model.vision_tower = tower
    model.model.language_model = language.model
    model.lm_head = language.lm_head
    projector = model.model.multi_modal_projector.to_empty(device=language.device).to(language.dtype)
    if isinstance(projector, CompressingProjector):
        projector.reset_parameters()
    else:
        projector.apply(model._init_weights)
    model.config.dtype = language.dtype
    model.generation_config = copy.deepcopy(language.generation_config)
    for module in (model, model.model):
        module.training = language.training
    projector.train(language.training)
    model.config.image_seq_length = image_tokens(model).tokens
    return model


def _encoder(config: PreTrainedConfig, source: PreTrainedModel | str | None) -> PreTrainedModel:
    """Return the encoder itself, compressed already or stock; a subclass is refused, as it may do something else."""
    if isinstance(source, PreTrainedModel):
        if not isinstance(config, CompressionConfig) and type(source) is not stock_class("vision", config):
            remedy = "Pass the vision model inside it, such as model.vision_model"
            expected = f"a {stock_class('vision', config).__name__}"
            raise TypeError(complaint("vision", f"a {type(source).__name__}", expected, remedy))
        return source
    if source is None:
        return cast("PreTrainedModel", AutoModel.from_config(copy.deepcopy(config)))
    if not isinstance(config, CompressionConfig):
        return load_stock(source, "vision")
    try:
        return cast("PreTrainedModel", AutoModel.from_pretrained(source, use_safetensors=True, trust_remote_code=False))
    except Exception as error:  # a damaged file raises whatever its reader raises
        raise unreadable("vision", source, error) from error


def _text_config(text: object) -> PreTrainedConfig:
    expected = "a Qwen2ForCausalLM or LlamaForCausalLM, a config or a checkpoint of one"
    if isinstance(text, (PreTrainedModel, PreTrainedConfig)):
        config = text.config if isinstance(text, PreTrainedModel) else text
    elif isinstance(text, (str, os.PathLike)):
        config = read_config("text", os.fspath(text))
    else:
        remedy = "Pass the LLM itself: before torch.compile, and out of PEFT by merge_and_unload()"
        raise TypeError(complaint("text", type(text).__name__, expected, remedy))
    if config.model_type not in TEXT_TYPES:
        raise TypeError(complaint("text", f"a model of type {config.model_type!r}", expected, "Pass an LLM of these families"))
    if isinstance(text, PreTrainedModel) and not (hasattr(text, "lm_head") and hasattr(text, "model")):
        raise TypeError(complaint("text", f"a {type(text).__name__}", expected, "Pass the model with its language head"))
    return config


def _language(text: Part, config: PreTrainedConfig) -> PreTrainedModel:
    if isinstance(text, PreTrainedModel):
        return text
    if isinstance(text, PreTrainedConfig):
        return cast("PreTrainedModel", AutoModelForCausalLM.from_config(copy.deepcopy(config)))
    source = os.fspath(text)
    try:
        return cast(
            "PreTrainedModel", AutoModelForCausalLM.from_pretrained(source, use_safetensors=True, trust_remote_code=False)
        )
    except Exception as error:  # a damaged file raises whatever its reader raises
        raise unreadable("text", source, error) from error


def _agree(tower: PreTrainedModel, language: PreTrainedModel, made: list[PreTrainedModel], dtype: torch.dtype | None) -> None:
    """Bring the parts ``made`` of a config to the other one's dtype and device, and all to ``dtype``; refuse what differs."""
    if len(made) == 1:
        other = tower if made[0] is language else language
        made[0].to(device=other.device, dtype=other.dtype)
    if dtype is not None:
        tower.to(dtype)
        language.to(dtype)
    for what, one, other in (("dtype", tower.dtype, language.dtype), ("device", tower.device, language.device)):
        if one != other:
            given = f"{one} for the encoder and {other} for the LLM"
            remedy = "Pass dtype=torch.bfloat16, say, to cast both" if what == "dtype" else "Move one of them first"
            raise ValueError(complaint(what, given, "the same for both", remedy))


def _description(projector: str, kind: type[Compressor], tower: PreTrainedModel, options: dict[str, Any]) -> dict[str, Any]:
    """Return what a config says of a projector, complete with what the encoder decides."""
    ratio = options.pop("ratio", 1)
    if issubclass(kind, (Mbtf, MbtfStf)):
        options.setdefault("num_layers", tower.config.num_hidden_layers)
    if "grid" in inspect.signature(kind).parameters:
        state = tower.config.num_hidden_layers  # the grid is the same from the last merge on
        _, grid = patches_at(tower.config, getattr(tower, "merges", ()), *sides(tower.config.image_size), state)
        options.setdefault("grid", grid)
    options = {name: list(option) if isinstance(option, tuple) else option for name, option in options.items()}
    return {"compressor": projector, "ratio": ratio, "options": options}


def _layers(tower: PreTrainedModel, compressor: Compressor | None, given: int | Sequence[int] | None) -> int | list[int]:
    """Return the ``vision_feature_layer`` of the config, checked."""
    config = tower.config
    if given is not None:
        chosen: Any = list(given) if isinstance(given, (list, tuple)) else given
    elif compressor is None or compressor.num_blocks == 1:
        deepest = points_of(config)[-1][0] if isinstance(config, CompressionConfig) else 0
        is_clip = isinstance(tower, (CLIPVisionModel, LacoCLIPVisionModel))
        chosen = -2 if is_clip and deepest < config.num_hidden_layers else -1
    elif compressor.blocks is not None:
        chosen = list(compressor.blocks)
    elif isinstance(compressor, TokenPacker) and (config.num_hidden_layers, compressor.num_blocks) == (24, len(HIDDEN_STATES)):
        chosen = list(HIDDEN_STATES)
    else:
        chosen = list(sampled_blocks(config.num_hidden_layers, compressor.num_blocks))
    for layer in as_list(chosen):
        state_number(config, layer)
    return cast("int | list[int]", chosen)
