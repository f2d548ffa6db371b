"""One case of ``laco bench ops``: every variant checked against float64, then timed in turns."""

from __future__ import annotations

import gc
import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from laco_kernels import testing
from laco_kernels.bench import op_variants
from laco_kernels.bench.gpu_timing import COLD, GRAPH, WALL, Clock, rounds_of
from laco_kernels.bench.memory import peak_bytes
from laco_kernels.bench.op_variants import AUTOTUNE, COMPILE, CONVOLUTION, EAGER, PRODUCTS
from laco_kernels.bench.timing import paired_ratio, spread
from laco_kernels.errors import UnsupportedError
from laco_kernels.ops.cost import Traffic

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from laco_kernels.bench.op_variants import Function
    from laco_kernels.bench.tower_cases import AnyCase

EMPTY: dict[str, Any] = {
    "ok": None, "error": None, "budget": None, "reason": None, "timings": {}, "ratio_eager": None, "ratio_compile": None,
    "roofline": None, "flops": None, "bytes": None, "least_bytes": None, "peak_bytes": None,
}  # fmt: skip


def measure_case(
    case: AnyCase,
    device: torch.device,
    variants: Mapping[str, Function | None],
    *,
    ceilings: dict[str, float] | None = None,
    rounds: int | None = None,
    seconds: float = 1.0,
) -> dict[str, dict[str, Any]]:
    """Measure the variants of one case in one interleaved run.

    Args:
        case: what to compute.
        device: where.
        variants: by name, the functions to compare; ``None`` for the bare products.
        ceilings: what the device reaches, for the share of the roofline.
        rounds: rounds to time; by default as many as ``seconds`` allow.
        seconds: time budget for the rounds.

    Returns:
        By variant, the ``values`` of a row (:class:`laco_kernels.bench.results.Row`). A variant that failed its check, or ran
        out of memory, has a ``reason`` and no time.
    """
    dtype = getattr(torch, case.dtype)
    found = {name: {**EMPTY, "goal": _goal(case, device), **_costs(case, name, dtype)} for name in variants}
    clocks: dict[str, Clock] = {}
    try:
        tensors, grads, truth, eager = _reference(case, device, dtype)
    except torch.OutOfMemoryError:
        return {name: {**values, "reason": "out of memory for inputs and reference"} for name, values in found.items()}
    for name, call in variants.items():
        try:
            given = op_variants.given(case, name, tensors)
            if call is not None:
                actual = _results(case, call, given, grads)
                found[name] |= _verdict(actual, eager, truth)
                del actual
                if not found[name]["ok"]:
                    found[name]["reason"] = "wrong: further from float64 than twice eager"
                    continue
            make = _maker(case, call, given, grads, device, dtype)
            # On a processor tensors are counted as operators return them, which compiled code does not show.
            if call is not None and (device.type == "cuda" or name not in op_variants.MODES):
                found[name]["peak_bytes"] = peak_bytes(make(), device)
            clocks[name] = Clock(make, device)
        except torch.OutOfMemoryError:
            found[name]["reason"] = "out of memory"
            _free(device)
        except Exception as error:  # one variant that breaks leaves the others their times
            found[name]["reason"] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # raises where the GPU is lost to this process
    del truth, eager
    _free(device)
    if not clocks:
        return found
    samples = rounds_of(clocks, device, rounds=rounds, seconds=seconds)
    for name, kinds in samples.items():
        found[name]["ratio_kind"] = next(kind for kind in (GRAPH, COLD, WALL) if kind in kinds)
        found[name]["timings"] = {kind: asdict(spread(sample)) for kind, sample in kinds.items()}
        if not clocks[name].replay and device.type == "cuda":
            found[name]["no_graph"] = clocks[name].reason
    _compare(found, samples, ceilings)
    return found


def prepare(case: AnyCase, device: torch.device, name: str, call: Function | None) -> tuple[Callable[[], Any], dict[str, Any]]:
    """Return one variant ready to be timed elsewhere, and its check: ``ok`` (``None`` for products), ``error``, ``budget``."""
    tensors, grads, truth, eager = _reference(case, device, getattr(torch, case.dtype))
    tensors = op_variants.given(case, name, tensors)
    verdict: dict[str, Any] = {"ok": None, "error": None, "budget": None}
    if call is not None:
        verdict = _verdict(_results(case, call, tensors, grads), eager, truth)
    return _maker(case, call, tensors, grads, device, getattr(torch, case.dtype))(), verdict


