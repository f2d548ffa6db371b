"""A training step of a LLaVA-style model, stage by stage of the papers' recipes: seconds and peak memory.

A step is a forward pass, a backward pass and an update by AdamW on one batch: an image a row, then text, whose second half is
the answer that is learned. Weights, gradients and AdamW's moments are in the run's precision.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from laco_kernels.bench import cases, llava_cases
from laco_kernels.bench.environment import environment
from laco_kernels.bench.generate import compile_pieces
from laco_kernels.bench.memory import peak_bytes
from laco_kernels.bench.timing import Spread, between, interleave, paired_ratio, spread, stamp
from laco_kernels.errors import complaint
from laco_kernels.hf.optimize import optimize, restore
from laco_kernels.train.parts import freeze, parts_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from fractions import Fraction

    from laco_kernels.bench.llava_cases import Prompt, Setting

PARTS = ("forward", "backward", "update")


@dataclass(frozen=True)
class Stage:
    """What a stage trains: learning rates by part of the model, and whether the LLM is adapted by LoRA instead."""

    rates: Mapping[str, float]
    lora: float | None = None  # its learning rate


#: The papers' stages. LaCo's stages 1.5, 2-SI and 2-OV train the same parts, so that a step of each is one of ``stage2``.
STAGES: dict[str, dict[str, Stage]] = {
    "laco": {
        "stage1": Stage({"merge": 1e-3, "projector": 1e-3}),
        "stage2": Stage({"encoder": 2e-6, "merge": 1e-5, "projector": 1e-5, "llm": 1e-5}),
    },
    "stf": {"pretrain": Stage({"projector": 1e-3}), "finetune": Stage({"projector": 2e-5}, lora=2e-4)},
}
TRAINED = {
    "stage1": "merge and projector",
    "stage2": "everything",
    "pretrain": "projector",
    "finetune": "projector, and the LLM by LoRA of rank 128",
}


@dataclass(frozen=True)
class Mode:
    """How a step is run.

    ``tower`` is what :func:`laco_kernels.hf.optimize` is told of the encoder; ``head`` computes logits where something is
    learned, and not at every position; ``compile`` compiles the LLM's norms and feed-forward blocks; ``graphs`` replays an
    encoder that is frozen.
    """

    tower: bool = False
    head: bool = False
    compile: bool = False
    graphs: bool = False


MODES = {
    "eager": Mode(),
    "fused": Mode(tower=True),
    "head": Mode(head=True),
    "fused+head": Mode(tower=True, head=True),
    "fused+graphs+head": Mode(tower=True, head=True, graphs=True),
    "fused+compile+head": Mode(tower=True, head=True, compile=True),
}
EXPLAINED = {
    "eager": "transformers' own forward pass",
    "fused": "with the encoder optimised",
    "head": "logits only where something is learned",
    "fused+head": "both",
    "fused+graphs+head": "both, and the frozen encoder as a CUDA graph",
    "fused+compile+head": "both, and the LLM's norms and feed-forward blocks compiled",
}


def modes_for(device: torch.device, method: str, *, compiled: bool = False) -> list[str]:
    """Return the modes that make sense on ``device``, those that compile only where asked for."""
    if device.type != "cuda":
        return ["eager", "head"] + ["fused+compile+head"] * compiled
    # An encoder that is trained, or has a merge inside that is, cannot be a graph.
    graphs = ["fused+graphs+head"] if method == "stf" else []
    return ["eager", "fused", "fused+head", *graphs, *["fused+compile+head"] * compiled]


@dataclass(frozen=True)
class StepRow:
    """One stage of one model's training, run in one mode."""

    stage: str
    subject: str
    mode: str
    image_tokens: int
    trained_parameters: int
    step_ms: Spread
    forward_ms: Spread
    backward_ms: Spread
    update_ms: Spread
    ratio: Spread  # the first subject's step in the first mode / this one, paired round by round
    same_mode_ratio: Spread  # the first subject's step in this mode / this one
    paper_ratio: float | None
    held_mib: float  # weights and AdamW's moments
    peak_mib: float | None  # the most beyond that in a step; unknown where a graph holds memory for good
    error: float  # of loss and gradients of a shrunken model, relative to float64
    error_budget: float  # twice the error of the first mode in the same precision, plus one rounding step
    correct: bool


