"""The operators on visual tokens as test cases, and what tests of registered operators share."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import laco_kernels as lk
from laco_kernels import reference
from laco_kernels.geometry import Windows

BATCH, GRID, PREFIX, CHANNELS, HIDDEN, TOKENS = 2, (3, 5), 1, 6, 5, 16
WINDOWS = Windows(GRID, 2, PREFIX, pad=True)


class Merge:
    name, activations, pre = "patch_merge", 1, True
    shapes = (HIDDEN, 4 * CHANNELS), (HIDDEN,), (CHANNELS, HIDDEN), (CHANNELS,)

    @staticmethod
    def call(x, *weights, **kwargs):
        return lk.patch_merge(x, *weights, grid=GRID, pad=True, prefix_tokens=PREFIX, **kwargs)

    @staticmethod
    def raw(x, *weights, save=True):
        return *(x, *weights), 2, list(GRID), "mean", "none", PREFIX, True, "raster", "reference", save

    @staticmethod
    def reference(x, *weights):
        return reference.patch_merge_forward(x, *weights, windows=WINDOWS)[0]


class Conv:
    name, activations, pre = "strided_conv_gelu", 1, True
    shapes = (HIDDEN, 4 * CHANNELS), (HIDDEN,)

    @staticmethod
    def call(x, *weights, **kwargs):
        return lk.strided_conv_gelu(x, *weights, grid=GRID, pad=True, prefix_tokens=PREFIX, **kwargs)

    @staticmethod
    def raw(x, *weights, save=True):
        return *(x, *weights), 2, list(GRID), PREFIX, True, "raster", "none", "reference", save

    @staticmethod
    def reference(x, *weights):
        return reference.strided_conv_gelu_forward(x, *weights, windows=WINDOWS)[0]


class PlainConv:
    name, activations, pre = "strided_conv", 1, False  # nothing is activated, so nothing but inputs is kept
    shapes = (HIDDEN, 4 * CHANNELS), (HIDDEN,)

    @staticmethod
    def call(x, *weights, **kwargs):
        return lk.strided_conv(x, *weights, grid=GRID, pad=True, prefix_tokens=PREFIX, **kwargs)

    @staticmethod
    def raw(x, *weights):
        return *(x, *weights), 2, list(GRID), PREFIX, True, "raster", "reference"

    @staticmethod
    def reference(x, *weights):
        return reference.strided_conv_forward(x, *weights, windows=WINDOWS)


class Fusion:
    name, activations, pre = "multi_block_linear_gelu", 2, True
    shapes = (HIDDEN, 2 * CHANNELS), (HIDDEN,)

    @staticmethod
    def call(x1, x2, *weights, **kwargs):
        return lk.multi_block_linear_gelu([x1, x2], *weights, prefix_tokens=PREFIX, **kwargs)

    @staticmethod
    def raw(x1, x2, *weights, save=True):
        return [x1, x2], *weights, PREFIX, "none", "reference", save

    @staticmethod
    def reference(x1, x2, *weights):
        return reference.multi_block_linear_gelu_forward([x1, x2], *weights, prefix_tokens=PREFIX)[0]


class Mlp:
    name, activations, pre = "gelu_mlp", 1, True
    shapes = (HIDDEN, CHANNELS), (HIDDEN,), (CHANNELS + 1, HIDDEN), (CHANNELS + 1,)

    @staticmethod
    def call(x, *weights, **kwargs):
        return lk.gelu_mlp(x, *weights, **kwargs)

    @staticmethod
    def raw(x, *weights, save=True):
        return x, *weights, x.dtype, "none", "reference", save

    @staticmethod
    def reference(x, *weights):
        windows = Windows((1, TOKENS), 1, 0, False)
        options = {"residual_kind": "none", "layout": "block"}
        return reference.patch_merge_forward(x, *weights, windows=windows, **options)[0]


CASES = [Merge, Conv, PlainConv, Fusion, Mlp]
every_op = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_activated_op = pytest.mark.parametrize("case", [case for case in CASES if case.pre], ids=lambda case: case.name)


def make(case, *, batch=BATCH, dtype=torch.float64, grad=True, frozen=0):
    """Return the tensors of a case, of which the first ``frozen`` need no gradient."""
    shapes = [(batch, TOKENS, CHANNELS)] * case.activations + list(case.shapes)
    return [torch.randn(s, dtype=dtype).requires_grad_(grad and i >= frozen) for i, s in enumerate(shapes)]


def clones(tensors):
    return [t.detach().clone().requires_grad_(t.requires_grad) for t in tensors]


def overload(case, suffix=""):
    return getattr(torch.ops.laco, case.name + suffix).default


def gradients(function, tensors, grad):
    tensors = clones(tensors)
    function(*tensors).backward(grad)
    return [t.grad for t in tensors]


def assert_same_gradients(function, other, tensors, **tolerance):
    """Compare outputs and gradients; the second function is the expected one."""
    y, expected = function(*tensors), other(*tensors)
    torch.testing.assert_close(y, expected, **tolerance)
    grad = torch.randn_like(expected)
    for got, want in zip(gradients(function, tensors, grad), gradients(other, tensors, grad), strict=True):
        torch.testing.assert_close(got, want, **tolerance)


class Calls(TorchDispatchMode):
    """Records every operator that is dispatched, with its arguments and its result."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, result))
        return result

    def of(self, func):
        return [call for call in self.calls if call[0] is func]

    def shapes(self, unlike):
        """The shapes of all results that are no views of the tensor ``unlike``."""
        results = [r if isinstance(r, (list, tuple)) else (r,) for _, _, r in self.calls]
        made = [t for result in results for t in result if isinstance(t, torch.Tensor)]
        return {tuple(t.shape) for t in made if t.untyped_storage().data_ptr() != unlike.untyped_storage().data_ptr()}
