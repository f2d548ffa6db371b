"""The operators as registered torch operators: checked by torch, autocast, counted."""

import pytest
import torch
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from .cases import Calls, Mlp, every_activated_op, every_op, make, overload


@every_op
@pytest.mark.parametrize("frozen", [False, True])
def test_opcheck(case, frozen):
    tensors = make(case, frozen=case.activations if frozen else 0)
    torch.library.opcheck(overload(case), case.raw(*tensors))


@every_activated_op
def test_opcheck_without_saving(case):
    torch.library.opcheck(overload(case), case.raw(*make(case, grad=False), save=False))


@every_op
@pytest.mark.parametrize("frozen", [False, True])
def test_opcheck_of_the_backward_operator(case, frozen):
    tensors = make(case, frozen=case.activations if frozen else 0)
    with Calls() as spy:
        case.call(*tensors).sum().backward()
    ((func, args, _),) = spy.of(overload(case, "_backward"))
    detached = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, args)
    torch.library.opcheck(func, detached)


@every_op
def test_outputs_are_contiguous_and_new(case):
    tensors = make(case)
    outputs = tree_leaves(overload(case)(*case.raw(*tensors)))
    assert all(o.is_contiguous() for o in outputs)
    assert len({t.untyped_storage().data_ptr() for t in (*outputs, *tensors)}) == len(outputs) + len(tensors)


@every_op
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_forward_and_backward(case, dtype):
    tensors = make(case, dtype=torch.float32)
    with torch.autocast("cpu", dtype), Calls() as spy:
        y = case.call(*tensors)
    assert y.dtype == dtype
    y.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in tensors)
    ((_, args, outputs),) = spy.of(overload(case))
    floats = [t for a in args for t in (a if isinstance(a, list) else [a]) if isinstance(t, torch.Tensor)]
    if case is Mlp:  # which casts inside, so that no copies of the weights are kept
        assert [t is given for t, given in zip(floats, tensors, strict=True)] == [True] * len(tensors)
        floats = []
    assert {t.dtype for t in (*floats, *tree_leaves(outputs))} == {dtype}
    lowered = [t.detach().to(dtype).requires_grad_() for t in tensors]
    z = case.call(*lowered)
    z.float().sum().backward()
    assert torch.equal(y, z)
    for t, low in zip(tensors, lowered, strict=True):
        assert torch.equal(t.grad, low.grad.float())


@every_op
@pytest.mark.parametrize("frozen", [False, True])
def test_flop_formulas_count_what_the_reference_computes(case, frozen):
    counts = []
    for function in (case.call, case.reference):
        tensors = make(case, frozen=case.activations if frozen else 0)
        with FlopCounterMode(display=False) as forward:
            y = function(*tensors)
        with FlopCounterMode(display=False) as backward:
            y.sum().backward()
        counts.append((forward.get_total_flops(), backward.get_total_flops()))
    assert counts[0] == counts[1]
    assert counts[0][0] > 0
    assert counts[0][1] > counts[0][0] * (0.9 if frozen else 1.9)


@pytest.mark.parametrize(
    "call",
    [
        "lk.patch_merge(torch.randn(1, 4, 2), torch.randn(3, 8), None, torch.randn(2, 3), None, grid=(2, 2))",
        "lk.packed_linear(torch.randn(1, 4, 2), [torch.randn(3, 2)])",
    ],
)
def test_importing_leaves_distributed_tensors_alone(call):
    from tests.test_import import python

    done = python(f"""
import sys, torch, laco_kernels as lk
{call}
assert "torch.distributed.tensor" not in sys.modules
assert "laco_kernels.ops.sharding" not in sys.modules
import torch.distributed.tensor
{call}
assert "laco_kernels.ops.sharding" in sys.modules
""")
    assert done.returncode == 0, done.stderr
