"""Photos for the benchmark: finding them, and turning them into pixel values."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from matplotlib import cbook

from laco_kernels.errors import complaint
from laco_kernels.images import open_image, reason

if TYPE_CHECKING:
    from collections.abc import Sequence


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Return the files named, folders replaced by what lies in them; without any, a public-domain photo.

    That photo is the portrait of Rear Admiral Grace Hopper among matplotlib's sample data.

    Raises:
        ValueError: if a path does not exist or there is no file in a folder.
    """
    if not paths:
        return [Path(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))]
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            files = sorted(entry for entry in path.iterdir() if not entry.is_dir() and not entry.name.startswith("."))
            if not files:
                raise ValueError(complaint("images", f"{path}, with no file in it", "a folder of photos", "Pass another one"))
            found += files
        elif path.exists():
            found.append(path)
        else:
            raise ValueError(complaint("images", f"{path}, which does not exist", "files or folders", "Check the spelling"))
    return found


def read_pixels(files: Sequence[Path], processor: Any) -> tuple[list[torch.Tensor], dict[str, str]]:
    """Turn photos into pixel values ``[3, height, width]``, one at a time.

    Returns:
        Those of the files that could be read, and by path why the others could not.

    Raises:
        ValueError: if the processor makes nothing of a good image.
    """
    pixels, failures = [], {}
    for file in files:
        try:
            image = open_image(file)
        except Exception as error:  # a damaged file raises whatever its decoder raises; the other files go on
            failures[str(file)] = reason(file, error)
            continue
        try:
            pixels.append(processor(images=[image], return_tensors="pt")["pixel_values"][0])
        except (TypeError, ValueError) as error:
            given = f"{type(processor).__name__}, which failed on {file.name} ({error})"
            remedy = "Correct the checkpoint's preprocessor_config.json"
            raise ValueError(complaint("encoder", given, "an image processor that works", remedy)) from error
    return pixels, failures


def batches(pixels: Sequence[torch.Tensor], batch: int) -> list[torch.Tensor]:
    """Return all images as batches ``[batch, 3, height, width]``; the last one is filled up from the beginning.

    Raises:
        ValueError: if the images have different sizes.
    """
    sizes = {tuple(image.shape) for image in pixels}
    if len(sizes) > 1:
        given = f"an image processor that makes images of {' and '.join(map(str, sorted(sizes)))}"
        remedy = "Correct its preprocessor_config.json, or pass images of one size"
        raise ValueError(complaint("encoder", given, "one that makes all images of one size", remedy))
    count = -(-len(pixels) // batch) * batch
    return list(torch.stack([pixels[i % len(pixels)] for i in range(count)]).split(batch))
