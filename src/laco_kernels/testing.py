"""The numerical promise, measured: for this project's tests, for ``laco check``, and for anybody's own CI.

An implementation may err at most twice as much as eager torch errs in the same precision, plus one rounding step of the
output's dtype; both against float64, once over all elements (Frobenius norm) and once at the worst element. Eager can be
lucky, on a handful of numbers above all; so where rounding the inputs once more, up or down at random, changes the exact
result by more than eager errs, that change is the yardstick (the largest of eight draws; twice it on fewer than 64 numbers, on
which eight draws are lucky too). Tolerances are computed that way for every case, not chosen.

In a test suite of your own::

    import pytest, torch
    from laco_kernels import testing

    @pytest.mark.parametrize("case", testing.CASES, ids=str)
    def test_fused_operators(case):
        for row in testing.check_case(case, "triton", torch.bfloat16, "cuda"):
            assert row.ok, row

The operators inside an encoder are cases of the same use in :mod:`laco_kernels.testing_tower`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from laco_kernels import ops
from laco_kernels.errors import UnsupportedError
from laco_kernels.kernels import select
from laco_kernels.ops.cost import Traffic

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from laco_kernels.testing_tower import TowerCase


@dataclass(frozen=True)
class Case:
    """One operator on one shape: ``sizes`` make the tensors, ``options`` are the operator's own keyword arguments."""

    op: str
    sizes: dict[str, int]
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        options = {name: "x".join(map(str, v)) if name == "grid" else v for name, v in self.options.items()}
        return f"{self.op} " + ",".join(f"{name}={value}" for name, value in {**self.sizes, **options}.items())

    def inputs(self, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> dict[str, torch.Tensor]:
        """Draw the operator's tensors by name, weights scaled as a trained layer's; blocks are ``xs[0]``, ``xs[1]`` ..."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
            if str(device) == "meta":
                return torch.empty(shape, dtype=dtype, device="meta")
            return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

        s = self.sizes
        if self.op == "multi_block_linear_gelu":
            width = s["blocks"] * s["channels"]
            blocks = {f"xs[{i}]": draw(s["batch"], s["tokens"], s["channels"]) for i in range(s["blocks"])}
            return {**blocks, "weight": draw(s["out"], width, scale=width**-0.5), "bias": draw(s["out"])}
        if self.op == "gelu_mlp":
            x, area = draw(s["batch"], s["tokens"], s["channels"]), s["channels"]
            return {"x": x, **self._layers(draw, area)}
        height, width = self.options["grid"]
        x = draw(s["batch"], self.options.get("prefix_tokens", 0) + height * width, s["channels"])
        area = self.options.get("ratio", self.options.get("kernel_size", 2)) ** 2 * s["channels"]
        if self.op in ("strided_conv", "strided_conv_gelu"):
            return {"x": x, "weight": draw(s["out"], area, scale=area**-0.5), "bias": draw(s["out"])}
        return {"x": x, **self._layers(draw, area)}

    def _layers(self, draw: Callable[..., torch.Tensor], width: int) -> dict[str, torch.Tensor]:
        hidden, out = self.sizes["hidden"], self.sizes.get("out", self.sizes["channels"])
        first = {"weight1": draw(hidden, width, scale=width**-0.5), "bias1": draw(hidden)}
        return {**first, "weight2": draw(out, hidden, scale=hidden**-0.5), "bias2": draw(out)}

    def __call__(self, inputs: dict[str, torch.Tensor], impl: str | None) -> torch.Tensor:
        """Run the operator."""
        tensors = list(inputs.values())
        if self.op == "multi_block_linear_gelu":
            return ops.multi_block_linear_gelu(tensors[:-2], *tensors[-2:], **self.options, impl=impl)
        return getattr(ops, self.op)(*tensors, **self.options, impl=impl)


def _merge(batch: int, grid: tuple[int, int], channels: int, hidden: int, **options: Any) -> Case:
    return Case("patch_merge", {"batch": batch, "channels": channels, "hidden": hidden}, {"grid": grid, **options})


def _conv(batch: int, grid: tuple[int, int], channels: int, out: int, **options: Any) -> Case:
    return Case("strided_conv_gelu", {"batch": batch, "channels": channels, "out": out}, {"grid": grid, **options})


def _plain_conv(batch: int, grid: tuple[int, int], channels: int, out: int, **options: Any) -> Case:
    return Case("strided_conv", {"batch": batch, "channels": channels, "out": out}, {"grid": grid, **options})


def _mlp(batch: int, tokens: int, channels: int, hidden: int, approximate: str, **sizes: int) -> Case:
    given = {"batch": batch, "tokens": tokens, "channels": channels, "hidden": hidden, **sizes}
    return Case("gelu_mlp", given, {"approximate": approximate})


def _fusion(batch: int, tokens: int, channels: int, blocks: int, out: int, **options: Any) -> Case:
    sizes = {"batch": batch, "tokens": tokens, "channels": channels, "blocks": blocks, "out": out}
    return Case("multi_block_linear_gelu", sizes, options)


# Small enough for Triton's interpreter, and odd enough to reach every mask: no size is a multiple of every tile.
CASES = (
    _merge(2, (4, 6), 40, 72),
    _merge(1, (5, 7), 24, 40, pad=True, prefix_tokens=1, approximate="tanh"),
    _merge(2, (6, 4), 32, 96, layout="block", prefix_tokens=1),
    _merge(2, (6, 6), 20, 36, ratio=3, residual="channel_group", prefix_tokens=5),
    _merge(3, (4, 4), 16, 64, residual="none", layout="block", approximate="tanh"),
    _merge(0, (4, 4), 16, 16),
    _conv(2, (4, 6), 24, 100),
    _conv(1, (5, 3), 40, 48, pad=True, prefix_tokens=1, approximate="tanh"),
    _conv(2, (1, 8), 16, 40, kernel_size=4, pad=True),
    _conv(2, (3, 3), 72, 24, kernel_size=1, prefix_tokens=2),
    _fusion(2, 17, 24, 8, 56, prefix_tokens=1),
    _fusion(1, 33, 40, 3, 40, approximate="tanh"),
    _fusion(2, 5, 16, 1, 16),
    _conv(2, (4, 6), 24, 40, layout="block", prefix_tokens=1),
    _plain_conv(2, (4, 6), 24, 104),
    _plain_conv(1, (5, 3), 40, 48, pad=True, prefix_tokens=1),
    _plain_conv(2, (8, 4), 12, 36, kernel_size=4, layout="block"),
    _plain_conv(2, (4, 2), 16, 40, layout="block", prefix_tokens=3),
    _plain_conv(3, (3, 5), 20, 68, kernel_size=3, pad=True),
    _plain_conv(2, (3, 3), 72, 24, kernel_size=1, prefix_tokens=2),
    _plain_conv(0, (2, 4), 16, 16),
    _mlp(2, 7, 40, 72, "none"),
    _mlp(1, 33, 24, 104, "tanh", out=20),
    _mlp(3, 5, 72, 24, "sigmoid"),
    _mlp(0, 4, 16, 16, "none"),
)

# The encoders of the papers, and a released model's, for a GPU.
LARGE_CASES = (
    _merge(4, (24, 24), 1024, 1024),
    _merge(4, (24, 24), 1024, 4096, layout="block"),
    _merge(2, (27, 27), 1152, 1152, pad=True),
    _merge(2, (32, 32), 1024, 1024, prefix_tokens=1),
    _conv(2, (24, 24), 1024, 4096, prefix_tokens=1),
    _fusion(2, 577, 1024, 8, 4096, prefix_tokens=1),
    _plain_conv(2, (26, 26), 1152, 4096),  # Idefics3's connector
    _mlp(2, 1025, 1024, 4096, "none"),
    _mlp(2, 729, 1152, 4304, "tanh"),
    _mlp(2, 577, 1024, 4096, "sigmoid"),
)


FEW = 64  # numbers


@dataclass(frozen=True)
class Row:
    """How far one output or gradient is from float64, and how far it may be; relative errors."""

    case: str
    op: str
    impl: str
    dtype: str
    tensor: str
    error: float
    budget: float
    ok: bool


class Allowance:
    """How far a tensor may be from ``truth`` by the module's rule: worked out once, for any number of results.

    ``truth`` is the float64 result, ``shaken`` are the same from inputs rounded once more, at random. Where ``eager`` is not
    finite, a result must be not finite in the same way.
    """

    def __init__(self, eager: torch.Tensor, truth: torch.Tensor, shaken: Sequence[torch.Tensor]) -> None:
        self.eager, self.finite = eager, eager.isfinite()
        theirs, self.exact, *near = (t.detach().double()[self.finite] for t in (eager, truth, *shaken))
        self.limits: list[tuple[Callable[[torch.Tensor], torch.Tensor], float, float]] = []
        if self.exact.numel() == 0:
            return
        step, few = torch.finfo(eager.dtype).eps, self.exact.numel() < FEW
        for measure in (torch.linalg.vector_norm, lambda t: t.abs().max()):
            scale = max(float(measure(self.exact)), torch.finfo(torch.float64).tiny)
            moved = max((float(measure(other - self.exact)) for other in near), default=0.0) * (2 if few else 1)
            yardstick = max(float(measure(theirs - self.exact)), moved) / scale
            self.limits.append((measure, scale, 2 * yardstick + step))

    def compare(self, actual: torch.Tensor) -> tuple[float, float, bool]:
        """Return error, budget and verdict of ``actual``; of the two measures the one nearer its budget."""
        eager, finite = self.eager, self.finite
        if actual.shape != eager.shape or actual.dtype != eager.dtype:
            return float("inf"), 0.0, False
        if not torch.equal(actual[~finite].nan_to_num(), eager[~finite].nan_to_num()) or not torch.equal(
            actual.isnan(), eager.isnan()
        ):
            return float("inf"), 0.0, False
        if not self.limits:
            return 0.0, 0.0, True
        off = actual.detach().double()[finite] - self.exact
        results = [(float(measure(off)) / scale, budget) for measure, scale, budget in self.limits]
        error, budget = max(results, key=lambda result: result[0] / result[1])
        return error, budget, error <= budget


def compare(
    actual: torch.Tensor, eager: torch.Tensor, truth: torch.Tensor, shaken: Sequence[torch.Tensor]
) -> tuple[float, float, bool]:
    """Return error, budget and verdict of one result, by :class:`Allowance` of the others."""
    return Allowance(eager, truth, shaken).compare(actual)


def by_name(result: torch.Tensor | dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return what a case returned by the outputs' names: the only one is ``"y"``."""
    return {"y": result} if isinstance(result, torch.Tensor) else result


def gradients(
    case: Case | TowerCase,
    inputs: dict[str, torch.Tensor],
    impl: str | None,
    grad: torch.Tensor | dict[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Return the outputs, of which the only one is ``"y"``, and the gradients of all inputs, as ``"d<name>"``.

    ``grad`` is the gradient of the output, or those of several by their names.
    """
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    outputs, grads = by_name(case(leaves, impl)), by_name(grad)
    given = [grads[name].to(y.dtype) for name, y in outputs.items()]
    found = torch.autograd.grad(list(outputs.values()), list(leaves.values()), given)
    named = {f"d{name}": gradient for name, gradient in zip(leaves, found, strict=True)}
    return {**{name: y.detach() for name, y in outputs.items()}, **named}


class Yardstick:
    """One case's truth in float64, and how far eager torch and rounding are from it: made once for all that is checked by it.

    Args:
        case: the operator and its shape.
        dtype: the precision.
        device: where to run it.
        inputs: tensors by name in place of drawn ones, e.g. with unusual strides.
        grads: gradients of the outputs by name, likewise.
        draws: how many times the inputs are rounded once more, at random.
    """

    def __init__(
        self,
        case: Case | TowerCase,
        dtype: torch.dtype,
        device: torch.device | str,
        inputs: dict[str, torch.Tensor] | None = None,
        grads: dict[str, torch.Tensor] | None = None,
        draws: int = 8,
    ) -> None:
        self.case, self.dtype = case, dtype
        self.inputs = inputs = case.inputs(dtype, device) if inputs is None else inputs
        if grads is None:
            with torch.no_grad():
                shapes = {name: y.shape for name, y in by_name(case(inputs, "reference")).items()}
            generator = torch.Generator().manual_seed(1)
            grads = {name: torch.randn(shape, generator=generator).to(device, dtype) for name, shape in shapes.items()}
        self.grads = grads
        exact, exact_grads = ({name: tensor.double() for name, tensor in tensors.items()} for tensors in (inputs, grads))
        truth = gradients(case, exact, "reference", exact_grads)
        shaken = []
        for seed in range(draws):
            generator = torch.Generator(device).manual_seed(seed)
            rounded, rounded_grads = (
                {name: _round_once(tensor, dtype, generator) for name, tensor in tensors.items()}
                for tensors in (exact, exact_grads)
            )
            shaken.append(gradients(case, rounded, "reference", rounded_grads))
        eager = gradients(case, inputs, "reference", grads)
        self.allowed = {name: Allowance(eager[name], truth[name], [draw[name] for draw in shaken]) for name in truth}

    def check(self, impl: str) -> list[Row]:
        """Return a row for every output of ``impl`` and one for every gradient."""
        actual = gradients(self.case, self.inputs, impl, self.grads)
        precision = str(self.dtype).removeprefix("torch.")
        return [
            Row(str(self.case), self.case.op, impl, precision, name, *allowed.compare(actual[name]))
            for name, allowed in self.allowed.items()
        ]


def check_case(
    case: Case | TowerCase,
    impl: str,
    dtype: torch.dtype,
    device: torch.device | str,
    inputs: dict[str, torch.Tensor] | None = None,
    grads: dict[str, torch.Tensor] | None = None,
    draws: int = 8,
) -> list[Row]:
    """Check outputs and gradients of one case in the implementation ``impl``; the other arguments are :class:`Yardstick`'s.

    Returns:
        A row for every output and one for every gradient.
    """
    return Yardstick(case, dtype, device, inputs, grads, draws).check(impl)


def _round_once(tensor: torch.Tensor, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Change every element by the most that rounding to ``dtype`` may change it, up or down.

    In float32 by twice that: nothing is computed more precisely there, so an elementary function errs as much as rounding does.
    """
    signs = torch.randint(0, 2, tensor.shape, generator=generator, device=generator.device)
    step = torch.finfo(dtype).eps / (1 if dtype in (torch.float32, torch.float64) else 2)
    return tensor * (1 + step * (2 * signs - 1))


def refusal(case: Case | TowerCase, impl: str, dtype: torch.dtype, device: torch.device | str) -> str | None:
    """Return why ``impl`` cannot do ``case`` on ``device``, or ``None`` where it can; found on the meta device."""
    if reason := select.unavailable(impl, torch.device(device), dtype):
        return reason
    if impl != "cuda":  # the one that does not do everything
        return None
    try:
        with torch.no_grad(), Traffic(impl):
            case(case.inputs(dtype, "meta"), None)
    except UnsupportedError as error:
        return str(error)
    return None


def check(
    cases: Iterable[Case | TowerCase], impls: Sequence[str], dtypes: Sequence[torch.dtype], device: torch.device | str
) -> Iterable[Row]:
    """Check every case in every implementation and precision that can do it on ``device``; yields rows as they come.

    An implementation that the operator does not have is left out.
    """
    for case in cases:
        for impl in (name for name in impls if name in select.implementations(case.op)):
            for dtype in dtypes:
                if refusal(case, impl, dtype, device) is None:
                    yield from check_case(case, impl, dtype, device)
