"""What prepares images and prompts for a LLaVA-style model: :func:`build_processor`, :func:`check_processor`."""

from __future__ import annotations

import copy
import logging
import os
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import AutoTokenizer, LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerBase
from transformers.image_processing_base import ImageProcessingMixin
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, SizeDict
from transformers.tokenization_utils_base import AddedToken

from laco_kernels.errors import complaint
from laco_kernels.hf.chat import CHAT_FORMATS, chat_format_of
from laco_kernels.hf.encoders import FAMILIES
from laco_kernels.hf.image_tokens import ImageTokens, image_tokens, prefix_tokens_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

logger = logging.getLogger(__name__)

#: Rows of an embedding that has to grow are rounded up to a multiple of this, which matrix products like.
ROWS = 64
#: What pads where a tokenizer does not say, in the order of preference: of Llama 3, of Vicuna's relatives, of Llama 2.
PADDING = ("<|finetune_right_pad_id|>", "<pad>", "<|endoftext|>", "<unk>")
BUILD_ONE = "Build one with laco_kernels.hf.build_processor(model, tokenizer)"


def build_processor(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase | str | os.PathLike[str],
    image_processor: Any = None,
    *,
    image_token: str | None = None,
    chat_format: str | None = None,
) -> LlavaProcessor:
    """Build a stock ``LlavaProcessor`` whose prompts have as many placeholders as an image has tokens in ``model``.

    It counts ``(height // patch_size) * (width // patch_size)``; with a ``patch_size`` that gives the model's number for
    the image size that its encoder is made for, so also for odd grids (27 for SigLIP's 384 pixels: 14 x 14). Where no
    ``patch_size`` does, as for learned queries, the number is a constant, ``num_additional_image_tokens``.

    Several images, or the frames of a video, are several images in a message.

    What the model and the tokenizer lack is put right in place, and logged: the image token as a special token, rows of the
    embedding for it (their values never matter in the input; in the output they start as the mean of all rows), a padding
    token, and what ends a turn among the tokens that end generation. The tokenizer pads on the left, as batches that
    generate need it.

    Args:
        model: from :func:`build_llava`, or a stock LLaVA with one of the four encoders, compressed or not.
        tokenizer: that of the LLM, or its local folder or hub name.
        image_processor: makes images of the size that the encoder is made for, as ``pixel_values`` alone; or a local folder
            or hub name. Unless given, the one of the encoder's family, in the variant that needs no torchvision. It is copied.
        image_token: what stands for an image in a prompt; the tokenizer's own unless given, ``"<image>"`` where it has none.
        chat_format: ``"chatml"`` (Qwen2, Qwen2.5), ``"llama3"`` or ``"vicuna"``; the one whose tokens the tokenizer has
            unless given.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: the image processor makes something else than the encoder takes.
        RuntimeError: a checkpoint cannot be read.
    """
    expected = image_tokens(_llava(model))
    if isinstance(tokenizer, (str, os.PathLike)):
        tokenizer = _load_tokenizer(os.fspath(tokenizer))
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        remedy = "Pass AutoTokenizer.from_pretrained(...)"
        raise TypeError(complaint("tokenizer", type(tokenizer).__name__, "a tokenizer of transformers", remedy))
    own = getattr(tokenizer, "image_token", None)
    if own is not None and image_token not in (None, own):
        raise ValueError(complaint("image_token", repr(image_token), f"{own!r}, the tokenizer's", "Leave image_token out"))
    image_token = image_token or own or "<image>"
    chat_format = chat_format_of(tokenizer) if chat_format is None else chat_format
    if chat_format not in CHAT_FORMATS:
        raise ValueError(complaint("chat_format", repr(chat_format), f"one of {', '.join(CHAT_FORMATS)}", "Pass one of these"))
    if image_processor is None:
        image_processor = _usual_image_processor(model.config.vision_config, expected)
    elif isinstance(image_processor, (str, os.PathLike)):
        image_processor = load_image_processor(os.fspath(image_processor), "image_processor")
    else:
        image_processor = copy.deepcopy(image_processor)
    height, width = expected.image_size
    if getattr(image_processor, "crop_size", None) is None:
        # What transformers looks at to count placeholders without an image.
        image_processor.crop_size = SizeDict(height=height, width=width)
    _check_images(image_processor, expected)

    _teach(model, tokenizer, image_token, chat_format)
    strategy = model.config.vision_feature_select_strategy
    kept = 0 if hasattr(model.model.multi_modal_projector, "compressor") else prefix_tokens_of(model.config.vision_config)
    kept -= kept > 0 and strategy == "default"
    patch_size = patch_size_for(height, width, expected.tokens - kept)
    constant = kept if patch_size is not None else expected.tokens
    processor = LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=max(height, width) + 1 if patch_size is None else patch_size,
        vision_feature_select_strategy=strategy,
        chat_template=CHAT_FORMATS[chat_format].template.replace("<image>", image_token),
        image_token=image_token,
        num_additional_image_tokens=constant + (strategy == "default"),  # which the stock count takes off again
    )
    check_processor(model, processor)
    return processor


