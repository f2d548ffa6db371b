"""The products of ``csrc/problem.h``, told where tensors lie; what they cannot address is refused before anything runs."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from laco_kernels.errors import UnsupportedError, complaint
from laco_kernels.kernels import select
from laco_kernels.kernels.passes import LISTENERS, announce

if TYPE_CHECKING:
    from collections.abc import Sequence

    from laco_kernels.geometry import Windows

ACTIVATIONS = {None: 0, "none": 1, "tanh": 2}
RESIDUALS = {"none": 0, "mean": 1, "channel_group": 2}
ELEMENTS = {torch.bfloat16: 0, torch.float16: 1}
MOST_SOURCES, MOST_SIDE = 8, 8
MOST_ROWS, MOST_TOKENS = 1 << 30, 1 << 31  # rows, or numbers of one; tokens of an image
FARTHEST = 1 << 39  # elements from one image to the next
ALIGNMENT, ELEMENT = 16, 2  # bytes: what the copy engine counts in, and one element
UNIT = ALIGNMENT // ELEMENT
SUM_ROWS = 16  # that one line of an input gradient's column sums is the sum of


def unsupported(argument: str, given: object, expected: str, remedy: str = "") -> UnsupportedError:
    """Return the complaint that ``impl="cuda"`` cannot do this."""
    others = "impl='composite', impl='triton' and the automatic choice have no such limit"
    return UnsupportedError(
        complaint(argument, given, f"{expected} for impl='cuda'", f"{remedy}; {others}" if remedy else others)
    )


class Tokens(NamedTuple):
    """Where rows lie, ``csrc/problem.h``: addresses, sizes, and strides in elements."""

    sources: tuple[int, ...]
    batch: int
    height: int
    width: int
    stride_b: int
    stride_t: int
    side: int
    channels: int


class Strides(NamedTuple):
    """Where tokens ``[B, T, C]`` lie in memory, in elements from one to the next."""

    address: int
    stride_b: int
    stride_t: int
    channels: int

    def behind(self, tokens: int) -> int:
        """Return the address of the first image's token number ``tokens``."""
        return self.address + ELEMENT * tokens * self.stride_t


def strides(name: str, x: torch.Tensor, rows: int) -> Strides:
    """Return where ``x [B, T, C]`` lies, of which a product has ``rows`` rows."""
    batch, count, channels = x.shape
    if channels % UNIT or not channels:
        raise unsupported(name, f"{channels} channels", f"a multiple of {UNIT}")
    if rows >= MOST_ROWS:
        raise unsupported(name, f"{rows} output tokens", f"fewer than {MOST_ROWS}")
    if count >= MOST_TOKENS:
        raise unsupported(name, f"{count} tokens an image", f"fewer than {MOST_TOKENS}")
    # The stride of a dimension of size 1 means nothing and may be anything.
    stride_t = x.stride(1) if count > 1 else channels
    stride_b = x.stride(0) if batch > 1 else count * stride_t
    apart = stride_t >= channels and count * stride_t <= stride_b < FARTHEST
    if x.stride(2) != 1 or not apart or stride_t % UNIT or stride_b % UNIT or x.data_ptr() % ALIGNMENT:
        given = f"strides {x.stride()} at an address that is {x.data_ptr() % ALIGNMENT} modulo {ALIGNMENT}"
        expected = f"channels side by side, tokens and images multiples of {UNIT} apart, not too far, {ALIGNMENT}-byte aligned,"
        raise unsupported(name, given, expected, f"Pass {name}.clone(memory_format=torch.contiguous_format)")
    return Strides(x.data_ptr(), stride_b, stride_t, channels)


def addressable(grad: torch.Tensor) -> torch.Tensor:
    """Return a gradient ``[B, T, C]`` that the copy engine can address: autograd hands over what it likes."""
    try:
        strides("grad", grad, 0)
    except UnsupportedError:
        return grad.clone(memory_format=torch.contiguous_format)
    return grad


