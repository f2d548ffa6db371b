"""``laco bench generate``: parts that add up, a tick that can fail, tables that fit."""

import contextlib
import dataclasses
import io
import json
from fractions import Fraction

import pytest
import torch
from rich.console import Console

from laco_kernels.bench import generate, generate_report, llava_cases, step
from laco_kernels.bench.decoding import Static

CPU = torch.device("cpu")
ASKED = {"depths": [Fraction(1, 4)], "batch": 2, "text_tokens": 8, "new_tokens": 5, "rounds": 2}


def measured(method, modes=("eager", "static")):
    setting = llava_cases.setting(method, CPU, tiny=True)
    return generate.measure_generate(setting, CPU, torch.float32, modes=modes, **ASKED)


@pytest.fixture(scope="module")
def result():
    return measured("laco", ("eager", "fused", "static"))


def shown(tables):
    console = Console(file=io.StringIO(), width=80)
    for table in tables:
        console.print(table)
    return console.file.getvalue()


def test_every_model_has_its_rows_and_is_right(result):
    keys = [(row.subject, row.mode) for row in result.rows]
    assert keys == [(name, mode) for name in ("@1", "@1/4") for mode in ("eager", "fused", "static")]
    assert all(row.correct and row.agreement == 1 and 0 < row.error <= row.error_budget for row in result.rows)
    assert all(row.image_tokens == 4 and row.peak_mib > 0 for row in result.rows)
    assert result.rounds == 2
    assert [row.paper_tps_ratio for row in result.rows[::3]] == [1.0, pytest.approx(27.4 / 24.0)]
    assert {row.paper_ttft_ratio for row in result.rows} == {None}
    assert json.loads(json.dumps(result.to_dict()))["depth"] == {"encoder": [12, 24], "llm": [2, 24]}


def test_the_parts_add_up():
    # A start, the encoder's start and end, the ends of projector, prefill and decoding, in seconds.
    parts = generate._parts([[0.0, 1.0, 3.0, 3.5, 5.5, 9.5], [0.0, 0.0, 2.0, 3.0, 5.0, 7.0]])
    assert parts == {
        "vision": [2000.0, 2000.0],
        "projector": [500.0, 1000.0],
        "prefill": [3000.0, 2000.0],
        "decode": [4000.0, 2000.0],
        "ttft": [5500.0, 5000.0],
        "generate": [9500.0, 7000.0],
    }


def test_times_are_of_tokens_and_rows(result):
    for row in result.rows:
        # A sum's median is not the sum of medians, but within the extremes of two rounds it is.
        least = sum(part.p20 for part in (row.vision_ms, row.projector_ms, row.prefill_ms))
        most = sum(part.p80 for part in (row.vision_ms, row.projector_ms, row.prefill_ms))
        assert least <= row.ttft_ms.median <= most
        assert row.tpot_ms.median == pytest.approx(row.decode_ms.median / 4)
        assert row.tps.p20 * row.generate_ms.p80 == pytest.approx(1e3 * 2 * 5, rel=0.5)
    first = result.rows[0]
    assert first.ttft_ratio.median == first.tps_ratio.median == 1


def test_wrong_tokens_and_wrong_logits_are_seen(monkeypatch):
    step = Static._step

    def mistaken(self):
        self.token.sub_(1)  # of what it was, not what it made
        step(self)

    monkeypatch.setattr(Static, "_step", mistaken)
    rows = measured("stf").rows
    assert [row.correct for row in rows] == [True, False, True, False]
    assert all(row.error > row.error_budget for row in rows[1::2])


@contextlib.contextmanager
def turned_further(static):
    """Let every token stand a place further than it does."""
    rotary = static.model.model.language_model.rotary_emb
    rotary.forward = lambda x, places, turn=rotary.forward: turn(x, places + 1)
    yield
    del rotary.forward


class Misplaced(Static):
    def _step(self):
        with turned_further(self):
            super()._step()


class Gap(Static):
    def _prefill(self):
        super()._prefill()
        for layer in self.cache.layers:
            layer.cumulative_length.add_(1)


class Overwriting(Static):
    def _prefill(self):
        super()._prefill()
        for layer in self.cache.layers:
            layer.cumulative_length.sub_(1)


class Staring(Static):
    def _step(self):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("transformers.models.qwen2.modeling_qwen2.create_causal_mask", lambda **_: None)
            super()._step()


class Repeating(Static):
    def _projector(self):
        super()._projector()
        self.features = self.features[:1].expand_as(self.features)


class Miswriting(Static):
    def _take(self, hidden):
        super()._take(hidden)
        self.made[:, -1] = 0


MISTAKES = [Misplaced, Gap, Overwriting, Staring, Repeating, Miswriting]


@pytest.mark.parametrize("mistaken", [Static, *MISTAKES])
def test_in_bfloat16_every_mistake_is_seen(judged, mistaken):
    model, asked, judge = judged
    assert judge(mistaken(model, asked, 6))["correct"] == (mistaken is Static)


@pytest.fixture(scope="module")
def judged():
    setting = llava_cases.setting("laco", CPU, tiny=True)
    (model,) = llava_cases.build(setting, ["@1/4"], CPU, torch.bfloat16).values()
    asked = llava_cases.prompt(model, 3, 24)
    return model, asked, generate._judge(model, asked, 6)


