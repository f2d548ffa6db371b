"""The gathered GEMM: one matrix product whose rows are gathered on the way in and scattered on the way out.

``acc[m, n] = sum_k A[m, k] W[n, k]``. Row ``m`` is one output token; its ``K = sources * taps * channels`` entries are read
where they lie: the ``r * r`` tokens of a window in raster or block order, the same token of several encoder blocks, or one
plain row. Nothing is concatenated, and a view without its class token is read through its strides. The epilogue adds a
bias, applies GELU or multiplies by its derivative, adds the pooled residual, or scatters window gradients back to tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from laco_kernels.kernels.activation import gelu, gelu_and_derivative
from laco_kernels.kernels.launch import INTERPRETED, accumulator, activation_code, is_cheap, launch, precision

if TYPE_CHECKING:
    from collections.abc import Sequence

    from laco_kernels.geometry import Windows

ROWS, RASTER, BLOCK = 0, 1, 2  # how a row's tokens are found
NO_RESIDUAL, MEAN, CHANNEL_GROUP = 0, 1, 2

# Products that float32 adds one by one. Over all of K = 4096 that would err four times as much (cuBLAS sums in pieces too).
PIECE = 256


@triton.jit
def token_of(i_q, i_tap, height, width, out_width, prefix, GATHER: tl.constexpr, RATIO: tl.constexpr):
    """Return the token that tap ``i_tap`` of window ``i_q`` reads, and whether it lies inside the image."""
    if GATHER == 0:
        return prefix + i_q + i_tap * 0, i_q + i_tap >= 0
    if GATHER == 2:
        return prefix + i_q * RATIO * RATIO + i_tap, i_q + i_tap >= 0
    y = i_q // out_width * RATIO + i_tap // RATIO
    x = i_q % out_width * RATIO + i_tap % RATIO
    return prefix + y * width + x, (y < height) & (x < width)


@triton.jit
def real_tokens(i_q, height, width, out_width, RATIO: tl.constexpr):
    """Return how many tokens of window ``i_q`` are not padding."""
    rows = tl.minimum(height - i_q // out_width * RATIO, RATIO)
    columns = tl.minimum(width - i_q % out_width * RATIO, RATIO)
    return rows * columns


# Sizes that change from image to image: a kernel for each of their divisors would stall users of dynamic resolution.
SIZES = ["M", "rows", "height", "width", "out_width", "prefix", "out_prefix", "res_prefix"]


@triton.jit(do_not_specialize=SIZES)
def gathered_gemm_kernel(
    p_a,  # tuple of sources [B, T, C] and of their strides
    p_w,  # [N, K] through its strides
    p_bias,  # [N]
    p_out,  # [B, T_out, N] contiguous, or the tokens [B, T, C] to scatter to
    p_pre,  # [M, N]: the pre-activation, written by a GELU and read by a dGELU
    p_act,  # [M, N]: gelu(pre), written by a dGELU
    p_partial,  # [row tiles, N]: column sums of a dGELU's result
    p_res,  # what the residual is made of: x [B, T, C] forward, the gradient [B, T_g, C] backward
    M,
    N,
    channels,
    rows,  # rows an image
    height,
    width,
    out_width,
    prefix,
    stride_ab,
    stride_at,
    stride_ac,
    stride_wn,
    stride_wk,
    stride_ob,
    out_prefix,
    stride_rb,
    stride_rt,
    stride_rc,
    res_prefix,
    SOURCES: tl.constexpr,
    GATHER: tl.constexpr,
    RATIO: tl.constexpr,
    TAPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SAVE_PRE: tl.constexpr,
    DERIVATIVE: tl.constexpr,
    WRITE_ACT: tl.constexpr,
    WRITE_SUMS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    RESIDUAL_GATHER: tl.constexpr,
    SCATTER: tl.constexpr,
    FLAT: tl.constexpr,
    CHEAP: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,  # tiles of K that are summed apart from the rest; 0 sums them all in one go
    EVEN_K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """``epilogue(A W^T)``; :func:`gathered_gemm` documents the arguments."""
    # Neighbouring programs share row tiles, GROUP_M at a time, so that A and W stay in the L2 cache.
    i_program = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    in_group = GROUP_M * tiles_n
    first_m = i_program // in_group * GROUP_M
    group_m = tl.minimum(tiles_m - first_m, GROUP_M)
    i_m = first_m + i_program % in_group % group_m
    i_n = i_program % in_group // group_m

    o_m = i_m * BM + tl.arange(0, BM)
    o_n = i_n * BN + tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    m_m, m_n = o_m < M, o_n < N
    i_b = (o_m // rows).to(tl.int64)
    i_q = o_m % rows

    b_acc = tl.zeros([BM, BN], dtype=ACC)
    if CHUNK:
        b_total = tl.zeros([BM, BN], dtype=ACC)
    tiles_k = tl.cdiv(channels, BK)
    for i_source in tl.static_range(SOURCES):
        for i in range(TAPS * tiles_k):
            i_tap, o_c = i // tiles_k, i % tiles_k * BK + o_k
            i_token, m_inside = token_of(i_q, i_tap, height, width, out_width, prefix, GATHER, RATIO)
            o_a = i_b * stride_ab[i_source] + i_token.to(tl.int64) * stride_at[i_source]
            o_w = (i_source * TAPS + i_tap) * channels + o_c
            m_a = (m_m & m_inside)[:, None]
            m_w = m_n[None, :]
            if not EVEN_K:
                m_a &= (o_c < channels)[None, :]
                m_w &= (o_c < channels)[:, None]
            b_a = tl.load(p_a[i_source] + o_a[:, None] + o_c[None, :].to(tl.int64) * stride_ac[i_source], mask=m_a, other=0.0)
            p_w_tile = p_w + o_n[None, :].to(tl.int64) * stride_wn + o_w[:, None].to(tl.int64) * stride_wk
            b_w = tl.load(p_w_tile, mask=m_w, other=0.0)
            b_acc = tl.dot(b_a, b_w, b_acc, input_precision=PRECISION, out_dtype=ACC)
            if CHUNK:  # noqa: SIM102  # known when it is compiled, unlike the next
                if i % CHUNK == CHUNK - 1:
                    b_total += b_acc
                    b_acc = tl.zeros([BM, BN], dtype=ACC)
    if CHUNK:
        b_acc += b_total

    m_tile = m_m[:, None] & m_n[None, :]
    # Offsets within the tile fit 32 bits, which halves the registers they take; the tile's own place does not.
    o_tile = tl.arange(0, BM)[:, None] * N + o_n[None, :]
    o_first = i_m.to(tl.int64) * BM * N
    if HAS_BIAS:
        b_acc += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(ACC)[None, :]
    if DERIVATIVE:
        b_pre = tl.load(p_pre + o_first + o_tile, mask=m_tile, other=0.0).to(ACC)
        b_act, b_slope = gelu_and_derivative(b_pre, ACTIVATION, CHEAP)
        if WRITE_ACT:
            tl.store(p_act + o_first + o_tile, b_act.to(p_act.dtype.element_ty), mask=m_tile)
        b_acc = tl.where(m_tile, b_acc * b_slope, 0.0)
        if WRITE_SUMS:
            tl.store(p_partial + i_m.to(tl.int64) * N + o_n, tl.sum(b_acc, 0), mask=m_n)
    elif ACTIVATION:
        if SAVE_PRE:
            tl.store(p_pre + o_first + o_tile, b_acc.to(p_pre.dtype.element_ty), mask=m_tile)
        b_acc = gelu(b_acc, ACTIVATION, CHEAP)

    if SCATTER:
        # Column n is channel n % channels_out of tap n // channels_out: N = taps * channels_out.
        channels_out = N // (RATIO * RATIO)
        i_tap, o_c = o_n // channels_out, o_n % channels_out
        i_token, m_inside = token_of(i_q[:, None], i_tap[None, :], height, width, out_width, out_prefix, SCATTER, RATIO)
        m_tile &= m_inside
        o_g = i_b[:, None] * stride_rb + (res_prefix + i_q)[:, None].to(tl.int64) * stride_rt
        if RESIDUAL == 1:
            b_g = tl.load(p_res + o_g + o_c[None, :].to(tl.int64) * stride_rc, mask=m_tile, other=0.0).to(ACC)
            b_acc += b_g / real_tokens(i_q, height, width, out_width, RATIO).to(ACC)[:, None]
        elif RESIDUAL == 2:
            o_group = (o_n // (RATIO * RATIO))[None, :].to(tl.int64)
            b_acc += tl.load(p_res + o_g + o_group * stride_rc, mask=m_tile, other=0.0).to(ACC) / (RATIO * RATIO)
        p_tile = p_out + i_b[:, None] * stride_ob + i_token.to(tl.int64) * channels_out + o_c[None, :]
    else:
        if RESIDUAL:
            b_res = tl.zeros([BM, BN], dtype=ACC)
            for i in range(RATIO * RATIO):
                if RESIDUAL == 1:
                    i_tap, o_c = o_n * 0 + i, o_n
                else:
                    o_s = o_n * (RATIO * RATIO) + i
                    i_tap, o_c = o_s // N, o_s % N
                i_token, m_inside = token_of(
                    i_q[:, None], i_tap[None, :], height, width, out_width, res_prefix, RESIDUAL_GATHER, RATIO
                )
                o_x = i_b[:, None] * stride_rb + i_token.to(tl.int64) * stride_rt + o_c[None, :].to(tl.int64) * stride_rc
                b_res += tl.load(p_res + o_x, mask=m_tile & m_inside, other=0.0).to(ACC)
            if RESIDUAL == 1:
                b_acc += b_res / real_tokens(i_q, height, width, out_width, RATIO).to(ACC)[:, None]
            else:
                b_acc += b_res / (RATIO * RATIO)
        if FLAT:
            p_tile = p_out + o_first + o_tile
        else:
            p_tile = p_out + i_b[:, None] * stride_ob + (out_prefix + i_q)[:, None].to(tl.int64) * N + o_n[None, :]
    tl.store(p_tile, b_acc.to(p_out.dtype.element_ty), mask=m_tile)


@dataclass(frozen=True)
class Tile:
    """One compiled shape of the kernel."""

    bm: int
    bn: int
    bk: int
    num_warps: int
    num_stages: int
    group_m: int = 8
    max_registers: int | None = None  # a thread; None leaves it to ptxas


TILES = {
    # Left alone ptxas holds some of these to fewer registers, and spills.
    "half-large": Tile(128, 128, 64, 8, 3, max_registers=255),
    "half-medium": Tile(128, 64, 64, 4, 4),
    "half-small": Tile(64, 64, 64, 4, 4),
    "half-heavy": Tile(128, 64, 64, 8, 3),
    "float-large": Tile(64, 32, 16, 4, 4),
    "float-small": Tile(32, 64, 32, 4, 2),
    "float-heavy": Tile(32, 32, 32, 4, 2),
    # A second sum of them takes registers too.
    "pieces-large": Tile(64, 32, 16, 4, 3),
    "pieces-small": Tile(32, 64, 16, 4, 3),
    "pieces-heavy": Tile(32, 32, 16, 4, 3),
}
HEAVY = ("half-heavy", "half-small", "float-heavy", "pieces-heavy")  # tiles whose registers hold a heavy epilogue too


def tile_for(m: int, n: int, dtype: torch.dtype, *, heavy: bool = False) -> Tile:
    """Choose a tile by shape: the largest one that still gives every multiprocessor of a large GPU something to do.

    ``heavy`` says that the epilogue needs registers for itself: dGELU, the channel-group residual, a scatter to many taps.
    """
    if INTERPRETED:
        return Tile(64, 32, 64, 4, 1)  # few programs, for each of their operations is slow there
    if dtype in (torch.float32, torch.float64):
        kind = "pieces" if precision(dtype) == "ieee" else "float"
        if heavy:
            return TILES[f"{kind}-heavy"]
        return TILES[f"{kind}-large" if m * n >= 64 * 32 * 264 else f"{kind}-small"]
    if heavy:
        return TILES["half-heavy" if m * n >= 128 * 64 * 132 else "half-small"]
    if m * n >= 128 * 128 * 132:
        return TILES["half-large"]
    return TILES["half-medium" if m * n >= 128 * 64 * 132 else "half-small"]


def gathered_gemm(
    sources: Sequence[torch.Tensor],
    weight: torch.Tensor,
    out: torch.Tensor,
    *,
    rows: int,
    prefix: int = 0,
    gather: int = ROWS,
    windows: Windows | None = None,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    save_pre: torch.Tensor | None = None,
    derivative_at: torch.Tensor | None = None,
    act: torch.Tensor | None = None,
    partial: torch.Tensor | None = None,
    residual: int = NO_RESIDUAL,
    residual_of: torch.Tensor | None = None,
    residual_prefix: int = 0,
    residual_gather: int = ROWS,
    out_prefix: int = 0,
    scatter: int = ROWS,
    tile: Tile | None = None,
) -> None:
    """Launch the kernel: write ``epilogue(A W^T)`` into ``out``.

    Args:
        sources: tensors ``[B, T, C]`` of one shape, in any strides.
        weight: ``[N, K]`` in any strides, ``K = sources * taps * C``.
        out: ``[B, out_prefix + rows, N]`` contiguous; with ``scatter`` the tokens ``[B, out_prefix + H * W, N / taps]``.
        rows: output tokens an image.
        prefix: tokens of a source to skip.
        gather: how a row finds its tokens: ``ROWS``, or ``RASTER`` / ``BLOCK`` windows.
        windows: the windows of ``gather``, ``scatter`` and ``residual``.
        bias: ``[N]``.
        activation: ``"none"`` (erf), ``"tanh"`` or ``"sigmoid"`` to apply GELU, ``None`` for none.
        save_pre: ``[B, rows, N]``, receives what GELU is applied to.
        derivative_at: ``[B, rows, N]`` pre-activations: multiply by GELU's derivative there instead of applying it.
        act: receives GELU of ``derivative_at``.
        partial: ``[row tiles, N]``, receives the column sums of each row tile of the result.
        residual: ``MEAN`` or ``CHANNEL_GROUP`` to add the residual of ``residual_of``; with ``scatter`` its gradient.
        residual_of: ``[B, T, C]``, tokens, or with ``scatter`` the gradient of the merged tokens.
        residual_prefix: tokens of it to skip.
        residual_gather: how a window finds its tokens there.
        out_prefix: tokens of ``out`` to leave alone.
        scatter: ``RASTER`` or ``BLOCK`` to write each tap's columns to its own token.
        tile: the tile; chosen by shape unless given.
    """
    first = sources[0]
    m, n = first.shape[0] * rows, weight.shape[0]
    if m == 0 or n == 0:
        return
    ratio = windows.ratio if windows is not None else 1
    # Finding the token of a column divides by a number of channels that is no power of two where three or four taps meet.
    heavy = ratio > 2 if scatter != ROWS else residual == CHANNEL_GROUP
    tile = tile or tile_for(m, n, first.dtype, heavy=heavy)
    height, width = windows.grid if windows is not None else (1, 1)
    out_width = windows.out_grid[1] if windows is not None else 1
    other = first if residual_of is None else residual_of
    missing = first  # an argument that the chosen epilogue does not touch

    def touches() -> tuple[list[torch.Tensor | None], list[torch.Tensor | None]]:
        read = slice(prefix, prefix + (rows if windows is None or gather == ROWS else windows.num_patches))
        residual_rows = slice(residual_prefix, None) if residual else slice(0)
        reads = [*(source[:, read] for source in sources), weight, bias, derivative_at, other[:, residual_rows]]
        return reads, [out[:, out_prefix:], save_pre, act, partial]

    launch(
        gathered_gemm_kernel,
        (triton.cdiv(m, tile.bm) * triton.cdiv(n, tile.bn),),
        out.device,
        touches,
        p_a=tuple(sources),
        p_w=weight,
        p_bias=missing if bias is None else bias.contiguous(),
        p_out=out,
        p_pre=next((t for t in (save_pre, derivative_at) if t is not None), missing),
        p_act=missing if act is None else act,
        p_partial=missing if partial is None else partial,
        p_res=other,
        M=m,
        N=n,
        channels=first.shape[2],
        rows=rows,
        height=height,
        width=width,
        out_width=out_width,
        prefix=prefix,
        stride_ab=tuple(source.stride(0) for source in sources),
        stride_at=tuple(source.stride(1) for source in sources),
        stride_ac=tuple(source.stride(2) for source in sources),
        stride_wn=weight.stride(0),
        stride_wk=weight.stride(1),
        stride_ob=out.shape[1] * out.shape[2],
        out_prefix=out_prefix,
        stride_rb=other.stride(0),
        stride_rt=other.stride(1),
        stride_rc=other.stride(2),
        res_prefix=residual_prefix,
        SOURCES=len(sources),
        GATHER=gather,
        RATIO=ratio,
        TAPS=1 if gather == ROWS else ratio * ratio,
        HAS_BIAS=bias is not None,
        ACTIVATION=0 if activation is None else activation_code(activation),
        SAVE_PRE=save_pre is not None,
        DERIVATIVE=derivative_at is not None,
        WRITE_ACT=act is not None,
        WRITE_SUMS=partial is not None,
        RESIDUAL=residual,
        RESIDUAL_GATHER=residual_gather,
        SCATTER=scatter,
        FLAT=out_prefix == 0,
        CHEAP=is_cheap(first.dtype),
        ACC=accumulator(first.dtype),
        PRECISION=precision(first.dtype),
        CHUNK=PIECE // tile.bk if first.dtype == torch.float32 and precision(first.dtype) == "ieee" else 0,
        EVEN_K=first.shape[2] % tile.bk == 0,
        BM=tile.bm,
        BN=tile.bn,
        BK=tile.bk,
        GROUP_M=tile.group_m,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        maxnreg=tile.max_registers,
    )
