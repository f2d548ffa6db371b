"""Image files, opened safely: upright, in RGB, and with a reason where that fails."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

BOMB = (Image.DecompressionBombError, Image.DecompressionBombWarning)


def open_image(file: Path) -> Image.Image:
    """Open a photo as an upright RGB image."""
    if not file.is_file():
        raise OSError("not a regular file")
    with _careful(), Image.open(file) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip at 255
            return Image.fromarray((np.asarray(upright).astype(np.uint32) >> 8).astype(np.uint8)).convert("RGB")
        return upright.convert("RGB")


def peek_image(file: Path) -> tuple[tuple[int, int], str]:
    """Return the width and height of a photo and its mode, as its header has them, without decoding pixels."""
    with _careful(), Image.open(file) as image:
        return image.size, image.mode


def reason(file: Path, error: Exception) -> str:
    """Say why a photo could not be opened, and what to do about it."""
    if isinstance(error, BOMB):
        return f"more than {Image.MAX_IMAGE_PIXELS:,} pixels, refused as a decompression bomb; scale it down first"
    if file.is_file() and file.stat().st_size == 0:
        return "an empty file; copy it again"
    if isinstance(error, UnidentifiedImageError):
        return "not an image that Pillow can read; convert it to JPEG or PNG"
    return f"damaged or unreadable ({str(error).strip() or type(error).__name__}); copy it again"


@contextmanager
def _careful() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of metadata that is not looked at
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield
