"""All compressors side by side on the same tokens of the same images: what comes out, and what it costs."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import os
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel

from laco_kernels.bench.environment import environment
from laco_kernels.bench.memory import peak_bytes
from laco_kernels.bench.prefill import FOLDER as LLMS
from laco_kernels.bench.prefill import llm_names, prefill_tflops
from laco_kernels.bench.timing import Spread, interleave, spread
from laco_kernels.errors import complaint
from laco_kernels.hf.compress import compress
from laco_kernels.hf.points import sides
from laco_kernels.nn import COMPRESSORS, build_compressor, sampled_blocks
from laco_kernels.nn.compressors import find_compressor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from transformers import PreTrainedModel

    from laco_kernels.nn import Compressor

INSIDE, BEHIND, BEFORE = "inside", "behind", "before"


@dataclass(frozen=True)
class CompressorRow:
    """One compressor with one ratio."""

    name: str
    ratio: int
    place: str  # where it stood
    places: list[str]  # where it may stand
    tokens: int  # that the LLM reads of an image
    out_dim: int
    parameters: int
    gflops: float  # of the compressor, one batch, a multiply-add counted as two
    encoder_gflops: float  # of the encoder with it, one batch; with the compressor that stands inside or behind
    prefill_tflops: dict[str, float]  # by LLM, of one image and no text
    ms: Spread  # of the compressor alone, one batch
    peak_mib: float  # activations of one batch beyond weights and input
    error: float  # relative to float64
    error_budget: float  # twice the error of the reference implementation in the same precision, plus one rounding step
    correct: bool
    same: bool  # whether the reference gives the very same numbers, as where nothing else runs


@dataclass(frozen=True)
class CompressorResult:
    """Everything that one run of ``laco bench compressors`` found."""

    encoder: str
    layer: int  # behind which those inside stand, and whose tokens all read but those of several blocks
    batch: int
    llm: str  # whose width those behind the encoder project to
    dtype: str
    device: str
    rounds: int
    images: int
    tokens_in: int  # of patches
    weights: str  # of the encoder; the compressors' are random
    left_out: dict[str, str]  # what cannot stand in this encoder with this ratio, and why
    environment: dict[str, Any]
    rows: list[CompressorRow]

    def to_dict(self) -> dict[str, Any]:
        """Return it JSON-ready."""
        return dataclasses.asdict(self)


@dataclass
class _Case:
    """A compressor and what it reads; one that looks at attention takes keys and query from ``layer`` and its input."""

    name: str
    module: Compressor
    inputs: tuple[Any, ...]
    layer: Any = None
    before: torch.Tensor | None = None

    def run(self) -> torch.Tensor:
        features: dict[str, Any] = {}
        if self.layer is not None:
            features["keys"], features["query"] = self.layer.attended(self.before)
        out: torch.Tensor = self.module(*self.inputs, **features)[0]
        return out

    def exact(self) -> _Case:
        """Return the same in float64."""
        module, layer = copy.deepcopy(self.module).double(), copy.deepcopy(self.layer)
        before = None if self.before is None else self.before.double()
        return _Case(self.name, module, _double(self.inputs), None if layer is None else layer.double(), before)


def measure_compressors(
    encoder: PreTrainedModel,
    name: str,
    pixels: torch.Tensor,
    *,
    layer: int,
    ratios: Sequence[int],
    llm: str,
    weights: str,
    images: int,
    names: Sequence[str] | None = None,
    rounds: int | None = None,
    seconds: float = 60.0,
    on_step: Callable[[str, float], None] = lambda *_: None,
) -> CompressorResult:
    """Measure every compressor on what ``encoder`` makes of ``pixels [batch, 3, height, width]``.

    Each stands where its authors put it: inside the encoder with its width, or behind it and projecting to the width of
    ``llm``, unless it keeps the width. Where they have a choice they leave as many tokens as there are windows. All that
    read one block read the tokens that leave ``layer``; those that read several, evenly spaced ones.

    Args:
        encoder: the stock encoder, on its device and in its dtype.
        name: its name.
        pixels: one batch.
        layer: behind which layer those inside stand.
        ratios: sides of windows; compressors that have none of their own are measured once.
        llm: one of :func:`laco_kernels.bench.prefill.llm_names`.
        weights: ``"random"`` or ``"checkpoint"``.
        images: how many photos the batch is made of.
        names: which compressors; all unless given.
        rounds: rounds to time; by default as many as ``seconds`` allow.
        seconds: time budget for the rounds.
        on_step: called before every slow step with what it is and how much of the whole is done.
    """
    device, dtype = encoder.device, encoder.dtype
    pixels = pixels.to(device, dtype)
    on_step("encoding", 0.0)
    with torch.inference_mode():
        states = encoder(pixels, output_hidden_states=True).hidden_states
    width = AutoConfig.from_pretrained(LLMS / llm).hidden_size
    stage = _Stage(encoder, pixels, states, layer, width)
    chosen = names or list(COMPRESSORS)
    left_out: dict[str, str] = {}
    rows: list[CompressorRow] = []
    for i, ratio in enumerate(ratios):  # one after the other, as all weights may not fit into memory together
        rows += _measure_ratio(
            stage,
            [name for name in chosen if COMPRESSORS[name].reduces or i == 0],
            ratio,
            left_out,
            rounds,
            seconds / len(ratios),
            lambda what, part, i=i, ratio=ratio: on_step(f"ratio {ratio}: {what}", (i + part) / len(ratios)),  # type: ignore[misc]
        )
    if not rows:
        reason = next(iter(left_out.values()), "none was asked for")
        raise ValueError(complaint("only", f"nothing that can be measured here ({reason})", "at least one", "Ask for others"))
    return CompressorResult(
        encoder=name,
        layer=layer,
        batch=len(pixels),
        llm=llm,
        dtype=str(dtype).removeprefix("torch."),
        device=device.type,
        rounds=min(row.ms.rounds for row in rows),
        images=images,
        tokens_in=math.prod(stage.grid),
        weights=weights,
        left_out=left_out,
        environment=environment(device),
        rows=rows,
    )


def _measure_ratio(
    stage: _Stage,
    names: Sequence[str],
    ratio: int,
    left_out: dict[str, str],
    rounds: int | None,
    seconds: float,
    on_step: Callable[[str, float], None],
) -> list[CompressorRow]:
    """Measure these compressors with one ratio; note in ``left_out`` which cannot be, and why."""
    device, cases = stage.pixels.device, []
    for name in names:
        try:
            cases.append(stage.case(name, ratio))
        except (TypeError, ValueError) as error:
            left_out[f"{name} {ratio if COMPRESSORS[name].reduces else 1}"] = str(error)
    with torch.inference_mode():
        facts = []
        for i, case in enumerate(cases):
            on_step(f"checking {case.name}", 0.4 * i / len(cases))
            facts.append({**stage.count(case), **_judge(case, device)})
        times = interleave(
            {case.name: lambda _, case=case: case.run() for case in cases},  # type: ignore[misc]
            device,
            rounds=rounds,
            seconds=seconds,
            warmup=3 if device.type == "cuda" else 1,
            on_call=lambda part: on_step("timing", 0.4 + 0.6 * part),
        )
    return [CompressorRow(ms=spread(times[row["name"]]), **row) for row in facts]


class _Stage:
    """An encoder at work, and compressors to be put there."""

    def __init__(
        self, encoder: PreTrainedModel, pixels: torch.Tensor, states: Sequence[torch.Tensor], layer: int, llm_width: int
    ) -> None:
        self.encoder, self.pixels, self.states, self.layer, self.llm_width = encoder, pixels, states, layer, llm_width
        config = encoder.config
        self.grid = tuple(side // patch for side, patch in zip(pixels.shape[-2:], sides(config.patch_size), strict=True))
        self.prefix = states[0].shape[1] - math.prod(self.grid)
        torch.manual_seed(0)

    def case(self, name: str, ratio: int) -> _Case:
        """Build a compressor with random weights; ValueError where it cannot stand here."""
        kind, channels = COMPRESSORS[name], self.encoder.config.hidden_size
        place = kind.places[0]
        if place == BEFORE:
            module = build_compressor(name, in_dim=self.pixels.shape[1], ratio=ratio)
            return _Case(name, module.eval(), (self.pixels, self.grid))
        options: dict[str, Any] = {"in_dim": channels, "place": place, "prefix_tokens": self.prefix, "pad": True}
        own = inspect.signature(kind).parameters
        if kind.reduces:
            options["ratio"] = ratio
        if place == BEHIND and not kind.keeps_width:
            options["out_dim"] = self.llm_width
        windows = math.prod(-(-side // ratio) for side in self.grid)
        if "num_queries" in own:  # a budget of its own, here that of the others
            options["num_queries"] = windows
        if kind.reads_attention:
            options["num_tokens"] = windows
        if "grid" in own:
            options["grid"] = self.grid
        if "num_layers" in own:
            options["num_layers"] = self.encoder.config.num_hidden_layers
        with torch.device("meta"):
            self._check_memory(name, sum(p.numel() for p in build_compressor(name, **options).parameters()))
        with self.states[0].device:
            module = build_compressor(name, **options).to(self.states[0].dtype).eval().requires_grad_(False)
        x: Any = self.states[self.layer]
        if module.num_blocks > 1:
            numbers = module.blocks or sampled_blocks(self.encoder.config.num_hidden_layers, module.num_blocks)
            x = [self.states[number] for number in numbers]
        if not kind.reads_attention:
            return _Case(name, module, (x, self.grid))
        layer = compress(self.encoder, compressor=name, layer=self.layer).merging_layers[0]
        return _Case(name, module, (x, self.grid), layer, self.states[self.layer - 1])

    def _check_memory(self, name: str, parameters: int) -> None:
        """Raise ValueError unless there is room for the weights, and once for those in float64."""
        needed = parameters * (4 + self.states[0].element_size() + 8)
        if needed > (free := _free_bytes(self.states[0].device)):
            given = f"{name} with {parameters / 1e9:.1f} billion parameters, which takes {needed / 2**30:.0f} GiB here"
            raise ValueError(complaint("ratio", given, f"what fits into {free / 2**30:.0f} GiB", "Use more memory"))

    def count(self, case: _Case) -> dict[str, Any]:
        """Count what comes out of a compressor, and what it computes, by itself and with the encoder."""
        module = case.module
        with FlopCounterMode(display=False) as counter:
            case.run()
        gflops = counter.get_total_flops() / 1e9
        tokens = module.num_output_patches(self.grid)
        return {
            "name": case.name,
            "ratio": module.ratio,
            "place": module.place,
            "places": list(module.places),
            "tokens": tokens,
            "out_dim": module.out_dim if module.place != BEFORE else self.encoder.config.hidden_size,
            "parameters": sum(p.numel() for p in module.parameters()),
            "gflops": gflops,
            "encoder_gflops": self._count_encoder(case, gflops),
            "prefill_tflops": {llm: prefill_tflops(llm, tokens) for llm in llm_names()},
        }

    def _count_encoder(self, case: _Case, gflops: float) -> float:
        """Count on shapes alone what the encoder computes with this compressor where it stands, for one batch."""
        config = copy.deepcopy(self.encoder.config)
        shape = list(self.pixels.shape)
        module = case.module
        with torch.device("meta"):
            if module.place == INSIDE:
                model = compress(config, compressor=case.name, layer=self.layer, ratio=module.ratio)
            else:
                if module.place == BEFORE:
                    shape[2:] = case.run().shape[2:]
                    config.image_size = shape[2] if isinstance(config.image_size, int) else shape[2:]
                model = AutoModel.from_config(config)
            with FlopCounterMode(display=False) as counter, torch.inference_mode():
                model.eval()(torch.empty(shape, dtype=model.dtype))
        return counter.get_total_flops() / 1e9 + gflops * (module.place == BEHIND)


def _judge(case: _Case, device: torch.device) -> dict[str, Any]:
    """Compare a compressor with itself in float64, and allow twice what the reference implementation errs."""
    truth = case.exact().run()
    ours, scale = case.run(), truth.norm()
    with _implementation("reference"):
        theirs = case.run()
    error, theirs_error = (float((made.double() - truth).norm() / scale) for made in (ours, theirs))
    budget = 2 * theirs_error + torch.finfo(ours.dtype).eps
    return {
        "error": error,
        "error_budget": budget,
        "correct": error <= budget,
        "same": torch.equal(ours, theirs),
        "peak_mib": peak_bytes(case.run, device) / 2**20,
    }


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def _double(value: Any) -> Any:
    """Return the same with tensors in float64."""
    if isinstance(value, torch.Tensor):
        return value.double()
    return type(value)(_double(part) for part in value) if isinstance(value, (list, tuple)) else value


@contextmanager
def _implementation(name: str) -> Iterator[None]:
    before = os.environ.get("LACO_IMPL")
    os.environ["LACO_IMPL"] = name
    try:
        yield
    finally:
        del os.environ["LACO_IMPL"]
        if before is not None:
            os.environ["LACO_IMPL"] = before


def check_names(text: str | None) -> list[str] | None:
    """Read a list of compressors such as ``"laco,avg_pool"``; ``None`` for all."""
    if text is None:
        return None
    names = list(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in names:
        find_compressor(name, "only")
    return names