def layer(suffix: str, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Check a layer's parameters; a bias with gaps comes back without."""
    name = f"weight{suffix}"
    if weight.shape[0] % UNIT or not weight.shape[0] or weight.shape[1] % UNIT:
        raise unsupported(name, list(weight.shape), f"both sides multiples of {UNIT}")
    if max(weight.shape) >= MOST_ROWS:
        raise unsupported(name, list(weight.shape), f"both sides shorter than {MOST_ROWS}")
    if not weight.is_contiguous():
        raise unsupported(name, f"strides {weight.stride()}", "a contiguous matrix", f"Pass {name}.contiguous()")
    bias = bias if bias is None else bias.contiguous()
    for what, tensor in ((name, weight), (f"bias{suffix}", bias)):
        if tensor is not None and tensor.data_ptr() % ALIGNMENT:
            given = f"an address that is {tensor.data_ptr() % ALIGNMENT} modulo {ALIGNMENT}"
            raise unsupported(what, given, f"one that {ALIGNMENT} divides", f"Pass {what}.clone()")
    return weight, bias


def image(windows: Windows, layout: str) -> tuple[int, int]:
    """Height and width of the image that the tokens are: window by window they are one that is a window wide."""
    return (windows.ratio * windows.num_windows, windows.ratio) if layout == "block" else windows.grid


def rows_of(batch: int, rows: int, channels: int, stride_t: int, stride_b: int, *sources: int) -> Tokens:
    """Rows that are one token each."""
    return Tokens(sources, batch, 1, rows, stride_b, stride_t, 1, channels)


def plain(x: torch.Tensor) -> Tokens:
    """Return the rows of ``x [B, rows, C]``, which :func:`strides` has let pass or this package has made."""
    batch, rows, channels = x.shape
    stride_t = x.stride(1) if rows > 1 else channels
    stride_b = x.stride(0) if batch > 1 else rows * stride_t
    return rows_of(batch, rows, channels, stride_t, stride_b, x.data_ptr())


def windows_of(tokens: Strides, batch: int, windows: Windows, layout: str) -> Tokens:
    """Rows that are windows; those in block order without gaps are plain rows."""
    first = tokens.behind(windows.prefix_tokens)
    if layout == "block" and tokens.stride_t == tokens.channels:
        width = windows.ratio**2 * tokens.channels
        return rows_of(batch, windows.num_windows, width, width, tokens.stride_b, first)
    height, width = image(windows, layout)
    return Tokens((first,), batch, height, width, tokens.stride_b, tokens.stride_t, windows.ratio, tokens.channels)


def residual_of(tokens: Strides, batch: int, windows: Windows, layout: str, kind: str) -> dict[str, Any]:
    """Return what a forward product is told of the residual."""
    _, stride_b, stride_t, channels = tokens
    height, width = image(windows, layout)
    first = (tokens.behind(windows.prefix_tokens),)
    follow = stride_t == channels and (batch == 1 or stride_b == windows.num_patches * channels)
    return {
        "residual_kind": RESIDUALS[kind],
        "residual": Tokens(first, batch, height, width, stride_b, stride_t, windows.ratio, channels),
        "residual_block": layout == "block" and not windows.prefix_tokens and follow,
    }


def forward(
    reads: Sequence[torch.Tensor],
    x: Tokens,
    out: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    approximate: str | None = None,
    pre: torch.Tensor | None = None,
    out_prefix: int = 0,
    **residual: Any,
) -> None:
    """Launch ``out = gelu(x weight^T + bias) + residual``; ``reads`` are the tensors behind ``x`` and the residual."""
    if not x.batch * x.width:
        return
    if LISTENERS:
        announce([*reads, weight, bias], [out[:, out_prefix:], pre])
    _launch(
        "forward",
        out,
        x=x,
        weight=weight.data_ptr(),
        bias=_address(bias),
        n=weight.shape[0],
        activation=ACTIVATIONS[approximate],
        out_prefix=out_prefix,
        pre=_address(pre),
        **residual,
    )


def through_activation(
    grad: torch.Tensor, weight: torch.Tensor, pre: torch.Tensor, approximate: str, *, with_sums: bool, with_act: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Return ``(grad weight) * gelu'(pre)``, with ``with_sums`` its column sums, and with ``with_act`` ``gelu(pre)``.

    ``grad [B, rows, n]`` addressable, ``weight [n, N]`` and ``pre [B, rows, N]`` contiguous.
    """
    batch, rows, n = pre.shape
    out = torch.empty_like(pre)
    act = torch.empty_like(pre) if with_act else None
    lines = -(-batch * rows // SUM_ROWS)
    sums = pre.new_empty((lines, n), dtype=torch.float32) if with_sums else None
    if batch * rows:
        if LISTENERS:
            announce([grad, weight, pre], [out, act, sums])
        _launch(
            "input_gradient",
            out,
            gradient=plain(grad),
            weight=weight.data_ptr(),
            channels=n,
            width=rows,
            pre=pre.data_ptr(),
            activation=ACTIVATIONS[approximate],
            act=_address(act),
            sums=_address(sums),
        )
    return out, None if sums is None else sums.sum(0).to(pre.dtype), act


def to_tokens(
    grad: torch.Tensor,
    weight: torch.Tensor,
    dx: torch.Tensor,
    windows: Windows,
    layout: str,
    residual: str,
    total: torch.Tensor,
) -> None:
    """Write ``grad weight``, gradients of windows, and the residual's behind the prefix of ``dx [B, P + N, C]``.

    ``grad [B, N', n]`` and ``total [B, N', C]``, the gradient of what the residual went into, are addressable.
    """
    if not grad.shape[0] * grad.shape[1]:
        return
    if LISTENERS:
        announce([grad, weight, *([total] if residual != "none" else [])], [dx[:, windows.prefix_tokens :]])
    height, width = image(windows, layout)
    _launch(
        "input_gradient",
        dx,
        gradient=plain(grad),
        weight=weight.data_ptr(),
        side=windows.ratio,
        channels=dx.shape[2],
        out_prefix=windows.prefix_tokens,
        height=height,
        width=width,
        residual_kind=RESIDUALS[residual],
        residual_gradient=plain(total),
    )


def of_weight(grad: torch.Tensor, reads: Sequence[torch.Tensor], x: Tokens, depth: int) -> torch.Tensor:
    """Return ``sum_m grad[m, i] x[m, k]``, ``[n, depth]``; ``grad [B, rows, n]`` is addressable."""
    out = grad.new_empty(grad.shape[2], depth)
    if not grad.shape[0] * grad.shape[1]:
        return out.zero_()
    if LISTENERS:
        announce([grad, *reads], [out])
    _launch("weight_gradient", out, gradient=plain(grad), x=x)
    return out


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _launch(product: str, out: torch.Tensor, **problem: Any) -> None:
    if out.device.type != "meta":
        _call(product, out.device, element=ELEMENTS[out.dtype], out=out.data_ptr(), **problem)


def _call(product: str, device: torch.device, **problem: Any) -> None:
    # The kernel runs on the current device, whatever device its pointers are on.
    here = device.index == torch.cuda.current_device()
    with contextlib.nullcontext() if here else torch.cuda.device(device):
        call(select.extension(), product, device=device.index, stream=torch.cuda.current_stream(device).cuda_stream, **problem)


def arguments(extension: Any, problem: dict[str, Any]) -> dict[str, Any]:
    """Return a problem as the extension takes it, with tokens of its own."""
    return {name: extension.Tokens(**of._asdict()) if isinstance(of, Tokens) else of for name, of in problem.items()}


def call(extension: Any, product: str, **problem: Any) -> None:
    """Have the extension's ``product`` done.

    Raises:
        RuntimeError: if it says what is wrong.
    """
    error = getattr(extension, product)(**arguments(extension, problem))
    if error is not None:
        raise RuntimeError(f"impl='cuda': the kernel was not launched: {error}")
