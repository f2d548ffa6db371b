"""What the operators inside an encoder refuse: one clear error each, from the wrapper and from the fake."""

import pytest
import torch

from laco_kernels import ops

X, VECTOR = torch.randn(2, 3, 8), torch.randn(8)
REFUSALS = [
    ({"x": [[1.0]]}, TypeError, r"x: got list, expected a torch\.Tensor"),
    ({"x": torch.ones(2, 3, 8, dtype=torch.long)}, TypeError, r"x: got torch\.int64, expected a floating-point dtype"),
    ({"x": torch.tensor(1.0)}, ValueError, r"x: got 0 dimensions \(\), expected \[\.\.\., C\] with at least one channel"),
    ({"x": torch.ones(2, 0)}, ValueError, r"x: got 2 dimensions \(2, 0\), expected \[\.\.\., C\]"),
    ({"delta": X[:1]}, ValueError, r"delta: got \[1, 3, 8\], expected \[2, 3, 8\], the shape of x\. Expand it"),
    ({"delta": None, "scale": VECTOR}, ValueError, "scale: got a tensor without delta, expected None"),
    ({"weight": torch.randn(7)}, ValueError, r"weight: got \[7\], expected \[8\], one entry a channel of x"),
    ({"weight": torch.randn(1, 8)}, ValueError, r"weight: got \[1, 8\], expected \[8\]"),
    ({"weight": None}, TypeError, "weight: got NoneType, expected a torch.Tensor"),
    ({"bias": torch.randn(9)}, ValueError, r"bias: got \[9\], expected \[8\]"),
    ({"scale": torch.randn(())}, ValueError, r"scale: got \[\], expected \[8\]"),
    ({"weight": VECTOR.double()}, TypeError, r"weight: got torch\.float64, expected torch\.float32, the dtype of x"),
    ({"bias": VECTOR.to("meta")}, ValueError, "bias: got device meta, expected cpu, the device of x"),
    ({"kind": "batch"}, ValueError, "kind: got 'batch', expected one of 'layer', 'rms'"),
    ({"eps": -1.0}, ValueError, r"eps: got -1\.0, expected a number of at least 0"),
    ({"eps": float("nan")}, ValueError, "eps: got nan, expected a number of at least 0"),
    ({"eps": "1e-6"}, TypeError, "eps: got '1e-6', expected a number of at least 0"),
    ({"impl": "composite"}, ValueError, "impl: got 'composite', expected None or one of 'reference', 'triton' for add_norm"),
    ({"impl": "cuda"}, ValueError, "impl: got 'cuda', expected None or one of 'reference', 'triton' for add_norm"),
]


@pytest.mark.parametrize(("change", "error", "message"), REFUSALS)
def test_add_norm_refuses(change, error, message):
    arguments = {"x": X, "delta": X, "weight": VECTOR, "bias": VECTOR, "scale": VECTOR, **change}
    with pytest.raises(error, match=message):
        ops.add_norm(**arguments)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: ops.gated_silu(X[..., :7]),
            ValueError,
            "h: got 7 channels, expected an even number, gate and up side by side",
        ),
        (lambda: ops.gated_silu(X.long()), TypeError, r"h: got torch\.int64"),
        (lambda: ops.activate(X[..., :0]), ValueError, r"h: got 3 dimensions \(2, 3, 0\), expected \[\.\.\., C\]"),
        (
            lambda: ops.activate(X, activation="relu"),
            ValueError,
            "activation: got 'relu', expected one of 'gelu', 'gelu_tanh', 'q",
        ),
        (lambda: ops.activate(X, impl="composite"), ValueError, "impl: got 'composite', .* 'reference', 'triton' for activate"),
        (
            lambda: ops.gated_silu(X.bfloat16(), impl="triton"),
            RuntimeError,
            "impl: got 'triton', expected .* cannot compute in bf",
        ),
    ],
)
def test_activations_refuse(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_environment_may_name_what_an_operator_does_not_have(monkeypatch):
    monkeypatch.setenv("LACO_IMPL", "composite")
    with pytest.raises(
        ValueError, match="LACO_IMPL: got 'composite', expected None or one of 'reference', 'triton' for activate"
    ):
        ops.activate(X)
    monkeypatch.setenv("LACO_IMPL", "triton")
    assert ops.activate(X).shape == X.shape


def test_the_fakes_refuse_what_does_not_fit():
    x, vector = X.to("meta"), VECTOR.to("meta")
    settings = (torch.float32, "layer", 1e-6, "reference", False)
    with pytest.raises(ValueError, match=r"delta: got \[2, 2, 8\], expected \[2, 3, 8\]"):
        torch.ops.laco.add_norm(x, x[:, 1:], vector, None, None, *settings)
    with pytest.raises(ValueError, match=r"weight: got \[7\], expected \[8\]"):
        torch.ops.laco.add_norm(x, None, vector[1:], None, None, *settings)
    with pytest.raises(ValueError, match="h: got 7 channels"):
        torch.ops.laco.gated_silu(x[..., 1:], "reference")
    with pytest.raises(ValueError, match="activation: got 'relu'"):
        torch.ops.laco.activate(x, "relu", "reference")
