"""Vision encoding cost (VEC): one encoder, compressed at several depths, measured in one run."""

from __future__ import annotations

import copy
import dataclasses
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel

from laco_kernels.bench.cases import FOLDER, encoder_names, paper_ratio
from laco_kernels.bench.environment import environment
from laco_kernels.bench.memory import peak_bytes
from laco_kernels.bench.timing import Spread, between, interleave, milliseconds, paired_ratio, spread, stamp
from laco_kernels.errors import complaint
from laco_kernels.hf.compress import compress, layer_at, load_stock
from laco_kernels.hf.mixins import inner_layout, windows_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from fractions import Fraction

    from transformers import PreTrainedModel

    from laco_kernels.hf.mixins import CompressedEncoder


@dataclass(frozen=True)
class VecRow:
    """One depth of one encoder."""

    depth: str
    layer: int
    tokens: int  # coming out of the encoder, prefix tokens included
    gflops: float  # of one batch, a multiply-add counted as two
    added_parameters: int
    vec_ms: Spread
    ratio: Spread  # VEC @1 / VEC, paired round by round
    paper_ratio: float | None
    peak_mib: float  # activations of one batch beyond the weights
    overhead: float  # time outside embeddings, layers, norms and head, as a fraction of the time inside
    error: float  # relative to float64
    error_budget: float  # twice the error of the raster layout in the same precision, plus one rounding step
    correct: bool


@dataclass(frozen=True)
class VecResult:
    """Everything that one run of ``laco bench vec`` found."""

    encoder: str
    batch: int
    dtype: str
    device: str
    compiled: bool
    rounds: int
    images: int
    tokens_in: int
    weights: str
    environment: dict[str, Any]
    rows: list[VecRow]

    def to_dict(self) -> dict[str, Any]:
        """Return it JSON-ready."""
        return dataclasses.asdict(self)


def load_encoder(name: str) -> tuple[PreTrainedModel, str]:
    """Return a stock encoder in evaluation mode, and ``"random"`` or ``"checkpoint"`` for its weights.

    Known names take their architecture from the package and random weights, since time does not depend on them; anything
    else is a checkpoint's folder or hub name.
    """
    if name in encoder_names():
        return AutoModel.from_config(AutoConfig.from_pretrained(FOLDER / name)).eval(), "random"
    return load_stock(name).eval(), "checkpoint"


def check_pixels(encoder: PreTrainedModel, pixels: torch.Tensor) -> None:
    """Raise ValueError unless images ``[B, 3, height, width]`` have the size that ``encoder`` was built for."""
    size = encoder.config.image_size
    expected = (size, size) if isinstance(size, int) else tuple(size)
    if tuple(pixels.shape[-2:]) != expected and not getattr(encoder.config, "is_native", False):
        given = f"an image processor that makes images of {pixels.shape[-2]} x {pixels.shape[-1]} pixels"
        remedy = "Correct its preprocessor_config.json"
        raise ValueError(complaint("encoder", given, f"{expected[0]} x {expected[1]}, the encoder's image size", remedy))


def measure_vec(
    encoder: PreTrainedModel,
    name: str,
    depths: Sequence[Fraction],
    pixel_batches: Sequence[torch.Tensor],
    *,
    weights: str,
    images: int,
    compiled: bool = False,
    rounds: int | None = None,
    seconds: float = 45.0,
    on_step: Callable[[str, float], None] = lambda *_: None,
) -> VecResult:
    """Measure ``encoder`` (on its device, in its dtype) compressed at every depth; ``depths`` contains 1.

    Args:
        encoder: the stock encoder.
        name: its name, which finds the paper's figures.
        depths: where to compress.
        pixel_batches: batches ``[batch, 3, height, width]`` of one size, taken in turn.
        weights: ``"random"`` or ``"checkpoint"``.
        images: how many photos the batches are made of.
        compiled: time ``torch.compile``\\ d encoders.
        rounds: rounds to time; by default as many as ``seconds`` allow.
        seconds: time budget for the rounds.
        on_step: called before every slow step with what it is and how much of the whole is done, for a progress bar.
    """
    device, dtype = encoder.device, encoder.dtype
    batches = [batch.to(device, dtype) for batch in pixel_batches]
    num_layers = encoder.config.num_hidden_layers
    variants = {
        # Not the zero start: the correctness tick shall see the MLP.
        str(depth): compress(encoder, layer=layer_at(depth, num_layers), zero_init_last=False)
        for depth in depths
    }
    with torch.inference_mode():
        on_step("preparing float64 weights", 0.0)
        exact = copy.deepcopy(encoder).double()
        facts = {}
        for i, (depth, model) in enumerate(variants.items()):
            on_step(f"checking @{depth}", 0.4 * i / len(variants))
            facts[depth] = {**_check(model, encoder, exact, batches[0][:1]), **_count(model, batches[0])}
        del exact
        # Above its limit torch.compile would quietly run the rest uncompiled; what was compiled before counts too.
        torch._dynamo.reset()
        limit = max(2 * len(variants), torch._dynamo.config.recompile_limit)
        with torch._dynamo.config.patch(recompile_limit=limit, fail_on_recompile_limit_hit=True):
            times = interleave(
                {d: _forward(torch.compile(model) if compiled else model, batches) for d, model in variants.items()},
                device,
                rounds=rounds,
                seconds=seconds,
                warmup=3 if device.type == "cuda" else 1,
                on_call=lambda done: on_step("timing", 0.4 + 0.6 * done),
            )
    rows = [
        VecRow(
            depth=depth,
            layer=model.config.compression["layer"],
            added_parameters=sum(p.numel() for p in model.merging_layer.merge.parameters()),
            vec_ms=spread(times[depth]),
            ratio=paired_ratio(times["1"], times[depth]),
            paper_ratio=paper_ratio(name, as_depth),
            **facts[depth],
        )
        for as_depth, (depth, model) in zip(depths, variants.items(), strict=True)
    ]
    with torch.inference_mode():
        tokens_in = encoder(batches[0][:1]).last_hidden_state.shape[1]
    return VecResult(
        encoder=name,
        batch=len(batches[0]),
        dtype=str(dtype).removeprefix("torch."),
        device=device.type,
        compiled=compiled,
        rounds=len(times["1"]),
        images=images,
        tokens_in=tokens_in,
        weights=weights,
        environment=environment(device),
        rows=rows,
    )


