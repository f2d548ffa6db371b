"""Who competes in ``laco bench ops``: every way of computing one operator that an engineer would consider."""

from __future__ import annotations

import functools
import logging
import warnings
from typing import TYPE_CHECKING, Any

import torch
import torch._inductor.config
import torch.nn.functional as F

from laco_kernels import reference, testing
from laco_kernels.bench.op_cases import CONV, FUSION, MERGE, MLP, OpCase
from laco_kernels.bench.tower_cases import GATE, INPUT, NORM, TowerOpCase
from laco_kernels.kernels import select

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from laco_kernels.bench.tower_cases import AnyCase

    Tensors = dict[str, torch.Tensor]
    Function = Callable[[Tensors], torch.Tensor | tuple[torch.Tensor, ...]]

EAGER, CONVOLUTION, COMPILE, AUTOTUNE, PRODUCTS = "eager", "eager-conv", "compile", "compile-max-autotune", "products"
OURS = ("composite", "triton", "cuda")
VARIANTS = (EAGER, CONVOLUTION, COMPILE, AUTOTUNE, *OURS, PRODUCTS)
APPROXIMATIONS = {"gelu": "none", "gelu_tanh": "tanh"}
EPS = 1e-6  # the default of lk.add_norm
MODES = {COMPILE: "default", AUTOTUNE: "max-autotune-no-cudagraphs"}


def unavailable(variant: str, case: AnyCase, device: torch.device) -> str | None:
    """Return why ``variant`` cannot be timed in ``case`` on ``device``, or ``None`` where it can."""
    if variant in (CONVOLUTION, PRODUCTS) and isinstance(case, TowerOpCase):
        return f"{case.op} is no product"
    if variant in OURS and variant not in select.implementations(case.op):
        return f"{case.op} has no implementation of that name"
    if variant == CONVOLUTION and case.op == MLP:
        return "single tokens are no windows of an image"
    if variant == CONVOLUTION and isinstance(case, OpCase) and case.layout == "block":
        return "tokens that lie window by window are no image; a convolution would have to put them in raster order first"
    if variant not in OURS:
        return None
    if select.interpreted():
        return "Triton's interpreter is there to check kernels, its time says nothing"
    return testing.refusal(case.case, variant, getattr(torch, case.dtype), device)


def function(case: AnyCase, variant: str) -> Function:
    """Return ``variant`` as a function from the tensors of ``case``, as :func:`given`, to its outputs; not for ``products``."""
    if variant in OURS:
        return lambda tensors: tuple(testing.by_name(case.case(tensors, variant)).values())
    plain: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]
    if isinstance(case, TowerOpCase):
        plain = functools.partial(_layers, case)
    else:
        plain = functools.partial(_convolution if variant == CONVOLUTION else _eager, case)
    if variant in MODES:
        _quiet_autotuning()
        compiled = torch.compile(lambda *tensors: plain(*tensors), fullgraph=True, dynamic=False, mode=MODES[variant])
        return lambda tensors: compiled(*tensors.values())
    return lambda tensors: plain(*tensors.values())


def given(case: AnyCase, variant: str, tensors: Tensors) -> Tensors:
    """Return the tensors of ``case`` as ``variant`` gets them: stock layers have gate and up in tensors of their own."""
    if variant in OURS or case.apart(tensors) is tensors:
        return tensors
    halves = case.apart({name: tensor.detach() for name, tensor in tensors.items()})
    grad = any(tensor.requires_grad for tensor in tensors.values())
    return {name: half.contiguous().requires_grad_(grad) for name, half in halves.items()}