def patch_size_for(height: int, width: int, tokens: int) -> int | None:
    """Return the largest ``p`` with ``(height // p) * (width // p) == tokens``; ``None`` where there is none."""
    sizes = range(min(height, width), 0, -1)
    return next((size for size in sizes if (height // size) * (width // size) == tokens), None)


def check_processor(model: LlavaForConditionalGeneration, processor: Any) -> ImageTokens:
    """Return what an image becomes, or say in one line what is wrong between ``model`` and ``processor``.

    Looked at on a wide and on a high image: the size and the keys that come out of the image processor; the image token,
    which has to be one token, the model's, and a row of its embedding; the placeholders in a prompt, and those counted
    without an image; and that the chat template writes one image token an image.

    Raises:
        TypeError: ``model`` is no LLaVA with a known encoder, or ``processor`` no ``LlavaProcessor``.
        ValueError: something does not fit.
    """
    expected = image_tokens(_llava(model))
    if not isinstance(processor, LlavaProcessor):
        raise TypeError(complaint("processor", type(processor).__name__, "a LlavaProcessor", BUILD_ONE))
    if model.config.vision_feature_select_strategy == "default" and not prefix_tokens_of(model.config.vision_config):
        remedy = "Set it in model.config and in the processor; the first patch is dropped otherwise"
        raise ValueError(
            complaint("vision_feature_select_strategy", "'default'", "'full', as the encoder has no class token", remedy)
        )
    _check_images(processor.image_processor, expected)
    token, tokenizer = processor.image_token, processor.tokenizer
    numbers = tokenizer.encode(token, add_special_tokens=False)
    if len(numbers) != 1:
        raise ValueError(complaint("image_token", f"{token!r}, which is {len(numbers)} tokens", "one special token", BUILD_ONE))
    if numbers[0] != model.config.image_token_id:
        given = f"{numbers[0]} for {token!r}"
        remedy = f"Set model.config.image_token_id = {numbers[0]}, or call laco_kernels.hf.build_processor again"
        raise ValueError(complaint("image_token_id", given, f"{model.config.image_token_id}, the model's", remedy))
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        remedy = f"Call model.resize_token_embeddings({len(tokenizer)})"
        raise ValueError(
            complaint("tokenizer", f"{len(tokenizer)} tokens", f"at most {rows}, the rows of the embedding", remedy)
        )
    for image in _samples(expected):
        count = processor(images=image, text=token)["input_ids"][0].count(numbers[0])
        if count != expected.tokens:
            raise ValueError(complaint("processor", f"{count} placeholders an image", f"{expected.tokens}", BUILD_ONE))
    _check_count_without_image(processor, expected)
    if processor.chat_template is not None:
        written = processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}])
        if written.count(token) != 1:
            given = f"one that writes {written.count(token)} image tokens for an image"
            raise ValueError(complaint("chat_template", given, "one that writes one", BUILD_ONE))
    return expected


def _check_count_without_image(processor: LlavaProcessor, expected: ImageTokens) -> None:
    try:
        counted = processor._get_num_multimodal_tokens([list(expected.image_size)]).num_image_tokens[0]
    except (AttributeError, TypeError, KeyError) as error:
        given = f"an image processor without one ({error})"
        height, width = expected.image_size
        remedy = f"Set processor.image_processor.crop_size = {{'height': {height}, 'width': {width}}}"
        raise ValueError(
            complaint("crop_size", given, "the size of images, by which placeholders are counted", remedy)
        ) from error
    if counted != expected.tokens:
        given = f"{counted} placeholders counted without an image"
        raise ValueError(complaint("processor", given, f"{expected.tokens}", BUILD_ONE))


def _check_images(image_processor: Any, expected: ImageTokens) -> None:
    remedy = "Pass another image_processor, or none for that of the encoder"
    for image in _samples(expected):
        made = image_processor(images=[image], return_tensors="pt")
        if list(made) != ["pixel_values"]:
            given = f"one that returns {', '.join(made)}"
            raise ValueError(complaint("image_processor", given, "one that returns pixel_values alone", remedy))
        shape = tuple(made["pixel_values"].shape)
        if shape != (1, 3, *expected.image_size):
            given = f"one that turns {image.width} x {image.height} pixels into {' x '.join(map(str, shape))}"
            wanted = "1 x 3 x {} x {}, what the encoder is made for".format(*expected.image_size)
            raise ValueError(complaint("image_processor", given, wanted, remedy))