@dataclass(frozen=True)
class StepResult:
    """Everything that one run of ``laco bench step`` found."""

    model: str
    method: str
    depth: dict[str, list[int]]  # layers that ran and layers of the whole model, of encoder and LLM
    reduced: str
    batch: int
    text_tokens: int
    checkpointing: bool
    dtype: str
    device: str
    modes: list[str]
    rounds: int
    environment: dict[str, Any]
    left_out: dict[str, str]  # what did not fit into memory, or got no graph, by stage, model and mode
    rows: list[StepRow]

    def to_dict(self) -> dict[str, Any]:
        """Return it JSON-ready."""
        return dataclasses.asdict(self)


def measure_step(
    setting: Setting,
    device: torch.device,
    dtype: torch.dtype,
    *,
    stages: Sequence[str] = (),
    depths: Sequence[Fraction] = (),
    modes: Sequence[str] = ("eager",),
    batch: int = 1,
    text_tokens: int = 128,
    checkpointing: bool = False,
    rounds: int | None = None,
    seconds: float = 45.0,
    on_step: Callable[[str, float], None] = lambda *_: None,
) -> StepResult:
    """Measure training steps of the models of ``setting``; those of one stage in one interleaved run.

    Args:
        setting: which models.
        device, dtype: where and in which precision they are trained.
        stages: names in :data:`STAGES`; by default all of the method.
        depths: of LaCo's merge; 1 is always among them.
        modes: names in :data:`MODES`; the first one is what the others are compared with.
        batch: rows, each with one image.
        text_tokens: of question and answer together.
        checkpointing: recompute activations in the backward pass.
        rounds: rounds to time; by default as many as ``seconds`` allow.
        seconds: time budget for the rounds of a stage.
        on_step: called before every slow step with what it is and how much of the whole is done, for a progress bar.
    """
    chosen = check_stages(setting.method, stages)
    names = llava_cases.subjects(setting.method, depths)
    rows: list[StepRow] = []
    left_out: dict[str, str] = {}
    count = 0
    for i, stage in enumerate(chosen):

        def report(what: str, done: float, i: int = i, stage: str = stage) -> None:
            on_step(f"{stage}: {what}", (i + done) / len(chosen))

        run = _StageRun(setting, stage, names, device, dtype, checkpointing)
        found, missing, count = run.measure(modes, batch, text_tokens, rounds, seconds / len(chosen), report)
        rows += found
        left_out |= {f"{stage} {key}": reason for key, reason in missing.items()}
    return StepResult(
        model=setting.name,
        method=setting.method,
        depth=setting.depth,
        reduced=llava_cases.reduction(setting.depth),
        batch=batch,
        text_tokens=text_tokens,
        checkpointing=checkpointing,
        dtype=str(dtype).removeprefix("torch."),
        device=device.type,
        modes=list(modes),
        rounds=count,
        environment=environment(device),
        left_out=left_out,
        rows=rows,
    )


def check_stages(method: str, stages: Sequence[str]) -> list[str]:
    """Return the stages named, all of the method where none is; ValueError for one that it does not have."""
    known = STAGES[method]
    for stage in stages:
        if stage not in known:
            raise ValueError(complaint("stages", repr(stage), f"some of {', '.join(known)}", "Leave it out for all"))
    return list(stages or known)


class Trained:
    """A model that is trained, in one mode: ``step`` is one of its optimiser's."""

    def __init__(self, model: Any, mode: Mode, asked: Prompt, optimizer: torch.optim.Optimizer | None = None) -> None:
        self.model, self.mode, self.asked, self.optimizer = model, mode, asked, optimizer
        self.answer = max((asked.ids.shape[1] - (asked.image.stop - asked.image.start)) // 2, 1)
        self.labels = asked.ids.clone()
        self.labels[:, : -self.answer] = -100
        tower = model.model.vision_tower
        if mode.tower:
            optimize(tower, fuse=True, graphs=mode.graphs)
        if mode.compile:
            compile_pieces(_language(model))
        is_frozen = not any(parameter.requires_grad for parameter in tower.parameters())
        tower.train(not is_frozen)

    def loss(self) -> torch.Tensor:
        """Return the loss of the batch."""
        if not self.mode.head:
            loss: torch.Tensor = self.model(**self.asked.inputs, labels=self.labels, use_cache=False).loss
            return loss
        logits = self.model(**self.asked.inputs, use_cache=False, logits_to_keep=self.answer + 1).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), self.labels[:, -self.answer :].flatten())

    def replays(self) -> bool:
        """Return whether the encoder has become a CUDA graph: without room for one it runs as it is, and says so once."""
        graphs = self.model.model.vision_tower.forward.graphs
        return any(captured.graph is not None for captured in graphs.values())

    def step(self) -> list[Any]:
        """Take a step; return four stamps, the start and the end of each of :data:`PARTS`."""
        assert self.optimizer is not None
        device = self.asked.ids.device
        stamps = [stamp(device)]
        loss = self.loss()
        stamps.append(stamp(device))
        loss.backward()
        stamps.append(stamp(device))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return [*stamps, stamp(device)]


