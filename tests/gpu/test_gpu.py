"""What only a GPU can show. `make gpu-test` runs these; without one they are skipped."""

import pytest
import torch

from laco_kernels import testing
from laco_kernels.testing import Case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
IMPLS = ["triton", "composite"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*testing.CASES, *testing.LARGE_CASES], ids=str)
def test_the_numerical_promise(case, impl, dtype):
    assert not [row for row in testing.check_case(case, impl, dtype, "cuda") if not row.ok]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", testing.LARGE_CASES, ids=str)
def test_two_hundred_and_fifty_runs_are_bitwise_equal(case, impl):
    inputs = case.inputs(torch.bfloat16, "cuda")
    with torch.no_grad():
        grad = torch.randn_like(case(inputs, impl))
    first = testing.gradients(case, inputs, impl, grad)
    for _ in range(250):
        again = testing.gradients(case, inputs, impl, grad)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", testing.LARGE_CASES, ids=str)
def test_a_captured_graph_replays_on_new_inputs(case, impl):
    inputs, other = (case.inputs(torch.bfloat16, "cuda", seed) for seed in (0, 1))
    with torch.no_grad():
        case(inputs, impl)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = case(inputs, impl)
        for name, tensor in inputs.items():
            tensor.copy_(other[name])
        graph.replay()
        assert torch.equal(y, case(other, impl))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", testing.LARGE_CASES, ids=str)
def test_a_captured_graph_replays_forward_and_backward(case, impl):
    inputs, other = (case.inputs(torch.bfloat16, "cuda", seed) for seed in (0, 1))
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    grad = torch.randn_like(case(leaves, impl).detach())
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            torch.autograd.grad(case(leaves, impl), list(leaves.values()), grad)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = torch.autograd.grad(case(leaves, impl), list(leaves.values()), grad)
    with torch.no_grad():
        for name, tensor in leaves.items():
            tensor.copy_(other[name])
    graph.replay()
    expected = testing.gradients(case, other, impl, grad)
    for name, gradient in zip(leaves, found, strict=True):
        assert torch.equal(gradient, expected[f"d{name}"])


@pytest.mark.parametrize("impl", IMPLS)
def test_more_than_two_to_the_thirty_first_elements(impl):
    # 2.2e9 elements of x; the last image must come out as it does alone.
    case = Case("patch_merge", {"batch": 2100, "channels": 1024, "hidden": 64}, {"grid": (32, 32)})
    small = Case("patch_merge", {"batch": 1, "channels": 1024, "hidden": 64}, {"grid": (32, 32)})
    inputs = small.inputs(torch.bfloat16, "cuda")
    x = torch.zeros(2100, 1024, 1024, dtype=torch.bfloat16, device="cuda")
    x[-1] = inputs["x"][0]
    with torch.no_grad():
        assert torch.equal(case({**inputs, "x": x}, impl)[-1], small(inputs, impl)[0])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", testing.CASES, ids=str)
def test_tensors_on_another_than_the_current_device(case, impl):
    assert not [row for row in testing.check_case(case, impl, torch.float32, "cuda:1") if not row.ok]
