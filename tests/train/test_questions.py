"""Answers follow from what was drawn."""

import random
import re
from collections import Counter

import pytest

from laco_kernels.train import questions
from laco_kernels.train.scenes import COLOURS, NEW_WORDS, PLACES, WORDS, Thing, imagine

ASKED = [
    (kind, scene, question)
    for number in range(300)
    for source in (random.Random(number),)
    for scene in (imagine(source, WORDS[:5] + NEW_WORDS),)
    for kind in questions.TYPES
    for question in (questions.ask(kind, scene, source),)
    if question is not None
]


def solve(text, scene):
    """Answer a question by looking at the scene."""
    at = dict(zip(PLACES, scene, strict=True))
    things = [thing for thing in scene if thing is not None]
    if match := re.fullmatch(r"What colour is the (\w+) at the (.+)\?", text):
        assert at[match[2]].kind == match[1]
        return at[match[2]].colour
    if match := re.fullmatch(r"What (\w+) is at the (.+)\?", text):
        assert at[match[2]].kind == match[1]
        return at[match[2]].name
    if match := re.fullmatch(r"Where is the (\w+) (\w+)\?", text):
        (place,) = [place for place, thing in at.items() if thing and (thing.colour, thing.name) == match.groups()]
        return place
    if match := re.fullmatch(r"How many (.+) are there\?", text):
        what = match[1]
        fits = [t for t in things if what == "things" or what == f"{t.kind}s" or what == f"{t.colour} things"]
        return str(len(fits))
    match = re.fullmatch(r"Is there a (?:(\w+) )?(\w+)\?", text)
    there = any(match[2] == t.name and match[1] in (None, t.colour) for t in things)
    return "yes" if there else "no"


@pytest.mark.parametrize("kind", questions.TYPES)
def test_answers_are_right(kind):
    asked = [(scene, question) for asked, scene, question in ASKED if asked == kind]
    assert len(asked) > 15
    for scene, question in asked:
        assert question.kind == kind
        assert question.answer == solve(question.text, scene)


def test_yes_is_as_frequent_as_no():
    counts = Counter(question.answer for kind, _, question in ASKED if kind == "yes/no")
    assert 0.35 < counts["yes"] / counts.total() < 0.55  # where no shape is, the answer is no


def test_new_words_are_asked_for_by_a_type_of_their_own():
    for kind, _, question in ASKED:
        if kind in ("word", "new word"):
            assert (question.answer in NEW_WORDS) == (kind == "new word")


def test_what_has_no_single_answer_is_not_asked():
    twins = (Thing("shape", "star", "red"), Thing("shape", "star", "red"), None, None)
    source = random.Random(0)
    assert all(questions.ask(kind, twins, source) is None for kind in ("position", "digit", "word", "new word"))


def test_several_questions_differ_and_never_ask_for_new_words():
    for number in range(50):
        source = random.Random(number)
        asked = questions.ask_several(imagine(source), source, 6)
        assert len({question.text for question in asked}) == len(asked)
        assert 3 <= len(asked) <= 6
        assert not any(question.kind == "new word" for question in asked)


def test_a_description_says_everything():
    scene = (Thing("shape", "star", "red"), None, Thing("word", "OX", "blue"), Thing("digit", "7", "white"))
    assert questions.describe(scene).split("\n") == [
        "top left: red star",
        "top right: nothing",
        "bottom left: blue OX",
        "bottom right: white 7",
    ]
    assert set(COLOURS) >= {"red", "blue", "white"}
