"""Whole models in the report: beside the papers, in full, where they lose, and against their goals."""

import pytest

from laco_kernels.bench import page
from laco_kernels.bench.compare import Change
from laco_kernels.bench.page import devices, llava, losses, sections
from laco_kernels.bench.results import Results, Row

from . import synthetic

SPEED = {"eager": 1.0, "fused+graphs": 11.0}
MORE = {"@1": 1.0, "@1/4": 1.2, "LLaVA-1.5": 1.0, "STF": 2.5}


def row(subject, variant, name, *, stage="", goal=None, **values):
    laco = subject.startswith("@")
    case = {"encoder": "aimv2-l-336" if laco else "clip-l-336", "llm": "qwen2.5-0.5b" if laco else "vicuna-7b"}
    case |= {"subject": subject, "batch": 2, "text_tokens": 64, "dtype": "bfloat16"}
    case |= {"stage": stage} if stage else {"new_tokens": 128}
    speed = MORE[subject] * SPEED[variant]
    ratios = {"ratio": speed} if stage else {"tps_ratio": speed, "ttft_ratio": speed / 4}
    wall = synthetic.spread(3.2e6 / speed)
    parts = dict.fromkeys(("vision", "projector", "prefill", "tpot", "forward", "backward", "update"), synthetic.spread(2e3))
    timed = {
        "ok": True,
        "error": 1e-3,
        "budget": 3e-3,
        "reason": None,
        "timings": {"wall": wall, "ttft": synthetic.spread(8e4 / speed), **parts},
        "goal": goal,
        "agreement": 0.97,
        "peak_bytes": 31 << 20,
        "held_mib": 1024.0,
        **{of: synthetic.interval(ratio) for of, ratio in ratios.items()},
    }
    return Row("step" if stage else "generate", case, variant, {**timed, **values}, name, "0123456789ab")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    results = Results.open(tmp_path_factory.mktemp("results") / "example-h900")
    name = results.begin(synthetic.GPU)
    tps = {"ratio": 10.0, "of": "tps", "against": "eager @1"}
    step = {"ratio": 2.8, "of": "step", "against": "eager LLaVA-1.5"}
    results.add([row(s, v, name, goal=tps) for s in ("@1", "@1/4") for v in SPEED])
    results.add([row(s, "eager", name, stage="finetune", goal=step) for s in ("LLaVA-1.5", "STF")])
    nothing = synthetic.untimed("does not fit: no room", goal=step)
    results.add([row("STF", "fused+graphs", name, stage="finetune", **nothing)])
    return [results.file.parent]


@pytest.fixture(scope="module")
def gpu(folders):
    return devices.read(folders)[0]


def test_the_papers_figures_stand_beside_ours(gpu):
    tps, ttft, everything, finetune = llava.beside_the_papers([gpu])
    assert list(tps.columns) == ["TPS of this over @1, eager", "@1/12", "@1/6", "@1/4", "@1/2", "@1"]
    paper, eager, best = (line.cells for line in tps.lines)
    assert (paper[3].text, paper[3].note) == ("1.14x", "27.4 a second")
    assert (eager[0].text, eager[3].text, eager[3].note) == ("Example H900", "1.20x", "96.0 a second")
    assert (best[5].text, best[5].note, best[1].text) == ("11.00x", "880 a second", "-")
    assert [line.heading for table in (ttft, everything) for line in table.lines[1:]] == [llava.NO_ROWS] * 2
    assert [cell.text for cell in finetune.lines[0].cells] == ["paper", "1.00x", "1.49x"]
    assert [cell.text for cell in finetune.lines[1].cells[1:]] == ["1.00x", "2.50x"]
    assert [cell.text for cell in finetune.lines[2].cells[1:]] == ["-", "no time"]


def test_goals_losses_and_what_has_no_time(gpu):
    missed, met = (line.cells for line in llava.goals(gpu).lines)
    assert missed[0].text == "step, 2.80x of eager LLaVA-1.5"
    assert (missed[2].text, missed[3].text) == ("no time", "missed"), "eager does not count as ours"
    assert met[0].text == "TPS, 10.00x of eager @1"
    assert (met[1].text, met[3].text) == ("@1/4 fused+graphs", "met")
    (lost,) = [line.cells for line in llava.losing(gpu).lines if "@1/4" in line.cells[0].text]
    assert [cell.text for cell in lost][1] == "eager"
    assert "TTFT" in [cell.text for cell in lost]
    assert "clip-l-336 STF" in losses.untimed(gpu).lines[0].cells[0].note
    assert "1 of 2" in [fact.text for fact in sections.facts(gpu)]


def test_pages_have_it_all(folders, gpu):
    for text in (page.html(folders), page.markdown(folders), page.readme_section(folders)):
        assert "LLaVA-1.5, a step of fine-tuning by LoRA (STF)" in text
        assert "880 a second" in text
    (generation,) = llava.in_full(gpu, "generate")
    assert generation.title == "aimv2-l-336, qwen2.5-0.5b, batch 2, 64 text tokens, 128 new, bfloat16"
    assert [cell.text for cell in generation.lines[-1].cells[:2]] == ["@1/4", "6.06 ms"]
    assert "LLaVA-1.5, time to first token (STF)" not in page.readme_section(folders), "nothing of ours to show"


def test_a_model_that_got_slower_counts():
    assert Change("generate", {}, "eager", "wall", 0.5, 0.4, 0.6).counts
    assert Change("step", {}, "fused", "wall", 0.5, 0.4, 0.6).counts
