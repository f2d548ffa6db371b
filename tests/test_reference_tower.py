"""The specification of the operators inside an encoder against torch's and transformers' own modules."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Aimv2VisionConfig
from transformers.activations import ACT2FN
from transformers.models.aimv2.modeling_aimv2 import Aimv2MLP, Aimv2RMSNorm
from transformers.models.internvl.modeling_internvl import InternVLVisionRMSNorm

from laco_kernels import reference_tower as reference
from laco_kernels import testing

EXACT = {"rtol": 0, "atol": 1e-10}
SHAPE, EPS = (2, 5, 12), 1e-5


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def add_norm(x, delta, weight, bias, scale, kind, dtype=None):
    return reference.add_norm_forward(x, delta, weight, bias, scale, kind=kind, eps=EPS, dtype=dtype or x.dtype)


def stock(kind, total, weight, bias):
    if kind == "layer":
        return F.layer_norm(total, total.shape[-1:], weight, bias, EPS)
    normed = F.rms_norm(total, total.shape[-1:], weight, EPS)
    return normed if bias is None else normed + bias


OPTIONS = list(itertools.product(["layer", "rms"], [True, False], ["scaled", "plain", "none"]))


@pytest.mark.parametrize(("kind", "biased", "delta"), OPTIONS)
def test_add_norm_is_a_sum_and_torchs_norm(kind, biased, delta):
    x, d, weight, bias, scale = random(*SHAPE), random(*SHAPE), random(12), random(12), random(12)
    bias, d, scale = bias if biased else None, None if delta == "none" else d, scale if delta == "scaled" else None
    total = x if d is None else x + d * (1 if scale is None else scale)
    expected = stock(kind, total, weight, bias)
    sum_, normed, mean, rstd = add_norm(x, d, weight, bias, scale, kind)
    assert (sum_ is None) is (d is None)
    assert (mean is None) is (kind == "rms")
    inputs = [t for t in (x, d, weight, bias, scale) if t is not None]
    for actual, other in ((sum_, total), (normed, expected)):
        if actual is None:
            continue
        torch.testing.assert_close(actual, other, **EXACT)
        grad = torch.randn_like(other)
        ours, theirs = (torch.autograd.grad(y, inputs, grad, retain_graph=True, allow_unused=True) for y in (actual, other))
        for one, another in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, another, **EXACT)
    spread = total.var(-1, correction=0) if kind == "layer" else total.square().mean(-1)
    torch.testing.assert_close(rstd, (spread + EPS).rsqrt(), **EXACT)


@pytest.mark.parametrize("with_total", [True, False])
@pytest.mark.parametrize(("kind", "biased", "delta"), OPTIONS)
def test_backward_of_add_norm_is_its_gradient(kind, biased, delta, with_total):
    x, d, weight, bias, scale = random(*SHAPE), random(*SHAPE), random(12), random(12), random(12)
    bias, d, scale = bias if biased else None, None if delta == "none" else d, scale if delta == "scaled" else None
    total, normed, mean, rstd = add_norm(x, d, weight, bias, scale, kind)
    dnormed = torch.randn_like(normed)
    dtotal = torch.randn_like(normed) if with_total and total is not None else None
    loss = (normed * dnormed).sum() + (0 if dtotal is None else (total * dtotal).sum())
    inputs = (x, None if scale is None else d, weight, bias, scale)
    needs = [t is not None for t in inputs]
    found = iter(torch.autograd.grad(loss, [t for t in inputs if t is not None]))
    expected = [next(found) if need else None for need in needs]
    saved = (x if d is None else total, d, mean, rstd, weight, scale)
    actual = reference.add_norm_backward(dnormed, dtotal, *saved, needs)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, **EXACT)
    for i in range(5):
        only = [i == j and needs[i] for j in range(5)]
        alone = reference.add_norm_backward(dnormed, dtotal, *saved, only)
        assert [gradient is not None for gradient in alone] == only
        torch.testing.assert_close(alone[i], expected[i], **EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("module", [nn.LayerNorm, Aimv2RMSNorm, InternVLVisionRMSNorm])
def test_norms_err_no_more_than_those_of_the_encoders(module, dtype):
    """The latter two take their statistics in float32 whatever the input is, so they can be met in no higher precision."""
    theirs = module(64, eps=EPS)
    kind = "layer" if module is nn.LayerNorm else "rms"
    bias = torch.randn(64) if kind == "layer" else None
    with torch.no_grad():
        theirs.weight.copy_(torch.randn(64))
        if bias is not None:
            theirs.bias.copy_(bias)
        theirs.to(dtype)
        x, weight, bias = torch.randn(40, 64).to(dtype), theirs.weight, theirs.bias if kind == "layer" else None
        truth = stock(kind, *[None if t is None else t.double() for t in (x, weight, bias)])
        _, actual, *_ = add_norm(x, None, weight, bias, None, kind)
        assert testing.compare(actual, theirs(x), truth, [])[2]


@pytest.mark.parametrize("module", [Aimv2RMSNorm, InternVLVisionRMSNorm])
def test_transformers_rounds_an_rms_norm_twice_and_this_once(module):
    dtype = torch.bfloat16
    theirs = module(64, eps=EPS).to(dtype)
    x, weight = torch.randn(40, 64).to(dtype), torch.randn(64).to(dtype)
    with torch.no_grad():
        theirs.weight.copy_(weight)
        _, hat, *_ = add_norm(x.float(), None, torch.ones(64), None, None, "rms")
        assert torch.equal(theirs(x), weight * hat.to(dtype))
        _, once, *_ = add_norm(x, None, weight, None, None, "rms")
        assert torch.equal(once, (weight.float() * hat).to(dtype))
        assert not torch.equal(once, theirs(x))


def test_a_total_is_rounded_before_its_norm_is_taken():
    x, delta = torch.full((1, 4), 256.0, dtype=torch.bfloat16), torch.tensor([[0.5, 0.0, 0.0, 0.0]], dtype=torch.bfloat16)
    total, normed, *_ = add_norm(x, delta, torch.ones(4, dtype=torch.bfloat16), None, None, "layer")
    assert torch.equal(total, x)
    assert torch.equal(normed, torch.zeros_like(x))


@pytest.mark.parametrize(
    ("activation", "names"),
    [("gelu", ["gelu"]), ("gelu_tanh", ["gelu_pytorch_tanh", "gelu_new"]), ("quick_gelu", ["quick_gelu"])],
)
def test_activations_are_those_of_transformers(activation, names):
    h = random(3, 50)
    actual = reference.activate_forward(h, activation=activation)
    grad = torch.randn_like(actual)
    for name in names:
        expected = ACT2FN[name](h)
        torch.testing.assert_close(actual, expected, **EXACT)
        (gradient,) = torch.autograd.grad(expected, h, grad)
        torch.testing.assert_close(reference.activate_backward(grad, h, activation=activation), gradient, **EXACT)
        torch.testing.assert_close(torch.autograd.grad(actual, h, grad, retain_graph=True)[0], gradient, **EXACT)


def test_gated_silu_is_inside_the_feed_forward_block_of_aimv2():
    mlp = Aimv2MLP(Aimv2VisionConfig(hidden_size=8, intermediate_size=12)).double()
    x = random(2, 3, 8)
    h = F.linear(x, torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))
    actual, expected = mlp.down_proj(reference.gated_silu_forward(h)), mlp(x)
    torch.testing.assert_close(actual, expected, **EXACT)
    grad = torch.randn_like(actual)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, grad)[0] for y in (actual, expected)), **EXACT)


def test_backward_of_gated_silu_is_its_gradient():
    h = random(2, 3, 10)
    gate, up = h.chunk(2, -1)
    grad = torch.randn_like(gate)
    torch.testing.assert_close(reference.gated_silu_forward(h), gate * torch.sigmoid(gate) * up, **EXACT)
    (expected,) = torch.autograd.grad(F.silu(gate) * up, h, grad)
    torch.testing.assert_close(reference.gated_silu_backward(grad, h), expected, **EXACT)
