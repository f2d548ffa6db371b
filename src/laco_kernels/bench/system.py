"""Vision encoding cost (VEC): one encoder, compressed at several depths, measured in one run."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import statistics
from dataclasses import dataclass
from fractions import Fraction
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
from laco_kernels.hf.optimize import optimize, restore
from laco_kernels.hf.points import route_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedModel

    from laco_kernels.hf.mixins import CompressedEncoder


# How an encoder can be run: what laco_kernels.hf.optimize is told, nothing for the encoder as it is.
MODES: dict[str, dict[str, Any]] = {
    "eager": {},
    "fused": {"fuse": True},
    "graphs": {"fuse": False, "graphs": True},
    "fused+graphs": {"fuse": True, "graphs": True},
    "compile": {"fuse": False, "compile": True},
    "fused+compile": {"fuse": True, "compile": True},
    "compile+graphs": {"fuse": False, "compile": True, "graphs": True},
    "fused+compile+graphs": {"fuse": True, "compile": True, "graphs": True},
}


@dataclass(frozen=True)
class VecRow:
    """One depth of one encoder, run in one mode."""

    depth: str
    mode: str
    layer: int
    tokens: int  # coming out of the encoder, prefix tokens included
    gflops: float  # of one batch, a multiply-add counted as two
    added_parameters: int
    vec_ms: Spread
    ratio: Spread  # VEC @1 in the first mode / VEC, paired round by round
    mode_ratio: Spread  # VEC at this depth in the first mode / VEC
    paper_ratio: float | None
    peak_mib: float  # activations of one batch beyond the weights
    overhead: float | None  # time outside embeddings, layers, norms and head over the time inside; of eager encoders
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
    modes: list[str]
    impl: str | None  # of what is fused; None is the measured choice
    training: bool  # forward and backward pass, of the sum of the features, for every parameter
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
    modes: Sequence[str] = ("eager",),
    impl: str | None = None,
    training: bool = False,
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
        modes: how the encoders are run, names in :data:`MODES`; the first one is what the others are compared with.
        impl: the implementation of what is fused; by default the measured choice.
        training: time a forward and a backward pass.
        rounds: rounds to time; by default as many as ``seconds`` allow.
        seconds: time budget for the rounds.
        on_step: called before every slow step with what it is and how much of the whole is done, for a progress bar.
    """
    device, dtype = encoder.device, encoder.dtype
    batches = [batch.to(device, dtype) for batch in pixel_batches]
    keys = [(str(depth), mode) for depth in depths for mode in modes]
    # Above its limit torch.compile would quietly run the rest uncompiled; what was compiled before counts too.
    torch._dynamo.reset()
    limit = max(2 * len(keys), torch._dynamo.config.recompile_limit)
    with (
        torch._dynamo.config.patch(recompile_limit=limit, fail_on_recompile_limit_hit=True),
        contextlib.nullcontext() if training else torch.inference_mode(),
    ):
        on_step("preparing float64 weights", 0.0)
        exact = copy.deepcopy(encoder).double()
        variants: dict[tuple[str, str], CompressedEncoder] = {}
        facts: dict[tuple[str, str], dict[str, Any]] = {}
        for i, depth in enumerate(depths):
            on_step(f"checking @{depth}", 0.4 * i / len(depths))
            made = _variants(encoder, layer_at(depth, encoder.config.num_hidden_layers), modes, impl, training=training)
            counted = _count(made[modes[0]])
            judge = _judge(made[modes[0]], encoder, exact, batches[0][:1])
            for mode, model in made.items():
                variants[str(depth), mode] = model
                facts[str(depth), mode] = {**counted(batches[0]), **judge(model), **_cost(model, mode, batches[0], training)}
        del exact
        times = interleave(
            {f"{depth} {mode}": _step(model, batches, training) for (depth, mode), model in variants.items()},
            device,
            rounds=rounds,
            seconds=seconds,
            warmup=3 if device.type == "cuda" else 1,
            on_call=lambda done: on_step("timing", 0.4 + 0.6 * done),
        )
        tokens_in = encoder(batches[0][:1]).last_hidden_state.shape[1]
    for model in variants.values():
        restore(model)
    return VecResult(
        encoder=name,
        batch=len(batches[0]),
        dtype=str(dtype).removeprefix("torch."),
        device=device.type,
        modes=list(modes),
        impl=impl,
        training=training,
        rounds=len(times[f"1 {modes[0]}"]),
        images=images,
        tokens_in=tokens_in,
        weights=weights,
        environment=environment(device),
        rows=[
            VecRow(
                depth=depth,
                mode=mode,
                layer=model.config.compression["layer"],
                added_parameters=sum(p.numel() for p in model.merges[0].parameters()),
                vec_ms=spread(times[f"{depth} {mode}"]),
                ratio=paired_ratio(times[f"1 {modes[0]}"], times[f"{depth} {mode}"]),
                mode_ratio=paired_ratio(times[f"{depth} {modes[0]}"], times[f"{depth} {mode}"]),
                paper_ratio=paper_ratio(name, Fraction(depth)) if not training else None,
                **facts[depth, mode],
            )
            for (depth, mode), model in variants.items()
        ],
    )


