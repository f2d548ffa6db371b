"""The composite's pointwise passes, each one reading and writing every element once, around products taken by cuBLAS."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from laco_kernels.kernels.activation import gelu_and_derivative
from laco_kernels.kernels.gathered_gemm import real_tokens, token_of
from laco_kernels.kernels.launch import PLANS, Plan, accumulator, accumulator_torch, activation_code, is_cheap, launch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from laco_kernels.geometry import Windows

ROW_TILE, COLUMN_TILE = 16, 128


@triton.jit(do_not_specialize=["rows", "height", "width", "out_width", "prefix", "out_prefix", "M"])
def split_kernel(
    p_x,  # [B, T, C] through its strides
    p_s,  # [M, taps * C]
    p_r,  # [B, out_prefix + rows, C] contiguous
    p_bias,  # [C]
    channels,
    rows,
    height,
    width,
    out_width,
    prefix,
    out_prefix,
    M,
    stride_xb,
    stride_xt,
    stride_xc,
    stride_rb,
    RATIO: tl.constexpr,
    GATHER: tl.constexpr,
    WRITE_S: tl.constexpr,
    RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACC: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    """One read of x writes S(x), and R(S(x)) + bias2."""
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    i_b, i_q = (o_m // rows).to(tl.int64), o_m % rows
    m_tile = (o_m < M)[:, None] & (o_c < channels)[None, :]
    b_r = tl.zeros([BM, BC], dtype=ACC)
    for i_tap in range(RATIO * RATIO):
        i_token, m_inside = token_of(i_q, i_tap, height, width, out_width, prefix, GATHER, RATIO)
        o_x = i_b[:, None] * stride_xb + i_token[:, None].to(tl.int64) * stride_xt + o_c[None, :].to(tl.int64) * stride_xc
        b_x = tl.load(p_x + o_x, mask=m_tile & m_inside[:, None], other=0.0)
        if WRITE_S:
            o_s = (o_m[:, None].to(tl.int64) * (RATIO * RATIO) + i_tap) * channels + o_c[None, :]
            tl.store(p_s + o_s, b_x, mask=m_tile)
        if RESIDUAL == 1:
            b_r += b_x.to(ACC)
    if RESIDUAL == 1:
        b_r /= real_tokens(i_q, height, width, out_width, RATIO).to(ACC)[:, None]
    elif RESIDUAL == 2:
        for i in range(RATIO * RATIO):
            o_k = o_c * (RATIO * RATIO) + i
            i_token, m_inside = token_of(
                i_q[:, None], (o_k // channels)[None, :], height, width, out_width, prefix, GATHER, RATIO
            )
            o_x = (
                i_b[:, None] * stride_xb + i_token.to(tl.int64) * stride_xt + (o_k % channels)[None, :].to(tl.int64) * stride_xc
            )
            b_r += tl.load(p_x + o_x, mask=m_tile & m_inside, other=0.0).to(ACC)
        b_r /= RATIO * RATIO
    if RESIDUAL:
        if HAS_BIAS:
            b_r += tl.load(p_bias + o_c, mask=o_c < channels, other=0.0).to(ACC)[None, :]
        o_r = i_b[:, None] * stride_rb + (out_prefix + i_q)[:, None].to(tl.int64) * channels + o_c[None, :]
        tl.store(p_r + o_r, b_r.to(p_r.dtype.element_ty), mask=m_tile)


@triton.jit(do_not_specialize=["rows", "prefix", "M"])
def collect_kernel(
    p_xs,  # tuple of blocks [B, T, C] and of their strides
    p_out,  # [M, blocks * C]
    channels,
    rows,
    prefix,
    M,
    stride_xb,
    stride_xt,
    stride_xc,
    SOURCES: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    """The blocks side by side."""
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    i_b, i_t = (o_m // rows).to(tl.int64), (prefix + o_m % rows).to(tl.int64)
    m_tile = (o_m < M)[:, None] & (o_c < channels)[None, :]
    for i in tl.static_range(SOURCES):
        o_x = (i_b * stride_xb[i] + i_t * stride_xt[i])[:, None] + o_c[None, :].to(tl.int64) * stride_xc[i]
        b_x = tl.load(p_xs[i] + o_x, mask=m_tile, other=0.0)  # [BM, BC]
        o_out = (o_m[:, None].to(tl.int64) * SOURCES + i) * channels + o_c[None, :]
        tl.store(p_out + o_out, b_x, mask=m_tile)


@triton.jit(do_not_specialize=["M", "rows"])
def gelu_backward_kernel(
    p_grad,  # [B, T, N] through its strides
    p_pre,  # [M, N]
    p_out,  # [M, N]
    p_act,  # [M, N]
    p_partial,  # [row tiles, N]
    M,
    N,
    rows,
    stride_gb,
    stride_gt,
    stride_gn,
    ACTIVATION: tl.constexpr,
    WRITE_ACT: tl.constexpr,
    WRITE_SUMS: tl.constexpr,
    CHEAP: tl.constexpr,
    ACC: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """``grad * gelu'(pre)``, its column sums by row tile, and ``gelu(pre)``."""
    i_m = tl.program_id(0)
    o_m = i_m * BM + tl.arange(0, BM)
    o_n = tl.program_id(1) * BN + tl.arange(0, BN)
    i_b, i_q = (o_m // rows).to(tl.int64), o_m % rows
    m_tile = (o_m < M)[:, None] & (o_n < N)[None, :]
    o_flat = o_m[:, None].to(tl.int64) * N + o_n[None, :]
    o_g = i_b[:, None] * stride_gb + i_q[:, None].to(tl.int64) * stride_gt + o_n[None, :].to(tl.int64) * stride_gn
    b_pre = tl.load(p_pre + o_flat, mask=m_tile, other=0.0).to(ACC)
    b_act, b_slope = gelu_and_derivative(b_pre, ACTIVATION, CHEAP)
    if WRITE_ACT:
        tl.store(p_act + o_flat, b_act.to(p_act.dtype.element_ty), mask=m_tile)
    b_out = tl.load(p_grad + o_g, mask=m_tile, other=0.0).to(ACC) * b_slope
    tl.store(p_out + o_flat, b_out.to(p_out.dtype.element_ty), mask=m_tile)
    if WRITE_SUMS:
        tl.store(p_partial + i_m.to(tl.int64) * N + o_n, tl.sum(tl.where(m_tile, b_out, 0.0), 0), mask=o_n < N)


@triton.jit(do_not_specialize=["rows", "height", "width", "out_width", "prefix", "g_prefix", "M"])
def join_kernel(
    p_s,  # [M, taps * C]
    p_g,  # [B, T_g, C] through its strides
    p_x,  # [B, prefix + H * W, C] contiguous
    channels,
    rows,
    height,
    width,
    out_width,
    prefix,
    g_prefix,
    M,
    stride_gb,
    stride_gt,
    stride_gc,
    stride_xb,
    RATIO: tl.constexpr,
    SCATTER: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACC: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    """Un-shuffle window gradients to tokens and add the residual's gradient."""
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    i_b, i_q = (o_m // rows).to(tl.int64), o_m % rows
    m_tile = (o_m < M)[:, None] & (o_c < channels)[None, :]
    o_g = i_b[:, None] * stride_gb + (g_prefix + i_q)[:, None].to(tl.int64) * stride_gt
    if RESIDUAL == 1:
        b_g = tl.load(p_g + o_g + o_c[None, :].to(tl.int64) * stride_gc, mask=m_tile, other=0.0).to(ACC)
        b_g /= real_tokens(i_q, height, width, out_width, RATIO).to(ACC)[:, None]
    for i_tap in range(RATIO * RATIO):
        i_token, m_inside = token_of(i_q, i_tap, height, width, out_width, prefix, SCATTER, RATIO)
        o_s = (o_m[:, None].to(tl.int64) * (RATIO * RATIO) + i_tap) * channels + o_c[None, :]
        b_x = tl.load(p_s + o_s, mask=m_tile, other=0.0).to(ACC)
        if RESIDUAL == 1:
            b_x += b_g
        elif RESIDUAL == 2:
            o_group = ((i_tap * channels + o_c) // (RATIO * RATIO))[None, :].to(tl.int64)
            b_x += tl.load(p_g + o_g + o_group * stride_gc, mask=m_tile, other=0.0).to(ACC) / (RATIO * RATIO)
        o_x = i_b[:, None] * stride_xb + i_token[:, None].to(tl.int64) * channels + o_c[None, :]
        tl.store(p_x + o_x, b_x.to(p_x.dtype.element_ty), mask=m_tile & m_inside[:, None])


def _tiles(m: int, columns: int) -> tuple[int, int]:
    return triton.cdiv(m, ROW_TILE), triton.cdiv(columns, COLUMN_TILE)


def split(
    x: torch.Tensor,
    windows: Windows,
    gather: int,
    merged: torch.Tensor | None,
    residual: int,
    out: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> None:
    """Write ``S(x)`` into ``merged`` and ``R(S(x)) + bias`` behind the prefix of ``out``, either where it is given."""
    m, channels = x.shape[0] * windows.num_windows, x.shape[2]
    if m == 0:
        return
    prefix = windows.prefix_tokens
    launch(
        split_kernel,
        _tiles(m, channels),
        x.device,
        lambda: ([x[:, prefix:], bias], [merged, None if out is None else out[:, prefix:]]),
        p_x=x,
        p_s=x if merged is None else merged,
        p_r=x if out is None else out,
        p_bias=x if bias is None else bias.contiguous(),
        channels=channels,
        rows=windows.num_windows,
        height=windows.grid[0],
        width=windows.grid[1],
        out_width=windows.out_grid[1],
        prefix=prefix,
        out_prefix=prefix,
        M=m,
        stride_xb=x.stride(0),
        stride_xt=x.stride(1),
        stride_xc=x.stride(2),
        stride_rb=windows.num_output_tokens * channels,
        RATIO=windows.ratio,
        GATHER=gather,
        WRITE_S=merged is not None,
        RESIDUAL=0 if out is None else residual,
        HAS_BIAS=bias is not None,
        ACC=accumulator(x.dtype),
        BM=ROW_TILE,
        BC=COLUMN_TILE,
        num_warps=4,
        maxnreg=168,  # left alone ptxas holds some of these to fewer registers, and spills
    )


def collect(xs: Sequence[torch.Tensor], prefix: int, out: torch.Tensor) -> None:
    """Write the blocks ``[B, P + N, C]``, in any strides, side by side into ``out [B, N, M * C]`` without their prefix."""
    m, channels = out.shape[0] * out.shape[1], xs[0].shape[2]
    if m == 0:
        return
    launch(
        collect_kernel,
        _tiles(m, channels),
        out.device,
        lambda: ([x[:, prefix:] for x in xs], [out]),
        p_xs=tuple(xs),
        p_out=out,
        channels=channels,
        rows=out.shape[1],
        prefix=prefix,
        M=m,
        stride_xb=tuple(x.stride(0) for x in xs),
        stride_xt=tuple(x.stride(1) for x in xs),
        stride_xc=tuple(x.stride(2) for x in xs),
        SOURCES=len(xs),
        BM=ROW_TILE,
        BC=COLUMN_TILE,
        num_warps=4,
    )


@functools.lru_cache(PLANS)
def _gelu_plan(
    tile: tuple[int, int],
    m: int,
    n: int,
    rows: int,
    strides: tuple[int, ...],
    approximate: str,
    with_act: bool,
    with_sums: bool,
    dtype: torch.dtype,
) -> Plan:
    return Plan(
        gelu_backward_kernel,
        (triton.cdiv(m, tile[0]), triton.cdiv(n, tile[1])),
        M=m,
        N=n,
        rows=rows,
        stride_gb=strides[0],
        stride_gt=strides[1],
        stride_gn=strides[2],
        ACTIVATION=activation_code(approximate),
        WRITE_ACT=with_act,
        WRITE_SUMS=with_sums,
        CHEAP=is_cheap(dtype),
        ACC=accumulator(dtype),
        BM=tile[0],
        BN=tile[1],
        num_warps=4,
    )


def gelu_backward(
    grad: torch.Tensor, pre: torch.Tensor, approximate: str, *, with_sums: bool, with_act: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Return ``grad * gelu'(pre)``, with ``with_sums`` its column sums, and with ``with_act`` ``gelu(pre)``.

    ``grad [B, rows, N]`` in any strides, ``pre [B, rows, N]`` contiguous.
    """
    batch, rows, n = pre.shape
    m = batch * rows
    out = torch.empty_like(pre)
    act = torch.empty_like(pre) if with_act else None
    tiles = triton.cdiv(m, ROW_TILE)
    partial = pre.new_empty((tiles, n), dtype=accumulator_torch(pre.dtype)) if with_sums else None
    if m and n:
        plan = _gelu_plan((ROW_TILE, COLUMN_TILE), m, n, rows, grad.stride(), approximate, with_act, with_sums, pre.dtype)
        plan.launch(
            out.device,
            lambda: ([grad, pre], [out, act, partial]),
            p_grad=grad,
            p_pre=pre,
            p_out=out,
            p_act=out if act is None else act,
            p_partial=out if partial is None else partial,
        )
    return out, None if partial is None else partial.sum(0).to(pre.dtype), act


def join(merged: torch.Tensor, grad: torch.Tensor, windows: Windows, scatter: int, residual: int, out: torch.Tensor) -> None:
    """Write window gradients ``[M, taps * C]`` and the residual's gradient behind the prefix of ``out [B, P + N, C]``."""
    m, channels = out.shape[0] * windows.num_windows, out.shape[2]
    if m == 0:
        return
    prefix = windows.prefix_tokens
    launch(
        join_kernel,
        _tiles(m, channels),
        out.device,
        lambda: ([merged, grad[:, prefix:] if residual else None], [out[:, prefix:]]),
        p_s=merged,
        p_g=grad,
        p_x=out,
        channels=channels,
        rows=windows.num_windows,
        height=windows.grid[0],
        width=windows.grid[1],
        out_width=windows.out_grid[1],
        prefix=prefix,
        g_prefix=prefix,
        M=m,
        stride_gb=grad.stride(0),
        stride_gt=grad.stride(1),
        stride_gc=grad.stride(2),
        stride_xb=windows.num_tokens * channels,
        RATIO=windows.ratio,
        SCATTER=scatter,
        RESIDUAL=residual,
        ACC=accumulator(out.dtype),
        BM=ROW_TILE,
        BC=COLUMN_TILE,
        num_warps=4,
    )
