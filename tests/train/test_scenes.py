"""The pictures show what their scenes say, and are the same on every machine."""

import itertools
import random

import numpy as np
import pytest

from laco_kernels.train import scenes
from laco_kernels.train.scenes import CELL, COLOURS, KINDS, PLACES, SIDE, Thing


def drawn(seed, **options):
    source = random.Random(seed)
    scene = scenes.imagine(source)
    return scene, np.asarray(scenes.draw(scene, source, **options)).astype(float)


@pytest.fixture(scope="module")
def templates():
    """All that can stand in a quadrant, by the size of its ink."""
    found = {}
    for size in range(scenes.SHAPE_SIZES[0], scenes.SHAPE_SIZES[1] + 1):
        for name in scenes.SHAPES:
            ink = scenes._shape(name, size)
            found.setdefault(ink.size, []).append((name, ink))
    sizes = {"digit": scenes.DIGIT_POINTS, "word": scenes.WORD_POINTS}
    for kind, points in sizes.items():
        for name in KINDS[kind]:
            for font in scenes.FONTS:
                for size in range(points[0], points[1] + 1):
                    ink = scenes._written(name, font, size)
                    found.setdefault(ink.size, []).append((name, ink))
    return {size: [(name, np.asarray(ink) / 255) for name, ink in inks] for size, inks in found.items()}


def read(quadrant, ground, templates):
    """Say what a quadrant without noise shows: the template that its ink is closest to, and the colour it is closest to."""
    strength = np.abs(quadrant - ground).sum(2)
    rows, columns = (np.flatnonzero((strength > 3).any(axis)) for axis in (1, 0))
    if not len(rows):
        return None
    colour = quadrant[strength > 0.97 * strength.max()].mean(0)
    ink = np.pad(strength, 2) / strength.max()
    height, width = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
    distances = {}
    for more in itertools.product((0, 1), (0, 1)):  # the outermost rows and columns of a template may be too faint to be seen
        for name, template in templates.get((width + more[0], height + more[1]), []):
            for up, left in itertools.product(range(more[1] + 1), range(more[0] + 1)):
                expected, top, start = np.zeros_like(ink), rows[0] + 2 - up, columns[0] + 2 - left
                expected[top : top + template.shape[0], start : start + template.shape[1]] = template
                distances[name] = min(distances.get(name, np.inf), np.abs(expected - ink).sum())
    return min(distances, key=distances.get), min(COLOURS, key=lambda known: np.abs(np.array(COLOURS[known]) - colour).sum())


def test_every_quadrant_shows_its_thing_in_its_colour(templates):
    for seed in range(40):
        scene, image = drawn(seed, noise=0.0)
        ground = image.reshape(-1, 3)[np.abs(image.reshape(-1, 3)).sum(1).argmin()]  # the darkest there is
        for number, thing in enumerate(scene):
            top, left = CELL * (number // 2), CELL * (number % 2)
            seen = read(image[top : top + CELL, left : left + CELL], ground, templates)
            assert seen == (None if thing is None else (thing.name, thing.colour)), (seed, number)


def test_the_same_numbers_draw_the_same_picture_and_others_another():
    (scene, image), (again, same), (_, other) = drawn(0), drawn(0), drawn(1)
    assert scene == again
    assert image.shape == (SIDE, SIDE, 3)
    assert np.array_equal(image, same)
    assert not np.array_equal(image, other)


def test_fonts_sizes_places_and_noise_vary():
    source = random.Random(0)
    scene = (Thing("word", "OX", "red"), None, None, None)
    images = [np.asarray(scenes.draw(scene, source, noise=0.0)).astype(float) for _ in range(40)]
    first_rows = {int(np.flatnonzero((np.abs(image - image[-1, -1]).sum(2) > 3).any(1))[0]) for image in images}
    ink = {int((np.abs(image - image[-1, -1]).sum(2) > 3).sum()) for image in images}
    assert len(first_rows) > 2 * scenes.SHIFT
    assert len(ink) > len(scenes.FONTS)  # in more than one size
    spreads = [np.asarray(scenes.draw((None,) * 4, source)).astype(float).std((0, 1)).mean() for _ in range(40)]
    assert min(spreads) < 4
    assert scenes.NOISE - 2 < max(spreads) < scenes.NOISE + 1


def test_a_scene_shows_something_and_every_thing_comes_up():
    source = random.Random(0)
    imagined = [scenes.imagine(source) for _ in range(1500)]
    assert all(len(scene) == len(PLACES) and any(scene) for scene in imagined)
    names = {thing.name for scene in imagined for thing in scene if thing is not None}
    assert names == {name for kind in KINDS.values() for name in kind}


def test_new_words_are_new_and_their_letters_are_not():
    assert not set(scenes.WORDS) & set(scenes.NEW_WORDS)
    for word in scenes.NEW_WORDS:
        assert all(any(other[place] == letter for other in scenes.WORDS) for place, letter in enumerate(word))
