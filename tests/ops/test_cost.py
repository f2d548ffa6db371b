"""Bytes moved, counted by hand beside the counter."""

import pytest
import torch

import laco_kernels as lk
from laco_kernels.ops.cost import Traffic

ITEM = 2  # bytes of a bfloat16


def meta(*shape):
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def counted(impl, call, *, backward=False):
    with Traffic(impl) as forward:
        y = call()
    if not backward:
        return forward.read // ITEM, forward.written // ITEM
    with Traffic(impl) as traffic:
        y.backward(torch.empty_like(y))
    return traffic.read // ITEM, traffic.written // ITEM


# 3 images of 6 x 7 patches behind one class token, 8 channels, 16 hidden: 3 x 4 windows, 5 of which reach over the edge.
BATCH, CHANNELS, HIDDEN = 3, 8, 16
PATCHES, WINDOWS = BATCH * 42, BATCH * 12
X, W1, ACT, W2, Y, CLS = PATCHES * 8, 16 * 32, WINDOWS * 16, 8 * 16, WINDOWS * 8, BATCH * 8


def merge(*, x=None, **options):
    x = meta(BATCH, 43, CHANNELS) if x is None else x
    weights = meta(HIDDEN, 4 * CHANNELS), meta(HIDDEN), meta(CHANNELS, HIDDEN), meta(CHANNELS)
    return lk.patch_merge(x, *weights, grid=(6, 7), prefix_tokens=1, pad=True, **options)


def test_the_fused_merge_reads_only_real_tokens_and_stores_one_hidden_tensor():
    read, written = counted("triton", merge)
    assert read == (X + W1 + HIDDEN) + (ACT + W2 + CHANNELS + X) + CLS
    assert written == ACT + Y + CLS
    assert counted("triton", lambda: merge(residual="none"))[0] == read - X


def test_saving_for_backward_writes_the_pre_activation():
    written = counted("triton", merge)[1]
    assert counted("triton", lambda: merge(x=meta(BATCH, 43, CHANNELS).requires_grad_()))[1] == written + ACT


def test_the_composite_merge_writes_what_it_gathers():
    merged = WINDOWS * 4 * CHANNELS
    read, written = counted("composite", merge)
    # split; first product; GELU; second product onto the residual; the class token
    assert read == (X + CHANNELS) + (merged + W1 + HIDDEN) + ACT + (Y + ACT + W2) + CLS
    assert written == (merged + Y) + ACT + ACT + Y + CLS


def test_the_reference_in_block_order_is_five_passes():
    x, weights = meta(2, 16, 8), (meta(16, 32), meta(16), meta(8, 16), meta(8))
    x_size, act, y = 2 * 16 * 8, 2 * 4 * 16, 2 * 4 * 8
    read, written = counted("reference", lambda: lk.patch_merge(x, *weights, grid=(4, 4), layout="block"))
    # two products, GELU, the mean of the window, the sum
    assert read == (x_size + 512 + 16) + act + (act + 128 + 8) + x_size + 2 * y
    assert written == act + act + y + y + y


@pytest.mark.parametrize("frozen", [False, True])
def test_a_frozen_encoder_moves_fewer_bytes(frozen):
    x, weight = meta(2, 17, 8).requires_grad_(not frozen), meta(16, 32).requires_grad_()
    read, written = counted(
        "composite", lambda: lk.strided_conv_gelu(x, weight, None, grid=(4, 4), prefix_tokens=1), backward=True
    )
    tokens, pre = 2 * 16 * 8, 2 * 4 * 16
    # dGELU; the tokens gathered, and the weight's gradient from them
    assert read == (pre + pre) + (tokens + tokens + pre) + (0 if frozen else (pre + 512) + tokens)
    assert written == pre + (tokens + 512) + (0 if frozen else tokens + tokens + 2 * 8)


