"""Photos: found, opened safely, turned into pixel values."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from laco_kernels.bench import cases, images
from laco_kernels.hf.processor import load_image_processor

SIZES = {"aimv2-l-336": 336, "siglip-so400m-384": 384, "internvit-300m-448": 448, "clip-l-336": 336}


def photo():
    (file,) = images.find_images([])
    return images.open_image(file)


class Sizes:
    """A processor that tells what images it was given."""

    def __init__(self):
        self.images = []

    def __call__(self, images, return_tensors):
        self.images += images
        return {"pixel_values": torch.zeros(1, 3, 2, 2)}


def test_the_bundled_photo_is_a_photo():
    assert photo().size == (512, 600)
    assert len(set(photo().tobytes())) > 200


@pytest.mark.parametrize("name", cases.encoder_names())
def test_real_processors_make_pixel_values(name, tmp_path):
    processor = load_image_processor(str(cases.FOLDER / name))
    side = SIZES[name]
    photo().save(tmp_path / "a.png")
    photo().resize((900, 300)).save(tmp_path / "b.png")
    pixels, failures = images.read_pixels([tmp_path / "a.png", tmp_path / "b.png", tmp_path / "a.png"], processor)
    assert not failures
    batches = images.batches(pixels, 2)
    assert [tuple(batch.shape) for batch in batches] == [(2, 3, side, side)] * 2
    assert torch.equal(batches[1][1], batches[0][0])  # filled up from the beginning
    assert batches[0].std() > 0.5


def test_a_batch_larger_than_the_photos_repeats_them():
    (batch,) = images.batches([torch.ones(3, 2, 2), torch.zeros(3, 2, 2)], 3)
    assert batch[:, 0, 0, 0].tolist() == [1, 0, 1]


def test_images_of_different_sizes_are_refused():
    with pytest.raises(ValueError, match=r"makes images of \(3, 2, 2\) and \(3, 4, 2\), expected one"):
        images.batches([torch.ones(3, 2, 2), torch.ones(3, 4, 2)], 2)


def test_photos_are_turned_upright_and_made_rgb(tmp_path):
    picture = Image.fromarray(np.zeros((20, 10, 3), np.uint8))
    exif = picture.getexif()
    exif[0x0112] = 6  # taken with the camera on its side
    picture.save(tmp_path / "a.jpg", exif=exif)
    Image.new("CMYK", (4, 4)).save(tmp_path / "b.jpg")
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(tmp_path / "c.png")
    processor = Sizes()
    _, failures = images.read_pixels(images.find_images([tmp_path]), processor)
    assert not failures
    assert [image.mode for image in processor.images] == ["RGB"] * 3
    assert processor.images[0].size == (20, 10)
    assert processor.images[2].getpixel((0, 0)) == (156, 156, 156)


def test_bad_files_are_named_and_the_others_go_on(tmp_path, monkeypatch):
    photo().save(tmp_path / "good.jpg")
    whole = (tmp_path / "good.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / ".hidden").write_text("not looked at")
    Image.new("1", (5000, 5000)).save(tmp_path / "huge.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 15_000_000)
    pixels, failures = images.read_pixels(images.find_images([tmp_path]), Sizes())
    assert len(pixels) == 1
    reasons = {path.rpartition("/")[2]: reason for path, reason in failures.items()}
    assert reasons.keys() == {"cut.jpg", "empty.jpg", "text.jpg", "huge.png", "pipe.png", "gone.png"}
    assert "damaged" in reasons["cut.jpg"]
    assert "an empty file" in reasons["empty.jpg"]
    assert "not an image" in reasons["text.jpg"]
    assert "decompression bomb" in reasons["huge.png"]
    assert "not a regular file" in reasons["pipe.png"]
    assert "not a regular file" in reasons["gone.png"]


def test_no_decoder_can_stop_the_others(tmp_path, monkeypatch):
    photo().save(tmp_path / "good.jpg")

    def fail(file):
        raise AttributeError("a decoder's own mistake")

    monkeypatch.setattr(images, "open_image", fail)
    pixels, failures = images.read_pixels([tmp_path / "good.jpg"], Sizes())
    assert not pixels
    assert "a decoder's own mistake" in failures[str(tmp_path / "good.jpg")]


def test_paths_that_do_not_exist_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"images: got .*nothing\.jpg, which does not exist"):
        images.find_images([tmp_path / "nothing.jpg"])
    with pytest.raises(ValueError, match=r"images: got .*, with no file in it"):
        images.find_images([tmp_path])


def test_a_folder_without_a_processor_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match=r"expected a checkpoint with a preprocessor_config\.json"):
        load_image_processor(str(tmp_path))
