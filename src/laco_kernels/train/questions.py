"""Questions about scenes, with answers that follow from what was drawn."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, NamedTuple

from laco_kernels.train.scenes import COLOURS, KINDS, NEW_WORDS, PLACES, SHAPES, Scene, Thing

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Types of questions. ``"new word"`` is ``"word"`` for words that training never shows.
TYPES = ("shape", "colour", "digit", "word", "new word", "count", "position", "yes/no")


class Question(NamedTuple):
    """A question, what is to be answered, and its type, one of :data:`TYPES`."""

    kind: str
    text: str
    answer: str


def ask(kind: str, scene: Scene, source: random.Random) -> Question | None:
    """Return a question of a type about a scene; ``None`` where there is none with one answer.

    Args:
        kind: one of :data:`TYPES`.
        scene: what was drawn.
        source: of random numbers.
    """
    there = [(place, thing) for place, thing in zip(PLACES, scene, strict=True) if thing is not None]
    if kind == "count":
        return _count([thing for _, thing in there], source)
    if kind == "yes/no":
        return _yes_no([thing for _, thing in there], source)
    if kind == "position":
        things = [thing for _, thing in there]
        there = [(place, thing) for place, thing in there if things.count(thing) == 1]
    elif kind in ("word", "new word"):
        there = [
            (place, thing) for place, thing in there if thing.kind == "word" and (thing.name in NEW_WORDS) == (kind != "word")
        ]
    elif kind != "colour":
        there = [(place, thing) for place, thing in there if thing.kind == kind]
    if not there:
        return None
    place, thing = source.choice(there)
    if kind == "position":
        return Question(kind, f"Where is the {thing}?", place)
    if kind == "colour":
        return Question(kind, f"What colour is the {thing.kind} at the {place}?", thing.colour)
    return Question(kind, f"What {thing.kind} is at the {place}?", thing.name)


def ask_several(scene: Scene, source: random.Random, count: int) -> list[Question]:
    """Return up to ``count`` different questions about a scene, of types in turn.

    Args:
        scene: what was drawn.
        source: of random numbers.
        count: how many.
    """
    found: dict[str, Question] = {}
    kinds = [kind for kind in TYPES if kind != "new word"]
    for _ in range(2):
        for kind in source.sample(kinds, len(kinds)):
            question = ask(kind, scene, source)
            if question is not None and len(found) < count:
                found.setdefault(question.text, question)
    return list(found.values())


def describe(scene: Scene) -> str:
    """Say what a scene shows, place by place, for who cannot see it."""
    return "\n".join(f"{place}: {thing or 'nothing'}" for place, thing in zip(PLACES, scene, strict=True))


def _count(things: Sequence[Thing], source: random.Random) -> Question:
    kind, colour = source.choice(tuple(KINDS)), source.choice(tuple(COLOURS))
    what, counted = source.choice(
        (
            ("things", list(things)),
            (f"{kind}s", [thing for thing in things if thing.kind == kind]),
            (f"{colour} things", [thing for thing in things if thing.colour == colour]),
        )
    )
    return Question("count", f"How many {what} are there?", str(len(counted)))


def _yes_no(things: Sequence[Thing], source: random.Random) -> Question:
    """Ask for a shape, with its colour or without; as often for one that is there as for one that is not, where both exist."""
    shapes = [(thing.colour, thing.name) for thing in things if thing.kind == "shape"]
    pairs = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    yes = bool(shapes) and source.random() < 0.5
    if source.random() < 0.5:
        names = {name for _, name in shapes}
        name = source.choice(sorted(names) if yes else [shape for shape in SHAPES if shape not in names])
        return Question("yes/no", f"Is there a {name}?", "yes" if yes else "no")
    colour, name = source.choice(shapes if yes else [pair for pair in pairs if pair not in shapes])
    return Question("yes/no", f"Is there a {colour} {name}?", "yes" if yes else "no")
