"""Generation by a LLaVA-style model: time to the first token, tokens a second, and where the time goes.

TTFT is the time from prompt and image, both on the device, to the first token; TPS the new tokens of all rows over the time of
the whole answer, TTFT included; TPOT the time of each token behind the first one.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from laco_kernels.bench import cases, llava_cases
from laco_kernels.bench.decoding import PARTS, Eager, Static, exactly
from laco_kernels.bench.environment import environment
from laco_kernels.bench.memory import peak_bytes
from laco_kernels.bench.timing import Spread, between, interleave, paired_ratio, spread
from laco_kernels.hf.optimize import optimize

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import LlavaForConditionalGeneration

    from laco_kernels.bench.llava_cases import Prompt, Setting

JUDGED = 4  # tokens behind the first whose logits are compared
Variant: TypeAlias = Eager | Static


@dataclass(frozen=True)
class Mode:
    """How a model is run.

    ``tower`` is what :func:`laco_kernels.hf.optimize` is told of the encoder; ``compile`` compiles the LLM's norms and
    feed-forward blocks; ``static`` takes the place of transformers' loop, whose step ``graphs`` captures, and ``graph_prompt``
    what comes before the first token.
    """

    tower: dict[str, Any] = dataclasses.field(default_factory=dict)
    compile: bool = False
    static: bool = False
    graphs: bool = False
    graph_prompt: bool = False


MODES = {
    "eager": Mode(),
    "fused": Mode({"fuse": True}),
    "compile": Mode({"fuse": False, "compile": True}, compile=True),
    "static": Mode(static=True),
    "static+graphs": Mode(static=True, graphs=True),
    "fused+graphs": Mode({"fuse": True}, static=True, graphs=True, graph_prompt=True),
    "fused+compile+graphs": Mode({"fuse": True}, compile=True, static=True, graphs=True, graph_prompt=True),
}
EXPLAINED = {
    "eager": "transformers' generate",
    "fused": "the same with the encoder optimised",
    "compile": "the same with encoder, norms and feed-forward blocks compiled",
    "static": "a static cache, no wait within an answer, the LLM's last feed-forward block for a prompt's last token alone",
    "static+graphs": "the same with the step as a CUDA graph",
    "fused+graphs": "the encoder optimised, everything as CUDA graphs",
    "fused+compile+graphs": "the same with the LLM's norms and feed-forward blocks compiled",
}


def modes_for(device: torch.device, *, compiled: bool = False) -> list[str]:
    """Return the modes that make sense on ``device``, those that compile only where asked for."""
    on_gpu = device.type == "cuda"
    plain = ["eager", "fused", "static+graphs", "fused+graphs"] if on_gpu else ["eager", "static"]
    return plain + (["compile", *(["fused+compile+graphs"] if on_gpu else [])] if compiled else [])


@dataclass(frozen=True)
class GenerateRow:
    """One model, run in one mode; parts of TTFT and the decoding are in milliseconds of one answer."""

    subject: str
    mode: str
    image_tokens: int
    ttft_ms: Spread
    vision_ms: Spread
    projector_ms: Spread
    prefill_ms: Spread
    decode_ms: Spread
    generate_ms: Spread
    tpot_ms: Spread
    tps: Spread
    ttft_ratio: Spread  # TTFT of the first subject in the first mode / TTFT, paired round by round
    tps_ratio: Spread  # TPS / TPS of the first subject in the first mode
    paper_ttft_ratio: float | None
    paper_tps_ratio: float | None
    peak_mib: float  # beyond the weights; what a graph holds is included
    agreement: float  # share of the tokens that are those of the first mode
    error: float  # of the logits of one row, relative to float64
    error_budget: float  # twice the error of the first mode in the same precision, plus one rounding step
    correct: bool


@dataclass(frozen=True)
class GenerateResult:
    """Everything that one run of ``laco bench generate`` found."""

    model: str
    method: str
    depth: dict[str, list[int]]  # layers that ran and layers of the whole model, of encoder and LLM
    reduced: str
    batch: int
    text_tokens: int
    new_tokens: int
    dtype: str
    device: str
    modes: list[str]
    rounds: int
    environment: dict[str, Any]
    left_out: dict[str, str]  # what did not fit into memory, by model and mode
    rows: list[GenerateRow]

    def to_dict(self) -> dict[str, Any]:
        """Return it JSON-ready."""
        return dataclasses.asdict(self)


def measure_generate(
    setting: Setting,
    device: torch.device,
    dtype: torch.dtype,
    *,
    depths: Sequence[Fraction] = (),
    modes: Sequence[str] = ("eager",),
    batch: int = 1,
    text_tokens: int = 64,
    new_tokens: int = 128,
    rounds: int | None = None,
    seconds: float = 45.0,
    on_step: Callable[[str, float], None] = lambda *_: None,
) -> GenerateResult:
    """Measure generation by the models of ``setting`` in one interleaved run.

    Args:
        setting: which models.
        device, dtype: where and in which precision they run.
        depths: of LaCo's merge; 1 is always among them.
        modes: names in :data:`MODES`; the first one is what the others are compared with, and has to be ``"eager"``.
        batch: rows, each with one image.
        text_tokens: of the prompt.
        new_tokens: of the answer; no token ends it.
        rounds: rounds to time; by default as many as ``seconds`` allow.
        seconds: time budget for the rounds.
        on_step: called before every slow step with what it is and how much of the whole is done, for a progress bar.
    """
    names = llava_cases.subjects(setting.method, depths)
    on_step("drawing weights", 0.0)
    models = llava_cases.build(setting, names, device, dtype)
    variants: dict[tuple[str, str], Variant] = {}
    facts: dict[tuple[str, str], dict[str, Any]] = {}
    left_out: dict[str, str] = {}
    limit = max(8 * len(names) * len(modes), torch._dynamo.config.recompile_limit)
    torch._dynamo.reset()
    # Above its limit torch.compile would quietly run the rest uncompiled.
    with torch._dynamo.config.patch(recompile_limit=limit, fail_on_recompile_limit_hit=True):
        runs = {(name, mode): optimised(models[name], MODES[mode]) for name in names for mode in modes}
        for i, name in enumerate(names):
            on_step(f"checking {name}", 0.4 * i / len(names))
            asked = llava_cases.prompt(models[name], batch, text_tokens)
            judge = _judge(models[name], asked, new_tokens)
            for mode in modes:
                try:
                    made, peak = _make(runs[name, mode], MODES[mode], asked, new_tokens)
                    found = judge(made)
                except torch.OutOfMemoryError as error:
                    if mode == modes[0]:
                        raise  # there is nothing to compare with
                    left_out[f"{name} {mode}"] = str(error).partition("\n")[0]
                    continue
                variants[name, mode] = made
                tokens = models[name].config.image_seq_length
                facts[name, mode] = {**found, "peak_mib": peak / 2**20, "image_tokens": tokens}
        stamps: dict[str, list[list[Any]]] = {f"{name} {mode}": [] for name, mode in variants}
        times = interleave(
            {f"{name} {mode}": _noting(made, stamps[f"{name} {mode}"]) for (name, mode), made in variants.items()},
            device,
            rounds=rounds,
            seconds=seconds,
            on_call=lambda done: on_step("timing", 0.4 + 0.6 * done),
        )
    first = f"{names[0]} {modes[0]}"
    count = len(times[first])
    parts = {key: _parts(noted[-count:]) for key, noted in stamps.items()}
    return GenerateResult(
        model=setting.name,
        method=setting.method,
        depth=setting.depth,
        reduced=llava_cases.reduction(setting.depth),
        batch=batch,
        text_tokens=text_tokens,
        new_tokens=new_tokens,
        dtype=str(dtype).removeprefix("torch."),
        device=device.type,
        modes=list(modes),
        rounds=count,
        environment=environment(device),
        left_out=left_out,
        rows=[
            GenerateRow(
                subject=name,
                mode=mode,
                **_spreads(parts[f"{name} {mode}"]),
                tpot_ms=spread([ms / (new_tokens - 1) for ms in parts[f"{name} {mode}"]["decode"]]),
                tps=spread([1e3 * batch * new_tokens / ms for ms in parts[f"{name} {mode}"]["generate"]]),
                ttft_ratio=paired_ratio(parts[first]["ttft"], parts[f"{name} {mode}"]["ttft"]),
                tps_ratio=paired_ratio(parts[first]["generate"], parts[f"{name} {mode}"]["generate"]),
                **_paper(setting, name),
                **facts[name, mode],
            )
            for name, mode in variants
        ],
    )


def optimised(model: LlavaForConditionalGeneration, mode: Mode) -> LlavaForConditionalGeneration:
    """Return a model with the same weights, made faster as ``mode`` says."""
    if not (mode.tower or mode.compile):
        return model
    made: Any = llava_cases.twin(model)
    optimize(made.model.vision_tower, **mode.tower)
    if mode.compile:
        compile_pieces(made.model.language_model)
    return made


def compile_pieces(language: Any) -> None:
    """Compile the norms and feed-forward blocks of an LLM in place, each compiled once for all its layers.

    Attention stays as it is: compiled it would get a mask for its prompt, which rules out the fastest kernels, and its layers
    would be compiled one by one, as each knows its number.
    """
    for layer in language.layers:
        for piece in (layer.mlp, layer.input_layernorm, layer.post_attention_layernorm):
            piece.compile(dynamic=False)
    language.norm.compile(dynamic=False)


def _make(model: LlavaForConditionalGeneration, mode: Mode, asked: Prompt, new_tokens: int) -> tuple[Variant, float]:
    """Return what generates, and the most bytes that it takes beyond the weights, what it holds for good included."""
    found: list[Variant] = []

    def make() -> Variant:
        if not mode.static:
            return Eager(model, asked, new_tokens)
        return Static(model, asked, new_tokens, graphs=mode.graphs, graph_prompt=mode.graph_prompt)

    if asked.ids.device.type == "cuda":
        torch.cuda.empty_cache()  # what a variant holds is counted in blocks of the allocator
        made = make()
        made()
        return made, made.held_bytes + peak_bytes(made, asked.ids.device)

    def make_and_run() -> None:
        found.append(make())
        found[0]()

    peak = peak_bytes(make_and_run, asked.ids.device)
    return found[0], peak


def _noting(made: Variant, stamps: list[list[Any]]) -> Callable[[int], object]:
    return lambda _: stamps.append(made().stamps)


def _parts(stamps: Sequence[Sequence[Any]]) -> dict[str, list[float]]:
    """Return milliseconds by part, of TTFT and of the whole, one entry a round."""

    def lasted(noted: Sequence[Any]) -> tuple[float, ...]:
        before, vision, projector, behind, decode = (between(*pair) for pair in itertools.pairwise(noted))
        return vision, projector, before + behind, decode

    columns = zip(*map(lasted, stamps), strict=True)
    parts = {part: list(column) for part, column in zip(PARTS, columns, strict=True)}
    parts["ttft"] = [sum(three) for three in zip(*(parts[part] for part in PARTS[:3]), strict=True)]
    parts["generate"] = [ttft + decode for ttft, decode in zip(parts["ttft"], parts["decode"], strict=True)]
    return parts


def _spreads(parts: dict[str, list[float]]) -> dict[str, Any]:
    return {f"{part}_ms": spread(sample) for part, sample in parts.items()}


def _judge(model: LlavaForConditionalGeneration, asked: Prompt, new_tokens: int) -> Callable[[Variant], dict[str, Any]]:
    """Return what compares a variant's logits with float64, allowing twice what eager errs by, and its tokens with eager's.

    The logits are of the first and the last row, behind their prompts and the first tokens of the eager answers. In float32
    the tokens have to be the same; elsewhere rounding decides between near ones, so that there each token of a loop of ours
    has to be the one that its own logits choose.
    """
    eager = Eager(model, asked, new_tokens)
    tokens = eager().tokens
    forced = tokens[:, :JUDGED]
    rows = sorted({0, len(tokens) - 1})
    with exactly(model):
        part = llava_cases.Prompt(asked.ids[rows], asked.pixels[rows])
        truth = Eager(model, part, new_tokens).logits(forced[rows])

    def error_of(made: Variant) -> float:
        off = (made.logits(forced)[rows].double() - truth).flatten(1).norm(dim=1) / truth.flatten(1).norm(dim=1)
        return float(off.max())

    budget = 2 * error_of(eager) + torch.finfo(model.dtype).eps

    def judge(made: Variant) -> dict[str, Any]:
        found = made().tokens.clone()
        error, agreement = error_of(made), float((found == tokens).double().mean())
        right = error <= budget and (agreement == 1 or model.dtype != torch.float32)
        if not isinstance(made, Eager):
            right = right and torch.equal(made.logits(found[:, :-1]).argmax(-1), found)
        return {"error": error, "error_budget": budget, "agreement": agreement, "correct": right}

    return judge


def _paper(setting: Setting, subject: str) -> dict[str, Any]:
    """Return the papers' ratios, where the models are theirs."""
    ttft = tps = None
    if setting.method == "stf" and (setting.encoder, setting.llm) == llava_cases.METHODS["stf"]:
        ttft = cases.PAPER_TTFT_MS[cases.LLAVA] / cases.PAPER_TTFT_MS[subject]
    if setting.method == "laco" and setting.llm == llava_cases.METHODS["laco"][1]:
        speeds = cases.PAPER_TPS.get(setting.encoder, {})
        depth = Fraction(subject[1:])
        tps = speeds[depth] / speeds[Fraction(1)] if depth in speeds else None
    return {"paper_ttft_ratio": ttft, "paper_tps_ratio": tps}
