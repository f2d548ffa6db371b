"""Residual sum and norm in one pass, and all gradients in another: up to 4096 channels each large tensor is read once."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl

from laco_kernels.kernels.launch import PLANS, Plan, accumulator, accumulator_torch
from laco_kernels.kernels.rows import rows_of

if TYPE_CHECKING:
    from collections.abc import Sequence

# Programs of the backward kernel at most, as each leaves sums of its own: three for each multiprocessor of a large GPU.
PROGRAMS = 396

# Whether the compiler may leave a product that is added to something unrounded. Where a row hardly varies, its gradient less
# its mean is what rounding leaves, and 1 / sqrt(eps) magnifies that: on an H200 to 3e-5 for rows of one channel, which have no
# gradient. Rounded, a product cancels against the mean it went into; what that costs is lost in passes over memory.
CONTRACT = False


class RowTile(NamedTuple):
    """Whole rows that a program holds at a time."""

    bm: int
    bc: int
    num_warps: int

    @property
    def is_wide(self) -> bool:
        """Whether a row and the sums of all three parameters do not fit the registers: there each gradient has its launch."""
        return self.bc > 4096

    @property
    def max_registers(self) -> int:
        """Registers of a thread for the gradients: three programs to a multiprocessor where they fit, and no spills."""
        return min(168, 2048 // self.num_warps)


@functools.cache
def row_tile(channels: int) -> RowTile:
    """Return rows of the next power of two, 16 numbers of a tensor to a thread."""
    bc = triton.next_power_of_2(channels)
    return RowTile(max(1, 2048 // bc), bc, min(32, max(4, bc // 512)))


@triton.jit
def add_norm_kernel(
    p_x,  # [B, T, C] through its strides
    p_delta,  # [B, T, C] through its strides
    p_weight,  # [C]
    p_bias,  # [C]
    p_scale,  # [C]
    p_total,  # [M, C]
    p_normed,  # [M, C]
    p_mean,  # [M]
    p_rstd,  # [M]
    M,
    channels,
    rows,
    stride_xb,
    stride_xt,
    stride_db,
    stride_dt,
    HAS_DELTA: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CENTRED: tl.constexpr,
    SAVE: tl.constexpr,
    EPS: tl.constexpr,
    ACC: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    """``total = x + scale * delta`` and ``norm(total) * weight + bias``."""
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    o_c = tl.arange(0, BC)
    i_b, i_t = (o_m // rows).to(tl.int64), (o_m % rows).to(tl.int64)
    m_m, m_c = o_m < M, o_c < channels
    m_tile = m_m[:, None] & m_c[None, :]
    o_tile = o_m[:, None].to(tl.int64) * channels + o_c[None, :]
    o_x = (i_b * stride_xb + i_t * stride_xt)[:, None] + o_c[None, :]
    b_total = tl.load(p_x + o_x, mask=m_tile, other=0.0).to(ACC)  # [BM, BC]
    if HAS_DELTA:
        o_d = (i_b * stride_db + i_t * stride_dt)[:, None] + o_c[None, :]
        b_delta = tl.load(p_delta + o_d, mask=m_tile, other=0.0).to(ACC)
        if HAS_SCALE:
            b_delta *= tl.load(p_scale + o_c, mask=m_c, other=0.0).to(ACC)[None, :]
        b_rounded = (b_total + b_delta).to(p_total.dtype.element_ty)
        tl.store(p_total + o_tile, b_rounded, mask=m_tile)
        b_total = b_rounded.to(ACC)
    if CENTRED:
        b_mean = tl.sum(b_total, 1) / channels
        b_total = tl.where(m_c[None, :], b_total - b_mean[:, None], 0.0)
        if SAVE:
            tl.store(p_mean + o_m, b_mean, mask=m_m)
    b_rstd = tl.rsqrt(tl.sum(b_total * b_total, 1) / channels + EPS)
    if SAVE:
        tl.store(p_rstd + o_m, b_rstd, mask=m_m)
    b_normed = b_total * b_rstd[:, None] * tl.load(p_weight + o_c, mask=m_c, other=0.0).to(ACC)[None, :]
    if HAS_BIAS:
        b_normed += tl.load(p_bias + o_c, mask=m_c, other=0.0).to(ACC)[None, :]
    tl.store(p_normed + o_tile, b_normed.to(p_normed.dtype.element_ty), mask=m_tile)


@triton.jit
def add_norm_backward_kernel(
    p_dtotal,  # [B, T, C] through its strides
    p_dnormed,  # [B, T, C] through its strides
    p_total,  # [B, T, C] through its strides
    p_delta,  # [B, T, C] through its strides
    p_mean,  # [M]
    p_rstd,  # [M]
    p_weight,  # [C]
    p_scale,  # [C]
    p_dx,  # [M, C]
    p_ddelta,  # [M, C]
    p_dweight,  # [programs, C]
    p_dbias,  # [programs, C]
    p_dscale,  # [programs, C]
    M,
    channels,
    rows,
    tiles,
    stride_tb,
    stride_tt,
    stride_nb,
    stride_nt,
    stride_xb,
    stride_xt,
    stride_db,
    stride_dt,
    HAS_DTOTAL: tl.constexpr,
    CENTRED: tl.constexpr,
    DX: tl.constexpr,
    DDELTA: tl.constexpr,
    DWEIGHT: tl.constexpr,
    DBIAS: tl.constexpr,
    DSCALE: tl.constexpr,
    ACC: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    """The gradients of x and delta, and over the rows of this program the sums that make those of weight, bias and scale."""
    i_program = tl.program_id(0)
    o_c = tl.arange(0, BC)
    m_c = o_c < channels
    b_dweight = tl.zeros([BM, BC], dtype=ACC)
    b_dbias = tl.zeros([BM, BC], dtype=ACC)
    b_dscale = tl.zeros([BM, BC], dtype=ACC)
    for i in range(tiles):
        o_m = (i_program * tiles + i) * BM + tl.arange(0, BM)
        i_b, i_t = (o_m // rows).to(tl.int64), (o_m % rows).to(tl.int64)
        m_m = o_m < M
        m_tile = m_m[:, None] & m_c[None, :]
        o_tile = o_m[:, None].to(tl.int64) * channels + o_c[None, :]
        o_n = (i_b * stride_nb + i_t * stride_nt)[:, None] + o_c[None, :]
        b_grad = tl.load(p_dnormed + o_n, mask=m_tile, other=0.0).to(ACC)  # [BM, BC]
        o_x = (i_b * stride_xb + i_t * stride_xt)[:, None] + o_c[None, :]
        b_hat = tl.load(p_total + o_x, mask=m_tile, other=0.0).to(ACC)
        if CENTRED:
            b_hat -= tl.load(p_mean + o_m, mask=m_m, other=0.0)[:, None]
        b_rstd = tl.load(p_rstd + o_m, mask=m_m, other=0.0)[:, None]
        b_hat *= b_rstd
        if DWEIGHT:
            b_dweight += b_grad * b_hat
        if DBIAS:
            b_dbias += b_grad
        if DX or DDELTA or DSCALE:
            # Weight and scale are read from the cache again: held across the loop they would cost registers for a tile each.
            b_grad *= tl.load(p_weight + o_c, mask=m_c, other=0.0).to(ACC)[None, :]
            b_inner = b_grad - b_hat * (tl.sum(b_grad * b_hat, 1) / channels)[:, None]
            if CENTRED:
                b_inner -= (tl.sum(b_grad, 1) / channels)[:, None]
            b_dx = b_rstd * b_inner
            if HAS_DTOTAL:
                o_t = (i_b * stride_tb + i_t * stride_tt)[:, None] + o_c[None, :]
                b_dx += tl.load(p_dtotal + o_t, mask=m_tile, other=0.0).to(ACC)
            if DX:
                tl.store(p_dx + o_tile, b_dx.to(p_dx.dtype.element_ty), mask=m_tile)
            if DDELTA:
                b_scale = tl.load(p_scale + o_c, mask=m_c, other=0.0).to(ACC)[None, :]
                tl.store(p_ddelta + o_tile, (b_scale * b_dx).to(p_ddelta.dtype.element_ty), mask=m_tile)
            if DSCALE:
                o_d = (i_b * stride_db + i_t * stride_dt)[:, None] + o_c[None, :]
                b_dscale += b_dx * tl.load(p_delta + o_d, mask=m_tile, other=0.0).to(ACC)
    o_sum = i_program.to(tl.int64) * channels + o_c
    if DWEIGHT:
        tl.store(p_dweight + o_sum, tl.sum(b_dweight, 0), mask=m_c)
    if DBIAS:
        tl.store(p_dbias + o_sum, tl.sum(b_dbias, 0), mask=m_c)
    if DSCALE:
        tl.store(p_dscale + o_sum, tl.sum(b_dscale, 0), mask=m_c)


@functools.lru_cache(PLANS)
def _plan(
    tile: RowTile,
    m: int,
    rows: int,
    x_strides: tuple[int, ...],
    delta_strides: tuple[int, ...],
    given: tuple[bool, bool, bool],
    channels: int,
    dtype: torch.dtype,
    kind: str,
    eps: float,
    save: bool,
) -> Plan:
    return Plan(
        add_norm_kernel,
        (-(-m // tile.bm),),
        M=m,
        channels=channels,
        rows=rows,
        stride_xb=x_strides[0],
        stride_xt=x_strides[1],
        stride_db=delta_strides[0],
        stride_dt=delta_strides[1],
        HAS_DELTA=given[0],
        HAS_SCALE=given[1],
        HAS_BIAS=given[2],
        CENTRED=kind == "layer",
        SAVE=save,
        EPS=eps,
        ACC=accumulator(dtype),
        BM=tile.bm,
        BC=tile.bc,
        num_warps=tile.num_warps,
        maxnreg=tile.max_registers if tile.is_wide else None,
        enable_fp_fusion=CONTRACT,
    )


def add_norm_forward(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    *,
    kind: str,
    eps: float,
    dtype: torch.dtype,
    save: bool,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """See :func:`laco_kernels.reference_tower.add_norm_forward`; without ``save`` there are no statistics."""
    channels, wide = x.shape[-1], accumulator_torch(x.dtype)
    total = None if delta is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    normed = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    mean = x.new_empty(x.shape[:-1], dtype=wide) if save and kind == "layer" else None
    rstd = x.new_empty(x.shape[:-1], dtype=wide) if save else None
    m, tile = x.numel() // channels, row_tile(channels)
    if m:
        p_x = rows_of(x)
        p_delta = p_x if delta is None else rows_of(delta)
        given = (delta is not None, scale is not None, bias is not None)
        plan = _plan(tile, m, p_x.shape[1], p_x.stride(), p_delta.stride(), given, channels, x.dtype, kind, eps, save)
        plan.launch(
            normed.device,
            lambda: ([x, delta, weight, bias, scale], [total, normed, mean, rstd]),
            p_x=p_x,
            p_delta=p_delta,
            p_weight=weight.contiguous(),
            p_bias=weight if bias is None else bias.contiguous(),
            p_scale=weight if scale is None else scale.contiguous(),
            p_total=normed if total is None else total,
            p_normed=normed,
            p_mean=normed if mean is None else mean,
            p_rstd=normed if rstd is None else rstd,
        )
    return total, normed, mean, rstd


@functools.lru_cache(PLANS)
def _backward_plan(
    tile: RowTile,
    m: int,
    rows: int,
    channels: int,
    programs: int,
    tiles: int,
    strides: tuple[tuple[int, ...], ...],
    given: tuple[bool, bool],
    wanted: tuple[bool, ...],
    dtype: torch.dtype,
) -> Plan:
    return Plan(
        add_norm_backward_kernel,
        (programs,),
        M=m,
        channels=channels,
        rows=rows,
        tiles=tiles,
        stride_tb=strides[0][0],
        stride_tt=strides[0][1],
        stride_nb=strides[1][0],
        stride_nt=strides[1][1],
        stride_xb=strides[2][0],
        stride_xt=strides[2][1],
        stride_db=strides[3][0],
        stride_dt=strides[3][1],
        HAS_DTOTAL=given[0],
        CENTRED=given[1],
        DX=wanted[0],
        DDELTA=wanted[1],
        DWEIGHT=wanted[2],
        DBIAS=wanted[3],
        DSCALE=wanted[4],
        ACC=accumulator(dtype),
        BM=tile.bm,
        BC=tile.bc,
        num_warps=tile.num_warps,
        maxnreg=tile.max_registers,
        enable_fp_fusion=CONTRACT,
    )


def add_norm_backward(
    dnormed: torch.Tensor,
    dtotal: torch.Tensor | None,
    total: torch.Tensor,
    delta: torch.Tensor | None,
    mean: torch.Tensor | None,
    rstd: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    needs: Sequence[bool],
) -> list[torch.Tensor | None]:
    """See :func:`laco_kernels.reference_tower.add_norm_backward`."""
    channels = total.shape[-1]
    m, tile = total.numel() // channels, row_tile(channels)
    every = -(-m // tile.bm)
    tiles = -(-every // PROGRAMS)
    programs = -(-every // max(tiles, 1))
    dx, ddelta = [torch.empty_like(total, memory_format=torch.contiguous_format) if need else None for need in needs[:2]]
    partials = [total.new_empty((programs, channels), dtype=rstd.dtype) if need else None for need in needs[2:]]
    p_total, p_dnormed = rows_of(total), rows_of(dnormed)
    p_dtotal = p_dnormed if dtotal is None else rows_of(dtotal)
    p_delta = p_dnormed if delta is None else rows_of(delta)
    strides = (p_dtotal.stride(), p_dnormed.stride(), p_total.stride(), p_delta.stride())
    missing = p_dnormed  # an argument that the gradients asked for do not touch

    def touches(wanted: Sequence[bool]) -> tuple[list[torch.Tensor | None], list[torch.Tensor | None]]:
        through = wanted[0] or wanted[1] or wanted[4]
        vectors = [weight if through else None, scale if wanted[1] else None]
        reads = [dtotal if through else None, dnormed, total, delta if wanted[4] else None, mean, rstd, *vectors]
        return reads, [tensor if want else None for tensor, want in zip((dx, ddelta, *partials), wanted, strict=True)]

    for wanted in _launches(needs, tile) if m else []:
        given = (dtotal is not None, mean is not None)
        plan = _backward_plan(tile, m, p_total.shape[1], channels, programs, tiles, strides, given, tuple(wanted), total.dtype)
        plan.launch(
            total.device,
            functools.partial(touches, wanted),
            p_dtotal=p_dtotal,
            p_dnormed=p_dnormed,
            p_total=p_total,
            p_delta=p_delta,
            p_mean=missing if mean is None else mean,
            p_rstd=rstd,
            p_weight=weight.contiguous(),
            p_scale=missing if scale is None else scale.contiguous(),
            p_dx=missing if dx is None else dx,
            p_ddelta=missing if ddelta is None else ddelta,
            p_dweight=missing if partials[0] is None else partials[0],
            p_dbias=missing if partials[1] is None else partials[1],
            p_dscale=missing if partials[2] is None else partials[2],
        )
    like = (weight.dtype, weight.dtype, weight.dtype if scale is None else scale.dtype)
    sums = [None if partial is None else partial.sum(0).to(dtype) for partial, dtype in zip(partials, like, strict=True)]
    return [dx, ddelta, *sums]


def _launches(needs: Sequence[bool], tile: RowTile) -> list[Sequence[bool]]:
    """Return which gradients are made together."""
    dx, ddelta, dweight, dbias, dscale = needs
    if not tile.is_wide:
        return [needs] if any(needs) else []
    groups = [
        (dx, ddelta, False, False, False),
        (False, False, dweight, dbias, False),
        (False, False, False, False, dscale),
    ]
    return [group for group in groups if any(group)]
