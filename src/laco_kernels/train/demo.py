"""The whole way at a size that two CPU cores go in minutes: ``laco train-demo``.

A task is drawn, a tower and an LLM are pretrained a little, LaCo goes into the tower, both of the paper's stages are run from
recipes as ``laco train`` runs them, and held-out questions are answered. A run that was stopped goes on where it was.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback

from laco_kernels.errors import complaint
from laco_kernels.geometry import integer
from laco_kernels.train.checkpoint import write_whole
from laco_kernels.train.evaluate import Answer, Score, answer, score
from laco_kernels.train.mixture import read_data
from laco_kernels.train.recipe import load_recipe
from laco_kernels.train.run import execute, prepare
from laco_kernels.train.scene_tower import pretrain_scene_tower
from laco_kernels.train.task import write_task
from laco_kernels.train.tiny_llm import pretrain_tiny_llm, train_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable

#: What a folder of this command has in it: what was asked for, and what is done.
RECORD = "train-demo.json"
STAGES = ("stage1", "stage2")

STAGE1 = """\
# Stage 1: projector and merge learn to speak to a frozen LLM, as in the paper
output: ./stage1
model:
  vision: ./tower
  text: ./llm
  compressor: laco
  depth: 1/4
  ratio: 2
data:
  path: ./task/train.json
train:
  rates:
    merge: 1.0e-3
    projector: 1.0e-3
  batch_size: {batch}
  max_steps: {stage1_steps}
"""

STAGE2 = """\
# Stage 2: all parts learn. Rates are those of a model of this size, hundreds of times the paper's
output: ./stage2
model:
  checkpoint: ./stage1
data:
  path: ./task/train.json
train:
  rates:
    encoder: 1.0e-3
    merge: 2.0e-3
    projector: 2.0e-3
    llm: 2.0e-3
  batch_size: {batch}
  max_steps: {stage2_steps}
"""

# Of both; how the section on training ends.
REST = """\
  warmup: 0.03
  min_lr: 1.0e-5
  precision: float32
  seed: {seed}
  log_every: 10
  save_every: 200
trainer:
  dataloader_num_workers: 1
  dataloader_persistent_workers: true