def _variants(
    encoder: PreTrainedModel, layer: int, modes: Sequence[str], impl: str | None, *, training: bool
) -> dict[str, CompressedEncoder]:
    """Compress ``encoder`` once for every mode, all with the same weights."""
    made: dict[str, CompressedEncoder] = {}
    for mode in modes:
        # Not the zero start: the correctness tick shall see the MLP.
        model = made[mode] = compress(encoder, layer=layer, zero_init_last=False)
        model.merging_layers[0].merge = made[modes[0]].merges[0]
        if MODES[mode]:
            optimize(model, **MODES[mode], impl=impl)
        model.train(training)
    return made


def _step(model: CompressedEncoder, batches: Sequence[torch.Tensor], training: bool) -> Callable[[int], object]:
    if not training:
        return lambda i: model(batches[i % len(batches)])
    parameters = list(model.parameters())

    def step(i: int) -> object:
        features = model(batches[i % len(batches)]).last_hidden_state
        # Heads that make other outputs get no gradient.
        return torch.autograd.grad(features.sum(), parameters, allow_unused=True)

    return step


def _judge(
    model: CompressedEncoder, encoder: PreTrainedModel, exact_encoder: PreTrainedModel, pixels: torch.Tensor
) -> Callable[[CompressedEncoder], dict[str, Any]]:
    """Return what compares an encoder with the raster layout in float64, and allows twice what that errs by itself.

    Weights and products are float64; AIMv2's norms compute in float32 even then.
    """
    compression = model.config.compression
    options = {"layer": compression["layer"], "layout": "raster", **compression["options"]}
    eager, exact = compress(encoder, **options), compress(exact_encoder, **options)
    eager.merging_layers[0].merge = model.merges[0]
    exact.merges[0].load_state_dict(model.merges[0].state_dict())

    def features(variant: CompressedEncoder, pixels: torch.Tensor) -> torch.Tensor:
        training = variant.training
        with torch.no_grad():
            made: torch.Tensor = variant.eval()(pixels).last_hidden_state
        variant.train(training)
        return made.double()

    truth, theirs = features(exact, pixels.double()), features(eager, pixels)
    scale = truth.norm()
    budget = 2 * float((theirs - truth).norm() / scale) + torch.finfo(pixels.dtype).eps

    def judge(variant: CompressedEncoder) -> dict[str, Any]:
        ours = features(variant, pixels)
        error = float((ours - truth).norm() / scale)
        return {"error": error, "error_budget": budget, "correct": error <= budget, "tokens": ours.shape[1]}

    return judge


def _count(model: CompressedEncoder) -> Callable[[torch.Tensor], dict[str, float]]:
    """Return what counts the operations of a forward pass on a batch; what a backward pass adds is left out."""
    # The counter knows no fused attention on CPU; shapes alone are counted, so the meta device is exact and free.
    with torch.device("meta"):
        skeleton = type(model)(copy.deepcopy(model.config)).eval()

    def count(pixels: torch.Tensor) -> dict[str, float]:
        with FlopCounterMode(display=False) as flops:
            skeleton(pixels.to("meta", torch.float32))
        return {"gflops": flops.get_total_flops() / 1e9}

    return count


def _cost(model: CompressedEncoder, mode: str, pixels: torch.Tensor, training: bool) -> dict[str, float | None]:
    step = _step(model, [pixels], training)
    if "graphs" in mode or "compile" in mode:
        step(0)  # what a capture or a compilation holds for good is not what a call takes
    found: dict[str, float | None] = {"peak_mib": peak_bytes(lambda: step(0), pixels.device) / 2**20, "overhead": None}
    if mode == "eager" and not training:
        found["overhead"] = overhead(model, pixels)
    return found


def overhead(model: CompressedEncoder, pixels: torch.Tensor) -> float:
    """Return the time that a forward pass spends outside its parts, over the time inside (median of three passes).

    Parts are the embeddings, every layer with its merge, and the norms and heads. Putting the tokens in block order
    happens within the embeddings, but is counted as outside: the stock encoder does not do it.
    """
    encoder = model.get_submodule(model.layers_path.split(".")[0])
    parts = [child for child in model.children() if child is not encoder] + list(model.get_submodule(model.layers_path))
    device = pixels.device
    route = route_of(model.config, model.merges, *pixels.shape[-2:])
    num_tokens = model.config.prefix_tokens + math.prod(route.grids[0] or ())
    tokens = torch.randn(len(pixels), num_tokens, model.config.hidden_size, dtype=pixels.dtype, device=device)
    stamps: list[Any] = []
    handles = [part.register_forward_pre_hook(lambda *_: stamps.append(stamp(device))) for part in parts]
    handles += [part.register_forward_hook(lambda *_: stamps.append(stamp(device))) for part in parts]
    ratios = []
    for _ in range(3):
        stamps.clear()
        total = milliseconds(lambda: model(pixels), device)
        inside = sum(between(start, stop) for start, stop in zip(stamps[::2], stamps[1::2], strict=True))
        if (order := route.order) is not None:
            inside -= milliseconds(lambda: order.to_block_order(tokens), device)
        ratios.append(total / inside - 1)
    for handle in handles:
        handle.remove()
    return statistics.median(ratios)
