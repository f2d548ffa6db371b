"""All compressors side by side: every row is what it says, and what cannot be measured is named."""

import dataclasses
import io
import itertools
import json
import math

import pytest
import torch

from laco_kernels.bench import compressor_report, compressors
from laco_kernels.bench.prefill import llm_names, prefill_tflops
from laco_kernels.nn import COMPRESSORS
from tests.hf.encoders import SIZES, pixels, stock

C, D, SIDE = SIZES["hidden_size"], 896, 8
N = SIDE * SIDE


@pytest.fixture(scope="module")
def result():
    encoder = stock("clip", side=SIDE, dtype=torch.float32)
    images = pixels(side=SIDE, dtype=torch.float32)
    wanted = {"layer": 2, "ratios": [2, 4], "llm": "qwen2.5-0.5b", "weights": "random", "images": 2, "rounds": 1}
    return compressors.measure_compressors(encoder, "tiny", images, **wanted)


def row(result, name, ratio=2):
    return next(row for row in result.rows if (row.name, row.ratio) == (name, ratio))


def test_every_compressor_has_its_rows_and_is_right(result):
    expected = {(name, ratio) for name, kind in COMPRESSORS.items() for ratio in ((2, 4) if kind.reduces else (1,))}
    assert {(row.name, row.ratio) for row in result.rows} | {
        (key.split()[0], int(key.split()[1])) for key in result.left_out
    } == expected
    assert set(result.left_out) <= {"mbtf 1", "mbtf+stf 2", "mbtf+stf 4", "token_packer 2", "token_packer 4"}, "four layers"
    assert all(row.correct and row.ms.median > 0 and row.peak_mib > 0 for row in result.rows)
    for one in result.rows:
        assert one.tokens == (N if one.ratio == 1 else N // one.ratio**2)
        assert one.prefill_tflops == {llm: prefill_tflops(llm, one.tokens) for llm in llm_names()}
        assert one.out_dim == (D if one.place == "behind" and not COMPRESSORS[one.name].keeps_width else C)


def test_what_is_counted(result):
    assert row(result, "mlp2x_gelu", 1).gflops == pytest.approx(2 * 2 * N * (C * D + D * D) / 1e9)
    assert row(result, "laco").gflops == pytest.approx(2 * 2 * N / 4 * (4 * C * C + C * C) / 1e9)
    assert row(result, "laco").parameters == 4 * C * C + C * C + 2 * C
    assert row(result, "visionzip").parameters == 0
    assert row(result, "visionzip").gflops > 2 * 2 * (1 + N) * C * C / 1e9, "the layer's keys are made for it"
    whole = row(result, "mlp2x_gelu", 1).encoder_gflops - row(result, "mlp2x_gelu", 1).gflops
    for name in ("idefics3", "vila", "avg_pool"):
        assert row(result, name).encoder_gflops == pytest.approx(whole + row(result, name).gflops)
    # Half of the layers see a quarter of the tokens; before the encoder all of them do.
    assert row(result, "downsample").encoder_gflops < 0.3 * whole
    assert 0.55 * whole < row(result, "laco").encoder_gflops < 0.8 * whole


def test_an_error_beyond_the_budget_is_seen(monkeypatch):
    calls = iter([1.0, 1.01, 1.0, 1.0, 1.0, 1.01, 1.02, 1.0])  # exact, ours, reference, for memory
    case = compressors._Case("x", torch.nn.Identity(), ())
    monkeypatch.setattr(compressors._Case, "run", lambda self: torch.tensor([next(calls)]))
    judged = [compressors._judge(case, torch.device("cpu")) for _ in range(2)]
    assert [one["correct"] for one in judged] == [False, True]
    assert [one["same"] for one in judged] == [False, False]


def test_what_there_is_no_memory_for_is_left_out_and_said(monkeypatch):
    monkeypatch.setattr(compressors, "_free_bytes", lambda device: 2**20)
    encoder, images = stock("clip", dtype=torch.float32), pixels(dtype=torch.float32)
    wanted = {"layer": 2, "ratios": [2], "llm": "qwen2.5-0.5b", "weights": "random", "images": 2, "rounds": 1}
    result = compressors.measure_compressors(encoder, "tiny", images, names=["tome", "stf"], **wanted)
    assert [row.name for row in result.rows] == ["tome"]
    assert "billion parameters" in result.left_out["stf 2"]
    assert "stf, ratio 2: ratio: got stf with" in compressor_report.markdown(result)


def test_tables_markdown_json_and_picture(result, tmp_path):
    from rich.console import Console

    console = Console(width=80, record=True, file=io.StringIO())
    for table in compressor_report.tables(result):
        console.print(table)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for name in COMPRESSORS:
        assert name in text or {f"{name} 1", f"{name} 2"} & {*result.left_out}
    paths = compressor_report.write(result, tmp_path) + compressor_report.write(result, tmp_path)
    assert len(set(paths)) == len(list(tmp_path.iterdir())) == 6
    assert json.loads(paths[0].read_text())["rows"][0]["name"] == "laco"
    assert paths[1].read_text().count("\n| ") == 2 * (len(result.rows) + 1)
    assert paths[2].read_bytes()[:4] == b"\x89PNG"


def test_labels_keep_their_distance(result, monkeypatch):
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots()
    axes.set(xscale="log", yscale="log", xlim=(1, 10), ylim=(1, 1000))
    ends = [(2.0, 900.0 + i / 10, f"high {i}", "k") for i in range(5)] + [(2.0, 2.0, "low", "k"), (5.0, 2.0, "other", "k")]
    compressor_report._label_apart(axes, ends)
    places = {text.get_text(): text.xyann for text in axes.texts}
    heights = sorted(y for name, (_, y) in places.items() if name != "other")
    assert all(b - a > 0.033 for a, b in itertools.pairwise(heights))
    assert max(heights) <= 1 + 1e-9
    assert places["low"][1] == pytest.approx(places["other"][1]) == pytest.approx(math.log10(2) / 3)
    plt.close(figure)


def test_names_are_checked():
    assert compressors.check_names(None) is None
    assert compressors.check_names("laco, tome") == ["laco", "tome"]
    assert compressors.check_names("tome,tome") == ["tome"]
    with pytest.raises(ValueError, match=r"only: got 'lacoo', expected one of laco.*Did you mean 'laco'"):
        compressors.check_names("laco,lacoo")


def test_nothing_to_measure_is_said():
    encoder, images = stock("clip", dtype=torch.float32), pixels(dtype=torch.float32)
    wanted = {"layer": 2, "ratios": [2], "llm": "qwen2.5-0.5b", "weights": "random", "images": 2, "rounds": 1}
    with pytest.raises(ValueError, match=r"only: got nothing that can be measured here \(num_blocks: got 8"):
        compressors.measure_compressors(encoder, "tiny", images, names=["mbtf"], **wanted)


def test_rows_keep_their_spread(result):
    assert dataclasses.asdict(result)["rows"][0]["ms"].keys() == {"median", "p20", "p80", "low", "high", "rounds"}
