"""Encoders in ``laco bench all``: the runs of ``laco bench vec`` that the papers report, as rows."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from laco_kernels.bench import cases, images
from laco_kernels.bench.campaign import Unit

if TYPE_CHECKING:
    from fractions import Fraction

    from laco_kernels.bench.campaign import Measured
    from laco_kernels.bench.system import VecResult
    from laco_kernels.bench.timing import Spread

# Encoder and batch, the most telling first.
RUNS = (
    ("aimv2-l-336", 16),
    ("siglip-so400m-384", 16),
    ("internvit-300m-448", 16),
    ("aimv2-l-336", 1),
    ("clip-l-336", 16),
)
TINY = {"num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "image_size": 56}


def vec_units(device: torch.device, dtype: str, *, small: bool, rounds: int | None, seconds: float) -> list[Unit]:
    """Return one unit for every encoder and batch; ``small`` makes one of a shrunken encoder."""
    runs = RUNS[:1] if small else RUNS
    return [_unit(encoder, 2 if small else batch, device, dtype, small, rounds, seconds) for encoder, batch in runs]


def _unit(encoder: str, batch: int, device: torch.device, dtype: str, small: bool, rounds: int | None, seconds: float) -> Unit:
    depths = cases.parse_depths("1/4,1" if small else cases.DEFAULT_DEPTHS)
    name = f"tiny-{encoder}" if small else encoder
    facts = [{"encoder": name, "batch": batch, "dtype": dtype, "depth": str(depth)} for depth in depths]

    def measure() -> Measured:
        result = _measure(encoder, name, depths, batch, device, dtype, small, rounds, seconds)
        return rows(result)

    suite = "tiny" if small else "vec"
    return Unit(f"vec {name} batch={batch} {dtype}", suite, tuple(facts), measure, ("eager",), "vec")


def _measure(
    encoder: str,
    name: str,
    depths: list[Fraction],
    batch: int,
    device: torch.device,
    dtype: str,
    small: bool,
    rounds: int | None,
    seconds: float,
) -> VecResult:
    from transformers import AutoConfig, AutoModel

    from laco_kernels.bench import system

    if small:
        config = AutoConfig.from_pretrained(cases.FOLDER / encoder)
        config.update(TINY)
        model = AutoModel.from_config(config).eval()
        pixels = [torch.rand(batch, 3, 56, 56)]
        count = batch
    else:
        model, _ = system.load_encoder(encoder)
        opened, _ = images.read_pixels(images.find_images([]), images.load_processor(str(cases.FOLDER / encoder)))
        pixels, count = images.batches(opened, batch), len(opened)
    model.to(device, getattr(torch, dtype))
    return system.measure_vec(model, name, depths, pixels, weights="random", images=count, rounds=rounds, seconds=seconds)


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
            "timings": {"wall": _microseconds(row.vec_ms)} if row.correct else {},
            "ratio": dataclasses.asdict(row.ratio) if row.correct else None,
            "mode_ratio": dataclasses.asdict(row.mode_ratio) if row.correct else None,
            "peak_bytes": round(row.peak_mib * 2**20),
            "tokens_in": result.tokens_in,
        }
        for name in ("error", "paper_ratio", "tokens", "layer", "gflops", "added_parameters", "overhead"):
            values[name] = getattr(row, name)
        found.append((case, row.mode, values))
    return found


def _microseconds(spread: Spread) -> dict[str, float]:
    times = {name: 1e3 * getattr(spread, name) for name in ("median", "p20", "p80", "low", "high")}
    return {**times, "rounds": spread.rounds}
