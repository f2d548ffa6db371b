"""What only a GPU can show. `make gpu-test` runs these; without one they are skipped."""

import pytest
import torch

from laco_kernels import testing
from laco_kernels.testing import Case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
IMPLS = ["triton", "composite", "cuda"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def every(cases, impls=IMPLS):
    """Cases in the implementations that can do them; test_cuda_kernels.py says what ``"cuda"`` must."""
    wanted = [(case, impl) for case in cases for impl in impls]
    able = [each for each in wanted if each[1] != "cuda" or testing.refusal(*each, torch.bfloat16, "cuda") is None]
    return pytest.mark.parametrize(("case", "impl"), able, ids=["-".join(map(str, each)) for each in able])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*testing.CASES, *testing.LARGE_CASES], ids=str)
def test_the_numerical_promise(case, dtype):
    able = [impl for impl in IMPLS if testing.refusal(case, impl, dtype, "cuda") is None]
    assert {"triton", "composite"} <= {*able}
    yardstick = testing.Yardstick(case, dtype, "cuda")
    assert not [row for impl in able for row in yardstick.check(impl) if not row.ok]


@every(testing.LARGE_CASES)
def test_two_hundred_and_fifty_runs_are_bitwise_equal(case, impl):
    inputs = case.inputs(torch.bfloat16, "cuda")
    with torch.no_grad():
        grad = torch.randn_like(case(inputs, impl))
    first = testing.gradients(case, inputs, impl, grad)
    for _ in range(250):
        again = testing.gradients(case, inputs, impl, grad)
        assert all(torch.equal(first[name], again[name]) for name in first)


@every(testing.LARGE_CASES)
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


@every(testing.LARGE_CASES)
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


@every(testing.LARGE_CASES)
def test_two_streams_do_not_disturb_each_other(case, impl):
    inputs = [case.inputs(torch.bfloat16, "cuda", seed) for seed in (0, 1)]
    with torch.no_grad():
        expected = [case(each, impl) for each in inputs]
        torch.cuda.synchronize()
        streams, found = [torch.cuda.Stream() for _ in inputs], ([], [])
        for _ in range(20):
            for stream, each, outputs in zip(streams, inputs, found, strict=True):
                with torch.cuda.stream(stream):
                    outputs.append(case(each, impl))
        torch.cuda.synchronize()
    for outputs, right in zip(found, expected, strict=True):
        assert all(torch.equal(output, right) for output in outputs)


@every([Case("patch_merge", {"batch": 2100, "channels": 1024, "hidden": 64}, {"grid": (32, 32)})])
def test_more_than_two_to_the_thirty_first_elements(case, impl):
    # 2.2e9 elements of x; output and gradient of the last image must be what they are alone, within the promise.
    alone = Case("patch_merge", {"batch": 1, "channels": 1024, "hidden": 64}, {"grid": (32, 32)})
    inputs = alone.inputs(torch.bfloat16, "cuda")
    grad = torch.randn(1, 256, 1024, device="cuda").bfloat16()
    x, wide = (torch.zeros(2100, n, 1024, dtype=torch.bfloat16, device="cuda") for n in (1024, 256))
    x[-1], wide[-1] = inputs["x"][0], grad[0]
    leaf = x.requires_grad_()
    y = case({**inputs, "x": leaf}, impl)
    (dx,) = torch.autograd.grad(y, leaf, wide)
    exact, eager = (
        {name: tensor.double() for name, tensor in inputs.items()},
        testing.gradients(alone, inputs, "reference", grad),
    )
    truth = testing.gradients(alone, exact, "reference", grad.double())
    for name, found in (("y", y[-1:]), ("dx", dx[-1:])):
        assert testing.compare(found.detach(), eager[name], truth[name], [])[2], name


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@every(testing.CASES)
def test_tensors_on_another_than_the_current_device(case, impl):
    assert not [row for row in testing.check_case(case, impl, torch.bfloat16, "cuda:1") if not row.ok]


@every(testing.CASES)
def test_a_compiled_call_equals_the_plain_one(case, impl):
    torch._dynamo.reset()
    inputs = case.inputs(torch.bfloat16, "cuda")
    grad = torch.randn_like(case(inputs, impl))
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    compiled = torch.compile(lambda *tensors: case(dict(zip(inputs, tensors, strict=True)), impl), fullgraph=True)
    found = torch.autograd.grad(compiled(*leaves), leaves, grad)
    for gradient, (name, expected) in zip(found, list(testing.gradients(case, inputs, impl, grad).items())[1:], strict=True):
        assert torch.equal(gradient, expected), name


@every(testing.CASES, impls=[*IMPLS, "reference"])
def test_autocast_computes_what_its_dtype_does(case, impl):
    """An odd grid too, whose residual takes a sum, which autocast on a GPU would widen."""
    inputs = case.inputs(torch.float32, "cuda")
    low = {name: tensor.bfloat16() for name, tensor in inputs.items()}
    grad = torch.randn_like(case(low, impl))
    with torch.autocast("cuda", torch.bfloat16):
        found = testing.gradients(case, inputs, impl, grad)
    expected = testing.gradients(case, low, impl, grad)
    assert found["y"].dtype == torch.bfloat16
    for name, tensor in found.items():
        assert torch.equal(tensor.bfloat16(), expected[name]), name
