"""What a trained model answers to questions that were held out: :func:`answer` asks them, :func:`score` counts by type."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from laco_kernels.errors import complaint
from laco_kernels.geometry import integer
from laco_kernels.images import open_image
from laco_kernels.train.conversation import parse

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    from laco_kernels.train.mixture import Records

#: The type of questions in data that does not say.
UNTYPED = "question"
BATCH, NEW_TOKENS = 64, 12


@dataclass(frozen=True)
class Answer:
    """What was asked and answered.

    Args:
        id: of the sample.
        kind: the type of the question.
        question, expected, given: texts; ``given`` is the model's.
    """

    id: str
    kind: str
    question: str
    expected: str
    given: str

    @property
    def right(self) -> bool:
        """Whether the model's answer is what was expected, but for spaces around it."""
        return self.given == self.expected


@dataclass(frozen=True)
class Score:
    """How questions of a type were answered.

    Args:
        kind: the type.
        asked, right: questions.
        majority: the answer that most of them have.
        majority_right: how many that one would get right, whatever the picture.
    """

    kind: str
    asked: int
    right: int
    majority: str
    majority_right: int

    @property
    def accuracy(self) -> float:
        """The share of right answers."""
        return self.right / self.asked

    @property
    def baseline(self) -> float:
        """The share that the majority answer gets right."""
        return self.majority_right / self.asked


@torch.inference_mode()
def answer(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    records: Records,
    *,
    batch: int = BATCH,
    new_tokens: int = NEW_TOKENS,
    on_step: Callable[[str, float], object] = lambda *_: None,
) -> list[Answer]:
    """Have a model answer every question of ``records``, greedily, each behind the true answers to those before it.

    Args:
        model, processor: of :func:`laco_kernels.hf.build_llava` and :func:`laco_kernels.hf.build_processor`.
        records: of :func:`laco_kernels.train.mixture.read_data`; a sample's ``"types"`` are those of its questions.
        batch: how many questions at once.
        new_tokens: how many an answer has at most.
        on_step: is told what is done and how much of all is.

    Raises:
        TypeError, ValueError: a number is no positive integer, there are no questions, or ``types`` are not as many as these.
        laco_kernels.train.skipping.BadSampleError: a sample is none.
        OSError: an image cannot be read.
    """
    batch, new_tokens = integer("batch", batch, 1), integer("new_tokens", new_tokens, 1)
    asked = list(_questions(records))
    if not asked:
        raise ValueError(complaint("records", "none", "some questions", "Pass the held-out samples"))
    answers: list[Answer] = []
    training = model.training
    model.eval()
    try:
        for start in range(0, len(asked), batch):
            on_step("answering held-out questions", start / len(asked))
            part = asked[start : start + batch]
            texts = _generate(
                model,
                processor,
                [messages for _, _, messages, _ in part],
                [file for *_, files in part for file in files],
                new_tokens,
            )
            for (name, kind, messages, _), given in zip(part, texts, strict=True):
                question, expected = (_text(messages[place]) for place in (-2, -1))
                answers.append(Answer(name, kind, question, expected, given))
    finally:
        model.train(training)
    return answers


def score(answers: Iterable[Answer]) -> list[Score]:
    """Return a score for each type of question, in the order in which they first come."""
    kinds: dict[str, list[Answer]] = {}
    for given in answers:
        kinds.setdefault(given.kind, []).append(given)
    scores = []
    for kind, group in kinds.items():
        majority, count = Counter(entry.expected for entry in group).most_common(1)[0]
        scores.append(Score(kind, len(group), sum(entry.right for entry in group), majority, count))
    return scores


def _questions(records: Records) -> Iterator[tuple[str, str, list[dict[str, Any]], list[Path]]]:
    """Yield id, type, messages up to the answer, and image files of every question."""
    for index in range(len(records)):
        source, position, record = records[index]
        messages, images = parse(record)
        name = str(record.get("id", f"{source.path.name}#{position}"))
        places = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        types = record.get("types", [UNTYPED] * len(places))
        if len(types) != len(places):
            given = f"{len(types)} for {len(places)} questions in {name}"
            raise ValueError(complaint("types", given, "one for each question", "Correct the sample, or leave them out"))
        for place, kind in zip(places, types, strict=True):
            until = messages[: place + 1]
            count = sum(part["type"] == "image" for message in until for part in message["content"])
            yield name, kind, until, [source.image_folder / image for image in images[:count]]


def _generate(
    model: Any, processor: LlavaProcessor, conversations: list[list[dict[str, Any]]], files: list[Path], new_tokens: int
) -> list[str]:
    prompts = [processor.apply_chat_template(messages[:-1], add_generation_prompt=True) for messages in conversations]
    images = [open_image(file) for file in files] or None
    inputs = processor(images=images, text=prompts, padding=True, return_tensors="pt").to(model.device, model.dtype)
    ids = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    texts = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def _text(message: dict[str, Any]) -> str:
    return "".join(part["text"] for part in message["content"] if part["type"] == "text").strip()
