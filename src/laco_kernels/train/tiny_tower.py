"""A vision encoder small enough to be pretrained on the spot, by reading the digits of :mod:`laco_kernels.train.digits`.

It stands in where no pretrained weights are at hand: with random weights nothing can be said about what a compressor keeps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from laco_kernels.geometry import check_grid, integer
from laco_kernels.train.digits import CLASSES, NOISE, QUADRANTS, SIDE, Digits, draw_digits

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PATCH, WIDTH, LAYERS, HEADS = 4, 64, 12, 4
GRID = (SIDE // PATCH, SIDE // PATCH)
STEPS, BATCH, LEARNING_RATE, WARMUP, WEIGHT_DECAY = 1500, 16, 3e-3, 100, 0.05
QUIET = 0.4  # the share of the steps over which noise grows to its full strength: what to look for is found sooner without
HELD_OUT, HELD_OUT_SEED = 256, 2**31  # pictures whose seed no training takes


class QuadrantReader(nn.Module):
    """Four linear heads, one a quadrant, each on the mean of its quadrant's tokens: ``[B, H * W, dim] -> [B, 4, 10]`` logits.

    Args:
        dim: width of the tokens.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(dim, CLASSES) for _ in range(QUADRANTS)])

    def forward(self, tokens: torch.Tensor, grid: Sequence[int] = GRID) -> torch.Tensor:
        """Read ``tokens [B, H * W, dim]`` of ``grid = (H, W)``, in raster order."""
        image = tokens.transpose(1, 2).unflatten(2, check_grid(grid))
        quadrants = F.adaptive_avg_pool2d(image, 2).flatten(2).transpose(1, 2)
        return torch.stack([head(quadrants[:, i]) for i, head in enumerate(self.heads)], dim=1)


@dataclass(frozen=True)
class TinyTower:
    """A pretrained tower and what it can do."""

    encoder: SiglipVisionModel  # in evaluation mode, its parameters frozen
    reader: QuadrantReader  # likewise
    accuracy: float  # share of the digits in held-out pictures that are read right
    steps: int
    seed: int


def build_tiny_tower(side: int = SIDE, patch: int = PATCH, width: int = WIDTH, layers: int = LAYERS) -> SiglipVisionModel:
    """Return an untrained SigLIP, unless told otherwise of 12 layers, 64 wide, on 8 x 8 patches of 32 x 32 pixels.

    With twelve layers the depths 1/12, 1/6, 1/4 and 1/2 are those behind layer 1, 2, 3 and 6.

    Args:
        side, patch: of the images and of their patches, in pixels.
        width: of the tokens.
        layers: how many.
    """
    config = SiglipVisionConfig(
        image_size=side,
        patch_size=patch,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        vision_use_head=False,
    )
    return SiglipVisionModel(config)


def pretrain_tiny_tower(
    *,
    steps: int = STEPS,
    batch: int = BATCH,
    seed: int = 0,
    on_step: Callable[[str, float], None] = lambda *_: None,
) -> TinyTower:
    """Pretrain a tower on the CPU, every step on new pictures: AdamW, warm-up, then a cosine to zero; noise grows.

    On the same machine with the same number of threads the same seed gives the same tower. The random numbers of the caller
    stay as they are.

    Args:
        steps: how many; 1,500 take 100 s on two CPU cores.
        batch: pictures a step.
        seed: of weights and pictures.
        on_step: called before every step with what it is and how much of the whole is done.

    Raises:
        TypeError, ValueError: a number is no positive integer (``seed``: below 0).
    """
    steps, batch, seed = integer("steps", steps, 1), integer("batch", batch, 1), integer("seed", seed, 0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder, reader = build_tiny_tower(), QuadrantReader(WIDTH)
    pictures = torch.Generator().manual_seed(seed)

    def loss(noise: float) -> torch.Tensor:
        pixels, labels = draw_digits(batch, pictures, noise=noise * NOISE)
        return F.cross_entropy(reader(encoder(pixels).last_hidden_state).flatten(0, 1), labels.flatten())

    pretrain([encoder, reader], loss, steps, lambda done: on_step("pretraining a tiny tower", done))
    return TinyTower(encoder, reader, accuracy(encoder, reader, held_out_digits()), steps, seed)


def pretrain(
    modules: Sequence[nn.Module],
    loss: Callable[[float], torch.Tensor],
    steps: int,
    on_step: Callable[[float], object],
    rate: float = LEARNING_RATE,
) -> None:
    """Train ``modules`` in place, and leave them frozen in evaluation mode: AdamW, warm-up, then a cosine to zero.

    Args:
        modules: what is trained.
        loss: called at every step with the share of the noise there is to be, which grows to 1.
        steps: how many.
        on_step: called before every step with how much is done.
        rate: the learning rate.
    """
    parameters = [parameter for module in modules for parameter in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warm_cosine(step, steps, min(WARMUP, steps)))
    for step in range(steps):
        on_step(step / steps)
        value = loss(min(1.0, (step + 1) / (QUIET * steps)))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
    for module in modules:
        module.eval().requires_grad_(False)


def held_out_digits(count: int = HELD_OUT) -> Digits:
    """Return pictures that no tower was trained on, always the same ones."""
    return draw_digits(count, torch.Generator().manual_seed(HELD_OUT_SEED))


@torch.inference_mode()
def accuracy(encoder: nn.Module, reader: QuadrantReader, digits: Digits, grid: Sequence[int] = GRID) -> float:
    """Return which share of the digits are read right from ``encoder``'s tokens, which lie in ``grid``."""
    parts = zip(digits.pixels.split(BATCH), digits.labels.split(BATCH), strict=True)
    right = [reader(encoder(pixels).last_hidden_state, grid).argmax(-1) == labels for pixels, labels in parts]
    return float(torch.cat(right).float().mean())


def warm_cosine(step: int, steps: int, warmup: int) -> float:
    """Return the factor of a learning rate: a cosine from 1 to 0, and over the first ``warmup`` steps a rise to it."""
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))