class _StageRun:
    """One stage of the training of several models, which share encoder and LLM."""

    def __init__(
        self,
        setting: Setting,
        stage: str,
        names: Sequence[str],
        device: torch.device,
        dtype: torch.dtype,
        checkpointing: bool,
    ) -> None:
        self.setting, self.stage, self.names = setting, stage, names
        self.device, self.dtype, self.checkpointing = device, dtype, checkpointing

    def measure(
        self,
        modes: Sequence[str],
        batch: int,
        text_tokens: int,
        rounds: int | None,
        seconds: float,
        on_step: Callable[[str, float], None],
    ) -> tuple[list[StepRow], dict[str, str], int]:
        """Return rows, what did not fit, and the number of rounds."""
        limit = max(16 * len(self.names) * len(modes), torch._dynamo.config.recompile_limit)
        torch._dynamo.reset()
        with torch._dynamo.config.patch(recompile_limit=limit, fail_on_recompile_limit_hit=True):
            on_step("checking", 0.0)
            ticks = self._judge(modes)
            on_step("drawing weights", 0.2)
            models = self._models(self.setting)
            optimizer = self._optimizer(models)
            asked = {name: llava_cases.prompt(model, batch, text_tokens) for name, model in models.items()}
            variants: dict[tuple[str, str], Trained] = {}
            facts: dict[tuple[str, str], dict[str, Any]] = {}
            left_out: dict[str, str] = {}
            for name, model in models.items():
                for mode in modes:
                    on_step(f"first step of {name} {mode}", 0.3)
                    try:
                        made = Trained(llava_cases.twin(model), MODES[mode], asked[name], optimizer)
                        facts[name, mode] = {**_memory(made), **ticks[name, mode]}
                        if made.mode.graphs and not made.replays():
                            left_out[f"{name} {mode}"] = "its encoder found no room for a CUDA graph"
                            continue
                        variants[name, mode] = made
                    except torch.OutOfMemoryError as error:
                        if (name, mode) == (self.names[0], modes[0]):
                            raise  # there is nothing to compare with
                        left_out[f"{name} {mode}"] = str(error).partition("\n")[0]
                        optimizer.zero_grad(set_to_none=True)
            stamps: dict[str, list[list[Any]]] = {f"{name} {mode}": [] for name, mode in variants}
            times = interleave(
                {f"{name} {mode}": _noting(made, stamps[f"{name} {mode}"]) for (name, mode), made in variants.items()},
                self.device,
                rounds=rounds,
                seconds=seconds,
                on_call=lambda done: on_step("timing", 0.4 + 0.6 * done),
            )
        for made in variants.values():
            restore(made.model.model.vision_tower)
        count = len(next(iter(times.values())))
        rows = []
        for name, mode in variants:
            key, noted = f"{name} {mode}", stamps[f"{name} {mode}"][-count:]
            parts: dict[str, Any] = {
                f"{part}_ms": spread([between(at[i], at[i + 1]) for at in noted]) for i, part in enumerate(PARTS)
            }
            rivals = times.get(f"{self.names[0]} {mode}", times[f"{self.names[0]} {modes[0]}"])
            rows.append(
                StepRow(
                    stage=self.stage,
                    subject=name,
                    mode=mode,
                    image_tokens=models[name].config.image_seq_length,
                    trained_parameters=sum(p.numel() for p in models[name].parameters() if p.requires_grad),
                    step_ms=spread(times[key]),
                    **parts,
                    ratio=paired_ratio(times[f"{self.names[0]} {modes[0]}"], times[key]),
                    same_mode_ratio=paired_ratio(rivals, times[key]),
                    paper_ratio=self._paper(name),
                    **facts[name, mode],
                )
            )
        return rows, left_out, count

    def _models(self, setting: Setting) -> dict[str, Any]:
        """Return a model for each subject, in training mode, with what the stage freezes frozen."""
        stage = STAGES[setting.method][self.stage]
        models: dict[str, Any] = dict(llava_cases.build(setting, self.names, self.device, self.dtype))
        for model in models.values():
            freeze(model, stage.rates)
            model.train()
        if stage.lora is not None:
            _adapt(next(iter(models.values())))  # the LLM is the same in all
        if self.checkpointing:
            for model in models.values():
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return models

    def _optimizer(self, models: Mapping[str, Any]) -> torch.optim.Optimizer:
        """Return one for all models: AdamW passes over what has no gradient."""
        stage = STAGES[self.setting.method][self.stage]
        groups: dict[str, dict[int, nn.Parameter]] = {}
        for model in models.values():
            for part, parameters in parts_of(model).items():
                groups.setdefault(part, {}).update({id(p): p for p in parameters.values() if p.requires_grad})
        rates = {**stage.rates, **({"llm": stage.lora} if stage.lora is not None else {})}
        listed = [{"params": [*groups[part].values()], "lr": rate} for part, rate in rates.items()]
        return torch.optim.AdamW(listed, weight_decay=0.0, fused=self.device.type == "cuda")

    def _judge(self, modes: Sequence[str]) -> dict[tuple[str, str], dict[str, Any]]:
        """Compare loss and gradients with float64, mode by mode, on models of a few narrow layers."""
        small = dataclasses.replace(self.setting, tiny=True, encoder_layers=8, llm_layers=2)
        ticks: dict[tuple[str, str], dict[str, Any]] = {}
        for name, model in self._models(small).items():
            asked = llava_cases.prompt(model, 2, 16)
            exact = copy.deepcopy(model).double()
            wide = llava_cases.Prompt(asked.ids, asked.pixels.double())
            truth = _loss_and_gradients(Trained(exact, Mode(), wide))

            def error_of(made: Trained, truth: list[torch.Tensor] = truth) -> float:
                found = _loss_and_gradients(made)
                return max(float((ours - right).norm() / right.norm()) for ours, right in zip(found, truth, strict=True))

            errors = {mode: error_of(Trained(llava_cases.twin(model), MODES[mode], asked)) for mode in modes}
            budget = 2 * errors[modes[0]] + torch.finfo(self.dtype).eps
            for mode, error in errors.items():
                ticks[name, mode] = {"error": error, "error_budget": budget, "correct": error <= budget}
        return ticks

    def _paper(self, subject: str) -> float | None:
        if (self.setting.encoder, self.setting.llm) != llava_cases.METHODS[self.setting.method]:
            return None
        if self.setting.method == "laco":
            return cases.PAPER_STEP_RATIO.get(subject) if self.stage == "stage2" else None
        steps = cases.PAPER_STEP_S
        return steps[cases.LLAVA] / steps[subject] if self.stage == "finetune" else None