"""


@dataclass(frozen=True)
class Settings:
    """How large everything is.

    Args:
        samples, held_out: drawn for training and for the questions at the end.
        tower_steps, tower_batch: of pretraining the tower, on pictures drawn as it goes.
        llm_steps, llm_batch: of pretraining the LLM, on conversations made up as it goes.
        stage1_steps, stage2_steps, batch: of the stages.
        seed: of everything.
    """

    samples: int = 4000
    held_out: int = 640
    tower_steps: int = 1200
    tower_batch: int = 16
    llm_steps: int = 800
    llm_batch: int = 16
    stage1_steps: int = 200
    stage2_steps: int = 1200
    batch: int = 32
    seed: int = 0


@dataclass(frozen=True)
class Step:
    """A step that is done: its name, the seconds since it was last begun, and those of all cores, loading data aside."""

    name: str
    seconds: float
    cpu_seconds: float


@dataclass(frozen=True)
class DemoResult:
    """What came of it.

    Args:
        settings: what was asked for.
        steps: what was done, and how long it took.
        tower: what a linear reader sees in the tower on pictures it has never seen, each as a share.
        stages: by stage the scores of its model.
        examples: the first answers of the last model to questions of each type.
        environment: what it was begun on.
        device: "cpu", or "cuda" where the stages found a GPU; all else is done on the CPU.
    """

    settings: Settings
    steps: tuple[Step, ...]
    tower: dict[str, float]
    stages: dict[str, tuple[Score, ...]]
    examples: tuple[Answer, ...]
    environment: dict[str, Any]
    device: str

    def to_dict(self) -> dict[str, Any]:
        """Return it JSON-ready."""
        return dataclasses.asdict(self)


def run_demo(
    folder: Path,
    settings: Settings,
    environment: dict[str, Any],
    on_step: Callable[[str, float], object] = lambda *_: None,
) -> DemoResult:
    """Do what is not done yet, and return what came of all of it. The model is ``folder / "stage2"``.

    Args:
        folder: made; one that is there has to be empty or of an earlier run with the same settings.
        settings: how large everything is.
        environment: what this runs on; kept where the run begins here.
        on_step: is told what is done and how much of it is.

    Raises:
        TypeError, ValueError: a setting is no positive integer, or the folder has something else in it; nothing is written.
        OSError, RuntimeError: as :func:`laco_kernels.train.run.execute`.
    """
    for name, value in dataclasses.asdict(settings).items():
        integer(name, value, 0 if name == "seed" else 1)
    demo = _Demo(folder, settings, environment, on_step)
    demo.step("task", functools.partial(_drawn, demo))
    demo.step("tower", functools.partial(_tower, demo))
    demo.step("llm", functools.partial(_llm, demo))
    for stage, recipe in zip(STAGES, (STAGE1, STAGE2), strict=True):
        file = folder / f"{stage}.yaml"
        text = (recipe + REST).format(**dataclasses.asdict(settings))
        demo.step(stage, functools.partial(_train, demo, stage, file, text))
        demo.step(f"{stage} answers", functools.partial(_ask, demo, stage))
    return demo.result()


class _Demo:
    """The folder, and the record of what is done in it."""

    def __init__(
        self, folder: Path, settings: Settings, environment: dict[str, Any], on_step: Callable[[str, float], object]
    ) -> None:
        self.folder, self.settings, self.environment, self.on_step = folder, settings, environment, on_step
        self.done: dict[str, dict[str, Any]] = {}
        asked = dataclasses.asdict(settings)
        record = folder / RECORD
        if record.exists():
            try:
                content = json.loads(record.read_text(encoding="utf-8"))
                before, self.done = dict(content["settings"]), dict(content["done"])
                self.environment = dict(content["environment"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    complaint(
                        "out", f"{record}, which is damaged ({error})", "a record of this command", "Choose another folder"
                    )
                ) from None
            if before != asked:
                changed = [name for name in asked if before.get(name) != asked[name]]
                given = ", ".join(f"{name} {asked[name]}" for name in changed)
                expected = ", ".join(f"{name} {before.get(name)}" for name in changed) + f", as in {record}"
                raise ValueError(complaint("out", given, expected, "Choose another folder"))
        elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            remedy = "Choose another folder; nothing is overwritten"
            raise ValueError(complaint("out", f"{str(folder)!r}, which has other things in it", "an empty folder", remedy))

    def step(self, name: str, work: Callable[[], dict[str, Any]]) -> None:
        """Do a step unless it is done, and remember what it returns."""
        if name in self.done:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.done:
            self._write()
        seconds, cpu = time.monotonic(), time.process_time()
        found = work()
        self.done[name] = {"seconds": time.monotonic() - seconds, "cpu_seconds": time.process_time() - cpu, "found": found}
        self._write()

    def result(self) -> DemoResult:
        """Return everything."""
        answers = {stage: [Answer(**entry) for entry in self.done[f"{stage} answers"]["found"]["answers"]] for stage in STAGES}
        seen: dict[str, Answer] = {}
        for entry in answers[STAGES[-1]]:
            seen.setdefault(entry.kind, entry)
        return DemoResult(
            self.settings,
            tuple(Step(name, entry["seconds"], entry["cpu_seconds"]) for name, entry in self.done.items()),
            self.done["tower"]["found"],
            {stage: tuple(score(entries)) for stage, entries in answers.items()},
            tuple(seen.values()),
            self.environment,
            "cuda" if self.environment.get("driver") else "cpu",
        )

    def _write(self) -> None:
        content = {"settings": dataclasses.asdict(self.settings), "environment": self.environment, "done": self.done}
        write_whole(self.folder / RECORD, json.dumps(content, indent=1).encode())


def _fresh(folder: Path) -> Path:
    """Return the folder, without what a process that was stopped left there."""
    if folder.exists():
        shutil.rmtree(folder)
    return folder


def _drawn(demo: _Demo) -> dict[str, Any]:
    settings = demo.settings
    _fresh(demo.folder / "task.part")
    write_task(_fresh(demo.folder / "task"), settings.samples, settings.held_out, settings.seed, on_step=demo.on_step)
    return {}


def _tower(demo: _Demo) -> dict[str, Any]:
    settings = demo.settings
    tell = functools.partial(demo.on_step, "pretraining a tiny tower")
    encoder, found = pretrain_scene_tower(settings.tower_steps, settings.tower_batch, settings.seed, tell)
    encoder.save_pretrained(_fresh(demo.folder / "tower"))
    return found


def _llm(demo: _Demo) -> dict[str, Any]:
    settings = demo.settings
    tell = functools.partial(demo.on_step, "pretraining a tiny LLM")
    tokenizer = train_tokenizer(settings.seed)
    model = pretrain_tiny_llm(tokenizer, settings.llm_steps, settings.llm_batch, settings.seed, tell)
    folder = _fresh(demo.folder / "llm")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {}


class _Tell(TrainerCallback):
    """Hands on how far a stage is."""

    def __init__(self, stage: str, on_step: Callable[[str, float], object]) -> None:
        self.stage, self.on_step = stage, on_step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.on_step(f"training, {self.stage}", state.global_step / state.max_steps)


def _train(demo: _Demo, stage: str, file: Path, text: str) -> dict[str, Any]:
    file.write_text(text, encoding="utf-8")
    recipe = load_recipe(file)
    begun = recipe.output.exists() and any(recipe.output.iterdir())
    execute(prepare(recipe, begun, demo.on_step), begun, [_Tell(stage, demo.on_step)])
    return {}


def _ask(demo: _Demo, stage: str) -> dict[str, Any]:
    source = demo.folder / stage
    model = AutoModelForImageTextToText.from_pretrained(source)
    processor = AutoProcessor.from_pretrained(source)
    answers = answer(model, processor, read_data(demo.folder / "task" / "held_out.json"), on_step=demo.on_step)
    return {"answers": [dataclasses.asdict(entry) for entry in answers]}