def compile_once(case: AnyCase, device: torch.device, wanted: Sequence[str]) -> None:
    """Run once, on zeros, what compiles among the variants ``wanted``, just as measuring does: its caches then know it."""
    dtype = getattr(torch, case.dtype)
    shapes = _inputs(case, torch.device("meta"), dtype)
    grads = [torch.zeros(y.shape, dtype=dtype, device=device) for y in _eager(case, shapes)]
    zeros = {name: torch.zeros_like(t, device=device).requires_grad_(t.requires_grad) for name, t in shapes.items()}
    compiling = [name for name in wanted if name in (COMPILE, *op_variants.OURS)]
    for name, call in contenders(case, device, compiling).items():
        if call is not None:
            given = op_variants.given(case, name, zeros)
            _results(case, call, given, grads)
            _maker(case, call, given, grads, device, dtype)()()
    _free(device)


def names(case: AnyCase, device: torch.device, wanted: Sequence[str] | None = None, *, autotune: bool = False) -> list[str]:
    """Return the variants that can run, or those of them in ``wanted``; without it max-autotune only where asked for."""
    chosen = [name for name in op_variants.VARIANTS if wanted is None or name in wanted]
    if not autotune and wanted is None:
        chosen.remove(AUTOTUNE)
    return [name for name in chosen if op_variants.unavailable(name, case, device) is None]


def contenders(
    case: AnyCase, device: torch.device, wanted: Sequence[str] | None = None, *, autotune: bool = False
) -> dict[str, Function | None]:
    """Return the functions of those variants, freshly to be compiled; ``None`` for the bare products."""
    torch._dynamo.reset()
    # A compiled backward pass may else run once only, and a benchmark runs it again and again.
    torch._functorch.config.donated_buffer = case.direction != "backward"
    able = names(case, device, wanted, autotune=autotune)
    return {name: None if name == PRODUCTS else op_variants.function(case, name) for name in able}


