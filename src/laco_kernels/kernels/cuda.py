"""``impl="cuda"``: forward passes as Hopper matrix products that do everything else on the way; ``csrc/`` has the kernel.

bfloat16 and float16 on compute capability 9.0. The copy engine gathers windows, completes odd grids with zeros and drops
prefix tokens; bias, GELU, saved pre-activation and residual are the product's epilogue. Only the forward pass is the fused
kernel; the backward pass is that of the composite, cuBLAS products between fused passes.

What the copy engine cannot address, or the kernel was not written for, is an :class:`~laco_kernels.errors.UnsupportedError`:
an explicit ``impl="cuda"`` raises it, the automatic choice takes the composite instead.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from laco_kernels.errors import UnsupportedError, complaint
from laco_kernels.kernels import select
from laco_kernels.kernels.backward import (
    gelu_mlp_backward,
    multi_block_linear_gelu_backward,
    patch_merge_backward,
    strided_conv_backward,
    strided_conv_gelu_backward,
)
from laco_kernels.kernels.passes import LISTENERS, announce

if TYPE_CHECKING:
    from collections.abc import Sequence

    from laco_kernels.geometry import Windows

__all__ = [
    "gelu_mlp_backward",
    "gelu_mlp_forward",
    "multi_block_linear_gelu_backward",
    "multi_block_linear_gelu_forward",
    "patch_merge_backward",
    "patch_merge_forward",
    "strided_conv_backward",
    "strided_conv_forward",
    "strided_conv_gelu_backward",
    "strided_conv_gelu_forward",
]

GELU = {"none": 1, "tanh": 2}
ELEMENTS = {torch.bfloat16: 0, torch.float16: 1}
MOST_SOURCES, MOST_ROWS, MOST_SIDE = 8, 1 << 30, 8
ALIGNMENT, ELEMENT = 16, 2  # bytes: what the copy engine counts in, and one element
UNIT = ALIGNMENT // ELEMENT


def patch_merge_forward(
    x: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor | None,
    weight2: torch.Tensor,
    bias2: torch.Tensor | None,
    *,
    windows: Windows,
    residual_kind: str,
    approximate: str,
    layout: str,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`laco_kernels.reference.patch_merge_forward`; without ``save`` the pre-activation is empty."""
    batch, prefix, rows = x.shape[0], windows.prefix_tokens, windows.num_windows
    hidden, out = weight1.shape[0], weight2.shape[0]
    if windows.ratio > MOST_SIDE:
        raise _unsupported("ratio", windows.ratio, f"at most {MOST_SIDE}")
    if approximate not in GELU:
        raise _unsupported("approximate", repr(approximate), " or ".join(map(repr, GELU)))
    if residual_kind == "channel_group":
        raise _unsupported("residual", "'channel_group'", "'mean' or 'none'")
    tokens = _tokens("x", x, batch * rows)
    weight1, bias1 = _layer("1", weight1, bias1)
    weight2, bias2 = _layer("2", weight2, bias2)

    pre = x.new_empty((batch, rows, hidden) if save else (0,))
    act = x.new_empty(batch, rows, hidden)
    patches = x[:, prefix:]
    source = _windows(tokens, batch, windows, layout)
    _gemm([patches], act, weight1, bias1, approximate=approximate, pre=pre if save else None, **source)

    y = x.new_empty(batch, prefix + rows, out)
    if prefix:
        y[:, :prefix] = x[:, :prefix]
    source = {"sources": [act.data_ptr()], **_rows(batch, rows, hidden, hidden, rows * hidden)}
    if residual_kind == "mean":
        _gemm([act, patches], y, weight2, bias2, out_prefix=prefix, **source, **_residual(tokens, batch, windows, layout))
    elif prefix and batch > 1:  # images that do not follow each other
        merged = x.new_empty(batch, rows, out)
        _gemm([act], merged, weight2, bias2, **source)
        y[:, prefix:] = merged
    else:
        _gemm([act], y[:, prefix:], weight2, bias2, **source)
    return y, pre


gelu_mlp_forward = patch_merge_forward  # a merge of one token a window, without a residual


