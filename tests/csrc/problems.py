"""csrc/problem.h's three products for tests: as the bindings want them, in memory full of NaN, and as torch computes them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

TYPES = [torch.bfloat16, torch.float16]
ACTIVATIONS = ["", "none", "tanh"]  # as torch.nn.functional.gelu's `approximate`
RESIDUALS = ["none", "mean", "channel_group"]
# Hopper's tiles: rows, columns, and whether blocks of a cluster may share the depth.
HOPPER = {
    "128x256": (128, 256, False), "192x144": (192, 144, False), "192x128": (192, 128, True), "128x192": (128, 192, False),
    "192x96": (192, 96, True), "128x128": (128, 128, True), "64x256": (64, 256, False), "64x128": (64, 128, True),
    "64x64": (64, 64, True),
}  # fmt: skip
MARGIN = 64  # elements in front of and behind what is allocated


def tiles_of(product):
    """Of a product: columns of gradients end with each tap, which 64 divide."""
    return [name for name, (_, bn, _) in HOPPER.items() if product == "forward" or bn % 64 == 0] + ["ampere"]


class Memory:
    """Memory for a launch: what nobody gave a value is NaN, and what nobody should write is looked at afterwards."""

    def __init__(self, dtype, seed):
        self.dtype, self.generator, self.blocks = dtype, torch.Generator().manual_seed(seed), []

    def empty(self, *shape, strides=None, offset=0, dtype=None):
        """A tensor of NaN somewhere in a larger one."""
        dtype = dtype or self.dtype
        contiguous = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        strides = strides or contiguous
        size = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1 if math.prod(shape) else 0
        block = torch.full((size + 2 * MARGIN,), float("nan"), dtype=dtype)
        place = (tuple(shape), tuple(strides), MARGIN + offset)
        self.blocks.append((block, *place))
        return block.as_strided(*place)

    def random(self, *shape, scale=1.0, **options):
        out = self.empty(*shape, **options)
        return out.copy_(torch.randn(shape, generator=self.generator) * scale)

    def untouched(self):
        """Only what the blocks' tensors hold is a number."""
        for block, *place in self.blocks:
            rest = block.clone()
            rest.as_strided(*place).fill_(float("nan"))
            if not rest.isnan().all():
                return False
        return True


def pointer(tensor):
    """As ``data_ptr``, which is null of a tensor without elements; null of None."""
    if tensor is None:
        return 0
    return tensor.untyped_storage().data_ptr() + tensor.storage_offset() * tensor.element_size()