def _goal(case: AnyCase, device: torch.device) -> dict[str, Any] | None:
    """The goals were set for one GPU."""
    return case.goal if device.type == "cuda" and "H200" in torch.cuda.get_device_name(device) else None


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _inputs(case: AnyCase, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    tensors = case.case.inputs(dtype, device)
    wants = case.direction != "forward"
    return {name: tensor.requires_grad_(wants and name not in case.frozen) for name, tensor in tensors.items()}


def _reference(case: AnyCase, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    """Return inputs, output gradients, and what float64 and eager make of them."""
    tensors = _inputs(case, device, dtype)
    given = op_variants.given(case, EAGER, tensors)
    plain = op_variants.function(case, EAGER)
    with torch.no_grad():
        shapes = [y.shape for y in op_variants.outputs(plain(given))]
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    exact = {name: tensor.detach().double().requires_grad_(tensor.requires_grad) for name, tensor in given.items()}
    truth = _results(case, plain, exact, [grad.double() for grad in grads])
    return tensors, grads, truth, _results(case, plain, given, grads)


def _eager(case: AnyCase, tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return op_variants.outputs(op_variants.function(case, EAGER)(op_variants.given(case, EAGER, tensors)))


def _results(
    case: AnyCase, call: Function, tensors: dict[str, torch.Tensor], grads: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Return the outputs, and behind them the gradients where the case has a backward pass."""
    if case.direction == "forward":
        with torch.no_grad():
            return list(op_variants.outputs(call(tensors)))
    ys = op_variants.outputs(call(tensors))
    leaves = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
    found = torch.autograd.grad(ys, list(leaves.values()), grads)
    return [*(y.detach() for y in ys), *case.apart(dict(zip(leaves, found, strict=True))).values()]


def _verdict(actual: Sequence[torch.Tensor], eager: Sequence[torch.Tensor], truth: Sequence[torch.Tensor]) -> dict[str, Any]:
    """Return error, budget and tick of the tensor that is nearest to its budget, or over it."""
    verdicts = [testing.compare(a, e, t, []) for a, e, t in zip(actual, eager, truth, strict=True)]
    error, budget, _ = max(verdicts, key=lambda verdict: verdict[0] / max(verdict[1], 1e-300))
    # Infinity, for what is not finite where it should be, is no number that JSON knows.
    return {"error": error if math.isfinite(error) else None, "budget": budget, "ok": all(ok for *_, ok in verdicts)}


def _maker(
    case: AnyCase,
    call: Function | None,
    tensors: dict[str, torch.Tensor],
    grads: Sequence[torch.Tensor],
    device: torch.device,
    dtype: torch.dtype,
) -> Callable[[], Callable[[], Any]]:
    if call is None:
        ready = op_variants.products(case, device, dtype)
        return lambda: ready

    def make() -> Callable[[], Any]:
        # Leaves of its own: those that autograd has seen on one stream it would wait for on another.
        leaves = {name: tensor.detach().requires_grad_(tensor.requires_grad) for name, tensor in tensors.items()}
        return op_variants.run(case, call, leaves, grads)

    return make


def _costs(case: AnyCase, variant: str, dtype: torch.dtype) -> dict[str, Any]:
    """Count on the meta device what the operator computes, and what a variant that shows its passes moves."""
    implementation = "reference" if variant == EAGER else variant if variant in op_variants.OURS else None
    flops = sum(2 * m * n * k for m, n, k, _ in op_variants.product_shapes(case))
    known = {"flops": flops, "least_bytes": least_bytes(case, dtype)}
    if implementation is None:
        return known
    tensors = op_variants.given(case, variant, _inputs(case, torch.device("meta"), dtype))
    leaves = [tensor for tensor in tensors.values() if tensor.requires_grad]
    plain = op_variants.function(case, EAGER)
    try:
        # Eager is autograd of plain operations, not the operator's own backward pass.
        with (
            torch.set_grad_enabled(case.direction != "forward"),
            Traffic(None if variant == EAGER else implementation) as forward,
        ):
            ys = op_variants.outputs(plain(tensors) if variant == EAGER else _ours(case, tensors))
        grads = [torch.empty_like(y) for y in ys]
        with Traffic(None if variant == EAGER else implementation) as backward:
            if case.direction != "forward":
                torch.autograd.grad(ys, leaves, grads)
    except (ImportError, UnsupportedError):  # no Triton, whose launchers count, or nothing that would be launched
        return known
    counts = {"forward": [forward], "backward": [backward], "both": [forward, backward]}[case.direction]
    return {**known, "bytes": sum(count.read + count.written for count in counts)}


def _ours(case: AnyCase, tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return tuple(testing.by_name(case.case(tensors, None)).values())


def least_bytes(case: AnyCase, dtype: torch.dtype) -> int:
    """Return the bytes that any implementation moves: every input read once, every result written once."""
    tensors = _inputs(case, torch.device("meta"), dtype)
    results = sum(y.nbytes for y in _ours(case, tensors))
    inputs = sum(tensor.nbytes for tensor in tensors.values())
    own = {name: tensor for name, tensor in tensors.items() if name not in case.shared}
    gradients = sum(tensor.nbytes for tensor in own.values() if tensor.requires_grad)
    forward, backward = inputs + results, sum(tensor.nbytes for tensor in own.values()) + results + gradients
    return {"forward": forward, "backward": backward, "both": forward + backward}[case.direction]


def _compare(
    found: dict[str, dict[str, Any]], samples: dict[str, dict[str, list[float]]], ceilings: dict[str, float] | None
) -> None:
    """Fill in ratios to the best eager and the best compiled variant, and the share of the roofline.

    Each variant in its own kind of time, replayed where it could be captured, against the best rival in that kind.
    """
    for name, kinds in samples.items():
        values, kind = found[name], found[name]["ratio_kind"]
        for column, names in (("ratio_eager", (EAGER, CONVOLUTION)), ("ratio_compile", (COMPILE, AUTOTUNE))):
            rivals = {rival: samples[rival][kind] for rival in names if rival in samples and kind in samples[rival]}
            if rivals:
                best = min(rivals, key=lambda rival: found[rival]["timings"][kind]["median"])
                values[column] = asdict(paired_ratio(rivals[best], kinds[kind]))
        if ceilings is not None:
            compute, memory = values["flops"] / ceilings["tflops"] / 1e6, values["least_bytes"] / ceilings["gbs"] / 1e3
            # A replay finds in the L2 cache what the bound says must come from memory.
            shown = COLD if memory > compute and COLD in kinds else kind
            values["roofline"] = max(compute, memory) / values["timings"][shown]["median"]
