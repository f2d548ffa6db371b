"""Pictures with something to ask about: a shape, a digit, a short word or nothing in each quadrant, drawn on the spot."""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE = 64
CELL = SIDE // 2
#: The quadrants, row by row.
PLACES = ("top left", "top right", "bottom left", "bottom right")
#: Red, green and blue from 0 to 255; what is drawn differs from these by up to :data:`SHADE`.
COLOURS = {
    "red": (225, 50, 50),
    "green": (50, 185, 65),
    "blue": (70, 110, 250),
    "yellow": (235, 215, 55),
    "white": (235, 235, 235),
}
SHADE, GROUND = 20, 60
SHAPES = ("circle", "square", "triangle", "star", "cross")
DIGITS = tuple("0123456789")
WORDS = (
    *("AM", "AN", "AS", "AX", "BE", "BY", "DO", "GO", "HI", "IF", "IN", "IT", "ME", "NO", "OF", "OH", "OR", "OX", "PI", "SO"),
    *("TO", "UP", "US", "WE", "YE"),
)
#: Words that no training picture shows: to read one is to read its letters, each of which other words have in its place.
NEW_WORDS = ("AT", "HE", "IS", "MY", "ON")
KINDS = {"shape": SHAPES, "digit": DIGITS, "word": WORDS}
FONTS = ("DejaVuSans-Bold", "DejaVuSansMono-Bold", "DejaVuSerif-Bold")
SHAPE_SIZES, DIGIT_POINTS, WORD_POINTS = (23, 26), (24, 26), (19, 21)
PITCH = 15  # from letter to letter, whatever the font
SHIFT = 1  # how far something is from the middle of its quadrant, at most
NOISE = 12.0  # the largest standard deviation of the normal noise on values from 0 to 255
FINE = 4  # shapes are drawn this much larger and scaled down, for smooth edges


@dataclass(frozen=True)
class Thing:
    """Something in a picture: its kind, one of :data:`KINDS`, its name, one of that kind's, and its colour."""

    kind: str
    name: str
    colour: str

    def __str__(self) -> str:
        return f"{self.colour} {self.name}"


#: What is in each of :data:`PLACES`.
Scene = tuple[Thing | None, ...]


def imagine(source: random.Random, words: tuple[str, ...] = WORDS) -> Scene:
    """Return what a picture is to show: something in four of five quadrants, on average, and something in one at least.

    Args:
        source: of random numbers.
        words: to choose from.
    """
    while True:
        kinds = source.choices((*KINDS, None), (40, 20, 20, 20), k=len(PLACES))
        if any(kinds):
            return tuple(_thing(kind, source, words) for kind in kinds)


def imagine_much(source: random.Random) -> Scene:
    """Return a scene for pretraining an encoder: more digits and words, and hardly a quadrant with nothing in it."""
    return tuple(_thing(kind, source, WORDS) for kind in source.choices((*KINDS, None), (25, 35, 35, 5), k=len(PLACES)))


def draw(scene: Scene, source: random.Random, noise: float = NOISE) -> Image.Image:
    """Draw a scene, ``SIDE`` x ``SIDE`` pixels in RGB: fonts, sizes, places within a quadrant, shades and noise vary.

    Fonts are matplotlib's own and laid out by Pillow alone, so that they are the same on every machine.

    Args:
        scene: of :func:`imagine`.
        source: of random numbers; the same ones draw the same picture.
        noise: the largest standard deviation of the normal noise on values from 0 to 255; each picture has its own.
    """
    image = Image.new("RGB", (SIDE, SIDE), _shade((GROUND // 2,) * 3, GROUND // 2, source))
    for number, thing in enumerate(scene):
        if thing is None:
            continue
        ink = _ink(thing, source)
        left, top = (_near_middle(CELL - size, source) for size in ink.size)
        left, top = left + CELL * (number % 2), top + CELL * (number // 2)
        image.paste(_shade(COLOURS[thing.colour], SHADE, source), (left, top), ink)
    strength = source.uniform(0, noise)
    grain = np.random.default_rng(source.getrandbits(64)).normal(0, 1, (SIDE, SIDE, 3))
    return Image.fromarray(np.clip(np.asarray(image) + strength * grain, 0, 255).round().astype(np.uint8))


def _thing(kind: str | None, source: random.Random, words: tuple[str, ...]) -> Thing | None:
    if kind is None:
        return None
    return Thing(kind, source.choice(words if kind == "word" else KINDS[kind]), source.choice(tuple(COLOURS)))


def _near_middle(space: int, source: random.Random) -> int:
    """Return how much of ``space`` is on one side."""
    middle = space // 2
    return min(space, max(0, middle + source.randint(-SHIFT, SHIFT)))


def _shade(colour: tuple[int, ...], spread: int, source: random.Random) -> tuple[int, ...]:
    return tuple(min(255, max(0, value + source.randint(-spread, spread))) for value in colour)


def _ink(thing: Thing, source: random.Random) -> Image.Image:
    """Return where a thing is, 0 to 255, with no empty rows or columns around it, and no larger than a quadrant."""
    if thing.kind == "shape":
        return _shape(thing.name, source.randint(*SHAPE_SIZES))
    points = source.randint(*(DIGIT_POINTS if thing.kind == "digit" else WORD_POINTS))
    return _written(thing.name, source.choice(FONTS), points)


@functools.cache
def _shape(name: str, size: int) -> Image.Image:
    image = Image.new("L", (size * FINE, size * FINE))
    pen, end = ImageDraw.Draw(image), size * FINE - 1
    if name == "circle":
        pen.ellipse((0, 0, end, end), fill=255)
    elif name == "square":
        pen.rectangle((0, 0, end, end), fill=255)
    elif name == "cross":
        pen.rectangle((0, end / 3, end, 2 * end / 3), fill=255)
        pen.rectangle((end / 3, 0, 2 * end / 3, end), fill=255)
    else:
        corners = {"triangle": (0.5, 0, 1, 1, 0, 1), "star": STAR}[name]
        pen.polygon([end * corner for corner in corners], fill=255)
    image = image.resize((size, size), Image.Resampling.BOX)
    return image.crop(image.getbbox())


#: Five points and the corners between them, in a square of side 1.
STAR = tuple(
    coordinate
    for corner in range(10)
    for radius in (0.5 if corner % 2 == 0 else 0.21,)
    for coordinate in (
        0.5 + radius * float(np.sin(np.pi * corner / 5)),
        0.5 - radius * float(np.cos(np.pi * corner / 5)),
    )
)


@functools.cache
def _written(text: str, font: str, points: int) -> Image.Image:
    image = Image.new("L", (PITCH * (len(text) - 1) + 2 * points, 2 * points))
    pen = ImageDraw.Draw(image)
    for number, letter in enumerate(text):
        pen.text((points + PITCH * number, points), letter, fill=255, font=_face(font, points), anchor="mm")
    ink = image.crop(image.getbbox())
    return ink if ink.width <= CELL else ink.resize((CELL, ink.height))


@functools.cache
def _face(font: str, points: int) -> ImageFont.FreeTypeFont:
    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"
    return ImageFont.truetype(str(file), points, layout_engine=ImageFont.Layout.BASIC)
