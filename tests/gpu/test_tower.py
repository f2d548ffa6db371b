"""What only a GPU can show of the operators inside an encoder. `make gpu-test` runs these; without one they are skipped."""

import pytest
import torch

from laco_kernels.testing import gradients as everything
from laco_kernels.testing_tower import CASES, LARGE_CASES, TowerCase, norm
from tests.tower import broken_promises, grads_like

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
large = pytest.mark.parametrize("case", LARGE_CASES, ids=str)


def drawn(case, seed=0):
    inputs = case.inputs(torch.bfloat16, "cuda", seed)
    with torch.no_grad():
        return inputs, grads_like(case(inputs, "reference"), torch.bfloat16, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, *LARGE_CASES], ids=str)
def test_the_numerical_promise(case, dtype):
    assert not broken_promises(case, "triton", dtype, "cuda")


@large
def test_two_hundred_and_fifty_runs_are_bitwise_equal(case):
    inputs, grads = drawn(case)
    first = everything(case, inputs, "triton", grads)
    for _ in range(250):
        again = everything(case, inputs, "triton", grads)
        assert all(torch.equal(first[name], again[name]) for name in first)


@large
def test_a_captured_graph_replays_forward_and_backward(case):
    (inputs, grads), (other, _) = drawn(case), drawn(case, seed=1)
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}

    def step():
        outputs = case(leaves, "triton")
        found = torch.autograd.grad(list(outputs.values()), list(leaves.values()), list(grads.values()))
        return {**outputs, **{f"d{name}": gradient for name, gradient in zip(leaves, found, strict=True)}}

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for name, tensor in leaves.items():
            tensor.copy_(other[name])
    graph.replay()
    expected = everything(case, other, "triton", grads)
    assert all(torch.equal(captured[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "case", [norm(2100, 1024, 1024, kind="rms", without=("bias", "scale")), TowerCase("gated_silu", (2100, 1024, 512))], ids=str
)
def test_more_than_two_to_the_thirty_first_elements(case):
    # 2.2e9 elements; the last image must come out as it does alone.
    small = TowerCase(case.op, (1, *case.shape[1:]), case.options, case.without)
    inputs = small.inputs(torch.bfloat16, "cuda")
    large = {name: t if t.dim() < 3 else t.new_zeros(len(t) * 2100, *t.shape[1:]) for name, t in inputs.items()}
    for name, tensor in large.items():
        tensor[-1:] = inputs[name][-1:]
    with torch.no_grad():
        outputs, expected = case(large, "triton"), small(inputs, "triton")
    assert all(torch.equal(outputs[name][-1:], expected[name]) for name in expected)


@pytest.mark.parametrize("case", LARGE_CASES[:3], ids=str)
def test_a_sequence_behind_its_class_token_is_read_in_place(case):
    inputs, grads = drawn(case)
    behind = {n: torch.cat([t[:, :1], t], 1)[:, 1:] if t.dim() == 3 else t for n, t in inputs.items()}
    allocated = {}
    for name, given in (("dense", inputs), ("behind", behind)):
        everything(case, given, "triton", grads)
        torch.cuda.reset_peak_memory_stats()
        # What was requested: the allocator's blocks depend on what was freed before.
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        found = everything(case, given, "triton", grads)
        allocated[name] = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
        expected = everything(case, inputs, "triton", grads)
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert allocated["behind"] == allocated["dense"]
