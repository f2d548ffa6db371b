"""The encoder and the photos that a command works on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import typer

from laco_kernels.cli.common import complain

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import torch
    from transformers import PreTrainedModel


class Work(NamedTuple):
    """A stock encoder and what it is to encode."""

    encoder: PreTrainedModel
    weights: str  # "random" or "checkpoint"
    batches: list[torch.Tensor]  # [batch, 3, height, width], on the CPU
    images: int  # photos that could be read
    failures: dict[str, str]  # the others by path, and why


def load_work(name: str, images: Sequence[Path] | None, batch: int, step: Callable[[str, float], Any]) -> Work:
    """Load an encoder and photos; photos that cannot be read are complained of, and without any the command ends.

    Raises:
        ValueError: the photos do not exist or do not fit the encoder.
        RuntimeError: the encoder or its processor cannot be loaded.
    """
    from laco_kernels.bench import cases, system
    from laco_kernels.bench import images as photos
    from laco_kernels.hf.processor import load_image_processor

    files = photos.find_images(images or [])
    step("loading the encoder", 0.0)
    encoder, weights = system.load_encoder(name)
    processor = load_image_processor(str(cases.FOLDER / name) if name in cases.encoder_names() else name)
    step(f"reading {len(files)} photos", 0.0)
    opened, failures = photos.read_pixels(files, processor)
    for file, reason in failures.items():
        complain(f"{file}: {reason}")
    if not opened:
        raise typer.Exit(1)
    batches = photos.batches(opened, batch)
    system.check_pixels(encoder, batches[0])
    return Work(encoder, weights, batches, len(opened), failures)
