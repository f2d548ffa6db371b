"""`hf.patch` and `hf.unpatch`: the same numbers, names and checkpoints, by the fused operators."""

import collections
import copy
import importlib
import pickle
import subprocess
import sys

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForImageTextToText

import laco_kernels as lk
from laco_kernels import testing
from laco_kernels.hf import connectors
from tests.hf.multimodal import ALIKE, MODELS, alike, built, connectors_of, features_of, inputs
from tests.hf.optimised import classes

families = pytest.mark.parametrize("family", list(MODELS))
IMPLS = ["reference", "triton"]  # the latter interpreted where there is no GPU

MERGE = {"patch_merge": 1, "patch_merge_backward": 1}
CONV = {"strided_conv": 1, "strided_conv_backward": 1}
NORM = {"add_norm": 1, "add_norm_backward": 1}
CALLS = {
    "internvl": MERGE,
    "qwen2_vl": MERGE,
    "qwen2_5_vl": MERGE | NORM,
    "qwen3_vl": {"patch_merge": 2, "patch_merge_backward": 2},
    "idefics3": CONV,
    "smolvlm": CONV,
    "llama4": {"strided_conv_gelu": 2, "strided_conv_gelu_backward": 2},
    "gemma3": NORM,
    "llava": MERGE,
}


class Calls(TorchDispatchMode):
    """Counts this library's operators, and torch's."""

    def __init__(self):
        super().__init__()
        self.laco, self.aten = collections.Counter(), collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, _, name = func._schema.name.partition("::")
        if namespace in ("laco", "aten"):
            getattr(self, namespace)[name] += 1
        return func(*args, **(kwargs or {}))


def everything(model, named):
    """Logits, and their gradients with respect to the pixels and all parameters."""
    pixels = named["pixel_values"].detach().requires_grad_()
    logits = model(**named | {"pixel_values": pixels}).logits
    grad = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)
    leaves = {"pixels": pixels, **dict(model.named_parameters())}
    found = torch.autograd.grad(logits, list(leaves.values()), grad, allow_unused=True)
    return {"logits": logits.detach(), **{name: g for name, g in zip(leaves, found, strict=True) if g is not None}}


@pytest.mark.parametrize("impl", [None, *IMPLS])
@families
def test_outputs_and_gradients_stay(family, impl):
    model, named = built(family), inputs(family)
    before, expected = classes(model), everything(model, named)
    names = MODELS[family][3]
    assert all(expected[n].abs().max() > 1e-6 for n in expected if any(n.startswith(name) for name in names)), "unused"
    report = lk.hf.patch(model, impl=impl)
    assert [part.name for part in report.replaced] == names
    assert all(part.inactive is None for part in report.replaced), str(report)
    assert [name for name, kind in classes(model).items() if before[name] is not kind] == names
    found = everything(model, named)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-10)
    lk.hf.unpatch(model)
    assert classes(model) == before
    assert not any("impl" in module.__dict__ for module in model.modules())
    assert all(torch.equal(value, expected[name]) for name, value in everything(model, named).items())


@pytest.mark.parametrize("package", list(ALIKE))
def test_families_that_share_a_connector(package):
    connector, x = alike(package)

    def everything():
        y = connector(x)
        return y, *torch.autograd.grad(y.square().sum(), [x, *connector.parameters()])

    expected = everything()
    (part,) = lk.hf.patch(connector, impl="triton").replaced
    assert (part.name, part.kind, part.inactive) == ("", ALIKE[package], None)
    with Calls() as calls:
        found = everything()
    assert calls.laco == MERGE
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_every_family_is_tested():
    assert {*MODELS, *ALIKE} == {family.package for family in connectors.FAMILIES}
    assert CALLS.keys() == MODELS.keys()


@families
def test_the_operators_are_called(family):
    model, named = built(family, torch.float32), inputs(family, torch.float32)
    with Calls() as calls:
        everything(model, named)
    assert not calls.laco
    stock = calls.aten
    lk.hf.patch(model)
    with Calls() as calls:
        everything(model, named)
    assert calls.laco == CALLS[family]
    assert ("avg_pool2d" in stock) == (family == "gemma3")
    assert "avg_pool2d" not in calls.aten


@pytest.fixture
def precise_norms(monkeypatch):
    """Stock RMSNorms that compute in float64 what they are given in float64."""
    qwen = importlib.import_module("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl").Qwen2_5_VLRMSNorm
    gemma = importlib.import_module("transformers.models.gemma3.modeling_gemma3").Gemma3RMSNorm
    for kind, eps, offset in ((qwen, "variance_epsilon", 0.0), (gemma, "eps", 1.0)):

        def forward(self, x, stock=kind.forward, eps=eps, offset=offset):
            if x.dtype != torch.float64:
                return stock(self, x)
            return nn.functional.rms_norm(x, x.shape[-1:], self.weight + offset, getattr(self, eps))

        monkeypatch.setattr(kind, "forward", forward)


PRECISIONS = [(impl, dtype) for impl in IMPLS for dtype in (torch.float32, torch.float16)] + [("reference", torch.bfloat16)]


