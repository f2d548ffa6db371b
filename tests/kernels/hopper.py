"""``laco_kernels._cuda.gemm`` in plain torch on the CPU, from the same pointers, sizes and strides; see csrc/hopper_gemm.h."""

import ctypes

import torch
import torch.nn.functional as F


def at(address, shape, strides):
    """The bfloat16 tensor that lies there."""
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    memory = (ctypes.c_uint8 * (2 * (last + 1))).from_address(address)
    return torch.frombuffer(memory, dtype=torch.bfloat16).as_strided(shape, strides)


def contiguous(address, *shape):
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return at(address, shape, strides)


def windowed(image):
    """``[B, H, W, C] -> [B, windows, 4, C]``, zero-padded."""
    batch, height, width, channels = image.shape
    image = F.pad(image, (0, 0, 0, width % 2, 0, height % 2))
    image = image.reshape(batch, (height + 1) // 2, 2, (width + 1) // 2, 2, channels)
    return image.transpose(2, 3).reshape(batch, -1, 4, channels)


def gemm(
    *, sources, batch, height, width, stride_b, stride_t, channels, weight, bias, n, activation, out, out_prefix, pre,
    windows=False, residual=0, residual_stride_b=0, residual_stride_t=0, residual_height=0, residual_width=0,
    residual_block=False,
):  # fmt: skip
    rows = []
    for source in sources:
        image = at(source, (batch, height, width, channels), (stride_b, width * stride_t, stride_t, 1)).double()
        rows.append(windowed(image).flatten(2) if windows else image.flatten(1, 2))
    a = torch.cat(rows, -1)
    value = a @ contiguous(weight, n, a.shape[2]).double().t()
    if bias:
        value += contiguous(bias, n).double()
    if pre:
        contiguous(pre, *value.shape).copy_(value)
    if activation:
        value = F.gelu(value, approximate=("none", "tanh")[activation - 1])
    if residual:
        strides = (residual_stride_b, residual_width * residual_stride_t, residual_stride_t, 1)
        image = at(residual, (batch, residual_height, residual_width, n), strides).double()
        if residual_block:
            assert strides[0] == residual_height * residual_width * n
            assert residual_stride_t == n
            value += image.reshape(batch, -1, 4, n).mean(2)
        else:
            value += windowed(image).sum(2) / windowed(torch.ones_like(image)).sum(2)
    contiguous(out, batch, out_prefix + value.shape[1], n)[:, out_prefix:].copy_(value)
