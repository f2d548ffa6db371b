"""Several linear layers as one product: the same numbers, one product, and gradients that reach every layer."""

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils import dlpack
from torch.utils.flop_counter import FlopCounterMode

import laco_kernels as lk
from laco_kernels import testing
from laco_kernels.ops.cost import Traffic
from laco_kernels.ops.packed_linear import _wholes, find_whole, lay_together, pack, run_packed_linear

SIZES = [5, 8, 3]


def layers(dtype=torch.float64, sizes=SIZES, channels=6, biased=True, packed=False):
    generator = torch.Generator().manual_seed(0)

    def draw(*shapes):
        if packed:
            whole = torch.randn(sum(shape[0] for shape in shapes), *shapes[0][1:], generator=generator).to(dtype)
            return list(whole.split([shape[0] for shape in shapes]))
        return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]

    x = torch.randn(2, 4, channels, generator=generator).to(dtype)
    return x, draw(*[(n, channels) for n in sizes]), draw(*[(n,) for n in sizes]) if biased else None


def separately(x, weights, biases):
    return torch.cat([F.linear(x, w, None if biases is None else biases[i]) for i, w in enumerate(weights)], -1)


def leaves_of(x, weights, biases):
    return [tensor.detach().requires_grad_() for tensor in (x, *weights, *(biases or []))]


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_it_computes_what_the_layers_do_one_by_one(packed, biased):
    x, weights, biases = layers(biased=biased, packed=packed)
    assert (find_whole(weights) is not None) == packed
    leaves = [t.requires_grad_() for t in leaves_of(x, weights, biases)]
    n = len(weights)
    y = lk.packed_linear(leaves[0], leaves[1 : 1 + n], leaves[1 + n :] or None)
    expected = separately(leaves[0], leaves[1 : 1 + n], leaves[1 + n :] or None)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    grad = torch.randn_like(y)
    found, wanted = (torch.autograd.grad(out, leaves, grad, retain_graph=True) for out in (y, expected))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def by_whole(x, weights, biases):
    wholes = [lay_together(group).tensor if group else None for group in (weights, biases)]
    return run_packed_linear(x, *wholes, weights, biases or [])


IN_PLACE = {
    "the whole": lambda y: (y.relu_(),),
    "a part of it": lambda y: (y[..., 2:7].mul_(3), y),
    "each layer's": lambda y: [part.relu_() for part in y.unsafe_split_with_sizes(SIZES, -1)],
}