@pytest.mark.usefixtures("precise_norms")
@pytest.mark.parametrize(("impl", "dtype"), PRECISIONS, ids=str)
@families
def test_errors_stay(family, impl, dtype):
    for module, x in zip(connectors_of(family, built(family, dtype)), features_of(family, dtype), strict=True):
        exact = copy.deepcopy(module).double()

        def everything(connector, x):
            x = x.detach().requires_grad_()
            y = connector(x)
            grad = torch.linspace(-1, 1, y.numel()).to(dtype).to(y.dtype).view_as(y)
            return y, *torch.autograd.grad(y, [x, *connector.parameters()], grad)

        truth, eager = everything(exact, x.double()), everything(module, x)
        lk.hf.patch(module, impl=impl)
        for ours, theirs, right in zip(everything(module, x), eager, truth, strict=True):
            error, budget, ok = testing.compare(ours, theirs, right, [])
            assert ok, (error, budget)


@pytest.mark.usefixtures("precise_norms")
@families
def test_under_autocast_dtypes_stay_and_errors_too(family):
    for dtype in (torch.float32, torch.bfloat16):
        model = built(family, torch.float32)
        for module, x in zip(connectors_of(family, model), features_of(family, dtype), strict=True):
            truth = copy.deepcopy(module).double()(x.double())
            with torch.autocast("cpu", torch.bfloat16):
                eager = module(x)
                lk.hf.patch(module)
                ours = module(x)
            assert ours.dtype == eager.dtype
            error, budget, ok = testing.compare(ours, eager, truth, [])
            assert ok, (error, budget)


@families
def test_parameters_names_and_config_stay(family):
    model = built(family)
    before = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    keys, config = list(model.state_dict()), model.config.to_dict()
    lk.hf.patch(model)
    assert {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()} == before
    assert list(model.state_dict()) == keys
    assert model.config.to_dict() == config


def test_it_is_idempotent_and_takes_another_impl():
    model = built("qwen3_vl")
    before = classes(model)
    first = lk.hf.patch(model)
    shape = classes(model)
    assert lk.hf.patch(model) == first
    assert classes(model) == shape
    lk.hf.patch(model, impl="triton")
    assert {module.impl for module in connectors_of("qwen3_vl", model)} == {"triton"}
    lk.hf.unpatch(model)
    lk.hf.unpatch(model)  # nothing left to do
    assert classes(model) == before


def test_the_report_names_what_was_left_and_why():
    report = lk.hf.patch(built("llama4"))
    assert str(report) == (
        "vision_model.vision_adapter (Llama4VisionPixelShuffleMLP): strided_conv_gelu\n"
        "multi_modal_projector (Llama4MultiModalProjector): left as it is, a single product, with nothing around it to fuse"
    )
    model = nn.ModuleDict({"one": built("llava"), "other": type("VoiceConnector", (nn.Module,), {})()})
    (left,) = lk.hf.patch(model).left
    assert (left.name, left.kind) == ("other", "VoiceConnector")


@families
def test_saved_as_a_stock_checkpoint(family, tmp_path):
    model, named = built(family, torch.float32), inputs(family, torch.float32)
    expected = model(**named).logits
    lk.hf.patch(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(model)
    assert loaded.config.architectures == [MODELS[family][0]]
    assert not any(isinstance(module, connectors.Connector) for module in loaded.modules())
    state = loaded.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(loaded(**named).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
@families
def test_copies_stand_alone(family, copied):
    model, named = built(family), inputs(family)
    report = lk.hf.patch(model, impl="reference")
    twin = copied(model)
    assert classes(twin) == classes(model)
    expected = model(**named).logits
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(twin(**named).logits, expected, rtol=1e-12, atol=1e-12)
    lk.hf.unpatch(model)
    assert lk.hf.patch(twin, impl="reference") == report


def test_unpickled_elsewhere_and_imported_when_needed(tmp_path):
    connector, _ = alike("llava_next")
    lk.hf.patch(connector)
    (tmp_path / "connector").write_bytes(pickle.dumps(connector))
    code = f"""
import pickle, sys
import laco_kernels.hf
loaded = {{name.split(".")[2] for name in sys.modules if name.startswith("transformers.models.") and ".modeling_" in name}}
assert not loaded & {{"llava_next", "llama4", "gemma3", "idefics3", "smolvlm", "qwen2_vl", "qwen2_5_vl"}}, loaded
connector = pickle.load(open({str(tmp_path / "connector")!r}, "rb"))
from transformers.models.llava_next.modeling_llava_next import LlavaNextMultiModalProjector
assert isinstance(connector, LlavaNextMultiModalProjector) and type(connector).__name__ == "FusedLlavaNextMultiModalProjector"
assert laco_kernels.hf.patch(connector).replaced
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


@families
def test_it_compiles_without_a_graph_break(family):
    model = built(family, torch.float32)
    module, x = connectors_of(family, model)[0], features_of(family, torch.float32)[0]
    expected = module(x)
    stock_gradients = torch.autograd.grad(expected.sum(), list(module.parameters()))
    lk.hf.patch(model, impl="reference")
    torch._dynamo.reset()
    seen = []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes if "laco" in str(node.target))
        return graph

    torch.compile(module, fullgraph=True, backend=backend)(x)
    assert {name.split(".")[1] for name in seen} == {op for op in CALLS[family] if "backward" not in op}
    y = torch.compile(module, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(torch.autograd.grad(y.sum(), list(module.parameters())), stock_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "llava"])
def test_compiled_once_for_any_number_of_tokens(family):
    (module,), (x,) = connectors_of(family, built(family, torch.float32)), features_of(family, torch.float32)
    lk.hf.patch(module, impl="reference")
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    for tokens in (64, 32, 12):
        part = (x[:, :tokens] if x.dim() == 3 else x[:tokens]).clone()
        torch.testing.assert_close(compiled(part), module(part))
    assert counter.frame_count == 1
