"""A small task to train a multimodal LLM on, drawn on the spot: :func:`write_task` writes pictures and LLaVA's JSON.

What is held out shows what no training picture shows: other combinations of shapes, colours, digits, words and places, and
words that are new.
"""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from laco_kernels.errors import complaint
from laco_kernels.geometry import integer
from laco_kernels.train.conversation import PLACEHOLDER
from laco_kernels.train.questions import TYPES, Question, ask, ask_several
from laco_kernels.train.scenes import NEW_WORDS, WORDS, Scene, draw, imagine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TRAIN, HELD_OUT = "train", "held_out"
FORMATS = ("json", "jsonl")
#: Questions in a training sample: one more costs little beside a picture.
QUESTIONS = (4, 8)
#: Of so many held-out samples one has a question before its own.
SEVERAL = 4


@dataclass(frozen=True)
class Task:
    """A task on the disk: the files of its samples, whose images lie beside them."""

    train: Path
    held_out: Path


def write_task(
    folder: Path | str,
    count: int = 4000,
    held_out: int = 640,
    seed: int = 0,
    form: str = "json",
    on_step: Callable[[str, float], object] = lambda *_: None,
) -> Task:
    """Draw a task into a folder: ``train.json`` and ``held_out.json`` in LLaVA's format, and their pictures in ``images``.

    A sample has, beside LLaVA's keys, ``"types"``: the type of each of its questions, one of
    :data:`laco_kernels.train.questions.TYPES`. Held-out samples have every type equally often.

    Args:
        folder: made; one that is there has to be empty.
        count, held_out: samples.
        seed: the same one draws the same task.
        form: ``"json"``, or ``"jsonl"`` for ``train.jsonl`` and ``held_out.jsonl``.
        on_step: is told what is done and how much of all is.

    Raises:
        TypeError, ValueError: an argument is out of range, or the folder has something in it; nothing is written.
        OSError: the folder cannot be written; what was written is taken away.
    """
    count, held_out, seed = integer("count", count, 1), integer("held_out", held_out, 1), integer("seed", seed, 0)
    if form not in FORMATS:
        raise ValueError(complaint("form", repr(form), f"one of {', '.join(FORMATS)}", "Pass one of these"))
    folder = Path(folder).resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        remedy = "Choose another folder; nothing is overwritten"
        raise ValueError(complaint("folder", f"{str(folder)!r}, which has something in it", "an empty folder, or none", remedy))
    part = folder.with_name(f"{folder.name}.part")
    if part.exists():
        remedy = "Delete it if this command was stopped while it wrote there, or choose another folder"
        raise ValueError(complaint("folder", f"{str(part)!r} beside it", "nothing of that name", remedy))
    try:
        (part / "images").mkdir(parents=True)
        shown: set[Scene] = set()
        total = count + held_out
        for name, samples in ((TRAIN, imagine_train(count, seed, shown)), (HELD_OUT, imagine_held_out(held_out, seed, shown))):
            records: list[dict[str, Any]] = []
            for scene, questions, source in samples:
                on_step("drawing the task", (len(records) + (count if name == HELD_OUT else 0)) / total)
                record = _record(f"{name}-{len(records):06d}", questions)
                draw(scene, source).save(part / record["image"])
                records.append(record)
            _write(part / f"{name}.{form}", records)
        part.replace(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return Task(folder / f"{TRAIN}.{form}", folder / f"{HELD_OUT}.{form}")


def imagine_train(count: int, seed: int, shown: set[Scene]) -> Iterator[tuple[Scene, list[Question], random.Random]]:
    """Yield scenes for training with their questions and what to draw them with; add them to ``shown``.

    They have four to eight questions each, or fewer where there is little to ask about.
    """
    for number in range(count):
        source = random.Random(f"{TRAIN} {seed} {number}")
        scene = imagine(source)
        shown.add(scene)
        yield scene, ask_several(scene, source, source.randint(*QUESTIONS)), source


def imagine_held_out(count: int, seed: int, shown: set[Scene]) -> Iterator[tuple[Scene, list[Question], random.Random]]:
    """Yield scenes that are not in ``shown`` and differ, with a question of each type in turn, and sometimes one before it."""
    seen = set(shown)
    for number in range(count):
        source = random.Random(f"{HELD_OUT} {seed} {number}")
        kind = TYPES[number % len(TYPES)]
        while True:
            scene = imagine(source, NEW_WORDS if kind == "new word" else WORDS)
            question = ask(kind, scene, source)
            if question is not None and scene not in seen:
                break
        seen.add(scene)
        before = ask_several(scene, source, 2) if number // len(TYPES) % SEVERAL == SEVERAL - 1 else []
        others = [other for other in before if other.text != question.text]  # whose answer would be told
        yield scene, [*others[:1], question], source


def _record(name: str, questions: list[Question]) -> dict[str, Any]:
    turns = []
    for number, question in enumerate(questions):
        turns.append({"from": "human", "value": f"{PLACEHOLDER}\n{question.text}" if number == 0 else question.text})
        turns.append({"from": "gpt", "value": question.answer})
    types = [question.kind for question in questions]
    return {"id": name, "image": f"images/{name}.png", "conversations": turns, "types": types}


def _write(path: Path, records: list[dict[str, Any]]) -> None:
    lines = [json.dumps(record) for record in records]
    text = "\n".join(lines) if path.suffix == ".jsonl" else "[\n" + ",\n".join(lines) + "\n]"
    path.write_text(text + "\n", encoding="utf-8")