def _forward(model: Callable[[torch.Tensor], Any], batches: Sequence[torch.Tensor]) -> Callable[[int], object]:
    return lambda i: model(batches[i % len(batches)])


def _check(
    model: CompressedEncoder, encoder: PreTrainedModel, exact_encoder: PreTrainedModel, pixels: torch.Tensor
) -> dict[str, Any]:
    """Compare with the raster layout in float64, and allow twice what that layout itself errs in the same precision.

    Weights and products are float64; AIMv2's norms compute in float32 even then.
    """
    compression = model.config.compression
    options = {"layer": compression["layer"], "layout": "raster", **compression["options"]}
    eager, exact = compress(encoder, **options), compress(exact_encoder, **options)
    eager.merging_layer.merge = model.merging_layer.merge
    exact.merging_layer.merge.load_state_dict(model.merging_layer.merge.state_dict())
    truth = exact(pixels.double()).last_hidden_state
    ours, theirs = (variant(pixels).last_hidden_state.double() for variant in (model, eager))
    scale = truth.norm()
    error, eager_error = float((ours - truth).norm() / scale), float((theirs - truth).norm() / scale)
    budget = 2 * eager_error + torch.finfo(pixels.dtype).eps
    return {"error": error, "error_budget": budget, "correct": error <= budget, "tokens": ours.shape[1]}


def _count(model: CompressedEncoder, pixels: torch.Tensor) -> dict[str, float]:
    # The counter knows no fused attention on CPU; shapes alone are counted, so the meta device is exact and free.
    with torch.device("meta"):
        skeleton = type(model)(copy.deepcopy(model.config)).eval()
    with FlopCounterMode(display=False) as flops:
        skeleton(pixels.to("meta", torch.float32))
    return {
        "gflops": flops.get_total_flops() / 1e9,
        "peak_mib": peak_bytes(lambda: model(pixels), pixels.device) / 2**20,
        "overhead": overhead(model, pixels),
    }


def overhead(model: CompressedEncoder, pixels: torch.Tensor) -> float:
    """Return the time that a forward pass spends outside its parts, over the time inside (median of three passes).

    Parts are the embeddings, every layer with its merge, and the norms and heads. Putting the tokens in block order
    happens within the embeddings, but is counted as outside: the stock encoder does not do it.
    """
    encoder = model.get_submodule(model.layers_path.split(".")[0])
    parts = [child for child in model.children() if child is not encoder] + list(model.get_submodule(model.layers_path))
    device = pixels.device
    windows = windows_of(model.config, *pixels.shape[-2:])
    tokens = torch.randn(len(pixels), windows.num_tokens, model.config.hidden_size, dtype=pixels.dtype, device=device)
    stamps: list[Any] = []
    handles = [part.register_forward_pre_hook(lambda *_: stamps.append(stamp(device))) for part in parts]
    handles += [part.register_forward_hook(lambda *_: stamps.append(stamp(device))) for part in parts]
    ratios = []
    for _ in range(3):
        stamps.clear()
        total = milliseconds(lambda: model(pixels), device)
        inside = sum(between(start, stop) for start, stop in zip(stamps[::2], stamps[1::2], strict=True))
        if inner_layout(model.config, windows) == "block":
            inside -= milliseconds(lambda: windows.to_block_order(tokens), device)
        ratios.append(total / inside - 1)
    for handle in handles:
        handle.remove()
    return statistics.median(ratios)
