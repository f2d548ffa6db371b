"""``laco bench step``: what each stage trains, a tick that can fail, a table that fits."""

import dataclasses
import io
import json
from fractions import Fraction

import pytest
import torch
from rich.console import Console

from laco_kernels.bench import llava_cases, step, step_report
from laco_kernels.train.parts import parts_of

CPU = torch.device("cpu")
ASKED = {"depths": [Fraction(1, 4)], "text_tokens": 8, "rounds": 2, "modes": ("eager", "head")}


def measured(method, *stages, **changes):
    setting = llava_cases.setting(method, CPU, tiny=True)
    return step.measure_step(setting, CPU, torch.float32, stages=stages, **{**ASKED, **changes})


@pytest.fixture(scope="module")
def result():
    return measured("stf", "finetune")


def test_every_row_is_right_and_says_what_it_took(result):
    assert [(row.stage, row.subject, row.mode) for row in result.rows] == [
        ("finetune", name, mode) for name in (llava_cases.LLAVA, llava_cases.STF) for mode in ASKED["modes"]
    ]
    for row in result.rows:
        assert row.correct
        assert 0 < row.error <= row.error_budget
        assert row.peak_mib > 0
        assert min(row.forward_ms.median, row.backward_ms.median, row.update_ms.median) > 0
    eager, head = result.rows[:2]
    assert eager.ratio.median == eager.same_mode_ratio.median == head.same_mode_ratio.median == 1
    assert [row.paper_ratio for row in result.rows[::2]] == [1.0, pytest.approx(27.8 / 18.6)]
    assert json.loads(json.dumps(result.to_dict()))["reduced"] == "8 of 24 encoder layers and 1 of 32 LLM layers"


@pytest.mark.parametrize(
    ("method", "stage", "trained"),
    [
        ("laco", "stage1", {"merge", "projector"}),
        ("laco", "stage2", {"encoder", "merge", "projector", "llm"}),
        ("stf", "pretrain", {"projector"}),
        ("stf", "finetune", {"projector", "llm"}),
    ],
)
def test_a_step_moves_what_the_stage_trains_and_nothing_else(method, stage, trained):
    setting = llava_cases.setting(method, CPU, tiny=True)
    names = llava_cases.subjects(method, [Fraction(1, 4)])[1:]
    run = step._StageRun(setting, stage, names, CPU, torch.float32, checkpointing=True)
    models = run._models(setting)
    (model,) = models.values()
    asked = llava_cases.prompt(model, 2, 8)
    made = step.Trained(model, step.MODES["head"], asked, run._optimizer(models))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    made.step()
    moved = {
        part
        for part, parameters in parts_of(model).items()
        for name, p in parameters.items()
        if not torch.equal(p, before[name])
    }
    assert moved == trained
    lora = {name for name, p in model.named_parameters() if not torch.equal(p, before[name]) and "lora_" in name}
    assert bool(lora) == (stage == "finetune")
    if stage == "finetune":
        assert not any(
            "layers" in name and not torch.equal(p, before[name]) and "lora_" not in name
            for name, p in model.named_parameters()
        )
    assert all(p.grad is None for p in model.parameters())


def test_logits_of_the_answer_alone_give_the_loss_of_all():
    setting = llava_cases.setting("stf", CPU, tiny=True)
    (model,) = llava_cases.build(setting, [llava_cases.STF], CPU, torch.float32).values()
    asked = llava_cases.prompt(model, 2, 8)
    whole, head = (step.Trained(model, step.MODES[name], asked).loss() for name in ("eager", "head"))
    torch.testing.assert_close(head, whole)


def test_a_wrong_loss_is_seen(monkeypatch):
    loss = step.Trained.loss
    monkeypatch.setattr(step.Trained, "loss", lambda self: loss(self) * (1.001 if self.mode.head else 1))
    rows = measured("stf", "pretrain", rounds=1).rows
    assert [row.correct for row in rows] == [True, False, True, False]


def test_the_table_fits_and_says_what_is_cut(result, tmp_path):
    slow = dataclasses.replace(result.rows[-1].step_ms, median=12345.6, p20=12000.1, p80=13000.2)
    row = dataclasses.replace(result.rows[-1], mode="fused+compile+head", step_ms=slow, peak_mib=None, correct=False)
    wide = dataclasses.replace(result, rows=[*result.rows, row])
    console = Console(file=io.StringIO(), width=80)
    console.print(step_report.table(wide))
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    assert "finetune STF" in text
    assert "REDUCED to 8 of 24 encoder layers" in step_report.headline(result)
    assert "no claim of performance" in step_report.legend(result)
    paths = step_report.write(result, tmp_path)
    assert {path.suffix for path in paths} == {".json", ".md", ".png"}
    assert paths[0].stem == "step-tiny-clip-l-336+vicuna-7b-cpu-float32-batch1-reduced"


def test_modes_and_stages_that_there_are():
    with pytest.raises(ValueError, match="stages: got 'stage3', expected some of stage1, stage2"):
        step.check_stages("laco", ["stage3"])
    gpu = torch.device("cuda")
    assert "fused+graphs+head" not in step.modes_for(gpu, "laco", compiled=True), "its encoder is trained"
    every = {"head", *step.modes_for(gpu, "stf", compiled=True)}
    assert every == set(step.MODES) == set(step.EXPLAINED)


def test_no_row_claims_a_graph_that_there_is_not():
    setting = llava_cases.setting("stf", CPU, tiny=True)
    asked = {"stages": ["pretrain"], "modes": ["eager", "fused+graphs+head"], "text_tokens": 8, "rounds": 1}
    found = step.measure_step(setting, CPU, torch.float32, **asked)
    assert {row.mode for row in found.rows} == {"eager"}
    assert found.left_out["pretrain STF fused+graphs+head"] == "its encoder found no room for a CUDA graph"
