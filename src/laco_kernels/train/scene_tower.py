"""A tower that knows scenes: :mod:`laco_kernels.train.tiny_tower` on the pictures of :mod:`laco_kernels.train.scenes`.

A linear reader learns to tell from every single token what the quadrant around it shows, in which colour, the letters of a
word, and which quadrant it is: what an LLM that attends to a token is to find there.
"""

from __future__ import annotations

import random
import string
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from laco_kernels.train.conversation import IGNORED
from laco_kernels.train.scenes import CELL, COLOURS, DIGITS, NOISE, PLACES, SHAPES, SIDE, draw, imagine_much
from laco_kernels.train.tiny_tower import build_tiny_tower, pretrain

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from PIL import Image
    from transformers import SiglipVisionModel

    from laco_kernels.train.scenes import Scene

PATCH, WIDTH, LAYERS = 8, 96, 4
#: The quadrant that each patch is in, row by row.
QUADRANTS = [2 * (top // CELL) + left // CELL for top in range(0, SIDE, PATCH) for left in range(0, SIDE, PATCH)]
LETTERS = string.ascii_uppercase
#: What a quadrant shows, and the classes of each of its labels: that, its colour, the two letters of a word, and its place.
WHAT = ("nothing", *SHAPES, *DIGITS, "word")
CLASSES = (len(WHAT), len(COLOURS), len(LETTERS), len(LETTERS), len(PLACES))
#: Of their losses: letters take longer than all else, and must not drown it.
WEIGHTS = (1.0, 1.0, 0.5, 0.5, 0.3)
HELD_OUT = 256


def labels_of(scene: Scene) -> list[list[int]]:
    """Return for every quadrant of a scene its class of each of :data:`CLASSES`, -100 where it has none."""
    rows = []
    for place, thing in enumerate(scene):
        row = [0, IGNORED, IGNORED, IGNORED, place]
        if thing is not None:
            is_word = thing.kind == "word"
            row[:2] = WHAT.index("word" if is_word else thing.name), list(COLOURS).index(thing.colour)
            row[2:4] = [LETTERS.index(letter) for letter in thing.name] if is_word else row[2:4]
        rows.append(row)
    return rows


def pixels_of(images: Sequence[Image.Image]) -> torch.Tensor:
    """Return ``[B, 3, SIDE, SIDE]`` between -1 and 1, as SigLIP's image processor makes them."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2) / 127.5 - 1


def draw_scenes(count: int, source: random.Random, noise: float = NOISE) -> tuple[torch.Tensor, torch.Tensor]:
    """Return pixels ``[count, 3, SIDE, SIDE]`` of new pictures and labels ``[count, 4, 5]``, as :func:`labels_of` has them."""
    scenes = [imagine_much(source) for _ in range(count)]
    return pixels_of([draw(scene, source, noise) for scene in scenes]), torch.tensor([labels_of(scene) for scene in scenes])


def pretrain_scene_tower(
    steps: int, batch: int, seed: int = 0, on_step: Callable[[float], object] = lambda _: None
) -> tuple[SiglipVisionModel, dict[str, float]]:
    """Pretrain a tower on the CPU, every step on new pictures, as :func:`~laco_kernels.train.tiny_tower.pretrain` does.

    Args:
        steps: how many.
        batch: pictures a step.
        seed: of weights and pictures.
        on_step: called before every step with how much is done.

    Returns:
        The tower, frozen, in evaluation mode, and which shares of what is in new pictures the reader reads right.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder, reader = build_tiny_tower(SIDE, PATCH, WIDTH, LAYERS), nn.Linear(WIDTH, sum(CLASSES))
    source = random.Random(f"tower {seed}")

    def read(pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return reader(encoder(pixels).last_hidden_state).split(CLASSES, -1)

    def loss(noise: float) -> torch.Tensor:
        pixels, labels = draw_scenes(batch, source, noise * NOISE)
        labels = labels[:, QUADRANTS]
        total = torch.zeros(())
        for weight, logits, expected in zip(WEIGHTS, read(pixels), labels.unbind(-1), strict=True):
            wrong = F.cross_entropy(logits.flatten(0, 1), expected.flatten(), ignore_index=IGNORED, reduction="sum")
            total = total + weight * wrong / (expected != IGNORED).sum().clamp(min=1)
        return total

    pretrain([encoder, reader], loss, steps, on_step)
    with torch.inference_mode():
        pixels, labels = draw_scenes(HELD_OUT, random.Random(f"tower held-out {seed}"))
        labels = labels[:, QUADRANTS]
        right = torch.stack([logits.argmax(-1) for logits in read(pixels)], -1) == labels
    shares = {"things": right[..., 0], "colours": right[..., 1], "letters": right[..., 2:4]}
    there = {"things": labels[..., 0] > 0, "colours": labels[..., 1] != IGNORED, "letters": labels[..., 2:4] != IGNORED}
    return encoder, {name: float(share[there[name]].float().mean()) for name, share in shares.items()}
