"""The papers' claim at a size anybody can rerun: one tower, one set of pictures, and a compressor inside it, fine-tuned.

What is pretrained is :mod:`laco_kernels.train.tiny_tower`, heads included. A compressor is put inside, everything is fine-tuned
on the same pictures in the order that the seed gives, and the digits of held-out pictures are read before the first step and
after the last. :mod:`laco_kernels.train.study_runs` carries many such runs out and keeps them.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import math
import time
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from laco_kernels.errors import complaint
from laco_kernels.hf.compress import compress, layer_at
from laco_kernels.nn import COMPRESSORS
from laco_kernels.train.digits import draw_digits
from laco_kernels.train.tiny_tower import (
    BATCH,
    GRID,
    HELD_OUT_SEED,
    LAYERS,
    WIDTH,
    TinyTower,
    accuracy,
    held_out_digits,
    warm_cosine,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from torch import nn

    from laco_kernels.train.digits import Digits

NAMES = ("laco", "pixel_shuffle", "ldpv2", "token_packer", "avg_pool")
DEPTHS = tuple(Fraction(1, n) for n in (12, 6, 4, 2, 1))
DEPTH = Fraction(1, 4)  # where compressors are compared
RATIO = 2
STEPS, ENCODER_RATE, RATE, WARM_SHARE, CLIP = 400, 4e-6, 1e-3, 0.03, 1.0
HELD_OUT = 1024
PICTURES_SEED = HELD_OUT_SEED + 1
#: Whether the mean of each window is added to what a compressor returns; ``NONE``: it has no parameters, or there is none.
ON, OFF, NONE = "on", "off", "-"


@dataclass(frozen=True)
class Arm:
    """What stands in the tower: a compressor behind a layer, or nothing."""

    compressor: str | None
    residual: str  # ON, OFF, or NONE where there is nothing to switch
    depth: str | None
    layer: int | None

    def __str__(self) -> str:
        if self.compressor is None:
            return "uncompressed"
        return f"{self.compressor}{'' if self.residual == NONE else f' {self.residual}'} @{self.depth}"


@dataclass(frozen=True)
class Settings:
    """How a run is trained and measured; what is not here is the same in all studies of one version of the code."""

    steps: int = STEPS
    batch: int = BATCH
    encoder_rate: float = ENCODER_RATE
    rate: float = RATE  # of the compressor and the heads
    held_out: int = HELD_OUT  # pictures, of four digits each


@dataclass(frozen=True)
class Outcome:
    """What came of one run."""

    before: float  # share of the held-out digits that are read right before the first step
    after: float
    loss: float  # the mean of the last tenth of the steps
    seconds: float  # of training; of the processor where it runs on one
    parameters: int  # of the compressor
    weights: str  # SHA-256 of all weights at the end


def list_arms(names: Sequence[str] = NAMES, depths: Sequence[Fraction] = DEPTHS) -> list[Arm]:
    """Return what is to be run: nothing, each of ``names`` at 1/4 with the residual on and off, LaCo at all ``depths``.

    A compressor without parameters has one arm.

    Raises:
        ValueError: a compressor is unknown, or may not stand inside.
    """
    arms = [Arm(None, NONE, None, None)]
    for name in names:
        inside = [known for known, kind in COMPRESSORS.items() if "inside" in kind.places]
        if name not in inside:
            raise ValueError(complaint("only", repr(name), f"one of {', '.join(inside)}", "Check the spelling"))
        places = sorted({*depths, DEPTH}) if name == "laco" else [DEPTH]
        arms += [Arm(name, residual, str(depth), layer_at(depth, LAYERS)) for residual in _residuals(name) for depth in places]
    return arms


def token_layers(arm: Arm) -> float:
    """Return how many tokens the layers of a compressed tower read in all, as a share of the uncompressed tower's."""
    before = LAYERS if arm.layer is None else arm.layer
    return (before + (LAYERS - before) / RATIO**2) / LAYERS