def strided_conv_forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, windows: Windows, layout: str, **epilogue: Any
) -> torch.Tensor:
    """See :func:`laco_kernels.reference.strided_conv_forward`; ``epilogue`` is what the product does besides."""
    if windows.ratio > MOST_SIDE:
        raise _unsupported("kernel_size", windows.ratio, f"at most {MOST_SIDE}")
    batch, rows = x.shape[0], windows.num_windows
    tokens = _tokens("x", x, batch * rows)
    weight, bias = _layer("", weight, bias)
    y = x.new_empty(batch, rows, weight.shape[0])
    _gemm([x[:, windows.prefix_tokens :]], y, weight, bias, **epilogue, **_windows(tokens, batch, windows, layout))
    return y


def strided_conv_gelu_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    windows: Windows,
    layout: str,
    approximate: str,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`laco_kernels.reference.strided_conv_gelu_forward`; without ``save`` the pre-activation is empty."""
    pre = x.new_empty((x.shape[0], windows.num_windows, weight.shape[0]) if save else (0,))
    epilogue = {"approximate": approximate, "pre": pre if save else None}
    return strided_conv_forward(x, weight, bias, windows=windows, layout=layout, **epilogue), pre


def multi_block_linear_gelu_forward(
    xs: Sequence[torch.Tensor],
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    prefix_tokens: int,
    approximate: str,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`laco_kernels.reference.multi_block_linear_gelu_forward`; without ``save`` the pre-activation is empty."""
    batch, rows = xs[0].shape[0], xs[0].shape[1] - prefix_tokens
    if len(xs) > MOST_SOURCES:
        raise _unsupported("xs", f"{len(xs)} blocks", f"at most {MOST_SOURCES}")
    blocks = [_tokens(f"xs[{i}]", x, batch * rows) for i, x in enumerate(xs)]
    first = blocks[0]
    for i, block in enumerate(blocks):
        if block[1:] != first[1:]:
            raise _unsupported(
                f"xs[{i}]", f"strides {xs[i].stride()}", f"{xs[0].stride()}, those of xs[0],", "Copy those that differ"
            )
    weight, bias = _layer("", weight, bias)
    shape = (batch, rows, weight.shape[0])
    y, pre = xs[0].new_empty(shape), xs[0].new_empty(shape if save else (0,))
    sources = [block.behind(prefix_tokens) for block in blocks]
    source = {"sources": sources, **_rows(batch, rows, first.channels, first.stride_t, first.stride_b)}
    reads = [x[:, prefix_tokens:] for x in xs]
    _gemm(reads, y, weight, bias, approximate=approximate, pre=pre if save else None, **source)
    return y, pre


class Tokens(NamedTuple):
    """Where tokens ``[B, T, C]`` lie in memory, in elements from one to the next."""

    address: int
    stride_b: int
    stride_t: int
    channels: int

    def behind(self, tokens: int) -> int:
        """Return the address of the first image's token number ``tokens``."""
        return self.address + ELEMENT * tokens * self.stride_t


def _unsupported(argument: str, given: object, expected: str, remedy: str = "") -> UnsupportedError:
    others = "impl='composite', impl='triton' and the automatic choice have no such limit"
    return UnsupportedError(
        complaint(argument, given, f"{expected} for impl='cuda'", f"{remedy}; {others}" if remedy else others)
    )


def _tokens(name: str, x: torch.Tensor, rows: int) -> Tokens:
    batch, count, channels = x.shape
    if channels % UNIT or not channels:
        raise _unsupported(name, f"{channels} channels", f"a multiple of {UNIT}")
    if rows >= MOST_ROWS:
        raise _unsupported(name, f"{rows} output tokens", f"fewer than {MOST_ROWS}")
    # The stride of a dimension of size 1 means nothing and may be anything.
    stride_t = x.stride(1) if count > 1 else channels
    stride_b = x.stride(0) if batch > 1 else count * stride_t
    apart = stride_t >= channels and stride_b >= count * stride_t
    if x.stride(2) != 1 or not apart or stride_t % UNIT or stride_b % UNIT or x.data_ptr() % ALIGNMENT:
        given = f"strides {x.stride()} at an address that is {x.data_ptr() % ALIGNMENT} modulo {ALIGNMENT}"
        expected = f"channels side by side, tokens and images multiples of {UNIT} apart, {ALIGNMENT}-byte aligned,"
        raise _unsupported(name, given, expected, f"Pass {name}.clone(memory_format=torch.contiguous_format)")
    return Tokens(x.data_ptr(), stride_b, stride_t, channels)


