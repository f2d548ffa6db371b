"""Hypothesis strategies for grids, windows and tokens that lie in memory in unusual ways."""

import torch
from hypothesis import strategies as st

from laco_kernels.geometry import Windows

RATIOS = st.integers(1, 4)


@st.composite
def windows(draw, ratios=RATIOS, pad=None):
    """Windows over grids from 1 x 1, odd ones where ``pad`` allows them."""
    ratio = draw(ratios)
    pad = draw(st.booleans()) if pad is None else pad
    side = st.integers(1, 9) if pad else st.integers(1, 4).map(lambda n: n * ratio)
    return Windows((draw(side), draw(side)), ratio, draw(st.integers(0, 5)), pad)


@st.composite
def tokens(draw, num_tokens, channels, dtype=torch.float64, min_batch=0):
    """``[B, num_tokens, channels]``: contiguous, transposed, sliced out of something larger, or expanded over the batch."""
    batch = draw(st.integers(min_batch, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    kind = draw(st.sampled_from(["contiguous", "transposed", "sliced", "expanded"]))
    shapes = {
        "contiguous": (batch, num_tokens, channels),
        "transposed": (batch, channels, num_tokens),
        "sliced": (batch, num_tokens + 2, 2 * channels),
        "expanded": (1, num_tokens, channels),
    }
    x = torch.randn(shapes[kind], generator=generator, dtype=dtype)
    if kind == "transposed":
        return x.transpose(1, 2)
    if kind == "sliced":
        return x[:, 1:-1, ::2]
    return x.expand(batch, -1, -1)
