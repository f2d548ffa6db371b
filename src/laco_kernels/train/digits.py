"""Pictures for experiments that anybody can repeat: one coloured digit in each quadrant, drawn on the spot."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from laco_kernels.geometry import integer

SIDE, QUADRANTS, CLASSES = 32, 4, 10
CELL = SIDE // 2
GLYPH_HEIGHT, GLYPH_WIDTH, POINTS = 13, 12, 16  # POINTS of DejaVu Sans Bold make digits that fill such a box
NOISE = 0.3
MEAN, SPREAD = 0.1, 0.25  # of pixel values, about; what comes out has zero mean and unit variance, about


class Digits(NamedTuple):
    """Pictures and what there is to read in them."""

    pixels: torch.Tensor  # [B, 3, 32, 32], float32, normalised
    labels: torch.Tensor  # [B, 4], int64, quadrants row by row


def draw_digits(count: int, generator: torch.Generator, *, noise: float = NOISE) -> Digits:
    """Draw ``count`` pictures: in each quadrant a random digit in a random colour at a random place, and noise everywhere.

    Digits are matplotlib's own DejaVu Sans Bold, so that they are the same on every machine.

    Args:
        count: how many.
        generator: of a CPU; the same seed draws the same pictures.
        noise: standard deviation of the normal noise on pixel values; the ground is 0, a digit's channels 0.4 to 1.

    Raises:
        TypeError, ValueError: ``count`` is no positive integer.
    """
    count = integer("count", count, 1)
    labels = torch.randint(CLASSES, (count, QUADRANTS), generator=generator)
    shapes = F.pad(_glyphs(), (0, CELL - GLYPH_WIDTH, 0, CELL - GLYPH_HEIGHT))[labels]
    down = torch.randint(CELL - GLYPH_HEIGHT + 1, (count, QUADRANTS, 1), generator=generator)
    right = torch.randint(CELL - GLYPH_WIDTH + 1, (count, QUADRANTS, 1), generator=generator)
    # Shifted in a circle: what is shifted in from the other end is the padding.
    rows, columns = (torch.arange(CELL) - down) % CELL, (torch.arange(CELL) - right) % CELL
    shapes = shapes.gather(2, rows[..., None].expand_as(shapes)).gather(3, columns[:, :, None].expand_as(shapes))
    colours = 0.4 + 0.6 * torch.rand(count, QUADRANTS, 3, 1, 1, generator=generator)
    cells = (colours * shapes[:, :, None]).unflatten(1, (2, 2))
    image = cells.permute(0, 3, 1, 4, 2, 5).reshape(count, 3, SIDE, SIDE)
    image = image + noise * torch.randn(image.shape, generator=generator)
    return Digits((image - MEAN) / SPREAD, labels)


@functools.cache
def _glyphs() -> torch.Tensor:
    """The ten digits as ink between 0 and 1, ``[10, height, width]``."""
    font = ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans-Bold.ttf"), POINTS)
    glyphs = []
    for digit in range(CLASSES):
        image = Image.new("L", (GLYPH_WIDTH, GLYPH_HEIGHT))
        left, top, right, bottom = font.getbbox(str(digit))
        corner = (GLYPH_WIDTH - right + left) // 2 - left, (GLYPH_HEIGHT - bottom + top) // 2 - top
        ImageDraw.Draw(image).text(corner, str(digit), fill=255, font=font)
        glyphs.append(torch.from_numpy(np.array(image, dtype=np.float32)) / 255)
    return torch.stack(glyphs)