def _layer(suffix: str, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Check a layer's parameters; a bias with gaps comes back without."""
    name = f"weight{suffix}"
    if weight.shape[0] % UNIT or not weight.shape[0] or weight.shape[1] % UNIT:
        raise _unsupported(name, list(weight.shape), f"both sides multiples of {UNIT}")
    if not weight.is_contiguous():
        raise _unsupported(name, f"strides {weight.stride()}", "a contiguous matrix", f"Pass {name}.contiguous()")
    bias = bias if bias is None else bias.contiguous()
    for what, tensor in ((name, weight), (f"bias{suffix}", bias)):
        if tensor is not None and tensor.data_ptr() % ALIGNMENT:
            given = f"an address that is {tensor.data_ptr() % ALIGNMENT} modulo {ALIGNMENT}"
            raise _unsupported(what, given, f"one that {ALIGNMENT} divides", f"Pass {what}.clone()")
    return weight, bias


def _rows(batch: int, rows: int, channels: int, stride_t: int, stride_b: int) -> dict[str, Any]:
    """Rows of a product that are one token each."""
    return {"batch": batch, "height": 1, "width": rows, "channels": channels, "stride_t": stride_t, "stride_b": stride_b}


def _windows(tokens: Tokens, batch: int, windows: Windows, layout: str) -> dict[str, Any]:
    """Rows of a product that are windows."""
    _, stride_b, stride_t, channels = tokens
    first = [tokens.behind(windows.prefix_tokens)]
    if layout == "block" and stride_t == channels:  # a window's tokens are one row
        width = windows.ratio**2 * channels
        return {"sources": first, **_rows(batch, windows.num_windows, width, width, stride_b)}
    height, width = _image(windows, layout)
    image = {"batch": batch, "height": height, "width": width, "channels": channels, "stride_t": stride_t, "stride_b": stride_b}
    return {"sources": first, "side": windows.ratio, **image}


def _residual(tokens: Tokens, batch: int, windows: Windows, layout: str) -> dict[str, Any]:
    _, stride_b, stride_t, channels = tokens
    height, width = _image(windows, layout)
    follow = stride_t == channels and (batch == 1 or stride_b == windows.num_patches * channels)
    return {
        "residual": tokens.behind(windows.prefix_tokens),
        "residual_stride_b": stride_b,
        "residual_stride_t": stride_t,
        "residual_height": height,
        "residual_width": width,
        "residual_side": windows.ratio,
        "residual_block": layout == "block" and not windows.prefix_tokens and follow,
    }


def _image(windows: Windows, layout: str) -> tuple[int, int]:
    """Height and width of the image that the tokens are: window by window they are one that is a window wide."""
    return (windows.ratio * windows.num_windows, windows.ratio) if layout == "block" else windows.grid


def _gemm(
    reads: Sequence[torch.Tensor],
    out: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    approximate: str | None = None,
    pre: torch.Tensor | None = None,
    out_prefix: int = 0,
    **problem: Any,
) -> None:
    """Launch ``out = gelu(A weight^T + bias) + residual``; ``csrc/hopper_gemm.h`` documents ``problem``."""
    if not problem["batch"] * problem["width"]:
        return
    if LISTENERS:
        announce([*reads, weight, bias], [out[:, out_prefix:], pre])
    if out.device.type == "meta":
        return
    _launch(
        out.device,
        **problem,
        element=ELEMENTS[out.dtype],
        weight=weight.data_ptr(),
        bias=0 if bias is None else bias.data_ptr(),
        n=weight.shape[0],
        activation=0 if approximate is None else GELU[approximate],
        out=out.data_ptr(),
        out_prefix=out_prefix,
        pre=0 if pre is None else pre.data_ptr(),
    )


def _launch(device: torch.device, **problem: Any) -> None:
    # The kernel runs on the current device, whatever device its pointers are on.
    here = device.index == torch.cuda.current_device()
    with contextlib.nullcontext() if here else torch.cuda.device(device):
        error = select.extension().gemm(**problem, device=device.index, stream=torch.cuda.current_stream(device).cuda_stream)
    if error is not None:
        raise RuntimeError(f"impl='cuda': the kernel was not launched: {error}")