def _samples(expected: ImageTokens) -> list[Any]:
    """Return a wide and a high image, black, neither of which has the size that the encoder is made for."""
    from PIL import Image

    height, width = expected.image_size
    return [Image.new("RGB", (2 * width + 1, height)), Image.new("RGB", (width, 2 * height + 1))]


def _llava(model: Any) -> LlavaForConditionalGeneration:
    if not isinstance(model, LlavaForConditionalGeneration):
        remedy = "Pass the model itself: before torch.compile, and out of PEFT by get_base_model()"
        raise TypeError(complaint("model", type(model).__name__, "a LlavaForConditionalGeneration", remedy))
    return model


def _teach(
    model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, image_token: str, chat_format: str
) -> None:
    """Give tokenizer and model what they lack, and say what."""
    if len(tokenizer.encode(image_token, add_special_tokens=False)) != 1 or image_token not in tokenizer.get_vocab():
        tokenizer.add_tokens([AddedToken(image_token, normalized=False, special=True)], special_tokens=True)
        logger.warning("Added %r to the tokenizer.", image_token)
    if tokenizer.pad_token is None:
        vocabulary = tokenizer.get_vocab()
        padding = next((token for token in PADDING if token in vocabulary), tokenizer.eos_token)
        if padding is not None:
            tokenizer.pad_token = padding
            logger.warning("The tokenizer had no padding token; it pads with %r.", padding)
    tokenizer.padding_side = "left"
    tokenizer.init_kwargs["padding_side"] = "left"  # what is saved
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        _grow(model, -(-len(tokenizer) // ROWS) * ROWS)
        grown = model.get_input_embeddings().weight.shape[0]
        logger.warning("The embedding grew from %d to %d rows for a tokenizer of %d.", rows, grown, len(tokenizer))
    model.config.image_token_id = tokenizer.convert_tokens_to_ids(image_token)

    generation: Any = model.generation_config
    if generation.pad_token_id is None:
        generation.pad_token_id = tokenizer.pad_token_id
    ends = generation.eos_token_id
    ends = [] if ends is None else list(ends) if isinstance(ends, (list, tuple)) else [ends]
    for mark in [*CHAT_FORMATS[chat_format].marks[-1:], tokenizer.eos_token]:
        if mark is not None and tokenizer.convert_tokens_to_ids(mark) not in ends:
            ends.append(tokenizer.convert_tokens_to_ids(mark))
    generation.eos_token_id = ends or None


@torch.no_grad()
def _grow(model: LlavaForConditionalGeneration, rows: int) -> None:
    """Lengthen embedding and head; new rows are the mean of the old ones, so that no new token is likely to be generated."""
    before = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(rows, mean_resizing=False)
    for weight in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        weight[before:] = weight[:before].float().mean(0).to(weight.dtype)


def _load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # a damaged file raises whatever its reader raises
        given = f"{source!r} ({(str(error).strip() or type(error).__name__).splitlines()[0]})"
        expected = "a local folder or hub name with a tokenizer_config.json"
        raise RuntimeError(complaint("tokenizer", given, expected, "Save the tokenizer there with save_pretrained")) from error
    return tokenizer


def _usual_image_processor(vision: PreTrainedConfig, expected: ImageTokens) -> Any:
    """Return an image processor as checkpoints of the encoder's family have it."""
    family = next(
        stock.__name__ for stock, (compressed, _) in FAMILIES.items() if type(vision) in (stock.config_class, compressed)
    )
    height, width = expected.image_size
    size = {"height": height, "width": width}
    if family == "InternVLVisionModel":
        return transformers.SiglipImageProcessorPil(size=size, image_mean=IMAGENET_DEFAULT_MEAN, image_std=IMAGENET_DEFAULT_STD)
    if family == "SiglipVisionModel":
        return transformers.SiglipImageProcessorPil(size=size)
    if height != width:
        return transformers.CLIPImageProcessorPil(size=size, do_center_crop=False, crop_size=size)
    return transformers.CLIPImageProcessorPil(size={"shortest_edge": height}, crop_size=size)


def load_image_processor(source: str, argument: str = "encoder") -> Any:
    """Load the image processor of a checkpoint's folder or hub name, in the variant that needs no torchvision.

    Args:
        source: a local folder or hub name.
        argument: what a complaint calls it.

    Raises:
        RuntimeError: if there is no processor that can be loaded.
    """
    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(source)
        kind = str(settings.get("image_processor_type") or settings["feature_extractor_type"])
        name = kind.removesuffix("Fast").replace("FeatureExtractor", "ImageProcessor") + "Pil"
        return getattr(transformers, name).from_pretrained(source)
    except Exception as error:  # a damaged file raises whatever its reader raises
        given = f"{source!r} ({(str(error).strip() or type(error).__name__).splitlines()[0]})"
        expected = "a checkpoint with a preprocessor_config.json that names an image processor of transformers"
        raise RuntimeError(complaint(argument, given, expected, "Save the image processor beside the model")) from error
