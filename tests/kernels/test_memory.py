"""The kernels write nothing outside their outputs: every tensor they allocate lies between canaries."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from laco_kernels import testing
from laco_kernels.ops.library import BODIES
from laco_kernels.testing import Case

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MARGIN, CANARY = 4096, 7.0
ALLOCATIONS = {torch.ops.aten.empty, torch.ops.aten.new_empty, torch.ops.aten.empty_like}
# A plain case of every kernel, and one where rows, channels and windows all end inside a tile.
CASES = [
    *testing.CASES,
    Case("patch_merge", {"batch": 1, "channels": 33, "hidden": 65}, {"grid": (5, 15), "pad": True}),
    Case("strided_conv_gelu", {"batch": 1, "channels": 129, "out": 33}, {"grid": (3, 3), "pad": True}),
    Case("strided_conv", {"batch": 1, "channels": 129, "out": 33}, {"grid": (3, 3), "pad": True}),
]


class Guarded(TorchDispatchMode):
    """Allocates every uninitialised tensor of a registered operator's body inside a larger one, canaries around it."""

    def __init__(self):
        super().__init__()
        self.around = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "laco":
            with self:
                return BODIES[func._schema.name.partition("::")[2]](*args, **kwargs)
        out = func(*args, **kwargs)
        if func.overloadpacket not in ALLOCATIONS or not out.is_floating_point() or not out.is_contiguous():
            return out
        whole = torch.full((out.numel() + 2 * MARGIN,), CANARY, dtype=out.dtype, device=out.device)
        self.around += [whole[:MARGIN], whole[-MARGIN:]]
        inside = whole[MARGIN : MARGIN + out.numel()].view(out.shape)
        return inside.fill_(float("nan"))


@pytest.mark.parametrize("impl", ["triton", "composite"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_nothing_is_written_outside_the_outputs(case, impl):
    inputs = case.inputs(torch.float32, DEVICE)
    grad = torch.ones_like(case(inputs, "reference"))
    with Guarded() as guard:
        found = testing.gradients(case, inputs, impl, grad)
    # In block order without a prefix the composite's plain convolution is products of views: no kernel of ours.
    options = case.options
    views = case.op == "strided_conv" and options.get("layout") == "block" and not options.get("prefix_tokens")
    assert (len(guard.around) > 2) is not (views and impl == "composite")
    assert all((margin == CANARY).all() for margin in guard.around)
    expected = testing.gradients(case, inputs, impl, grad)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