@dataclass
class Tokens:
    """Sources [B, H, W, C] of one layout; windows of ``side``."""

    sources: list
    side: int = 1

    @classmethod
    def random(cls, memory, batch, height, width, channels, *, side=1, sources=1, prefix=0, gap_t=0, gap_b=0, block=False):
        """``prefix`` tokens in front of each image, ``gap_t`` elements behind each token, ``gap_b`` behind each image."""
        stride_t = channels + gap_t
        strides = ((prefix + height * width) * stride_t + gap_b, width * stride_t, stride_t, 1)
        shape = (batch, height, width, channels)
        return cls([memory.random(*shape, strides=strides, offset=prefix * stride_t) for _ in range(sources)], side)

    def layout(self):
        """What the bindings' Tokens are made of."""
        x = self.sources[0]
        batch, height, width, channels = x.shape
        return {
            "sources": [pointer(source) for source in self.sources], "batch": batch, "height": height, "width": width,
            "stride_b": x.stride(0), "stride_t": x.stride(2), "side": self.side, "channels": channels,
        }  # fmt: skip

    @property
    def grid(self):
        return tuple(-(-n // self.side) for n in self.sources[0].shape[1:3])

    @property
    def rows(self):
        return self.sources[0].shape[0] * math.prod(self.grid)

    @property
    def depth(self):
        return len(self.sources) * self.side**2 * self.sources[0].shape[3]

    def windows(self, dtype):
        """[rows, depth]"""
        return torch.cat([space_to_depth(x.to(dtype), self.side) for x in self.sources], -1)


def space_to_depth(x, side):
    batch, height, width, channels = x.shape
    x = F.pad(x, (0, 0, 0, -width % side, 0, -height % side))
    x = x.view(batch, x.shape[1] // side, side, x.shape[2] // side, side, channels)
    return x.transpose(2, 3).reshape(-1, side * side * channels)


def residual(x, side, kind):
    """R(S(x)) of [B, H, W, C]: [rows, C]."""
    rows, channels = space_to_depth(x, side), x.shape[3]
    if kind == "channel_group":
        return rows.view(-1, channels, side * side).mean(-1)
    there = space_to_depth(torch.ones_like(x), side).view(-1, side * side, channels)
    return rows.view(-1, side * side, channels).sum(1) / there.sum(1)


def from_blocks(x, side):
    """Tokens that lie window by window, brought into raster order."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // side, width // side, side, side, channels)
    return x.transpose(2, 3).reshape(batch, height, width, channels)


def gelu(x, activation):
    return F.gelu(x, approximate=ACTIVATIONS[activation]) if activation else x


@dataclass
class Problem:
    """``product`` of the bindings with these arguments writes ``outputs``; ``compute(dtype)`` is what these must be."""

    product: str
    memory: Memory
    arguments: dict[str, Any]
    compute: Callable[[torch.dtype], dict[str, torch.Tensor]]
    outputs: dict[str, torch.Tensor]

    def launch(self, module, **options):
        """Return what is wrong, or None."""
        made = {k: module.Tokens(**v.layout()) if isinstance(v, Tokens) else v for k, v in self.arguments.items()}
        return getattr(module, self.product)(element=TYPES.index(self.memory.dtype), **made, **options)


def forward(memory, x, n, *, bias=True, activation=0, save_pre=False, kind="none", shortcut=None, block=False, out_prefix=0):
    """``shortcut``: the residual's Tokens; ``block``: they lie window by window."""
    batch = x.sources[0].shape[0]
    weight, bias = memory.random(n, x.depth, scale=x.depth**-0.5), memory.random(n) if bias else None
    per_image = math.prod(x.grid)
    strides = ((out_prefix + per_image) * n, n, 1)
    outputs = {"out": memory.empty(batch, per_image, n, strides=strides, offset=out_prefix * n)}
    if save_pre:
        outputs["pre"] = memory.empty(batch, per_image, n)

    def compute(dtype):
        y = F.linear(x.windows(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
        out = gelu(y, activation)
        if kind != "none":
            tokens = shortcut.sources[0].to(dtype)
            out = out + residual(from_blocks(tokens, shortcut.side) if block else tokens, shortcut.side, kind)
        return {"out": out, "pre": y}

    arguments = {
        "x": x, "weight": pointer(weight), "bias": pointer(bias), "n": n, "activation": activation,
        "out": pointer(outputs["out"]) - 2 * out_prefix * n, "out_prefix": out_prefix, "pre": pointer(outputs.get("pre")),
        "residual_kind": RESIDUALS.index(kind), "residual_block": block,
    }  # fmt: skip
    if shortcut is not None:
        arguments["residual"] = shortcut
    return Problem("forward", memory, arguments, compute, outputs)


def input_gradient(
    memory,
    gradient,
    channels,
    *,
    activation=0,
    save_act=False,
    sums=False,
    grid=None,
    side=1,
    out_prefix=0,
    kind="none",
    shortcut=None,
):
    """Through an activation, or to the tokens of ``grid``; ``shortcut``: the gradient of what the residual was added to."""
    batch, height, width, n = gradient.sources[0].shape
    columns = side * side * channels
    weight = memory.random(n, columns, scale=n**-0.5)
    arguments = {
        "gradient": gradient, "weight": pointer(weight), "side": side, "channels": channels, "activation": activation,
        "out_prefix": out_prefix, "residual_kind": RESIDUALS.index(kind),
    }  # fmt: skip
    if activation:
        rows = batch * height * width
        pre = memory.random(rows, channels)
        outputs = {"out": memory.empty(rows, channels)}
        if save_act:
            outputs["act"] = memory.empty(rows, channels)
        if sums:
            outputs["sums"] = memory.empty(-(-rows // 16), channels, dtype=torch.float32)
        arguments |= {"height": height, "width": width, "pre": pointer(pre)}
        arguments |= {name: pointer(tensor) for name, tensor in outputs.items()}

        def compute(dtype):
            g, before = gradient.windows(dtype) @ weight.to(dtype), pre.to(dtype)
            out = torch.ops.aten.gelu_backward(g, before, approximate=ACTIVATIONS[activation])
            lines = F.pad(out, (0, 0, 0, -rows % 16)).view(-1, 16, channels)
            lines = lines.sum(1, dtype=torch.promote_types(dtype, torch.float32))
            return {"out": out, "act": gelu(before, activation), "sums": lines}

    else:
        height, width = grid
        strides = ((out_prefix + height * width) * channels, width * channels, channels, 1)
        shape = (batch, height, width, channels)
        outputs = {"out": memory.empty(*shape, strides=strides, offset=out_prefix * channels)}
        arguments |= {"out": pointer(outputs["out"]) - 2 * out_prefix * channels, "height": height, "width": width}
        if shortcut is not None:
            arguments["residual_gradient"] = shortcut

        def compute(dtype):
            tokens = torch.zeros(shape, dtype=dtype, requires_grad=True)
            rows = gradient.windows(dtype) @ weight.to(dtype)
            (out,) = torch.autograd.grad(space_to_depth(tokens, side), tokens, rows)
            if kind != "none":
                back = torch.autograd.grad(residual(tokens, side, kind), tokens, shortcut.windows(dtype))
                out = out + back[0]
            return {"out": out}

    return Problem("input_gradient", memory, arguments, compute, outputs)


def weight_gradient(memory, gradient, x):
    n = gradient.sources[0].shape[3]
    out = memory.empty(n, x.depth)
    arguments = {"gradient": gradient, "x": x, "out": pointer(out)}

    def compute(dtype):
        return {"out": gradient.windows(dtype).T @ x.windows(dtype)}

    return Problem("weight_gradient", memory, arguments, compute, {"out": out})


def assert_right(problem):
    """Every output is as near to float64's as twice the error of eager torch in the same precision and one rounding allow."""
    exact, eager = problem.compute(torch.float64), problem.compute(problem.memory.dtype)
    for name, got in problem.outputs.items():
        want, rough = exact[name].view(got.shape), eager[name].view(got.shape).double()
        if not got.numel():
            continue
        limits = torch.finfo(got.dtype)
        allowed = 2 * (rough - want).abs().max() + limits.eps * want.abs() + limits.smallest_normal
        error = (got.double() - want).abs()
        wrong = ~(error <= allowed)
        where = wrong.nonzero()[:4].tolist()
        assert not wrong.any(), (
            f"{name}: {int(wrong.sum())} of {wrong.numel()} wrong, first at {where}: "
            f"got {[got[tuple(i)].item() for i in where]}, expected {[want[tuple(i)].item() for i in where]}"
        )
    assert problem.memory.untouched()
