"""Deliberate faults, one at a time: each must turn a test red. ``make faults`` runs them all.

``python -m tests.faults [part of a name]`` copies ``src`` and ``csrc`` to a temporary folder, breaks one thing there and runs
tests on it.
A new fault is a line below: what is broken, what text of it is replaced, and which tests must pass without it and fail with it,
by an assertion.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
CASES = "tests/kernels/test_kernels.py -k test_cases"
TILES = "tests/kernels/test_kernels.py -k 'test_many_tiles and (patch_merge or strided_conv)'"
CONV_TILES = "tests/kernels/test_kernels.py -k 'test_many_tiles and strided_conv'"
CONV = "tests/kernels/test_kernels.py -k 'test_cases and strided_conv'"
FAR = "tests/kernels/test_kernels.py -k test_strides_beyond"
AROUND = "tests/kernels/test_kernels.py -k test_nothing_is_read"
PIECES = "tests/kernels/test_kernels.py -k taken_in_pieces"
RANGE = "tests/kernels/test_kernels.py -k 'test_activations and triton'"
TOWER, TOWER_TILES, TOWER_FAR, TOWER_AROUND, TOWER_MEMORY, TOWER_RANGE, ROUNDED, VIEWS = (
    f"tests/kernels/test_tower_kernels.py -k '{name}'"
    for name in (
        "test_tower_cases", "test_many_tiles", "test_strides_beyond", "test_nothing_is_read", "test_nothing_is_written",
        "over_their_whole_range", "rounds_once", "test_rows_are_views",
    )
)  # fmt: skip
MLP, RECOMPUTED = "tests/kernels/test_kernels.py -k 'test_cases and gelu_mlp'", "tests/ops/test_direct.py -k feed_forward"
RESPECTED = "tests/hf/test_optimize_mlp.py -k 'internvl and (written_to or changed_runs)'"
WAITS, HANDED = (f"tests/hf/test_optimize_handing_on.py -k '{name}'" for name in ("waits", "siglip or somebody"))
HOPPER = "tests/kernels/test_cuda.py"
TOWER_REFERENCE, SAVED = "tests/test_reference_tower.py", "tests/ops/test_tower_ops.py -k test_add_norm_saves"
CONNECTORS, CHANGED = (
    "tests/hf/test_patch.py -k 'outputs_and or errors_stay'",
    ("tests/hf/test_patch_lived_in.py -k 'passed_over or activation or dropout'"),
)
FORWARD, MEAN, PREFIX, SHARED, ACTIVATION, TOKENS, WEIGHT, *AMPERE = (
    f"tests/csrc/test_orders.py -k '[{name}]'"
    for name in (
        "forward-128x256-1", "forward_mean-128x256-1", "forward_mean_behind_prefix-128x256-1", "forward-128x128-4",
        "through_activation-128x256-1", "to_tokens_mean-128x256-1", "weight_gradient-128x256-1",
        "forward-ampere-1", "through_activation-ampere-1", "to_tokens_mean-ampere-1", "weight_gradient-ampere-1",
    )
)  # fmt: skip
AMPERE_FORWARD, AMPERE_ACTIVATION, AMPERE_TOKENS, AMPERE_WEIGHT = AMPERE
TOLD, TOLD_TOKENS, TOLD_WEIGHT, VAST = (
    f"tests/csrc/test_operands.py -k {name}" for name in ("test_forward", "test_input", "test_weight", "beyond")
)
NARROW = "tests/csrc/test_orders.py -k '[forward-192x96-4]'"
AMPERE_BANKS = "tests/csrc/test_ampere.py -k bank"
MEMORY, REFERENCE, GEOMETRY = "tests/kernels/test_memory.py", "tests/test_reference.py", "tests/test_geometry.py"

FILES = dict.fromkeys(("split", "collect", "gelu_backward", "join"), "kernels/pointwise.py")
FILES |= {
    name: f"kernels/{name}.py"
    for name in ("gathered_gemm", "activation", "launch", "common", "composite", "fused", "backward", "cuda", "cuda_products")
}
FILES |= {name: f"kernels/{name}.py" for name in ("norm", "elementwise", "rows")}
FILES |= {name: f"{name}.py" for name in ("reference", "reference_tower", "geometry")}
FILES |= {"add_norm": "ops/add_norm.py", "connectors": "hf/connectors.py", "gelu_mlp": "ops/gelu_mlp.py"}
FILES |= {"fused_mlps": "hf/fused_mlps.py", "handing_on": "hf/handing_on.py", "layers": "hf/fused.py"}
FILES = {name: f"src/laco_kernels/{path}" for name, path in FILES.items()}
FILES |= {
    name: f"csrc/{name}.cuh"
    for name in (
        "hopper_gemm",
        "hopper_producer",
        "hopper_params",
        "hopper_launch",
        "wgmma",
        "ampere_gemm",
        "ampere_products",
        "ampere_operands",
    )
}
FILES |= {f"{name}.h": f"csrc/{name}.h" for name in ("operands", "plan", "problem", "schedule")}


@dataclass(frozen=True)
class Fault:
    """One change to one kernel or module, and the tests that must notice it."""

    where: str
    what: str
    old: str
    new: str
    tests: str = CASES

    def __str__(self):
        return f"{self.where}: {self.what}"


FAULTS = [
    Fault("gathered_gemm", "a tap's row and column change places",
        "+ i_tap // RATIO\n    x = i_q % out_width * RATIO + i_tap % RATIO",
        "+ i_tap % RATIO\n    x = i_q % out_width * RATIO + i_tap // RATIO"),
    Fault("gathered_gemm", "the image's last column is taken for padding", "(x < width)", "(x < width - 1)"),
    Fault("gathered_gemm", "windows are counted as patches", "y = i_q // out_width", "y = i_q // width"),
    Fault("gathered_gemm", "block order does not skip the prefix", "prefix + i_q * RATIO * RATIO", "i_q * RATIO * RATIO"),
    Fault("gathered_gemm", "padding counts in the mean", "return rows * columns", "return rows * columns * 0 + RATIO * RATIO"),
    Fault("gathered_gemm", "a row of padding counts in the mean", "tl.minimum(height - i_q", "tl.minimum(height + 1 - i_q"),
    Fault("gathered_gemm", "every block meets the first's weights", "(i_source * TAPS + i_tap) * channels", "i_tap * channels"),
    Fault("gathered_gemm", "a channel too many of tokens", "m_a &= (o_c < channels)", "m_a &= (o_c <= channels)", AROUND),
    Fault("gathered_gemm", "a channel too many of weights", "m_w &= (o_c < channels)", "m_w &= (o_c <= channels)", AROUND),
    Fault("gathered_gemm", "the last column is left out", "o_m < M, o_n < N", "o_m < M, o_n < N - 1"),
    Fault("gathered_gemm", "a column too many", "o_m < M, o_n < N", "o_m < M, o_n <= N"),
    Fault("gathered_gemm", "a row too many", "o_m < M, o_n < N", "o_m <= M, o_n < N", MEMORY),
    Fault("gathered_gemm", "padding is scattered", "m_tile &= m_inside", "m_tile &= m_inside | True", MEMORY),
    Fault("gathered_gemm", "float32 is summed in one go", "if i % CHUNK == CHUNK - 1", "if i < 0", PIECES),
    Fault("gathered_gemm", "only the last piece of a sum is kept", "b_acc += b_total", "b_acc += 0.0 * b_total", PIECES),
    Fault("gathered_gemm", "the bias is left out", "b_acc += tl.load(p_bias", "b_acc += 0.0 * tl.load(p_bias"),
    Fault("gathered_gemm", "half of the pre-activation is saved", "b_acc.to(p_pre.dtype", "(b_acc * 0.5).to(p_pre.dtype"),
    Fault("gathered_gemm", "GELU's derivative is left out", "b_acc * b_slope", "b_acc"),
    Fault("gathered_gemm", "GELU's derivative is kept as GELU", "b_act.to(p_act.dtype", "b_slope.to(p_act.dtype"),
    Fault("gathered_gemm", "row tiles overwrite each other's sums", "p_partial + i_m.to(tl.int64) * N", "p_partial", TILES),
    Fault("gathered_gemm", "row tiles overwrite the first one", "o_first = i_m.to(tl.int64)", "o_first = 0", TILES),
    Fault("gathered_gemm", "groups of row tiles overlap", "i_program // in_group * GROUP_M", "i_program // in_group", TILES),
    Fault("gathered_gemm", "the last group of row tiles is a full one", "tl.minimum(tiles_m - first_m, GROUP_M)", "GROUP_M",
        CONV_TILES),
    Fault("gathered_gemm", "columns are scattered channel by channel", "o_n // channels_out, o_n % channels_out",
        "o_n % (RATIO * RATIO), o_n // (RATIO * RATIO)"),
    Fault("gathered_gemm", "the residual's gradient is left out", "b_acc += b_g", "b_acc += 0.0 * b_g"),
    Fault("gathered_gemm", "the residual's gradient is the prefix's", "(res_prefix + i_q)[:", "i_q[:"),
    Fault("gathered_gemm", "the gradient of a wrong channel group", "o_group = (o_n // (RATIO * RATIO))", "o_group = o_c"),
    Fault("gathered_gemm", "a wrong channel group", "o_s // N, o_s % N", "o_s % (RATIO * RATIO), o_s // (RATIO * RATIO)"),
    Fault("gathered_gemm", "the residual is of one tap", "i_tap, o_c = o_n * 0 + i, o_n", "i_tap, o_c = o_n * 0, o_n"),
    Fault("gathered_gemm", "the output is written over the prefix", "(out_prefix + i_q)[:", "i_q[:"),
    Fault("gathered_gemm", "images in 32 bits", "i_b = (o_m // rows).to(tl.int64)", "i_b = o_m // rows", FAR),
    Fault("gathered_gemm", "tokens in 32 bits", "i_token.to(tl.int64) * stride_at", "i_token * stride_at", FAR),
    Fault("gathered_gemm", "channels in 32 bits", "[None, :].to(tl.int64) * stride_ac", "[None, :] * stride_ac", FAR),
    Fault("gathered_gemm", "weights in 32 bits", "o_n[None, :].to(tl.int64) * stride_wn", "o_n[None, :] * stride_wn", FAR),
    Fault("gathered_gemm", "the residual in 32 bits", "i_token.to(tl.int64) * stride_rt +", "i_token * stride_rt +", FAR),
    Fault("split", "taps are written channel by channel",
        "(o_m[:, None].to(tl.int64) * (RATIO * RATIO) + i_tap) * channels + o_c[None, :]\n            tl.store(p_s",
        "(o_m[:, None].to(tl.int64) * channels + o_c[None, :]) * (RATIO * RATIO) + i_tap\n            tl.store(p_s"),
    Fault("split", "padding is not zero", "m_inside[:, None], other=0.0", "m_inside[:, None], other=1.0"),
    Fault("split", "padding counts in the mean", "b_r /= real_tokens(i_q, height", "b_r /= real_tokens(i_q * 0, height"),
    Fault("split", "a wrong channel group", "(o_k // channels)[None, :]", "(o_k % (RATIO * RATIO))[None, :]"),
    Fault("split", "the bias is left out", "b_r += tl.load(p_bias", "b_r += 0.0 * tl.load(p_bias"),
    Fault("split", "the residual is written over the prefix", "stride_rb + (out_prefix + i_q)", "stride_rb + i_q"),
    Fault("split", "tokens in 32 bits", "i_token[:, None].to(tl.int64) * stride_xt", "i_token[:, None] * stride_xt", FAR),
    Fault("split", "a channel too many", "(o_c < channels)[None, :]\n    b_r", "(o_c <= channels)[None, :]\n    b_r", MEMORY),
    Fault("collect", "every block is the first", "p_xs[i] + o_x", "p_xs[0] + o_x"),
    Fault("collect", "the prefix is not skipped", "(prefix + o_m % rows)", "(o_m % rows)"),
    Fault("collect", "blocks lie in the output's rows", "to(tl.int64) * SOURCES + i)", "to(tl.int64) + i * M)"),
    Fault("collect", "a channel too many", "(o_c < channels)[None, :]\n    for i in",
        "(o_c <= channels)[None, :]\n    for i in", MEMORY),
    Fault("gelu_backward", "GELU instead of its derivative", "* b_slope", "* b_act"),
    Fault("gelu_backward", "GELU's derivative is kept as GELU", "b_act.to(p_act", "b_slope.to(p_act"),
    Fault("gelu_backward", "row tiles overwrite each other's sums", "p_partial + i_m.to(tl.int64) * N", "p_partial"),
    Fault("gelu_backward", "every row has the first one's gradient", "stride_gb + i_q", "stride_gb + (i_q * 0)"),
    Fault("gelu_backward", "a column of sums too many", "mask=o_n < N", "mask=o_n <= N", MEMORY),
    Fault("join", "the residual's gradient is left out", "b_x += b_g", "b_x += 0.0 * b_g"),
    Fault("join", "padding counts in the mean", "b_g /= real_tokens(i_q, height", "b_g /= real_tokens(i_q * 0, height"),
    Fault("join", "the gradient of a wrong channel group", "((i_tap * channels + o_c) // (RATIO * RATIO))", "o_c"),
    Fault("join", "the residual's gradient is the prefix's", "(g_prefix + i_q)", "i_q"),
    Fault("join", "taps are read backwards", "+ i_tap) * channels + o_c[None, :]\n        b_x",
        "+ RATIO * RATIO - 1 - i_tap) * channels + o_c[None, :]\n        b_x"),
    Fault("join", "padding is written", "mask=m_tile & m_inside[:, None])\n", "mask=m_tile)\n", MEMORY),
    Fault("activation", "erf of x itself", "tl.math.erf(x * 0.7071067811865476)", "tl.math.erf(x)", RANGE),
    Fault("activation", "two digits of a coefficient of the cheap Phi", "0.254829592", "0.26", RANGE),
    Fault("activation", "three digits of a coefficient of tanh", "0.044715 * x * x * x", "0.0447 * x * x * x", RANGE),
    Fault("activation", "tanh overflows", "tl.exp(-tl.abs(inner))", "tl.exp(-inner)", RANGE),
    Fault("activation", "half of the derivative of erf", "phi + x * density", "phi", RANGE),
    Fault("activation", "a cube's derivative without its three", "0.134145", "0.044715", RANGE),
    Fault("launch", "erf where tanh was asked for", '"tanh": TANH', '"tanh": ERF'),
    Fault("composite", "the second bias is left out", "            bias2,\n", "            None,\n"),
    Fault("backward", "the prefix has no gradient", "dx[:, :prefix] = grad[:, :prefix]", "dx[:, :prefix] = 0"),
    Fault("cuda_products", "the prefix is read as patches", "self.address + ELEMENT * tokens * self.stride_t", "self.address",
        HOPPER),
    Fault("cuda", "the prefix does not pass through", "y[:, :prefix] = x[:, :prefix]", "y[:, :prefix] = 0", HOPPER),
    Fault("cuda", "the prefix's gradient does not pass through", "dx[:, :prefix] = grad[:, :prefix]", "dx[:, :prefix] = 0",
        HOPPER),
    Fault("cuda_products", "block order is gathered in raster order", "(windows.ratio * windows.num_windows, windows.ratio) if",
        "windows.grid if", HOPPER),
    Fault("cuda", "gradients of block order are written in raster order",
        "to_tokens(dpre, weight1, dx, windows, layout, residual_kind, g)",
        'to_tokens(dpre, weight1, dx, windows, "raster", residual_kind, g)', HOPPER),
    Fault("cuda", "the residual's gradient is left out", "windows, layout, residual_kind, g)", 'windows, layout, "none", g)',
        HOPPER),
    Fault("cuda_products", "the residual is always the mean", '"residual_kind": RESIDUALS[kind]', '"residual_kind": 1', HOPPER),
    Fault("cuda_products", "everything is bfloat16", "element=ELEMENTS[out.dtype]", "element=0", HOPPER),
    Fault("cuda_products", "no bias", "bias=_address(bias)", "bias=0", HOPPER),
    Fault("cuda_products", "the residual lies where the first token does", "first = (tokens.behind(windows.prefix_tokens),)",
        "first = (tokens.address,)", HOPPER),
    Fault("cuda_products", "tokens with gaps are taken for rows", " and tokens.stride_t == tokens.channels:", ":", HOPPER),
    Fault("cuda_products", "half of the column sums are left out", "sums.sum(0)", "sums[::2].sum(0)", HOPPER),
    Fault("cuda_products", "a gradient's images follow each other", "stride_b = x.stride(0) if batch > 1 else rows",
        "stride_b = rows", HOPPER),
    Fault("fused", "the prefix is read as patches", "prefix=prefix,\n        gather=", "prefix=0,\n        gather="),
    Fault("fused", "the prefix does not pass through", "y[:, :prefix] = x[:, :prefix]", "y[:, :prefix] = 0"),
    Fault("fused", "block order is scattered in raster order", "out_prefix=prefix,\n                scatter=GATHER[layout]",
        'out_prefix=prefix,\n                scatter=GATHER["raster"]'),
    Fault("fused", "a convolution gathers block order in raster order",
        "prefix=windows.prefix_tokens,\n        gather=GATHER[layout]",
        'prefix=windows.prefix_tokens,\n        gather=GATHER["raster"]', CONV),
    Fault("fused", "a convolution scatters block order in raster order",
        "out_prefix=windows.prefix_tokens,\n            scatter=GATHER[layout]",
        'out_prefix=windows.prefix_tokens,\n            scatter=GATHER["raster"]', CONV),
    Fault("fused", "a convolution's prefix has a gradient", "dx[:, : windows.prefix_tokens].zero_()",
        "dx[:, : windows.prefix_tokens].fill_(1)", CONV),
    Fault("fused", "a convolution's bias has half a gradient", "column_sum(grad) if", "column_sum(grad / 2) if", CONV),
    Fault("backward", "a convolution's block order is put in raster order", "dmerged, grad, windows, GATHER[layout]",
        'dmerged, grad, windows, GATHER["raster"]', CONV),
    Fault("backward", "a convolution's bias has half a gradient", "column_sum(grad) if", "column_sum(grad / 2) if", CONV),
    Fault("composite", "a convolution's bias is left out", "F.linear(gathered(x, windows, layout), weight, bias)",
        "F.linear(gathered(x, windows, layout), weight)", CONV),
    Fault("reference", "padding counts in the mean", "(tokens.sum(2, dtype=wide) / windows.split(ones).sum(2)).to(x.dtype)",
        "tokens.mean(2)", REFERENCE),
    Fault("reference", "the residual has no gradient", "dmerged = dmerged + residual_backward", "residual_backward", REFERENCE),
    Fault("reference", "a convolution's bias has half a gradient", "grad.sum((0, 1)) if needs[2]",
        "grad.sum((0, 1)) / 2 if needs[2]", REFERENCE),
    Fault("reference", "a convolution knows raster order only",
        "return F.linear(space_to_depth(x, windows, layout), weight, bias)",
        "return F.linear(space_to_depth(x, windows), weight, bias)", REFERENCE),
    Fault("reference", "a wrong channel group", "repeat_interleave(area, dim=-1)", "repeat(1, 1, area)", REFERENCE),
    Fault("geometry", "a tap's row and column change places", "height, r, width, r, channels).transpose(2, 3)",
        "height, r, width, r, channels).permute(0, 1, 3, 4, 2, 5)", GEOMETRY),
    Fault("geometry", "padding at the top left", "(0, 0, 0, right, 0, bottom)", "(0, 0, right, 0, bottom, 0)", GEOMETRY),
    Fault("geometry", "block order is not undone", "(height, width, r, r)", "(height, r, width, r)", GEOMETRY),
    Fault("norm", "the scale is left out", "b_delta *= tl.load(p_scale", "b_delta *= 1.0 + 0.0 * tl.load(p_scale", TOWER),
    Fault("norm", "the total is not rounded before its norm", "b_total = b_rounded.to(ACC)", "b_total += b_delta", ROUNDED),
    Fault("norm", "the mean is that of a whole tile", "tl.sum(b_total, 1) / channels", "tl.sum(b_total, 1) / BC", TOWER),
    Fault("norm", "masked channels count in the variance", "tl.where(m_c[None, :], b_total - b_mean[:, None], 0.0)",
        "b_total - b_mean[:, None]", TOWER),
    Fault("norm", "no eps", "/ channels + EPS)", "/ channels)", TOWER),
    Fault("norm", "the bias is left out", "b_normed += tl.load(p_bias", "b_normed += 0.0 * tl.load(p_bias", TOWER),
    Fault("norm", "half of the mean is saved", "(p_mean + o_m, b_mean,", "(p_mean + o_m, b_mean * 0.5,", TOWER),
    Fault("norm", "a channel too many", "= o_m < M, o_c < channels", "= o_m < M, o_c <= channels", TOWER_AROUND),
    Fault("norm", "a row too many", "= o_m < M, o_c < channels", "= o_m <= M, o_c < channels", TOWER_MEMORY),
    Fault("norm", "images in 32 bits", "(o_m // rows).to(tl.int64), (o_m % rows).to(tl.int64)\n    m_m, m_c",
        "o_m // rows, (o_m % rows).to(tl.int64)\n    m_m, m_c", TOWER_FAR),
    Fault("norm", "tokens of gradients in 32 bits", "(o_m % rows).to(tl.int64)\n        m_m", "o_m % rows\n        m_m",
        TOWER_FAR),
    Fault("norm", "the mean of the gradient is kept", "b_inner -= (", "b_inner -= 0.0 * (", TOWER),
    Fault("norm", "the gradient along the row is kept", "b_grad - b_hat * (", "b_grad - 0.0 * b_hat * (", TOWER),
    Fault("norm", "the gradient of the total is left out", "b_dx += tl.load(p_dtotal", "b_dx += 0.0 * tl.load(p_dtotal", TOWER),
    Fault("norm", "the gradient of delta is not scaled", "(b_scale * b_dx).to", "b_dx.to", TOWER),
    Fault("norm", "the scale's gradient is that before the norm", "b_dscale += b_dx *", "b_dscale += b_grad *", TOWER),
    Fault("norm", "the weight's gradient is the bias's", "b_dweight += b_grad * b_hat", "b_dweight += b_grad", TOWER),
    Fault("norm", "programs overwrite each other's sums", "i_program.to(tl.int64) * channels + o_c", "o_c", TOWER_TILES),
    Fault("norm", "every tile of a program is the first", "(i_program * tiles + i)", "(i_program * tiles)", TOWER_TILES),
    Fault("norm", "a channel of sums too many", "o_c = tl.arange(0, BC)\n    m_c = o_c < channels",
        "o_c = tl.arange(0, BC)\n    m_c = o_c <= channels", TOWER_MEMORY),
    Fault("elementwise", "up is left out", "b_y *= tl.load(p_tile + N", "b_y *= 1.0 + 0.0 * tl.load(p_tile + N", TOWER),
    Fault("elementwise", "both gradients are written to the gate", "tl.store(p_out + N, ", "tl.store(p_out, ", TOWER),
    Fault("elementwise", "the gradient's rows are of half the width", ".to(tl.int64) * (2 * N)", ".to(tl.int64) * N", TOWER),
    Fault("activation", "a digit of quick GELU", "derivative = times_sigmoid(x, 1.702)",
        "derivative = times_sigmoid(x, 1.7)", TOWER_RANGE),
    Fault("activation", "SiLU for quick GELU", "value, _ = times_sigmoid(x, 1.702)", "value, _ = times_sigmoid(x, 1.0)", MLP),
    Fault("activation", "the derivative of SiLU for quick GELU", "sigma + ALPHA * x *", "sigma + x *", TOWER_RANGE),
    Fault("activation", "the left half is the right one", "tl.where(x >= 0, upper, z * upper)", "upper", TOWER_RANGE),
    Fault("elementwise", "a column too many", "(o_n < N)[None, :]\n    p_tile", "(o_n <= N)[None, :]\n    p_tile",
        TOWER_MEMORY),
    Fault("elementwise", "rows in 32 bits", "p_h + (i_b * stride_hb + i_t * stride_ht)[:, None] + o_n[None, :]\n    b_y",
        "p_h + (i_b.to(tl.int32) * stride_hb + i_t.to(tl.int32) * stride_ht)[:, None] + o_n[None, :]\n    b_y", TOWER_FAR),
    Fault("rows", "channels apart are read as neighbours", "x.stride(2) == 1 or x.shape[2] < 2", "True", VIEWS),
    Fault("reference_tower", "the gradient along the row is kept", "g - hat * (g * hat).mean(-1, keepdim=True)", "g",
        TOWER_REFERENCE),
    Fault("reference_tower", "the norm sees more than the total", "total = x = total.to(x.dtype)",
        "x, total = x.float() + delta, total.to(x.dtype)", TOWER_REFERENCE),
    Fault("add_norm", "delta is kept without need", "delta if scale is not None and ctx.needs_input_grad[4] else None", "delta",
        SAVED),
    Fault("connectors", "erf where tanh was asked for", 'return "tanh" if', 'return "none" if', CHANGED),
    Fault("connectors", "hooks on a product are passed over", "reason := _changed(layer, nn.Linear)", "reason := None",
        CHANGED),
    Fault("connectors", "quantised weights are read", "type(parameter) not in PLAIN_TENSORS", "False", CHANGED),
    Fault("connectors", "the last of four patches first", "return out.view(-1, self.hidden_size)\n\n\nclass RMS",
        "return out.flip(0).view(-1, self.hidden_size)\n\n\nclass RMS", CONNECTORS),
    Fault("connectors", "a weight that counts from zero", "1.0 + norm.weight.float()", "norm.weight.float()", CONNECTORS),
    Fault("geometry", "tiles of a transposed image", "unflatten(1, (height, r, width, r))",
        "unflatten(1, (width, r, height, r))", GEOMETRY),
    Fault("gelu_mlp", "a norm's input for what it made", "*ctx.norm)[1]", "*ctx.norm)[0]", RECOMPUTED),
    Fault("fused_mlps", "what a hook wrote to is made again", " and version == x._version", "", RESPECTED),
    Fault("fused_mlps", "hooks on the activation are passed over", "or not is_plain(activation, type(activation))", "",
        RESPECTED),
    Fault("handing_on", "any input will do", " or waiting.total is not x", "", WAITS),
    Fault("handing_on", "what was written to is taken", "t.is_inference() else t._version", "t.is_inference() else 0", WAITS),
    Fault("handing_on", "what is recomputed is handed on", "not (layer.training and ", "not (False and ", HANDED),
    Fault("handing_on", "hooks of a layer are passed over", "and not is_called_for_others(layer)", "", HANDED),
    Fault("handing_on", "a chain outlives its encoder", "running.chain = outer\n", "pass\n", HANDED),
    Fault("layers", "a merge is passed over", ' or getattr(self, "merge", None) is not None', "", HANDED),
    Fault("layers", "parameters of any class are read", "type(p) is nn.Parameter and ", "", HANDED),
    Fault("connectors", "dropout is left out", "(mlp.training and mlp.dropout)", "False", CHANGED),
    Fault("hopper_gemm", "a slot is given back before it is read",
        "wgmma::wait_previous();\n      if (step > 0) release(previous);",
        "if (step > 0) release(previous);\n      wgmma::wait_previous();", FORWARD),
    Fault("hopper_gemm", "a slot is given back twice as fast",
        "if (step > 0) release(previous);\n      previous", "release(ring.slot);\n      previous", FORWARD),
    Fault("hopper_gemm", "sums are used before they are there",
        "    wgmma::wait_all();\n", "    wgmma::wait_previous();\n", FORWARD),
    Fault("hopper_gemm", "registers are not fenced", "      wgmma::fence();\n", "", FORWARD),
    Fault("hopper_gemm", "the copy engine is not told of stores",
        "    const uint32_t buffer = stage(values);\n    ptx::fence_async();\n    __syncwarp();\n"
        "    if (lane == 0) {\n      if (is_there) ptx::store_2d",
        "    const uint32_t buffer = stage(values);\n    __syncwarp();\n    if (lane == 0) {\n"
        "      if (is_there) ptx::store_2d", FORWARD),
    Fault("hopper_gemm", "one lane sends what the others still write",
        "    const uint32_t buffer = stage(values);\n    ptx::fence_async();\n    __syncwarp();\n"
        "    if (lane == 0) {\n      if (is_there) ptx::store_2d",
        "    const uint32_t buffer = stage(values);\n    ptx::fence_async();\n    if (lane == 0) {\n"
        "      if (is_there) ptx::store_2d", FORWARD),
    Fault("hopper_gemm", "buffers are used before they are read",
        "store_wait_read<T::STORE_BUFFERS - 1>", "store_wait_read<T::STORE_BUFFERS>", FORWARD),
    Fault("hopper_gemm", "a block ends before its stores are read", "    if (lane == 0) ptx::store_wait_all();\n", "", FORWARD),
    Fault("hopper_gemm", "barriers are not made known", "    ptx::barrier_init_fence();\n", "", FORWARD),
    Fault("hopper_gemm", "barriers are used before they are there", "  __syncwarp();\n  __syncthreads();\n", "", FORWARD),
    Fault("hopper_gemm", "one warp gives back what four read",
        "ptx::barrier_init(empty + i * 8, 4 * T::CONSUMERS)", "ptx::barrier_init(empty + i * 8, T::CONSUMERS)", FORWARD),
    Fault("hopper_gemm", "the pre-activation is read in the wrong order",
        "ptx::load_matrices(line + (((2 * j + lane / 16) ^ (lane % 8)) << 4), x)",
        "ptx::load_matrices(line + ((2 * j + lane / 16) << 4), x)", ACTIVATION),
    Fault("hopper_gemm", "what is staged is not swizzled",
        "ptx::store_matrices(line + (((2 * i + lane / 16) ^ (lane % 8)) << 4)",
        "ptx::store_matrices(line + ((2 * i + lane / 16) << 4)", FORWARD),
    Fault("hopper_gemm", "the slots are overwritten while others read them",
        "        ptx::named_barrier(1, T::CONSUMERS * 128);  // the slots are no longer read\n", "", SHARED),
    Fault("hopper_gemm", "sums are added before they are laid out",
        "        ptx::cluster_sync();\n      }\n#pragma unroll(K", "      }\n#pragma unroll(K", SHARED),
    Fault("hopper_gemm", "a block ends while others read its sums",
        "  if constexpr (K::SPLIT) {  // the others", "  if constexpr (false) {  // the others", SHARED),
    Fault("hopper_gemm", "the kernel in front is not waited for", "  ptx::wait_for_kernels_in_front();\n", "", FORWARD),
    Fault("hopper_gemm", "outputs lie over the prefix",
        "(m + static_cast<int64_t>(b + 1) * p.out_prefix)", "(m + static_cast<int64_t>(b) * p.out_prefix)", PREFIX),
    Fault("hopper_gemm", "the second 64 rows are the first", "slot + consumer * A_OFFSET", "slot", FORWARD),
    Fault("hopper_producer", "the first round waits",
        'ring.parity ^ 1, "empty", iteration', 'ring.parity, "empty", iteration', FORWARD),
    Fault("hopper_producer", "fewer bytes are announced than come",
        "const uint32_t to = open(T::SLOT_BYTES);\n      const int of_source",
        "const uint32_t to = open(T::A_BYTES);\n      const int of_source", FORWARD),
    Fault("hopper_producer", "more bytes are announced than come",
        "const uint32_t to = open(T::A_BYTES);", "const uint32_t to = open(T::SLOT_BYTES);", MEAN),
    Fault("hopper_producer", "a tap's row and column change places",
        "dy = of_source / side, dx = of_source - dy * side;\n      load",
        "dx = of_source / side, dy = of_source - dx * side;\n      load", FORWARD),
    Fault("hopper_producer", "a weight gradient's taps change places",
        "dy = tap / side, dx = tap - dy * side;\n        if", "dx = tap / side, dy = tap - dx * side;\n        if", WEIGHT),
    Fault("hopper_producer", "the residual is of one column",
        "dy = tap / side, dx = tap - dy * side, c", "dy = tap / side, dx = 0, c", MEAN),
    Fault("hopper_producer", "every source is the first",
        "load_rows(&p.sources[source], p.rows, barrier(), to, step",
        "load_rows(&p.sources[0], p.rows, barrier(), to, step", FORWARD),
    Fault("hopper_producer", "chunks of a weight overlap",
        "to + T::A_BYTES + j * wgmma::CHUNK_BYTES, chunk.c", "to + T::A_BYTES, chunk.c", TOKENS),
    Fault("hopper_params", "a ring has one parity", "slot = 0, parity ^= 1", "slot = 0", FORWARD),
    Fault("hopper_params", "registers are given to two", "CONSUMERS == 2 ? 40 : 32", "CONSUMERS == 2 ? 56 : 40", FORWARD),
    Fault("hopper_params", "windows are counted as tokens",
        "x = (q - y * rows.out_width) * rows.side;", "x = q - y * rows.out_width;", FORWARD),
    Fault("hopper_params", "depth is shared out with a gap",
        "min(first + part, p.steps)", "min(first + part - 1, p.steps)", SHARED),
    Fault("hopper_launch", "windows step by a token",
        "map.side ? step : 1, 1};", "1, 1};", FORWARD),
    Fault("hopper_gemm", "the last piece is added up as if it were whole",
        "exchange() + first / 2 * EXCHANGE_STRIDE", "exchange() + piece * 32 * EXCHANGE_STRIDE", NARROW),
    Fault("operands.h", "images follow each other", "t.batch > 1 ? t.stride_b : height * line", "height * line", TOLD),
    Fault("operands.h", "taps are as far apart as rows",
        "{channels, taps * channels}", "{taps * channels, channels}", TOLD_TOKENS),
    Fault("operands.h", "tokens with gaps are one matrix",
        "t.side == 1 && (t.batch == 1 || t.stride_b == tokens * t.stride_t)", "t.side == 1", TOLD),
    Fault("operands.h", "a residual in block order is read line by line",
        "if (d.copied && q.residual_block)", "if (d.copied && false)", TOLD),
    Fault("operands.h", "the pre-activation goes where the output does",
        "map_matrix(q.pre, p.m, q.n", "map_matrix(q.out, p.m, q.n", TOLD),
    Fault("operands.h", "the activation goes over the pre-activation",
        "d.maps.second = map_matrix(q.act", "d.maps.second = map_matrix(q.pre", TOLD_TOKENS),
    Fault("operands.h", "there is no bias", "static_cast<const uint16_t*>(q.bias)", "nullptr", TOLD),
    Fault("operands.h", "columns are not added up", "p.sums = q.sums", "p.sums = nullptr", TOLD_TOKENS),
    Fault("operands.h", "the residual's gradient is the product's",
        "Image(q.residual_gradient)", "Image(q.gradient)", TOLD_TOKENS),
    Fault("operands.h", "a residual in block order is found line by line",
        "Image(residual_tokens(q))", "Image(q.residual)", TOLD),
    Fault("plan.h", "a gradient's taps share chunks",
        "columns_of(const InputGradient& q) { return COLUMNS * chunks_of(int64_t(q.side) * q.side, q.channels); }",
        "columns_of(const InputGradient& q) { return COLUMNS * chunks_of(1, q.side * q.side * q.channels); }", TOLD_TOKENS),
    Fault("plan.h", "each source is one tap",
        "chunks_of(q.x.num_sources * q.x.taps(), q.x.channels)", "chunks_of(q.x.num_sources, q.x.channels)", TOLD_WEIGHT),
    Fault("schedule.h", "the last group of rows is as high as the others", "left < group ? left : group", "group", TOLD),
    Fault("problem.h", "rows are counted beyond 32 bits", "t.rows() >= MOST", "t.rows() >= 8 * MOST", VAST),
    Fault("problem.h", "windows are counted in 32 bits", "int64_t(height) + side - 1", "(height + side - 1)", VAST),
    Fault("problem.h", "rows are longer than 32 bits", "t.depth() >= MOST", "t.depth() >= 64 * MOST", VAST),
    Fault("problem.h", "strides are longer than the copy engine's",
        "t.stride_t >= FARTHEST / tokens", "t.stride_t >= FARTHEST", VAST),
    Fault("wgmma", "chunks lie next to each other",
        "leading = MN ? CHUNK_BYTES >> 4 : 1", "leading = MN ? CHUNK_BYTES >> 5 : 1", WEIGHT),
    Fault("wgmma", "a step along K is half of one",
        "constexpr int K_STEP = MN ? 16 * 128 / 16", "constexpr int K_STEP = MN ? 8 * 128 / 16", WEIGHT),
    Fault("wgmma", "no swizzle", "swizzle_128 << 62", "swizzle_128 << 61", FORWARD),
    Fault("ampere_gemm", "copies are used before they are there",
        "ptx::copy_wait<STAGES - 2>()", "ptx::copy_wait<STAGES - 1>()", AMPERE_FORWARD),
    Fault("ampere_gemm", "only the own copies are waited for",
        "    ptx::copy_wait<STAGES - 2>();\n    __syncthreads();", "    ptx::copy_wait<STAGES - 2>();", AMPERE_FORWARD),
    Fault("ampere_gemm", "results go over slots that are read",
        "  __syncthreads();\n  product.finish", "  product.finish", AMPERE_TOKENS),
    Fault("ampere_gemm", "the last groups are not counted",
        "    if (step + STAGES - 1 < steps) loader.load(next);\n    ptx::copy_commit();",
        "    if (step + STAGES - 1 < steps) loader.load(next), ptx::copy_commit();", AMPERE_FORWARD),
    Fault("ampere_gemm", "a piece is overwritten while it is read",
        "ptx::load_shared_16(chunk(i)));\n    }\n    __syncwarp();", "ptx::load_shared_16(chunk(i)));\n    }", AMPERE_FORWARD),
    Fault("ampere_gemm", "transposed fragments change places",
        "at(k + lane / 16 * 8 + lane % 8, row / CHUNK + lane / 8 % 2)",
        "at(k + lane / 8 % 2 * 8 + lane % 8, row / CHUNK + lane / 16)", AMPERE_WEIGHT),
    Fault("ampere_gemm", "rows lie as lines",
        "ptx::load_matrices_transposed(tile + at(k + lane % 16", "ptx::load_matrices(tile + at(k + lane % 16", AMPERE_WEIGHT),
    Fault("ampere_gemm", "rows of a matrix lie in the same banks", "(row / 2 % 4)", "(row % 4)", AMPERE_BANKS),
    Fault("ampere_operands", "lines that are copied together lie in the same banks", "^ (line % 2 * 4)", "^ 0", AMPERE_BANKS),
    Fault("ampere_operands", "a tap's row and column change places",
        "dy < high && dx < wide", "dx < high && dy < wide", AMPERE_FORWARD),
    Fault("ampere_products", "padding is copied",
        "a.is_inside(q.x) && 32 * i < rows_left", "32 * i < rows_left", AMPERE_FORWARD),
    Fault("ampere_products", "the pre-activation is read before it is there",
        "      ptx::copy_wait<0>();\n      __syncwarp();", "      __syncwarp();", AMPERE_ACTIVATION),
    Fault("ampere_products", "lanes read what others copied",
        "      ptx::copy_wait<0>();\n      __syncwarp();", "      ptx::copy_wait<0>();", AMPERE_ACTIVATION),
    Fault("ampere_products", "depth behind the last row", "a.channel + b.line < q.gradient.channels", "true", AMPERE_TOKENS),
]  # fmt: skip

# An installed package may come before the broken copy: the run says which one it imported.
RUN = """
import sys, pytest
code = pytest.main(sys.argv[2:])
found = sys.modules["laco_kernels"].__file__
sys.exit(70 + code if found.startswith(sys.argv[1]) else f"imported {found}, expected the copy in {sys.argv[1]}")
"""


def run(folder, tests):
    """Run tests on the package in ``folder``; return pytest's exit code, the first failure and the seconds."""
    env = {**os.environ, "PYTHONPATH": f"{folder}/src", "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "400"}  # wide: ids are long
    env |= {"CUDA_VISIBLE_DEVICES": "", "HYPOTHESIS_STORAGE_DIRECTORY": f"{folder}/hypothesis"}
    command = [sys.executable, "-c", RUN, folder, "-x", "-q", "-p", "no:cacheprovider", *shlex.split(tests)]
    begin = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - begin
    if 0 <= done.returncode < 70:
        raise SystemExit(f"{tests} did not run:\n{done.stdout}{done.stderr}")
    failure = re.search(r"^(?:FAILED|ERROR) (.*)", done.stdout, re.MULTILINE)
    return done.returncode - 70, failure[1] if failure else f"exit code {done.returncode}", seconds


def main(part=""):
    """Run the faults whose names contain ``part``; return how many did not turn a test red."""
    chosen = [fault for fault in FAULTS if part in str(fault)]
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        folder = os.path.realpath(folder)
        for part in ("src", "csrc"):
            shutil.copytree(ROOT / part, Path(folder, part), ignore=shutil.ignore_patterns("__pycache__"))
        for tests in dict.fromkeys(fault.tests for fault in chosen):
            code, failure, seconds = run(folder, tests)
            if code:
                raise SystemExit(f"{tests} is red without a fault: {failure}")
            print(f"      {seconds:5.1f} s  without a fault: {tests}", flush=True)
        for fault in chosen:
            file = Path(folder, FILES[fault.where])
            text = file.read_text()
            if text.count(fault.old) != 1:
                raise SystemExit(f"{fault}: found {fault.old!r} {text.count(fault.old)} times in {file.name}, expected once")
            file.write_text(text.replace(fault.old, fault.new))
            code, failure, seconds = run(folder, fault.tests)
            file.write_text(text)
            red = code == 1 and re.search(r" - (AssertionError|assert )", failure)
            verdict = "red" if red else "GREEN" if code == 0 else "OTHER"
            missed += verdict != "red"
            first = failure.partition(" - ")[0] if red else failure
            print(f"{verdict:5} {seconds:5.1f} s  {fault}\n               {first}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} faults turned a test red")
    return missed


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) > 0)
