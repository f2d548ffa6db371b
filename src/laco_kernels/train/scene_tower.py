"""A tower that knows scenes: :mod:`laco_kernels.train.tiny_tower` for the pictures of :mod:`laco_kernels.train.scenes`."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from laco_kernels.train.scenes import COLOURS, DIGITS, NOISE, SHAPES, SIDE, Scene, draw, imagine
from laco_kernels.train.tiny_tower import QuadrantReader, build_tiny_tower, pretrain

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from PIL import Image
    from transformers import SiglipVisionModel

PATCH, WIDTH, LAYERS = 8, 64, 8
LETTERS, LENGTH = 26, 3
#: What there is to read in a quadrant, and the classes of each: what it shows, its colour, the letters of a word; 0 is nothing.
WHAT = ("", *SHAPES, *DIGITS, "word")
CLASSES = (len(WHAT), 1 + len(COLOURS), *[1 + LETTERS] * LENGTH)


def labels_of(scene: Scene) -> list[list[int]]:
    """Return for every quadrant of a scene its class of each of :data:`CLASSES`."""
    rows = []
    for thing in scene:
        if thing is None:
            rows.append([0] * len(CLASSES))
        else:
            is_word = thing.kind == "word"
            letters = [1 + ord(letter) - ord("A") for letter in thing.name] if is_word else [0] * LENGTH
            rows.append([WHAT.index("word" if is_word else thing.name), 1 + list(COLOURS).index(thing.colour), *letters])
    return rows


def pixels_of(images: Sequence[Image.Image]) -> torch.Tensor:
    """Return ``[B, 3, SIDE, SIDE]`` between -1 and 1, as SigLIP's image processor makes them."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2) / 127.5 - 1


def draw_scenes(count: int, source: random.Random, noise: float = NOISE) -> tuple[torch.Tensor, torch.Tensor]:
    """Return pixels ``[count, 3, SIDE, SIDE]`` and labels ``[count, 4, 5]`` of new pictures."""
    scenes = [imagine(source) for _ in range(count)]
    return pixels_of([draw(scene, source, noise) for scene in scenes]), torch.tensor([labels_of(scene) for scene in scenes])


def pretrain_scene_tower(
    steps: int, batch: int, seed: int = 0, on_step: Callable[[float], None] = lambda _: None
) -> tuple[SiglipVisionModel, dict[str, float]]:
    """Pretrain a tower."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder, reader = build_tiny_tower(SIDE, PATCH, WIDTH, LAYERS), QuadrantReader(WIDTH, sum(CLASSES))
    source = random.Random(f"tower {seed}")
    grid = (SIDE // PATCH, SIDE // PATCH)

    def read(pixels: torch.Tensor) -> list[torch.Tensor]:
        return list(reader(encoder(pixels).last_hidden_state, grid).split(CLASSES, -1))

    def loss(noise: float) -> torch.Tensor:
        pixels, labels = draw_scenes(batch, source, noise * NOISE)
        return torch.stack(
            [F.cross_entropy(logits.flatten(0, 1), labels[..., i].flatten()) for i, logits in enumerate(read(pixels))]
        ).sum()

    pretrain([encoder, reader], loss, steps, on_step)
    with torch.inference_mode():
        pixels, labels = draw_scenes(256, random.Random(f"tower held-out {seed}"))
        right = torch.stack([logits.argmax(-1) == labels[..., i] for i, logits in enumerate(read(pixels))], -1)
    words = labels[..., 0] == WHAT.index("word")
    return encoder, {
        "what": float(right[..., 0][labels[..., 0] > 0].float().mean()),
        "colour": float(right[..., 1][labels[..., 1] > 0].float().mean()),
        "letters": float(right[words][:, 2:].float().mean()),
        "words": float(right[words][:, 2:].all(-1).float().mean()),
    }
