"""Questions about images, answered by a LLaVA-style model that was saved with its processor."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration, TextStreamer

from laco_kernels.errors import complaint
from laco_kernels.hf.compress import read_config, unreadable
from laco_kernels.hf.processor import check_processor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from PIL import Image
    from transformers import LlavaProcessor


@dataclass(frozen=True)
class Answer:
    """What a model wrote, and how long it took."""

    answer: str
    tokens: int  # written, with the one that ends the turn
    ttft: float  # seconds from the prepared prompt to the first token
    seconds: float  # to the last one


def load_pair(
    source: str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, argument: str = "model"
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Load a model and its processor from one checkpoint, in evaluation mode, and see that they fit each other.

    Weights are read in safetensors format only, and no code of a checkpoint is run.

    Args:
        source: a local folder or hub name.
        device: where to.
        dtype: of the weights.
        argument: what complaints call the checkpoint.

    Raises:
        TypeError: the model is no LLaVA with an encoder that this package knows.
        ValueError: weights are missing, or model and processor do not fit each other.
        RuntimeError: the checkpoint cannot be read.
    """
    if (Path(source) / "adapter_config.json").exists():
        given, remedy = f"{source!r}, which is an adapter", "Merge it into its model and save that with its processor"
        raise ValueError(complaint(argument, given, "a whole model", remedy))
    config = read_config(argument, source)
    if type(config) not in AutoModelForImageTextToText._model_mapping:
        remedy = "Pass a model that was saved with its processor, such as laco train leaves"
        raise ValueError(complaint(argument, f"{source!r}, a {config.model_type}", "a model of images and text", remedy))
    try:
        model, info = AutoModelForImageTextToText.from_pretrained(
            source, config=config, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:  # a damaged file raises whatever its reader raises
        raise unreadable(argument, source, error) from error
    if lacking := sorted(info["missing_keys"]):
        given = f"{source!r}, which lacks {', '.join(lacking[:3])}"
        raise ValueError(complaint(argument, given, f"all weights of a {type(model).__name__}", "Save the model again"))
    try:
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=False)
    except Exception as error:
        given = f"{source!r} ({(str(error).strip() or type(error).__name__).splitlines()[0]})"
        remedy = "Save the processor beside the model with save_pretrained"
        raise RuntimeError(complaint(argument, given, "a model with its processor", remedy)) from error
    check_processor(model, processor)
    return model.to(device).eval(), processor


def user_message(images: Sequence[Image.Image], question: str) -> dict[str, Any]:
    """Return the message of a user who shows ``images`` and asks ``question`` about them."""
    shown: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*shown, {"type": "text", "text": question}]}


def prepare(processor: LlavaProcessor, conversations: Sequence[Sequence[dict[str, Any]]], device: Any, dtype: Any) -> Any:
    """Return what a model takes of ``conversations``, each to be answered, padded to one length."""
    inputs = processor.apply_chat_template(
        [list(conversation) for conversation in conversations],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        processor_kwargs={"padding": True},
    )
    return inputs.to(device, dtype)


@torch.inference_mode()
def answer(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    images: Sequence[Image.Image],
    question: str,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    tell: Callable[[str], None] = lambda _: None,
) -> Answer:
    """Let ``model`` answer a question about images.

    Args:
        model, processor: those of :func:`load_pair`.
        images: shown in this order, in front of the question.
        question: asked about them.
        max_new_tokens: at most so many.
        temperature: of sampling; 0 takes the likeliest token every time.
        tell: called with every piece of the text as it is written.

    Raises:
        ValueError: ``question`` has the image token in it.
    """
    if processor.image_token in question:
        remedy = "Leave it out: the images stand in front of the question"
        raise ValueError(complaint("question", repr(question), f"a text without {processor.image_token}", remedy))
    inputs = prepare(processor, [[user_message(images, question)]], model.device, model.dtype)
    streamer = _Streamer(processor.tokenizer, tell)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    start = time.perf_counter()
    written = model.generate(**inputs, **sampling, max_new_tokens=max_new_tokens, streamer=streamer)
    end = time.perf_counter()
    new = written[0, inputs["input_ids"].shape[1] :]
    text = processor.tokenizer.decode(new, skip_special_tokens=True)
    return Answer(text.strip(), len(new), (streamer.first or end) - start, end - start)


class _Streamer(TextStreamer):
    """Hands on the text as it is written, and remembers when the first token came."""

    def __init__(self, tokenizer: Any, tell: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.tell = tell
        self.first: float | None = None

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, and then every token."""
        if self.first is None and not self.next_tokens_are_prompt:
            self.first = time.perf_counter()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Hand on what will not change any more."""
        if text:
            self.tell(text)


def is_folder(source: str) -> bool:
    """Whether ``source`` can only be a local folder, not a hub name: no network is to be asked for it."""
    path = Path(source)
    return path.exists() or path.is_absolute() or source.startswith((".", "~")) or len(path.parts) > 2
