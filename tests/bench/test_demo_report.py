"""The table, the sentences and the picture of ``laco train-demo``."""

import pytest
from PIL import Image

from laco_kernels.bench import demo_report
from laco_kernels.train.demo import DemoResult, Settings, Step
from laco_kernels.train.evaluate import Answer, Score


@pytest.fixture
def result():
    first = (Score("colour", 100, 22, "red", 24), Score("new word", 80, 3, "BED", 20))
    last = (Score("colour", 100, 97, "red", 24), Score("new word", 80, 21, "BED", 20))
    steps = tuple(Step(name, 30.0, 50.0) for name in demo_report.STEPS)
    answers = (Answer("a", "colour", "What colour is the star?", "red", "blue"),)
    names = ("torch", "transformers", "python", "commit", "laco_kernels", "date", "device", "cpu_threads")
    environment = dict.fromkeys(names, "?")
    return DemoResult(Settings(), steps, {"things": 0.9}, {"stage1": first, "stage2": last}, answers, environment, "cpu")


def test_it_says_which_types_are_above_chance_and_which_are_not(result):
    assert demo_report.findings(result) == [
        "Above the majority answer by more than three standard deviations of guessing: colour. Not: new word.",
        "What a linear reader reads right in a token of the pretrained tower, before any merge: things 90%.",
    ]
    assert demo_report.margin(Score("", 100, 0, "", 50)) == pytest.approx(0.15)
    assert demo_report.times(result).startswith(
        "3.5 minutes (5.8 of all cores together, loading data aside): drawing the task 30 s, "
    )


def test_markdown_and_files(result, tmp_path):
    text = demo_report.markdown(result)
    assert "| colour | 22.0% | 97.0% | 24.0% (red) | 100 |" in text
    assert "| What colour is the star? | blue | red |" in text
    paths = demo_report.write(result, tmp_path)
    assert [path.name for path in paths] == ["accuracy.json", "accuracy.md", "accuracy.png"]
    with Image.open(paths[2]) as image:
        assert image.size[0] > 1000
    paths[1].write_text("as it was")
    assert demo_report.write(result, tmp_path) == paths
    assert paths[1].read_text() == "as it was"