@pytest.mark.parametrize("method", ["laco", "stf"])
def test_the_papers_figures_stand_beside_their_models_alone(method):
    theirs = llava_cases.setting(method, CPU)
    subject = llava_cases.subjects(method, [Fraction(1, 4)])[1]
    ratio = "paper_tps_ratio" if method == "laco" else "paper_ttft_ratio"
    stage = {"laco": "stage2", "stf": "finetune"}[method]
    other = "siglip-so400m-384" if method == "stf" else theirs.encoder
    for setting, known in ((theirs, True), (dataclasses.replace(theirs, encoder=other, llm="llama-3.1-8b"), False)):
        assert (generate._paper(setting, subject)[ratio] is not None) == known
        run = step._StageRun(setting, stage, [subject], CPU, torch.float32, False)
        assert (run._paper(subject) is not None) == known


def test_what_does_not_fit_is_left_out_and_named(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("no room\nfor details")

    monkeypatch.setattr(generate, "Static", full)
    found = measured("stf")
    assert [(row.subject, row.mode) for row in found.rows] == [("LLaVA-1.5", "eager"), ("STF", "eager")]
    assert found.left_out == {"LLaVA-1.5 static": "no room", "STF static": "no room"}
    assert found.rows[1].paper_ttft_ratio == pytest.approx(346.2 / 103.8)
    assert "Left out: STF static: no room" in generate_report.markdown(found)


def test_the_tables_fit_and_say_what_is_cut(result, tmp_path):
    slow = dataclasses.replace(result.rows[-1].ttft_ms, median=12345.6, p20=12000.1, p80=13000.2)
    row = dataclasses.replace(result.rows[-1], mode="fused+compile+graphs", ttft_ms=slow, correct=False)
    wide = dataclasses.replace(result, rows=[*result.rows, row])
    text = shown(generate_report.tables(wide))
    assert max(map(len, text.splitlines())) <= 80
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    assert "@1/4, 4 tokens" in text
    assert "12346 (12000-13000)" in text
    assert "REDUCED to 12 of 24 encoder layers and 2 of 24 LLM layers" in generate_report.headline(result)
    assert "neither times nor ratios are those of the whole model" in generate_report.legend(result)
    assert "no claim of performance" in generate_report.legend(result)
    paths = generate_report.write(result, tmp_path)
    assert {path.suffix for path in paths} == {".json", ".md", ".png"}
    assert all(path.stem.endswith("-reduced") for path in paths)
    assert json.loads(paths[0].read_text())["reduced"] == "12 of 24 encoder layers and 2 of 24 LLM layers"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "both"}, "method: got 'both'"),
        ({"method": "laco", "llm": "gpt"}, "llm: got 'gpt'"),
        ({"method": "stf", "encoder_layers": 7}, "encoder_layers: got 7, expected 8 to 24 layers"),
        ({"method": "laco", "llm_layers": 25}, "llm_layers: got 25, expected 1 to 24 layers"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        llava_cases.setting(device=CPU, **arguments)


def test_whole_models_on_a_gpu_and_goals_of_these_alone():
    gpu = torch.device("cuda")
    whole = llava_cases.setting("stf", gpu)
    assert (whole.depth, llava_cases.reduction(whole.depth)) == ({"encoder": [24, 24], "llm": [32, 32]}, "")
    goal = llava_cases.goal("generate", whole, batch=16, text_tokens=64)
    assert goal == {"ratio": 3.5, "of": "ttft", "against": "eager LLaVA-1.5"}
    assert llava_cases.goal("generate", whole, batch=1, text_tokens=64) is None
    assert llava_cases.goal("generate", llava_cases.setting("stf", CPU), batch=16, text_tokens=64) is None
    small = llava_cases.setting("laco", gpu)
    assert llava_cases.goal("generate", small, batch=1, new_tokens=128)["ratio"] == 10
    assert llava_cases.goal("step", small, stage="stage2", text_tokens=128)["ratio"] == 1.6
    assert llava_cases.goal("step", small, stage="stage1", text_tokens=128) is None
    assert llava_cases.goal("step", whole, stage="finetune", text_tokens=128)["ratio"] == 2.0
    assert "graphs" not in " ".join(generate.modes_for(CPU, compiled=True))
    assert set(generate.modes_for(gpu, compiled=True)) | {"static"} == set(generate.MODES) == set(generate.EXPLAINED)


def test_prompts_have_one_image_and_as_much_text_as_asked_for():
    setting = llava_cases.setting("stf", CPU, tiny=True)
    (model,) = llava_cases.build(setting, [llava_cases.LLAVA], CPU, torch.float32).values()
    asked = llava_cases.prompt(model, 3, 9)
    assert asked.ids.shape == (3, 9 + 16)
    assert (asked.image.start, asked.image.stop) == (1, 17)
    assert (asked.ids[:, asked.image] == llava_cases.IMAGE_TOKEN).all()
    assert (asked.ids == llava_cases.IMAGE_TOKEN).sum() == 3 * 16
    with pytest.raises(ValueError, match="text_tokens: got 1"):
        llava_cases.prompt(model, 3, 1)