def outputs(result: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Return what a function returned as a tuple."""
    return result if isinstance(result, tuple) else (result,)


def _quiet_autotuning() -> None:
    """Keep max-autotune from writing all that it tries, and what of it does not fit a GPU, between our lines."""
    for name, value in (("autotune_num_choices_displayed", 0), ("max_autotune_report_choices_stats", False)):
        if hasattr(torch._inductor.config, name):
            setattr(torch._inductor.config, name, value)
    logging.getLogger("torch._inductor.select_algorithm").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", message="TypedStorage is deprecated")


def _eager(case: OpCase, *tensors: torch.Tensor) -> torch.Tensor:
    """The operator as its paper describes it, in plain PyTorch."""
    if case.op == MERGE:
        x, weight1, bias1, weight2, bias2 = tensors
        # In block order without a prefix its space-to-depth is x.view(batch, windows, 4 * channels): nothing is copied.
        merge = functools.partial(reference.patch_merge_forward, windows=case.windows, layout=case.layout)
        return merge(x, weight1, bias1, weight2, bias2)[0]
    if case.op == MLP:
        x, weight1, bias1, weight2, bias2 = tensors
        return F.linear(reference.gelu(F.linear(x, weight1, bias1), case.approximate), weight2, bias2)
    *xs, weight, bias = tensors
    if case.op == CONV:
        return reference.strided_conv_gelu_forward(xs[0], weight, bias, windows=case.windows)[0]
    return reference.multi_block_linear_gelu_forward(xs, weight, bias, prefix_tokens=case.prefix)[0]


def _layers(case: TowerOpCase, *tensors: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """What the layers of transformers do between their products, roundings included; in float64 without any."""
    if case.op == GATE:
        gate, up = tensors
        return F.silu(gate) * up
    x, *rest = tensors
    if case.op != NORM:
        return x * torch.sigmoid(1.702 * x) if case.form == "quick_gelu" else F.gelu(x, approximate=APPROXIMATIONS[case.form])
    total = x
    if case.terms != INPUT:
        delta, *rest = rest
        total = x + delta if "scale" in case.case.without else rest.pop() * delta + x
    weight, *bias = rest
    if bias:
        normed = F.layer_norm(total, (case.channels,), weight, bias[0], EPS)
    else:
        wide = total.to(torch.promote_types(total.dtype, torch.float32))
        normed = weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(total.dtype)
    return normed if case.terms == INPUT else (total, normed)


def _convolution(case: OpCase, *tensors: torch.Tensor) -> torch.Tensor:
    """The same with ``F.conv2d`` on channels-last images, as the authors of STF write it."""
    if case.op == FUSION:
        *xs, weight, bias = tensors
        image = torch.cat([_image(case, x) for x in xs], dim=1)
        return F.gelu(_tokens(F.conv2d(image, weight[:, :, None, None], bias)))
    x, weight, bias, *second = tensors
    image = _image(case, x)
    bottom, right = case.windows.padding
    padded = F.pad(image, (0, right, 0, bottom)) if bottom or right else image
    kernel = weight.view(weight.shape[0], 2, 2, case.channels).permute(0, 3, 1, 2)
    y = F.gelu(_tokens(F.conv2d(padded, kernel, bias, stride=2)))
    if not second:
        return y
    pooled = F.avg_pool2d(image, 2, ceil_mode=True, count_include_pad=False)
    y = F.linear(y, *second) + _tokens(pooled)
    return torch.cat([x[:, : case.prefix], y], dim=1) if case.prefix else y


def _image(case: OpCase, x: torch.Tensor) -> torch.Tensor:
    return x[:, case.prefix :].unflatten(1, case.grid).permute(0, 3, 1, 2)


def _tokens(image: torch.Tensor) -> torch.Tensor:
    return image.flatten(2).transpose(1, 2)


def products(case: AnyCase, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    """Return the bare matrix products of ``case``, operands and results ready in memory: the floor, not a contender."""
    shapes = product_shapes(case)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    # A weight gradient is left^T right, the others are left right^T, as cuBLAS gets them from linear layers.
    work: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    for m, n, k, is_outer in shapes:
        left, right = (draw(k, m).t(), draw(k, n)) if is_outer else (draw(m, k), draw(n, k).t())
        work.append((left, right, draw(m, n)))

    def run() -> None:
        for left, right, out in work:
            torch.mm(left, right, out=out)

    return run


def product_shapes(case: AnyCase) -> list[tuple[int, int, int, bool]]:
    """Return ``(m, n, k, whether it is a weight gradient)`` of every product."""
    if isinstance(case, TowerOpCase):
        return []
    area = {MERGE: 4, CONV: 4, FUSION: len(case.frozen), MLP: 1}[case.op] * case.channels
    layers = [(case.hidden, area)] + ([(case.channels, case.hidden)] if case.op in (MERGE, MLP) else [])
    found: list[tuple[int, int, int, bool]] = []
    if case.direction != "backward":
        found += [(case.rows, out, inner, False) for out, inner in layers]
    if case.direction != "forward":
        found += [(out, inner, case.rows, True) for out, inner in layers]
        found += [(case.rows, inner, out, False) for i, (out, inner) in enumerate(layers) if i or not case.frozen]
    return found


def run(case: AnyCase, call: Function, tensors: Tensors, grads: Sequence[torch.Tensor]) -> Callable[[], Any]:
    """Return what is timed: the forward pass, the backward pass behind one forward pass, or both."""
    leaves = [tensor for tensor in tensors.values() if tensor.requires_grad]
    if case.direction == "forward":

        def forward() -> object:
            with torch.no_grad():
                return call(tensors)

        return forward
    if case.direction == "both":
        return lambda: torch.autograd.grad(outputs(call(tensors)), leaves, grads)
    ys = outputs(call(tensors))
    return lambda: torch.autograd.grad(ys, leaves, grads, retain_graph=True)
