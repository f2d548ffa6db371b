"""What ``laco train-demo`` found, as a table, sentences, Markdown and a picture."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from matplotlib import pyplot as plt
from rich.table import Table

from laco_kernels.bench.report import MEASURED, OTHERS, SUFFIXES, machine, write_new

if TYPE_CHECKING:
    from pathlib import Path

    from laco_kernels.train.demo import DemoResult
    from laco_kernels.train.evaluate import Score

RECORD = "accuracy"
NAMES = {"stage1": "after stage 1", "stage2": "after stage 2"}
STEPS = {
    "task": "drawing the task",
    "tower": "pretraining the tower",
    "llm": "pretraining the LLM",
    "stage1": "stage 1",
    "stage1 answers": "answers after it",
    "stage2": "stage 2",
    "stage2 answers": "answers after it",
}


def headline(result: DemoResult) -> str:
    """One line that says what was done."""
    settings = result.settings
    return (
        f"A tiny multimodal LLM, LaCo at 1/4 of its tower, trained in two stages of {settings.stage1_steps} and "
        f"{settings.stage2_steps} steps on {settings.samples} drawn pictures; seed {settings.seed}"
    )


def table(result: DemoResult) -> Table:
    """Return held-out accuracy by type of question, in at most 80 columns."""
    made = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("question", *NAMES.values(), "majority answer", "asked"):
        made.add_column(name, justify="left" if name == "question" else "right", no_wrap=True)
    for row in _rows(result):
        made.add_row(*row)
    return made


def findings(result: DemoResult) -> list[str]:
    """Say what the figures show, whichever way that is."""
    last = list(result.stages.values())[-1]
    above = [score.kind for score in last if score.accuracy > score.baseline + margin(score)]
    others = [score.kind for score in last if score.kind not in above]
    beyond = "Above the majority answer by more than three standard deviations of guessing"
    lines = [f"{beyond}: {', '.join(above) or 'none'}. Not: {', '.join(others) or 'none'}."]
    seen = ", ".join(f"{name} {share:.0%}" for name, share in result.tower.items())
    lines.append(f"What a linear reader reads right in a token of the pretrained tower, before any merge: {seen}.")
    return lines


def margin(score: Score) -> float:
    """Return three standard deviations of the share that the majority answer gets right in so many questions."""
    return 3 * (score.baseline * (1 - score.baseline) / score.asked) ** 0.5


def times(result: DemoResult) -> str:
    """Say how long everything took."""
    parts = ", ".join(f"{STEPS[step.name]} {step.seconds:.0f} s" for step in result.steps)
    total, cpu = (sum(times) for times in zip(*((step.seconds, step.cpu_seconds) for step in result.steps), strict=True))
    return f"{total / 60:.1f} minutes ({cpu / 60:.1f} of all cores together, loading data aside): {parts}."


def legend() -> str:
    """What the figures mean."""
    return (
        "Held-out questions answered word for word, greedily. No training picture shows the same in all four "
        "quadrants, and none shows a new word. Majority answer: what the most frequent answer of the type gets right."
    )


def markdown(result: DemoResult) -> str:
    """Return everything as Markdown."""
    lines = [
        f"**{headline(result)}**",
        "",
        f"| question | {' | '.join(NAMES.values())} | majority answer | asked |",
        "|---" + "|---:" * 4 + "|",
    ]
    lines += [f"| {' | '.join(row)} |" for row in _rows(result)]
    lines += [
        "",
        *[f"* {line}" for line in findings(result)],
        "",
        legend(),
        "",
        "| question | answer | expected |",
        "|---|---|---|",
    ]
    lines += [f"| {entry.question} | {entry.given} | {entry.expected} |" for entry in result.examples]
    return "\n".join([*lines, "", times(result), "", f"Trained on {machine(result)}.", ""])


def picture(result: DemoResult, path: Path) -> None:
    """Draw accuracy by type of question as PNG."""
    figure, panel = plt.subplots(figsize=(9, 4.6), dpi=130, layout="constrained")
    stages = list(result.stages.items())
    places = range(len(stages[-1][1]))
    for number, (stage, scores) in enumerate(stages):
        shifted = [place + 0.36 * (number - 0.5) for place in places]
        colour = MEASURED if number else OTHERS[0]
        bars = panel.bar(shifted, [100 * score.accuracy for score in scores], 0.34, color=colour, label=NAMES[stage])
        panel.bar_label(bars, fmt="%.0f", fontsize=8)
    for place, score in zip(places, stages[-1][1], strict=True):
        label = "majority answer" if place == 0 else None
        panel.hlines(100 * score.baseline, place - 0.38, place + 0.38, color="black", linewidth=1.5, label=label)
    panel.set_xticks(list(places), [f"{score.kind}\n{score.asked} asked" for score in stages[-1][1]])
    panel.set_ylabel("right answers to held-out questions, %")
    panel.set_ylim(0, 105)
    panel.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path)
    plt.close(figure)


def write(result: DemoResult, folder: Path) -> list[Path]:
    """Write JSON, Markdown and the picture into ``folder`` unless they are there; return the paths."""
    paths = [folder / f"{RECORD}.{suffix}" for suffix in SUFFIXES]
    if all(path.exists() for path in paths):
        return paths
    data = json.dumps(result.to_dict(), indent=2) + "\n"
    text = f"{markdown(result)}\n![Held-out accuracy by type of question]({{stem}}.png)\n"
    return write_new(folder, RECORD, data, text, lambda path: picture(result, path))


def _rows(result: DemoResult) -> list[tuple[str, ...]]:
    rows = []
    for scores in zip(*result.stages.values(), strict=True):
        last = scores[-1]
        shares = [f"{score.accuracy:.1%}" for score in scores]
        rows.append((last.kind, *shares, f"{last.baseline:.1%} ({last.majority})", str(last.asked)))
    return rows
