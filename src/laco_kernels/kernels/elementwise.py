"""Activations, gated or not, and their gradients: one pass each."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from laco_kernels.kernels.activation import ERF, QUICK, TANH, gelu_and_derivative, times_sigmoid
from laco_kernels.kernels.launch import PLANS, Plan, accumulator, is_cheap
from laco_kernels.kernels.rows import rows_of

SILU = 4  # beside those of GELU
ACTIVATIONS = {"gelu": ERF, "gelu_tanh": TANH, "quick_gelu": QUICK}
ROW_TILE, COLUMN_TILE = 8, 256


@triton.jit
def _value_and_slope(x, ACTIVATION: tl.constexpr, CHEAP: tl.constexpr):
    if ACTIVATION == 4:
        value, slope = times_sigmoid(x, 1.0)
    else:
        value, slope = gelu_and_derivative(x, ACTIVATION, CHEAP)
    return value, slope


@triton.jit
def activation_kernel(
    p_h,  # [B, T, N], with GATED [B, T, 2 * N], through its strides
    p_y,  # [M, N]
    M,
    N,
    rows,
    stride_hb,
    stride_ht,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    CHEAP: tl.constexpr,
    ACC: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """``activation(h)``, or with GATED ``activation(gate) * up`` of ``h = [gate, up]``."""
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    o_n = tl.program_id(1) * BN + tl.arange(0, BN)
    i_b, i_t = (o_m // rows).to(tl.int64), (o_m % rows).to(tl.int64)
    m_tile = (o_m < M)[:, None] & (o_n < N)[None, :]
    p_tile = p_h + (i_b * stride_hb + i_t * stride_ht)[:, None] + o_n[None, :]
    b_y, _ = _value_and_slope(tl.load(p_tile, mask=m_tile, other=0.0).to(ACC), ACTIVATION, CHEAP)  # [BM, BN]
    if GATED:
        b_y *= tl.load(p_tile + N, mask=m_tile, other=0.0).to(ACC)
    tl.store(p_y + o_m[:, None].to(tl.int64) * N + o_n[None, :], b_y.to(p_y.dtype.element_ty), mask=m_tile)


@triton.jit
def activation_backward_kernel(
    p_grad,  # [B, T, N] through its strides
    p_h,  # [B, T, N], with GATED [B, T, 2 * N], through its strides
    p_dh,  # [M, N], with GATED [M, 2 * N]
    M,
    N,
    rows,
    stride_gb,
    stride_gt,
    stride_hb,
    stride_ht,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    CHEAP: tl.constexpr,
    ACC: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """``grad * activation'(h)``, or with GATED the gradients of gate and up side by side."""
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    o_n = tl.program_id(1) * BN + tl.arange(0, BN)
    i_b, i_t = (o_m // rows).to(tl.int64), (o_m % rows).to(tl.int64)
    m_tile = (o_m < M)[:, None] & (o_n < N)[None, :]
    o_g = (i_b * stride_gb + i_t * stride_gt)[:, None] + o_n[None, :]
    p_tile = p_h + (i_b * stride_hb + i_t * stride_ht)[:, None] + o_n[None, :]
    b_grad = tl.load(p_grad + o_g, mask=m_tile, other=0.0).to(ACC)  # [BM, BN]
    b_y, b_slope = _value_and_slope(tl.load(p_tile, mask=m_tile, other=0.0).to(ACC), ACTIVATION, CHEAP)
    if GATED:
        p_out = p_dh + o_m[:, None].to(tl.int64) * (2 * N) + o_n[None, :]
        tl.store(p_out + N, (b_grad * b_y).to(p_dh.dtype.element_ty), mask=m_tile)
        b_grad *= tl.load(p_tile + N, mask=m_tile, other=0.0).to(ACC)
    else:
        p_out = p_dh + o_m[:, None].to(tl.int64) * N + o_n[None, :]
    tl.store(p_out, (b_grad * b_slope).to(p_dh.dtype.element_ty), mask=m_tile)


@functools.lru_cache(PLANS)
def _plan(
    tile: tuple[int, int],
    m: int,
    n: int,
    rows: int,
    h_strides: tuple[int, ...],
    grad_strides: tuple[int, ...] | None,
    dtype: torch.dtype,
    activation: int,
    gated: bool,
) -> Plan:
    strides = {} if grad_strides is None else {"stride_gb": grad_strides[0], "stride_gt": grad_strides[1]}
    return Plan(
        activation_backward_kernel if strides else activation_kernel,
        (-(-m // tile[0]), -(-n // tile[1])),
        M=m,
        N=n,
        rows=rows,
        **strides,
        stride_hb=h_strides[0],
        stride_ht=h_strides[1],
        ACTIVATION=activation,
        GATED=gated,
        CHEAP=is_cheap(dtype),
        ACC=accumulator(dtype),
        BM=tile[0],
        BN=tile[1],
        num_warps=4,
    )


def _forward(h: torch.Tensor, activation: int, *, gated: bool = False) -> torch.Tensor:
    n = h.shape[-1] // (2 if gated else 1)
    y = h.new_empty((*h.shape[:-1], n)) if gated else torch.empty_like(h, memory_format=torch.contiguous_format)
    if m := y.numel() // n:
        p_h, tile = rows_of(h), (ROW_TILE, COLUMN_TILE)
        plan = _plan(tile, m, n, p_h.shape[1], p_h.stride(), None, h.dtype, activation, gated)
        plan.launch(y.device, lambda: ([h], [y]), p_h=p_h, p_y=y)
    return y


def _backward(grad: torch.Tensor, h: torch.Tensor, activation: int, *, gated: bool = False) -> torch.Tensor:
    n = grad.shape[-1]
    dh = torch.empty_like(h, memory_format=torch.contiguous_format)
    if m := grad.numel() // n:
        p_grad, p_h, tile = rows_of(grad), rows_of(h), (ROW_TILE, COLUMN_TILE)
        strides = p_h.stride(), p_grad.stride()
        plan = _plan(tile, m, n, p_h.shape[1], *strides, h.dtype, activation, gated)
        plan.launch(dh.device, lambda: ([grad, h], [dh]), p_grad=p_grad, p_h=p_h, p_dh=dh)
    return dh


def gated_silu_forward(h: torch.Tensor) -> torch.Tensor:
    """See :func:`laco_kernels.reference_tower.gated_silu_forward`."""
    return _forward(h, SILU, gated=True)


def gated_silu_backward(grad: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """See :func:`laco_kernels.reference_tower.gated_silu_backward`."""
    return _backward(grad, h, SILU, gated=True)


def activate_forward(h: torch.Tensor, *, activation: str) -> torch.Tensor:
    """See :func:`laco_kernels.reference_tower.activate_forward`."""
    return _forward(h, ACTIVATIONS[activation])


def activate_backward(grad: torch.Tensor, h: torch.Tensor, *, activation: str) -> torch.Tensor:
    """See :func:`laco_kernels.reference_tower.activate_backward`."""
    return _backward(grad, h, ACTIVATIONS[activation])