def fine_tune(tower: TinyTower, arm: Arm, seed: int, settings: Settings, device: torch.device | str = "cpu") -> Outcome:
    """Put ``arm`` into a copy of ``tower``, fine-tune it, and measure before and after.

    AdamW without weight decay, warm-up over 3 % of the steps, then a cosine to zero; gradients are clipped to norm 1. On a CPU
    it runs on one thread, and the same arguments give the same outcome bit for bit; the caller's random numbers and threads
    stay as they are.

    Args:
        tower: what was pretrained; stays as it is.
        arm: what is put inside.
        seed: of the compressor's weights and of the order of the pictures.
        settings: how it is trained.
        device: where.

    Raises:
        RuntimeError: the loss is not finite.
    """
    with one_thread():
        encoder, reader, new = _build(tower, arm, seed, device)
        grid = GRID if arm.layer is None else (GRID[0] // RATIO, GRID[1] // RATIO)
        held_out = _to(held_out_digits(settings.held_out), device)
        before = accuracy(encoder, reader, held_out, grid)
        ids = {id(parameter) for parameter in new}
        groups: list[dict[str, Any]] = [
            {"params": [p for p in encoder.parameters() if id(p) not in ids], "lr": settings.encoder_rate},
            {"params": [*new, *reader.parameters()], "lr": settings.rate},
        ]
        everything = [parameter for group in groups for parameter in group["params"]]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        warmup = max(1, round(WARM_SHARE * settings.steps))
        rate = functools.partial(warm_cosine, steps=settings.steps, warmup=warmup)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        encoder.train()
        losses = []
        clock = time.process_time if torch.device(device).type == "cpu" else time.perf_counter
        start = clock()
        for step, (pixels, labels) in enumerate(_batches(settings, seed)):
            tokens = encoder(pixels.to(device)).last_hidden_state
            loss = F.cross_entropy(reader(tokens, grid).flatten(0, 1), labels.to(device).flatten())
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                given = f"{losses[-1]} at step {step} of {arm}, seed {seed}"
                raise RuntimeError(complaint("loss", given, "a finite number", "Lower the learning rates"))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(everything, CLIP)
            optimizer.step()
            schedule.step()
        seconds = clock() - start
        encoder.eval()
        last = losses[-max(1, len(losses) // 10) :]
        return Outcome(
            before=before,
            after=accuracy(encoder, reader, held_out, grid),
            loss=math.fsum(last) / len(last),
            seconds=seconds,
            parameters=sum(parameter.numel() for parameter in new),
            weights=digest({**encoder.state_dict(), **reader.state_dict()}),
        )


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 of named tensors: their names and bits."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(tensors[name].detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def _residuals(name: str) -> Iterable[str]:
    """Yield the states of the residual in which ``name`` can be told apart."""
    kind = COMPRESSORS[name]
    if not any(True for _ in kind(WIDTH, ratio=RATIO, place="inside").parameters()):
        return [NONE]
    return [ON, OFF] if kind.residuals[0] != "none" else [OFF]


def _build(
    tower: TinyTower, arm: Arm, seed: int, device: torch.device | str
) -> tuple[nn.Module, Any, list[torch.nn.Parameter]]:
    """Return a copy of the tower with the compressor inside, the heads, and the compressor's parameters, all trainable."""
    encoder: Any = copy.deepcopy(tower.encoder)
    new: list[torch.nn.Parameter] = []
    if arm.compressor is not None:
        options: dict[str, Any] = {} if arm.residual == NONE else {"residual": arm.residual == ON}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            encoder = compress(encoder, compressor=arm.compressor, layer=arm.layer, ratio=RATIO, **options)
        new = [parameter for merge in encoder.merges for parameter in merge.parameters()]
    reader = copy.deepcopy(tower.reader)
    return encoder.to(device).requires_grad_(True), reader.to(device).requires_grad_(True), new


def _batches(settings: Settings, seed: int) -> Iterator[Digits]:
    """Yield every training picture once, in the order of ``seed``."""
    pictures = draw_digits(settings.steps * settings.batch, torch.Generator().manual_seed(PICTURES_SEED))
    order = torch.randperm(len(pictures.pixels), generator=torch.Generator().manual_seed(seed))
    for chosen in order.split(settings.batch):
        yield type(pictures)(pictures.pixels[chosen], pictures.labels[chosen])


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread: sums split among several round otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _to(digits: Digits, device: torch.device | str) -> Digits:
    return type(digits)(digits.pixels.to(device), digits.labels.to(device))