@pytest.mark.parametrize(
    ("call", "write"),
    [*[(lk.packed_linear, write) for write in IN_PLACE.values()], (by_whole, IN_PLACE["each layer's"])],
    ids=[*IN_PLACE, "inside an encoder"],
)
@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 4, 6)])
@pytest.mark.parametrize("biased", [True, False])
def test_outputs_may_be_written_in_place(biased, shape, call, write):
    _, weights, biases = layers(biased=biased)
    leaves = leaves_of(torch.randn(shape, dtype=torch.float64), weights, biases)
    results = []
    for layer in (call, separately):
        for frozen in (False, True):
            given = [t.detach() if frozen else t for t in leaves]
            outputs = write(layer(given[0], given[1:4], given[4:] or None))
            loss = sum(y.sin().sum() for y in outputs)
            results.append([*outputs, *([] if frozen else torch.autograd.grad(loss, leaves))])
    for ours, theirs in zip(results[0] + results[1], results[2] + results[3], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("write", IN_PLACE.values(), ids=IN_PLACE)
@pytest.mark.parametrize("inside", [True, False])
def test_outputs_may_be_written_in_place_under_a_compiler(inside, write):
    """By compiled code, and by what is called behind it."""
    leaves = leaves_of(*layers())

    def call(x, *others, layer=lk.packed_linear):
        y = layer(x, others[:3], others[3:])
        return write(y) if inside else y

    ours, theirs = torch.compile(call, fullgraph=True, backend="aot_eager")(*leaves), call(*leaves, layer=separately)
    if not inside:
        ours, theirs = write(ours), write(theirs)
    found, wanted = (torch.autograd.grad(sum(y.sin().sum() for y in outputs), leaves) for outputs in (ours, theirs))
    for a, b in zip([*ours, *found], [*theirs, *wanted], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_packed_weights_are_read_where_they_lie():
    _, weights, _ = layers(packed=True)
    assert pack(weights).data_ptr() == weights[0].data_ptr()
    _, apart, _ = layers()
    assert torch.equal(pack(apart), torch.cat(apart))
    for others in ([1, 0], [0, 2]):
        assert find_whole([weights[i] for i in others]) is None
    assert find_whole([weights[0].t(), weights[1].t()]) is None
    # Neighbours by accident, in memory of their own, are no one tensor.
    memory = torch.zeros(64)
    left, right = (torch.empty(0).set_(memory.untyped_storage(), i * 8, (2, 4)) for i in range(2))
    assert torch.equal(find_whole([left, right]), torch.cat([left, right]))
    copy = right.clone()
    assert find_whole([left, copy]) is None
    left = left.clone()
    right = dlpack.from_dlpack(torch.empty(0).set_(left.untyped_storage(), 0, (2, 4)))
    assert find_whole([left, right]) is None


def test_weights_laid_together_keep_storages_of_their_own():
    _, weights, _ = layers()
    before, version = [w.clone() for w in weights], weights[0]._version
    whole = lay_together(weights)
    assert all(map(torch.equal, weights, before))
    assert weights[0]._version == version
    assert all(w.untyped_storage().nbytes() == w.nbytes for w in weights)
    assert find_whole(weights) is whole.tensor
    assert pack(weights) is whole.tensor
    assert lay_together(weights) is whole, "somebody else's is as good"
    assert find_whole(weights[:2]) is None
    assert find_whole([weights[1], weights[2]]) is None
    moved = [*weights[:2], weights[2].clone()]
    assert lay_together(moved) is not whole
    assert find_whole(weights) is None
    gone = lay_together(layers()[1])
    place = gone.tensor.device, gone.tensor.data_ptr()
    assert place in _wholes
    del gone
    assert place not in _wholes


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("mode", [lambda: torch.autocast("cpu", torch.bfloat16), lambda: torch.device("cpu")])
def test_weights_laid_together_are_copied_in_no_mode(mode, biased):
    leaves = leaves_of(*layers(torch.float32, biased=biased))
    x, weights, biases = leaves[0], leaves[1:4], leaves[4:]
    held = [lay_together(group) for group in (weights, biases) if group]
    whole, whole_bias = [h.tensor for h in held] if biased else (held[0].tensor, None)
    with profile(activities=[ProfilerActivity.CPU]) as seen, mode():
        y = run_packed_linear(x, whole, whole_bias, weights, biases)
        torch.autograd.grad(y.float().sum(), leaves)
    assert "laco::packed_linear" in {event.name for event in seen.events()}
    assert "aten::cat" not in {event.name for event in seen.events()}


def test_one_product_a_pass():
    x, weights, biases = layers(packed=True)
    with FlopCounterMode(display=False) as flops:
        lk.packed_linear(x, weights, biases)
    assert flops.get_total_flops() == 2 * 8 * sum(SIZES) * 6
    meta = [t.to("meta") for t in weights]
    with Traffic("triton") as traffic:  # an operator with one body only
        lk.packed_linear(x.to("meta"), meta)
    assert traffic.written


@pytest.mark.parametrize("biased", [True, False])
def test_gradcheck_and_opcheck(biased):
    x, weights, biases = layers(biased=biased)
    leaves = leaves_of(x, weights, biases)
    n = len(weights)

    def call(x, *others):
        return lk.packed_linear(x, others[:n], others[n:] or None)

    assert torch.autograd.gradcheck(call, leaves)
    arguments = (leaves[0], leaves[1 : 1 + n], leaves[1 + n :], torch.float64)
    torch.library.opcheck(torch.ops.laco.packed_linear.default, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_numerical_promise(dtype):
    x, weights, biases = layers(dtype, sizes=[48, 64], channels=96)
    grad = torch.randn(2, 4, 112, generator=torch.Generator().manual_seed(1)).to(dtype)

    def everything(call, convert=lambda t: t):
        leaves = [convert(t).detach().requires_grad_() for t in (x, *weights, *biases)]
        y = call(leaves[0], leaves[1:3], leaves[3:])
        return [y.detach(), *torch.autograd.grad(y, leaves, convert(grad))]

    truth = everything(separately, torch.Tensor.double)
    for ours, eager, exact in zip(everything(lk.packed_linear), everything(separately), truth, strict=True):
        assert testing.compare(ours, eager, exact, [])[2]


def test_it_compiles_without_a_graph_break():
    x, weights, biases = layers(torch.float32)
    leaves = leaves_of(x, weights, biases)

    def call(x, *others):
        return [part.sin() for part in lk.packed_linear(x, others[:3], others[3:]).split(SIZES, -1)]

    compiled = torch.compile(call, fullgraph=True)
    for ours, theirs in zip(compiled(*leaves), call(*leaves), strict=True):
        torch.testing.assert_close(ours, theirs)
        for a, b in zip(
            torch.autograd.grad(ours.sum(), leaves, retain_graph=True, allow_unused=True),
            torch.autograd.grad(theirs.sum(), leaves, retain_graph=True, allow_unused=True),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


def test_autocast_computes_in_its_dtype_and_returns_gradients_in_the_weights():
    x, weights, biases = layers(torch.float32)
    leaves = leaves_of(x, weights, biases)
    with torch.autocast("cpu", torch.bfloat16):
        y = lk.packed_linear(leaves[0], leaves[1:4], leaves[4:])
    low = [t.detach().bfloat16() for t in leaves]
    assert torch.equal(y, lk.packed_linear(low[0], low[1:4], low[4:]))
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(y.float().sum(), leaves))


def test_only_what_needs_a_gradient_gets_one():
    x, weights, biases = layers()
    frozen = [w.detach() for w in weights]
    bias = [b.detach().requires_grad_() for b in biases]
    y = lk.packed_linear(x, frozen, bias)
    with FlopCounterMode(display=False) as flops:
        torch.autograd.grad(y.sum(), bias)
    assert flops.get_total_flops() == 0


def test_shapes_at_the_edge():
    x, weights, biases = layers()
    assert lk.packed_linear(x[:0], weights, biases).shape == (0, 4, sum(SIZES))
    one = x[0, 0].detach().requires_grad_()
    y = lk.packed_linear(one, weights, biases)
    torch.testing.assert_close(y, separately(one, weights, biases), rtol=0, atol=1e-12)
    torch.autograd.grad(y.sum(), one)
    expanded = x[:1].expand(3, -1, -1).transpose(0, 1)
    torch.testing.assert_close(lk.packed_linear(expanded, weights), separately(expanded, weights, None), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "error", "names"),
    [
        (lambda x, w, b: (x, [], None), ValueError, "weights"),
        (lambda x, w, b: (x, [w[0].t(), *w[1:]], b), ValueError, r"weights\[0\]"),
        (lambda x, w, b: (x, w, b[:2]), ValueError, "biases"),
        (lambda x, w, b: (x, w, [b[1], *b[1:]]), ValueError, r"biases\[0\]"),
        (lambda x, w, b: (x.long(), w, b), TypeError, "x"),
        (lambda x, w, b: (x, [w[0].float(), *w[1:]], b), TypeError, r"weights\[[01]\]"),
        (lambda x, w, b: (x, [w[0].to("meta"), *w[1:]], b), ValueError, r"weights\[0\]"),
    ],
)
def test_refusals(change, error, names):
    with pytest.raises(error, match=f"^{names}: got"):
        lk.packed_linear(*change(*layers()))
