"""Photos: found, opened safely, turned into pixel values."""

import numpy as np
import pytest
import torch
from PIL import Image

from laco_kernels.bench import cases, images

SIZES = {"aimv2-l-336": 336, "siglip-so400m-384": 384, "internvit-300m-448": 448, "clip-l-336": 336}


def photo():
    opened, failures = images.load_images(images.find_images([]))
    assert not failures
    return opened[0]


def test_the_bundled_photo_is_a_photo():
    assert photo().size == (512, 600)
    assert len(set(photo().tobytes())) > 200


@pytest.mark.parametrize("name", cases.encoder_names())
def test_real_processors_make_pixel_values(name):
    processor = images.load_processor(str(cases.FOLDER / name))
    side = SIZES[name]
    wide = photo().resize((900, 300))
    batches = images.batches([photo(), wide, photo()], processor, 2)
    assert [tuple(batch.shape) for batch in batches] == [(2, 3, side, side)] * 2
    assert torch.equal(batches[1][1], batches[0][0])  # filled up from the beginning
    assert batches[0].std() > 0.5


def test_a_batch_larger_than_the_photos_repeats_them():
    processor = images.load_processor(str(cases.FOLDER / "clip-l-336"))
    (batch,) = images.batches([photo()], processor, 3)
    assert torch.equal(batch[0], batch[2])


def test_photos_are_turned_upright_and_made_rgb(tmp_path):
    picture = Image.fromarray(np.zeros((20, 10, 3), np.uint8))
    exif = picture.getexif()
    exif[0x0112] = 6  # taken with the camera on its side
    picture.save(tmp_path / "a.jpg", exif=exif)
    Image.new("CMYK", (4, 4)).save(tmp_path / "b.jpg")
    Image.new("I;16", (4, 4)).save(tmp_path / "c.png")
    opened, failures = images.load_images(images.find_images([tmp_path]))
    assert not failures
    assert [image.mode for image in opened] == ["RGB"] * 3
    assert opened[0].size == (20, 10)


def test_bad_files_are_named_and_the_others_go_on(tmp_path, monkeypatch):
    photo().save(tmp_path / "good.jpg")
    whole = (tmp_path / "good.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / ".hidden").write_text("not looked at")
    Image.new("1", (5000, 5000)).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 15_000_000)
    opened, failures = images.load_images(images.find_images([tmp_path]))
    assert len(opened) == 1
    reasons = {path.rpartition("/")[2]: reason for path, reason in failures.items()}
    assert reasons.keys() == {"cut.jpg", "empty.jpg", "text.jpg", "huge.png"}
    assert "damaged" in reasons["cut.jpg"]
    assert "an empty file" in reasons["empty.jpg"]
    assert "not an image" in reasons["text.jpg"]
    assert "decompression bomb" in reasons["huge.png"]


def test_paths_that_do_not_exist_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"images: got .*nothing\.jpg, which does not exist"):
        images.find_images([tmp_path / "nothing.jpg"])
    with pytest.raises(ValueError, match="images: got the empty folder"):
        images.find_images([tmp_path])


def test_a_folder_without_a_processor_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match=r"expected a checkpoint with a preprocessor_config\.json"):
        images.load_processor(str(tmp_path))
