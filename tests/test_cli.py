"""The command line, through its runner and once as a real process."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from laco_kernels.bench import cases
from laco_kernels.cli import app

from .hf.encoders import stock


@pytest.fixture
def encoder(tmp_path):
    """A checkpoint folder of a small SigLIP with a real image processor."""
    folder = tmp_path / "encoder"
    stock("siglip", side=6, dtype=torch.float32).save_pretrained(folder)
    settings = json.loads((cases.FOLDER / "siglip-so400m-384" / "preprocessor_config.json").read_text())
    settings["size"] = {"height": 84, "width": 84}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def laco(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def vec(encoder, *arguments):
    return laco("bench", "vec", "--encoder", encoder, "--device", "cpu", "--depths", "1/4,1/2", "--rounds", 2, *arguments)


def test_env():
    done = laco("env")
    assert done.exit_code == 0
    assert torch.__version__ in done.output
    assert "reference    available" in done.output
    report = json.loads(laco("env", "--json").output)
    assert report["torch"] == torch.__version__
    assert report["implementations"]["reference"] is None
    reason = report["implementations"]["cuda"]
    assert reason is None or "compute capability 8.0" in reason or "CUDA extension" in reason


def test_env_says_what_the_environment_chooses(monkeypatch):
    monkeypatch.setenv("LACO_IMPL", "composite")
    choices = json.loads(laco("env", "--json").output)["automatic_choice"]
    for name in ("patch_merge block", "strided_conv", "strided_conv block"):
        assert choices.pop(name) == {"impl": "composite", "reason": "LACO_IMPL says so"}
    refused = {"impl": "refused", "reason": "LACO_IMPL says composite, which this operator does not have"}
    assert {name for name, choice in choices.items() if choice == refused} == {
        "add_norm layer",
        "add_norm rms",
        "gated_silu",
        "activate gelu",
        "activate gelu_tanh",
        "activate quick_gelu",
    }


def test_bench_vec_measures_every_depth(encoder, tmp_path):
    out = tmp_path / "a" / "b"
    done = vec(encoder, "--out", out, "--batch", 2)
    assert done.exit_code == 0, done.output
    assert "36 tokens in, 2 interleaved rounds" in " ".join(done.output.split())
    assert max(map(len, done.stdout.replace(str(out), "").splitlines())) <= 80
    (path,) = out.glob("*.json")
    result = json.loads(path.read_text())
    rows = {row["depth"]: row for row in result["rows"]}
    assert [row["layer"] for row in result["rows"]] == [1, 2, 4]
    assert {row["tokens"] for row in rows.values()} == {9}
    assert rows["1"]["ratio"]["median"] == 1
    assert rows["1/4"]["gflops"] < rows["1/2"]["gflops"] < rows["1"]["gflops"]
    assert rows["1/4"]["added_parameters"] == 32 * 4 * 32 + 32 + 32 * 32 + 32
    assert all(row["correct"] and row["peak_mib"] > 0 for row in rows.values())
    assert result["weights"] == "checkpoint"
    assert result["batch"] == 2
    markdown = path.with_suffix(".md").read_text()
    assert markdown.count("\n| @") == 3
    assert f"({path.stem}.png)" in markdown
    with Image.open(path.with_suffix(".png")) as picture:
        assert picture.size[0] > 800


def test_a_second_run_overwrites_nothing(encoder, tmp_path):
    vec(encoder, "--out", tmp_path / "out")
    first = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert vec(encoder, "--out", tmp_path / "out").exit_code == 0
    assert all(path.read_bytes() == content for path, content in first.items())
    assert len(list((tmp_path / "out").iterdir())) == 6


def test_json_is_the_only_thing_on_standard_output(encoder):
    done = vec(encoder, "--json")
    assert json.loads(done.stdout)["rounds"] == 2


def test_bfloat16_and_compile(encoder):
    result = json.loads(vec(encoder, "--json", "--dtype", "bfloat16", "--compile").stdout)
    assert (result["dtype"], result["modes"]) == ("bfloat16", ["compile"])
    assert all(row["correct"] for row in result["rows"])


@pytest.mark.parametrize("training", [[], ["--training"]], ids=["inference", "training"])
def test_every_way_to_make_it_faster_beside_eager(encoder, tmp_path, training):
    done = vec(encoder, "--optimize", "--impl", "reference", "--out", tmp_path / "out", *training)
    assert done.exit_code == 0, done.output
    assert max(map(len, done.stdout.splitlines())) <= 80
    result = json.loads(next((tmp_path / "out").glob("*.json")).read_text())
    assert result["modes"] == ["eager", "fused", "compile", "fused+compile"]  # graphs need a GPU
    assert (result["training"], result["impl"]) == (bool(training), "reference")
    assert {(row["depth"], row["mode"]) for row in result["rows"]} == {
        (depth, mode) for depth in ("1/4", "1/2", "1") for mode in result["modes"]
    }
    assert all(row["correct"] for row in result["rows"])
    assert [row["mode_ratio"]["median"] for row in result["rows"] if row["mode"] == "eager"] == [1, 1, 1]
    assert "over eager" in next((tmp_path / "out").glob("*.md")).read_text()


def test_an_implementation_that_cannot_run_here(encoder):
    done = vec(encoder, "--optimize", "--impl", "composite")
    assert done.exit_code == 2
    assert "impl: got 'composite', expected None or one of 'reference', 'triton' for add_norm" in done.output


def test_one_way_at_a_time(encoder):
    done = vec(encoder, "--optimize", "--compile")
    assert done.exit_code == 2
    assert "optimize: got it together with --compile" in done.output


def test_a_wrong_result_is_a_failed_check(encoder, monkeypatch):
    from laco_kernels import reference

    exact = reference.space_to_depth
    # A fault of the view only: block layout differs from raster.
    monkeypatch.setattr(
        reference, "space_to_depth", lambda x, w, layout="raster": exact(x, w, layout) * (1.01 if layout == "block" else 1)
    )
    done = vec(encoder)
    assert done.exit_code == 1
    assert "NO" in done.output


def test_a_failed_write_leaves_nothing_behind(encoder, tmp_path, monkeypatch):
    from laco_kernels.bench import report

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "picture", full)
    done = vec(encoder, "--out", tmp_path / "out", "--json")
    assert done.exit_code == 2
    assert "out: got" in done.stderr
    assert "No space left on device" in done.stderr
    assert json.loads(done.stdout)["files"] == []  # what was measured is not lost
    assert list((tmp_path / "out").iterdir()) == []


def test_a_folders_name_is_no_markup(encoder, tmp_path):
    odd = tmp_path / "[bold]" / "enc[/red]"
    shutil.copytree(encoder, odd)
    assert vec(odd).exit_code == 0


def test_long_depths_fit_the_table(encoder):
    done = vec(encoder, "--depths", "0.3333333,1e-9")
    assert "@0.333" in done.stdout
    assert "\u2026" not in done.stdout


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "preprocessor_config.json",
            {"size": {"height": 112, "width": 112}},
            "makes images of 112 x 112 pixels, expected 84 x 84",
        ),
        ("preprocessor_config.json", {"size": "abc"}, "encoder: got"),
        ("config.json", {"hidden_size": "abc"}, "encoder: got"),
        ("config.json", {"num_attention_heads": 5}, "encoder: got"),
        ("config.json", [], "encoder: got"),
        ("model.safetensors.index.json", {}, "encoder: got"),
    ],
)
def test_a_damaged_checkpoint_is_one_line(encoder, file, content, message):
    path = encoder / file
    if path.exists() and content:
        content = {**json.loads(path.read_text()), **content}
    path.write_text(json.dumps(content))
    if file.startswith("model"):
        (encoder / "model.safetensors").unlink()
    done = vec(encoder)
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_bad_images_are_named_and_the_others_measured(encoder, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.effect_noise((90, 70), 60).save(photos / "good.png")
    (photos / "bad.png").write_bytes(b"")
    done = vec(encoder, photos, "--json")
    assert done.exit_code == 1
    result = json.loads(done.stdout)
    assert result["images"] == 1
    assert list(result["failed_images"]) == [str(photos / "bad.png")]
    assert "bad.png: an empty file" in done.stderr
    (photos / "good.png").unlink()
    done = vec(encoder, photos)
    assert done.exit_code == 1
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--depths", "2"], "depths: got '2', expected fractions in (0, 1]"),
        (["--dtype", "int8"], "dtype: got 'int8', expected one of float32, bfloat16, float16"),
        (["--device", "tpu"], "device: got 'tpu', expected cpu, cuda or cuda:N"),
        (["--device", "cuda:99"], "device: got 'cuda:99'"),
        (["--encoder", "no/such-encoder"], "encoder: got 'no/such-encoder'"),
        (["--out", "/proc/nowhere"], "out: got '/proc/nowhere' (No such file or directory), expected a folder that can be"),
        (["--out", "x" * 300], "expected a folder that can be written to"),
        (["--out", __file__], "expected a folder that can be written to"),
        (["missing.jpg"], "images: got missing.jpg, which does not exist"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(encoder, arguments, message):
    done = vec(encoder, *arguments)
    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_bench_compressors(encoder, tmp_path):
    out = tmp_path / "results"
    done = laco("bench", "compressors", "--encoder", encoder, "--rounds", 1, "--only", "laco,tome,mlp2x_gelu", "--out", out)
    assert done.exit_code == 0, done.output
    words = " ".join(done.stdout.split())
    assert "tokens behind layer 1, batch 1, float32, checkpoint weights, 1 photo, 36 tokens in" in words
    assert [line.split()[:3] for line in done.stdout.splitlines() if line.startswith("laco ")] == [
        ["laco", "2", "in+"],
        ["laco", "2", "9"],
    ]
    assert sorted(path.suffix for path in out.iterdir()) == [".json", ".md", ".png"]
    printed = laco("bench", "compressors", "--encoder", encoder, "--rounds", 1, "--only", "laco", "--ratio", "2,3", "--json")
    rows = json.loads(printed.stdout)["rows"]
    assert [(row["name"], row["ratio"], row["tokens"]) for row in rows] == [("laco", 2, 9), ("laco", 3, 4)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ratio", "1"], "ratio: got '1', expected integers of at least 2"),
        (["--ratio", "two"], "ratio: got 'two'"),
        (["--only", "magic"], "only: got 'magic', expected one of laco, pixel_shuffle"),
        (["--llm", "gpt"], "llm: got 'gpt', expected one of 'llama-3.1-8b'"),
        (["--layer", "5"], "layer: got 5, expected 1 to 4"),
        (["--encoder", "no/such-encoder"], "encoder: got 'no/such-encoder'"),
        (["--out", __file__], "expected a folder that can be written to"),
        (["missing.jpg"], "images: got missing.jpg, which does not exist"),
    ],
)
def test_bench_compressors_refuses(encoder, arguments, message):
    done = laco("bench", "compressors", "--encoder", encoder, "--device", "cpu", "--rounds", 1, *arguments)
    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_a_result_that_cannot_be_written_is_shown_all_the_same(encoder, tmp_path, monkeypatch):
    from laco_kernels.bench import compressor_report

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compressor_report, "picture", full)
    wanted = ("--encoder", encoder, "--rounds", 1, "--only", "laco", "--out", tmp_path / "out")
    done = laco("bench", "compressors", *wanted)
    assert done.exit_code == 2
    assert "laco " in done.stdout
    assert "No space left on device" in done.stderr
    assert list((tmp_path / "out").iterdir()) == []


def test_a_compressed_checkpoint_is_refused(encoder):
    import laco_kernels as lk

    folder = encoder.parent / "compressed"
    lk.hf.compress(encoder).save_pretrained(folder)
    shutil.copy(encoder / "preprocessor_config.json", folder)
    done = vec(folder)
    assert done.exit_code == 2
    assert "expected one that is not compressed yet" in done.stderr


def test_as_a_process_without_a_terminal(encoder):
    command = [Path(sys.executable).parent / "laco", "bench", "vec", "--encoder", encoder, "--rounds", "2"]
    env = {**os.environ, "COLUMNS": "80"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env, check=False)
    assert done.returncode == 0, done.stderr
    assert "@1/12" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr
    assert done.stderr == ""


def test_check_of_the_kernels():
    done = laco("check", "--op", "strided_conv_gelu", "--impl", "composite", "--dtype", "float32", "--device", "cpu")
    assert done.exit_code == 0, done.output
    assert "0 failed" in done.output
    rows = json.loads(
        laco("check", "--op", "multi_block_linear_gelu", "--dtype", "float16", "--device", "cpu", "--json").stdout
    )
    assert {row["impl"] for row in rows} == {"composite", "triton"}
    assert all(row["ok"] and row["dtype"] == "float16" for row in rows)


def test_check_of_the_operators_inside_an_encoder():
    rows = json.loads(laco("check", "--op", "activate", "--dtype", "float32", "--device", "cpu", "--json").stdout)
    assert {(row["impl"], row["tensor"]) for row in rows} == {("triton", "y"), ("triton", "dh")}
    assert all(row["ok"] for row in rows)


def test_checking_nothing_is_no_success(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    done = laco("check", "--device", "cpu", "--op", "strided_conv_gelu")
    assert done.exit_code == 1
    assert "not checked: triton in float32: Triton kernels need an NVIDIA GPU" in done.output
    assert "0 passed, 0 failed" in done.output


def test_check_fails_on_a_wrong_kernel(monkeypatch):
    from laco_kernels.kernels import composite

    right = composite.strided_conv_gelu_forward

    def wrong(*args, **kwargs):
        y, pre = right(*args, **kwargs)
        return y * 1.001, pre

    monkeypatch.setattr(composite, "strided_conv_gelu_forward", wrong)
    done = laco("check", "--op", "strided_conv_gelu", "--impl", "composite", "--dtype", "float32", "--device", "cpu")
    assert done.exit_code == 1
    assert "FAIL composite" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "matmul"], "op: got 'matmul', expected one of patch_merge"),
        (["--impl", "magic"], "impl: got 'magic', expected one of reference"),
        (["--op", "add_norm", "--impl", "composite"], "impl: got 'composite', expected one of reference, triton"),
        (["--impl", "cuda"], "impl: got 'cuda', expected one that can run, but the CUDA kernels need compute capability 8.0"),
    ],
)
def test_check_refuses(arguments, message):
    done = laco("check", "--device", "cpu", *arguments)
    assert done.exit_code == 2
    assert message in done.stderr
