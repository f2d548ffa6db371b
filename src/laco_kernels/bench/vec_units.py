"""Encoders in ``laco bench all``: the runs of ``laco bench vec`` that the papers report, as rows."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from laco_kernels.bench import cases, images
from laco_kernels.bench.campaign import Unit

if TYPE_CHECKING:
    from laco_kernels.bench.campaign import Measured
    from laco_kernels.bench.system import VecResult
    from laco_kernels.bench.timing import Spread


@dataclass(frozen=True)
class Run:
    """One run of ``laco bench vec``."""

    encoder: str
    batch: int
    modes: tuple[str, ...] = ("eager", "fused", "graphs", "fused+graphs")
    depths: str = cases.DEFAULT_DEPTHS
    training: bool = False

    def __str__(self) -> str:
        """Return its name in a campaign."""
        return f"vec {self.encoder} batch={self.batch}{' training' * self.training} {','.join(self.modes)}"

    @property
    def case(self) -> dict[str, Any]:
        """What its rows have in common."""
        return {"encoder": self.encoder, "batch": self.batch, **({"step": "training"} if self.training else {})}


# The most telling first; what compiles takes minutes and comes last.
RUNS = (
    Run("aimv2-l-336", 16),
    Run("siglip-so400m-384", 16),
    Run("internvit-300m-448", 16),
    Run("aimv2-l-336", 1),
    Run("clip-l-336", 16),
    Run("aimv2-l-336", 16, ("eager", "fused"), "1/4,1", training=True),
    Run("siglip-so400m-384", 16, ("eager", "fused"), "1/4,1", training=True),
)
COMPILED = (Run("aimv2-l-336", 16, ("eager", "compile", "compile+graphs"), "1/4,1"),)
TINY = {"num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "image_size": 56}


def vec_units(
    device: torch.device, dtype: str, *, small: bool, rounds: int | None, seconds: float, compiled: bool = False
) -> list[Unit]:
    """Return one unit for every run, of those that compile or of the others; ``small`` makes one of a shrunken encoder."""
    runs = COMPILED if compiled else RUNS
    return [_unit(run, device, dtype, small, rounds, seconds) for run in (runs[:1] if small else runs)]


def _unit(run: Run, device: torch.device, dtype: str, small: bool, rounds: int | None, seconds: float) -> Unit:
    modes = tuple(mode for mode in run.modes if device.type == "cuda" or "graphs" not in mode)
    run = replace(run, modes=modes)
    if small:
        run = replace(run, encoder=f"tiny-{run.encoder}", batch=2, depths="1/4,1")
    facts = [{**run.case, "dtype": dtype, "depth": str(depth)} for depth in cases.parse_depths(run.depths)]
    suite, kind = "tiny" if small else "vec", "vec compile" if "compile" in modes else "vec"
    return Unit(f"{run} {dtype}", suite, tuple(facts), lambda: rows(_measure(run, device, dtype, rounds, seconds)), modes, kind)


def _measure(run: Run, device: torch.device, dtype: str, rounds: int | None, seconds: float) -> VecResult:
    from transformers import AutoConfig, AutoModel

    from laco_kernels.bench import system
    from laco_kernels.hf.processor import load_image_processor

    known = run.encoder.removeprefix("tiny-")
    if known != run.encoder:
        config = AutoConfig.from_pretrained(cases.FOLDER / known)
        config.update(TINY)
        model = AutoModel.from_config(config).eval()
        pixels = [torch.rand(run.batch, 3, 56, 56)]
        count = run.batch
    else:
        model, _ = system.load_encoder(known)
        opened, _ = images.read_pixels(images.find_images([]), load_image_processor(str(cases.FOLDER / known)))
        pixels, count = images.batches(opened, run.batch), len(opened)
    model.to(device, getattr(torch, dtype))
    return system.measure_vec(
        model,
        run.encoder,
        cases.parse_depths(run.depths),
        pixels,
        weights="random",
        images=count,
        modes=run.modes,
        training=run.training,
        rounds=rounds,
        seconds=seconds,
    )


def rows(result: VecResult) -> Measured:
    """Return a result of ``laco bench vec`` as rows, times in microseconds."""
    found: Measured = []
    for row in result.rows:
        case = {"encoder": result.encoder, "batch": result.batch, "dtype": result.dtype, "depth": row.depth}
        if result.training:
            case["step"] = "training"
        values: dict[str, Any] = {
            "ok": row.correct,
            "budget": row.error_budget,
            "reason": None if row.correct else "wrong: further from float64 than twice the raster layout",
            "timings": {"wall": microseconds(row.vec_ms)} if row.correct else {},
            "ratio": dataclasses.asdict(row.ratio) if row.correct else None,
            "mode_ratio": dataclasses.asdict(row.mode_ratio) if row.correct else None,
            "peak_bytes": round(row.peak_mib * 2**20) if "graphs" not in row.mode else None,  # held by the graph for good
            "tokens_in": result.tokens_in,
        }
        for name in ("error", "paper_ratio", "tokens", "layer", "gflops", "added_parameters", "overhead"):
            values[name] = getattr(row, name)
        found.append((case, row.mode, values))
    return found


def microseconds(spread: Spread) -> dict[str, float]:
    """Return milliseconds as rows keep them."""
    times = {name: 1e3 * getattr(spread, name) for name in ("median", "p20", "p80", "low", "high")}
    return {**times, "rounds": spread.rounds}
