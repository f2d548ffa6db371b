"""``laco bench kept`` through its runner."""

import json

import pytest
from PIL import Image

from .test_cli import encoder, laco  # noqa: F401 - a fixture


def kept(*arguments):
    return laco("bench", "kept", "--device", "cpu", "--seeds", 1, "--depths", "1/4,1/2", *arguments)


def test_the_tiny_encoder_is_pretrained_on_the_spot(tmp_path):
    done = kept("--steps", 2, "--only", "laco,tome", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "pretrained here (reads " in " ".join(done.stdout.split())
    assert max(map(len, done.stdout.splitlines())) <= 80
    result = json.loads((tmp_path / "out" / "kept-tiny-tower-ratio2.json").read_text())
    assert (result["images"], result["tokens_in"], result["seeds"]) == (64, 64, 1)
    assert result["weights"] == "pretrained here"
    assert 0 < result["accuracy"] < 1
    assert [(row["compressor"], row["layer"]) for row in result["rows"][:2]] == [("laco", 3), ("laco", 6)]


def test_a_users_own_encoder_and_photos(encoder, tmp_path):  # noqa: F811
    for name in "abc":
        Image.effect_noise((90, 70), 60).convert("RGB").save(tmp_path / f"{name}.png")
    (tmp_path / "d.png").write_bytes(b"")
    photos = [tmp_path / f"{name}.png" for name in "abcd"]
    done = kept("--encoder", encoder, "--json", *photos)
    assert done.exit_code == 1
    result = json.loads(done.stdout)
    assert (result["weights"], result["images"], result["accuracy"]) == ("checkpoint", 3, None)
    assert list(result["failed_images"]) == [str(tmp_path / "d.png")]
    assert 0 < result["other_windows"] < 1
    assert {row["compressor"] for row in result["rows"]} >= {"laco", "avg_pool", "tome"}


def test_one_photo_has_no_other_to_be_compared_with(encoder):  # noqa: F811
    done = kept("--encoder", encoder, "--only", "avg_pool")
    assert done.exit_code == 0, done.output
    assert "1 image of 36 tokens, 1 draw of" in " ".join(done.stdout.split())
    assert "Another image" not in done.stdout


def test_a_failed_write_loses_nothing(encoder, tmp_path, monkeypatch):  # noqa: F811
    from laco_kernels.bench import kept_report

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kept_report, "picture", full)
    done = kept("--encoder", encoder, "--only", "avg_pool", "--out", tmp_path / "out", "--json")
    assert done.exit_code == 2
    assert "out: got" in done.stderr
    assert json.loads(done.stdout)["files"] == []
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["photo.jpg"], "images: got photo.jpg, expected none for the tiny encoder, which reads digits"),
        (["--encoder", "no/such-encoder"], "encoder: got 'no/such-encoder'"),
        (["--encoder", "x", "--steps", "3"], "steps: got 3, expected none with --encoder"),
        (["--depths", "0"], "depths: got '0', expected fractions in (0, 1]"),
        (["--only", "lacoo"], "only: got 'lacoo', expected one of laco"),
        (["--steps", "1", "--only", "qformer"], "only: got qformer, expected some that can stand inside this encoder: laco"),
        (["--out", "/proc/nowhere"], "out: got '/proc/nowhere'"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(arguments, message):
    done = kept(*arguments)
    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
