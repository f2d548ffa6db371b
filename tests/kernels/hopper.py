"""``laco_kernels._cuda.gemm`` in plain torch on the CPU, from the same pointers, sizes and strides; see csrc/hopper_gemm.h."""

import ctypes

import torch
import torch.nn.functional as F

ELEMENTS = (torch.bfloat16, torch.float16)


def at(address, element, shape, strides):
    """The tensor that lies there."""
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    memory = (ctypes.c_uint8 * (2 * (last + 1))).from_address(address)
    return torch.frombuffer(memory, dtype=ELEMENTS[element]).as_strided(shape, strides)


def contiguous(address, element, *shape):
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return at(address, element, shape, strides)


def windowed(image, side):
    """``[B, H, W, C] -> [B, windows, side * side, C]``, zero-padded."""
    batch, height, width, channels = image.shape
    image = F.pad(image, (0, 0, 0, -width % side, 0, -height % side))
    image = image.reshape(batch, image.shape[1] // side, side, image.shape[2] // side, side, channels)
    return image.transpose(2, 3).reshape(batch, -1, side * side, channels)


def gemm(
    *, element, sources, batch, height, width, stride_b, stride_t, channels, weight, bias, n, activation, out, out_prefix, pre,
    side=1, residual=0, residual_stride_b=0, residual_stride_t=0, residual_height=0, residual_width=0,
    residual_side=2, residual_block=False,
):  # fmt: skip
    rows = []
    for source in sources:
        image = at(source, element, (batch, height, width, channels), (stride_b, width * stride_t, stride_t, 1)).double()
        rows.append(windowed(image, side).flatten(2))
    a = torch.cat(rows, -1)
    value = a @ contiguous(weight, element, n, a.shape[2]).double().t()
    if bias:
        value += contiguous(bias, element, n).double()
    if pre:
        contiguous(pre, element, *value.shape).copy_(value)
    if activation:
        value = F.gelu(value, approximate=("none", "tanh")[activation - 1])
    if residual:
        strides = (residual_stride_b, residual_width * residual_stride_t, residual_stride_t, 1)
        image = at(residual, element, (batch, residual_height, residual_width, n), strides).double()
        if residual_block:
            assert strides[0] == residual_height * residual_width * n
            assert residual_stride_t == n
            value += image.reshape(batch, -1, residual_side**2, n).mean(2)
        else:
            present = windowed(torch.ones_like(image), residual_side).sum(2)
            assert present.shape[1] == value.shape[1]
            value += windowed(image, residual_side).sum(2) / present
    contiguous(out, element, batch, out_prefix + value.shape[1], n)[:, out_prefix:].copy_(value)
