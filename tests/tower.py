"""The operators inside an encoder, and the numerical promise checked on each of their outputs and gradients."""

import torch
from hypothesis import strategies as st

from laco_kernels import testing


def grads_like(outputs, dtype, device, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(y.shape, generator=generator).to(device, dtype) for name, y in outputs.items()}


def broken_promises(case, impl, dtype, device, inputs=None, grads=None):
    """Return error and budget of every output and gradient that errs more than :mod:`laco_kernels.testing` allows."""
    rows = testing.check_case(case, impl, dtype, device, inputs, grads)
    return {row.tensor: (row.error, row.budget) for row in rows if not row.ok}


@st.composite
def layouts(draw, tensor):
    """The same values elsewhere in memory: transposed, a slice of something larger, behind a class token, expanded."""
    kind = draw(st.sampled_from(["contiguous", "transposed", "sliced", "behind", "expanded"]))
    if kind == "transposed":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == "sliced":
        around = tensor.new_full([2 * size + 1 for size in tensor.shape], float("nan"))
        return around[(slice(1, None, 2),) * tensor.dim()].copy_(tensor)
    if kind == "behind" and tensor.dim() > 1:
        around = tensor.new_full((*tensor.shape[:-2], tensor.shape[-2] + 2, tensor.shape[-1] + 8), float("nan"))
        return around[..., 1:-1, 8:].copy_(tensor)
    if kind == "expanded" and len(tensor):
        return tensor[:1].expand(tensor.shape)
    return tensor