def test_a_frozen_feed_forward_block_goes_back_in_two_products_and_one_pass():
    x = meta(2, 16, 8).requires_grad_()
    weights, act, tokens = (meta(12, 8), meta(12), meta(8, 12), meta(8)), 2 * 16 * 12, 2 * 16 * 8
    read, written = counted("composite", lambda: lk.gelu_mlp(x, *weights), backward=True)
    # the second product; GELU's derivative; the first product, which makes the gradient where it is to be
    assert read == (tokens + 12 * 8) + (act + act) + (act + 12 * 8)
    assert written == act + act + tokens


def test_a_bias_adds_its_sums_to_the_backward_pass():
    def call(bias):
        x, weight = meta(2, 17, 8), meta(16, 32).requires_grad_()
        return counted("composite", lambda: lk.strided_conv_gelu(x, weight, bias, grid=(4, 4), prefix_tokens=1), backward=True)

    without, with_bias = call(None), call(meta(16).requires_grad_())
    sums = 16 * 2  # one row tile, in float32: written and read, reduced, rounded
    assert with_bias[0] - without[0] == sums + sums
    assert with_bias[1] - without[1] == sums + sums + 16


@pytest.mark.parametrize("layout", ["raster", "block"])
def test_a_plain_convolution_keeps_no_pre_activation_and_in_block_order_copies_nothing(layout):
    x, weight, bias = meta(2, 16, 8).requires_grad_(), meta(24, 32).requires_grad_(), meta(24).requires_grad_()
    call = lambda: lk.strided_conv(x, weight, bias, grid=(4, 4), layout=layout)  # noqa: E731
    tokens, out, parameters = 2 * 16 * 8, 2 * 4 * 24, 24 * 32 + 24
    copied = tokens if layout == "raster" else 0
    assert counted("triton", call) == (tokens + parameters, out)
    assert counted("composite", call) == (copied + tokens + parameters, copied + out)
    sums = 24 * 2  # of the bias's gradient, in float32: written and read, rounded
    read, written = counted("composite", call, backward=True)
    # the product for x and its scatter; the tokens gathered, and the weight's gradient from them; the bias's gradient
    assert read == (out + 24 * 32) + copied + copied + (tokens + out) + (out + sums)
    assert written == tokens + copied + copied + 24 * 32 + (sums + 24)


def test_several_blocks_are_read_where_they_lie():
    xs, weight = [meta(2, 5, 8) for _ in range(3)], meta(16, 24)
    call = lambda: lk.multi_block_linear_gelu(xs, weight, None, prefix_tokens=1)  # noqa: E731
    tokens, out = 3 * 2 * 4 * 8, 2 * 4 * 16
    assert counted("triton", call) == (tokens + 16 * 24, out)
    assert counted("composite", call) == (tokens + tokens + 16 * 24 + out, tokens + out + out)
    # the concatenation is written and read again, and so is the pre-activation
    assert counted("reference", call) == (tokens + tokens + 16 * 24 + out, tokens + out + out)


def test_views_and_allocations_move_nothing_and_expanded_tensors_count_once():
    with Traffic() as traffic:
        x = torch.empty(4, 6).t()[1:].unsqueeze(0)
    assert (traffic.read, traffic.written) == (0, 0)
    with Traffic() as traffic:
        x.expand(5, -1, -1).clone()
    assert (traffic.read, traffic.written) == (5 * 4 * 4, 5 * 5 * 4 * 4)
    with Traffic() as traffic:
        torch.empty(3).copy_(torch.empty(3))
    assert (traffic.read, traffic.written) == (12, 12)


def test_counting_on_a_real_device_computes_the_same():
    x, weight = torch.randn(2, 16, 4), torch.randn(3, 16)
    with Traffic() as traffic:
        y = lk.strided_conv_gelu(x, weight, None, grid=(4, 4))
    assert torch.equal(y, lk.strided_conv_gelu(x, weight, None, grid=(4, 4)))
    assert traffic.read >= x.nbytes + weight.nbytes
