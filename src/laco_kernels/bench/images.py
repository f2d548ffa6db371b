"""Photos for the benchmark: finding them, opening them safely, and turning them into pixel values."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from matplotlib import cbook
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers.image_processing_base import ImageProcessingMixin

from laco_kernels.errors import complaint

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Return the files named, folders replaced by the files in them; without any, a public-domain photo.

    That photo is the portrait of Rear Admiral Grace Hopper among matplotlib's sample data.

    Raises:
        ValueError: if a path does not exist or a folder is empty.
    """
    if not paths:
        return [Path(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))]
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            files = sorted(entry for entry in path.iterdir() if entry.is_file() and not entry.name.startswith("."))
            if not files:
                raise ValueError(complaint("images", f"the empty folder {path}", "a folder of photos", "Pass another one"))
            found += files
        elif path.exists():
            found.append(path)
        else:
            raise ValueError(complaint("images", f"{path}, which does not exist", "files or folders", "Check the spelling"))
    return found


def load_images(files: Sequence[Path]) -> tuple[list[Image.Image], dict[str, str]]:
    """Open the files as upright RGB images; return those that could be read, and why the others could not by path."""
    images, failures = [], {}
    for file in files:
        try:
            images.append(_open(file))
        except (
            OSError,
            ValueError,
            SyntaxError,
            Image.DecompressionBombError,
            Image.DecompressionBombWarning,
        ) as error:
            failures[str(file)] = _reason(file, error)
    return images, failures


def _open(file: Path) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(file) as image:
            return ImageOps.exif_transpose(image).convert("RGB")


def _reason(file: Path, error: Exception) -> str:
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"more than {Image.MAX_IMAGE_PIXELS:,} pixels, refused as a decompression bomb; scale it down first"
    if file.is_file() and file.stat().st_size == 0:
        return "an empty file; copy it again"
    if isinstance(error, UnidentifiedImageError):
        return "not an image that Pillow can read; convert it to JPEG or PNG"
    return f"damaged or unreadable ({error}); copy it again"


def load_processor(source: str) -> Any:
    """Load the image processor of a checkpoint's folder or hub name, in the variant that needs no torchvision.

    Raises:
        RuntimeError: if there is no processor that can be loaded.
    """
    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(source)
        kind = str(settings.get("image_processor_type") or settings["feature_extractor_type"])
        name = kind.removesuffix("Fast").replace("FeatureExtractor", "ImageProcessor") + "Pil"
        return getattr(transformers, name).from_pretrained(source)
    except (OSError, KeyError, AttributeError) as error:
        given = f"{source!r} ({str(error).strip().splitlines()[0]})"
        expected = "a checkpoint with a preprocessor_config.json that names an image processor of transformers"
        raise RuntimeError(complaint("encoder", given, expected, "Save the image processor beside the model")) from error


def batches(images: Sequence[Image.Image], processor: Any, batch: int) -> list[torch.Tensor]:
    """Return all images as batches ``[batch, 3, height, width]``; the last one is filled up from the beginning."""
    count = -(-len(images) // batch) * batch
    pixels = processor(images=list(images), return_tensors="pt")["pixel_values"]
    filled = pixels[[i % len(images) for i in range(count)]]
    return list(filled.split(batch))
