"""A sample of LLaVA's becomes token ids, with labels on the assistant's answers alone."""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING, Any

from laco_kernels.errors import complaint
from laco_kernels.train.skipping import BadSampleError, Cause

if TYPE_CHECKING:
    from transformers import LlavaProcessor

#: What stands for an image in LLaVA's data, whatever the processor's image token is.
PLACEHOLDER = "<image>"
#: What the loss leaves out.
IGNORED = -100
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def parse(record: Any) -> tuple[list[dict[str, Any]], list[str]]:
    """Return a sample's messages, as a chat template takes them, and the names of its images.

    Images stay where they stand in a message. The template ends them with a line break, so one that is there is taken away.

    Args:
        record: ``{"image" or "images": name or names, "conversations": [{"from": "human" or "gpt", "value": text}]}``.

    Raises:
        BadSampleError: it is not that, questions and answers do not alternate, one is empty, or there are not as many
            placeholders in the questions as images.
    """
    if not isinstance(record, dict):
        raise BadSampleError(Cause.MALFORMED, f"{type(record).__name__} instead of an object")
    images = _images(record)
    turns = record.get("conversations")
    if turns is None or turns == []:
        raise BadSampleError(Cause.EMPTY, "no conversations")
    if not isinstance(turns, list):
        raise BadSampleError(Cause.MALFORMED, f"conversations are {type(turns).__name__} instead of a list")
    messages: list[dict[str, Any]] = []
    placeholders = 0
    for number, turn in enumerate(turns):
        speaker, value = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
        if not isinstance(speaker, str) or speaker not in ROLES or not isinstance(value, str):
            raise BadSampleError(Cause.MALFORMED, f"turn {number} without 'from' human or gpt, or without text as 'value'")
        role = ROLES[speaker]
        try:
            value.encode()
        except UnicodeEncodeError as error:  # which no tokenizer takes
            detail = f"turn {number} with half a character, as of a text that was cut"
            raise BadSampleError(Cause.MALFORMED, detail) from error
        if not value.strip():
            raise BadSampleError(Cause.EMPTY, f"turn {number} is empty")
        if PLACEHOLDER in value and role != "user":
            raise BadSampleError(Cause.PLACEHOLDERS, f"{PLACEHOLDER} in turn {number}, which is no question")
        placeholders += value.count(PLACEHOLDER)
        messages.append({"role": role, "content": _content(value.strip())})
    spoken = [str(message["role"]) for message in messages[messages[0]["role"] == "system" :]]
    if not spoken or spoken != ["user", "assistant"] * (len(spoken) // 2):
        raise BadSampleError(Cause.MALFORMED, f"turns of {', '.join(spoken) or 'nobody'} instead of questions and answers")
    if placeholders != len(images):
        raise BadSampleError(Cause.PLACEHOLDERS, f"{placeholders} placeholders for {len(images)} images")
    return messages, images


def encode(processor: LlavaProcessor, messages: list[dict[str, Any]], tokens: int) -> tuple[list[int], list[int]]:
    """Return the token ids of a conversation, and its labels: those of the answers and what ends them, -100 else.

    The conversation is written out turn by turn: an answer is what a turn adds to the prompt that asks for it, up to the token
    that ends the turn. (``{% generation %}`` in a template counts characters before the image tokens are repeated.) All of it
    is tokenised at once, as a prompt is, and a token belongs to the answer that it begins in.

    Args:
        processor: with a fast tokenizer.
        messages: of :func:`parse`.
        tokens: how many an image has.

    Raises:
        BadSampleError: a text contains the image token.
        ValueError: the chat template writes a turn differently once others follow.
    """
    image_token = processor.image_token

    def write(upto: int, ask: bool) -> str:
        return processor.apply_chat_template(messages[:upto], add_generation_prompt=ask)

    whole = write(len(messages), False)
    images = sum(part["type"] == "image" for message in messages for part in message["content"])
    if whole.count(image_token) != images:
        raise BadSampleError(Cause.PLACEHOLDERS, f"{whole.count(image_token)} times {image_token} for {images} images")

    def repeated(text: str) -> str:
        return text.replace(image_token, image_token * tokens)

    starts, ends = [], []
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            before, after = write(number, True), write(number + 1, False)
            if not (after.startswith(before) and whole.startswith(after)):
                given = "one that writes a turn differently once others follow"
                remedy = "Pass a processor of laco_kernels.hf.build_processor"
                raise ValueError(complaint("chat_template", given, "one that writes turn after turn", remedy))
            starts.append(len(repeated(before)))
            ends.append(len(repeated(after.rstrip())))

    tokenizer = processor.tokenizer
    begun = tokenizer.bos_token is not None and whole.startswith(tokenizer.bos_token)
    made = tokenizer(repeated(whole), add_special_tokens=not begun, return_offsets_mapping=True, verbose=False)
    ids = made["input_ids"]
    labels = [IGNORED] * len(ids)
    for place, (first, _) in enumerate(made["offset_mapping"]):
        answer = bisect_right(starts, first) - 1
        if answer >= 0 and first < ends[answer]:
            labels[place] = ids[place]
    return ids, labels


def _images(record: dict[str, Any]) -> list[str]:
    found = [record[key] for key in ("image", "images") if record.get(key)]
    video = record.get("video")
    if video or len(found) > 1:
        detail = "a video; pass its frames as images" if video else "both 'image' and 'images'"
        raise BadSampleError(Cause.MALFORMED, detail)
    images = found[0] if found else []
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise BadSampleError(Cause.MALFORMED, "images that are not names of files")
    return images


def _content(value: str) -> list[dict[str, str]]:
    first, *others = value.split(PLACEHOLDER)
    parts = [{"type": "text", "text": first}] if first else []
    for text in others:
        parts.append({"type": "image"})
        if text.removeprefix("\n"):
            parts.append({"type": "text", "text": text.removeprefix("\n")})
    return parts
