"""The pictures show what their labels say, where they say it, and are the same on every machine."""

import pytest
import torch
import torch.nn.functional as F

from laco_kernels.train import digits


def draw(seed, count=32, **options):
    return digits.draw_digits(count, torch.Generator().manual_seed(seed), **options)


def test_the_same_seed_draws_the_same_pictures():
    pixels, labels = draw(0)
    assert (pixels.shape, pixels.dtype) == ((32, 3, 32, 32), torch.float32)
    assert (labels.shape, labels.dtype) == ((32, 4), torch.int64)
    again, other = draw(0), draw(1)
    assert torch.equal(pixels, again.pixels)
    assert torch.equal(labels, again.labels)
    assert not torch.equal(labels, other.labels)
    assert set(labels.unique().tolist()) == set(range(10))


def test_every_quadrant_shows_its_digit():
    pixels, labels = draw(0, noise=0.0)
    ink = (pixels * digits.SPREAD + digits.MEAN).sum(1)
    templates = digits._glyphs()[:, None]
    templates = templates / templates.norm(dim=(2, 3), keepdim=True)
    for i in range(4):
        row, column = divmod(i, 2)
        quadrant = ink[:, None, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
        # The best match over all places, relative to all the ink there is: one exactly where the digit alone is.
        match = F.conv2d(quadrant, templates).flatten(2).amax(2) / quadrant.flatten(1).norm(dim=1, keepdim=True)
        assert torch.equal(match.argmax(1), labels[:, i])
        torch.testing.assert_close(match.amax(1), torch.ones(32))


def test_no_digit_is_cut_off(monkeypatch):
    ink = digits._glyphs().sum((1, 2))
    monkeypatch.setattr(digits, "GLYPH_HEIGHT", 30)
    monkeypatch.setattr(digits, "GLYPH_WIDTH", 30)
    torch.testing.assert_close(ink, digits._glyphs.__wrapped__().sum((1, 2)))


def test_digits_differ_in_place_and_colour():
    pixels, labels = draw(0, count=256, noise=0.0)
    first = (pixels * digits.SPREAD + digits.MEAN)[:, :, :16, :16][labels[:, 0] == 7]
    tops = {int(image.sum((0, 2)).nonzero()[0]) for image in first}
    lefts = {int(image.sum((0, 1)).nonzero()[0]) for image in first}
    assert len(tops) == 16 - digits.GLYPH_HEIGHT + 1
    assert len(lefts) == 16 - digits.GLYPH_WIDTH + 1
    colours = first.amax((2, 3))
    assert colours.min() >= 0.39
    assert colours.std(0).min() > 0.1


def test_noise_is_as_strong_as_asked_for():
    clean, noisy = draw(0, count=64, noise=0.0).pixels, draw(0, count=64, noise=0.3).pixels
    difference = (noisy - clean) * digits.SPREAD
    assert abs(float(difference.std()) - 0.3) < 0.01
    assert abs(float(draw(0, count=64).pixels.mean())) < 0.3


@pytest.mark.parametrize("count", [0, -1, 1.5])
def test_how_many_is_a_positive_integer(count):
    with pytest.raises((TypeError, ValueError), match="count: got"):
        draw(0, count=count)