def _language(model: Any) -> Any:
    """Return the LLM without its head; PEFT's layers are put inside it and leave it what it is."""
    return model.model.language_model


def _adapt(model: Any) -> None:
    """Put LoRA, as LLaVA-1.5 is fine-tuned with it, into every linear layer of the LLM, in place."""
    try:
        from peft import LoraConfig, inject_adapter_in_model

        from laco_kernels.train.recipe import LINEAR
    except ModuleNotFoundError as missing:
        remedy = "Run: pip install 'laco_kernels[train]', or pass --stage pretrain"
        raise ImportError(complaint("stage", f"finetune without {missing.name}", "it to be installed", remedy)) from None
    language = _language(model)
    inject_adapter_in_model(LoraConfig(r=128, lora_alpha=256, target_modules=list(LINEAR)), language)
    with torch.no_grad():
        for name, parameter in language.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.02)  # the correctness tick shall see it
            if "lora_" in name:
                parameter.data = parameter.data.to(model.dtype)


def _loss_and_gradients(made: Trained) -> list[torch.Tensor]:
    """Return the loss and all gradients behind each other, in float64."""
    parameters = [parameter for parameter in made.model.parameters() if parameter.requires_grad]
    loss = made.loss()
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    flat = [gradient.double().flatten() for gradient in gradients if gradient is not None]
    return [loss.detach().double(), torch.cat(flat)]


def _memory(made: Trained) -> dict[str, Any]:
    """Return what model and optimiser hold, and the most that a step takes beyond it."""
    made.step()  # makes the moments, compiles, captures
    sizes = [p.nbytes * (3 if p.requires_grad else 1) for p in made.model.parameters()]
    peak = peak_bytes(made.step, made.asked.ids.device)
    return {"held_mib": sum(sizes) / 2**20, "peak_mib": None if made.mode.graphs else peak / 2**20}


def _noting(made: Trained, stamps: list[list[Any]]) -> Callable[[int], object]:
    return lambda _: stamps.append(made.step())
