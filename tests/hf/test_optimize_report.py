"""What `hf.optimize` says of an encoder that somebody else has changed, and what it refuses."""

import pytest
import torch
from torch import nn
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer, SiglipMLP

import laco_kernels as lk
from laco_kernels.hf import fusing
from laco_kernels.kernels import select
from tests.hf.encoders import STOCK, pixels
from tests.hf.optimised import classes, features, made


def counts(report):
    return {part.name.partition(" ")[0]: part.count for part in report.parts if not part.inactive}


class Own(nn.Module):
    """Somebody's block in the place of another."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


class OwnLayer(SiglipEncoderLayer):
    pass


class OwnMLP(SiglipMLP):
    pass


def wrap(module):
    forward = module.forward
    module.forward = lambda *args, **kwargs: forward(*args, **kwargs)


CHANGES = {
    "layer, its forward": (lambda layer: wrap(layer), "", "with a forward pass of its own", (3, 9)),
    "layer, its class": (lambda layer: setattr(layer, "__class__", OwnLayer), "", "a class of its own", (3, 9)),
    "norm": (lambda layer: setattr(layer, "layer_norm2", Own(layer.layer_norm2)), ".layer_norm2", "not the norm of", (3, 12)),
    "norm, its forward": (lambda layer: wrap(layer.layer_norm2), ".layer_norm2", "with a forward pass of its own", (3, 12)),
    "block": (lambda layer: setattr(layer, "mlp", Own(layer.mlp)), ".mlp", "not the feed-forward block", (4, 12)),
    "block, its class": (lambda layer: setattr(layer.mlp, "__class__", OwnMLP), ".mlp", "a class of its own", (4, 12)),
    "queries": (
        lambda layer: setattr(layer.self_attn, "q_proj", Own(layer.self_attn.q_proj)),
        ".self_attn",
        "its queries, keys and values are not linear layers alike",
        (4, 9),
    ),
}


# Who changes the class of a fused layer undoes the optimisation; layers inside adapters put in later go on sharing.
LATER = [change for change in CHANGES if "class" not in change and change != "queries"]


@pytest.mark.parametrize(("change", "when"), [*[(c, "before") for c in CHANGES], *[(c, "after") for c in LATER]])
def test_what_somebody_else_changed_is_named_and_not_counted(change, when):
    apply, name, reason, (layers, products) = CHANGES[change]
    model = made("siglip")
    expected = features(model, pixels())
    if when == "after":
        assert not lk.hf.optimize(model, impl="reference").left
    apply(model.encoder.layers[1])
    report = lk.hf.optimize(model, impl="reference")
    assert [left.names for left in report.left] == [(f"encoder.layers.1{name}",)]
    assert report.left[0].reason.startswith(reason)
    assert f"encoder.layers.1{name} (" in str(report)
    blocks = 3 if when == "before" and (change.startswith("block") or change == "layer, its class") else 4
    pairs = 3 if layers == 4 else 1  # of neighbours that hand on, the second being one of four
    assert counts(report) == {"residual": layers, "norm": pairs, "linear": products, "feed-forward": blocks, "patch": 1}
    torch.testing.assert_close(features(model, pixels()), expected, rtol=1e-9, atol=1e-9)
    assert lk.hf.optimize(model, impl="reference") == report


def test_layers_inside_adapters_go_on_sharing():
    model = made("siglip")
    report = lk.hf.optimize(model, impl="reference")
    attention = model.encoder.layers[1].self_attn
    attention.q_proj = Own(attention.q_proj)
    assert lk.hf.optimize(model, impl="reference") == report


def test_many_are_named_together():
    model = made("siglip")
    for layer in model.encoder.layers:
        wrap(layer)
    report = lk.hf.optimize(model, impl="reference")
    reason = "left as it is, with a forward pass of its own"
    assert str(report).splitlines()[-1] == f"encoder.layers.0 and 3 more (SiglipEncoderLayer): {reason}"
    assert len(report.left) == 1
    assert len(report.left[0].names) == 4


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("family", "kind"), [("aimv2", "Aimv2RMSNorm"), ("aimv2", "Aimv2MLP"), ("clip", "LayerNorm")])
def test_a_class_patched_by_somebody_else_is_respected(family, kind, when, monkeypatch):
    model, calls = made(family), []
    patched = next(type(module) for module in model.modules() if type(module).__name__ == kind)
    forward = patched.forward

    def spy(self, x):
        calls.append(self)
        return forward(self, x)

    if when == "before":
        monkeypatch.setattr(patched, "forward", spy)
    lk.hf.optimize(model, impl="reference")
    if when == "after":
        monkeypatch.setattr(patched, "forward", spy)
    features(model, pixels())
    assert len(calls) == sum(isinstance(module, patched) for module in model.modules())
    report = lk.hf.optimize(model, impl="reference")
    assert f"the forward pass of {kind} was replaced" in str(report)
    if when == "before":
        monkeypatch.setattr(patched, "forward", forward)
    assert all(kind not in left.kind for left in lk.hf.optimize(made(family), impl="reference").left) is (when == "before")


def test_a_layer_that_has_come_since_is_fused_too():
    model = made("siglip")
    lk.hf.optimize(model, impl="reference")
    model.encoder.layers[1] = made("siglip").encoder.layers[1]
    assert counts(lk.hf.optimize(model, impl="reference")) == {
        "residual": 4,
        "norm": 3,
        "linear": 12,
        "feed-forward": 4,
        "patch": 1,
    }


@pytest.mark.parametrize("family", list(STOCK))
def test_parts_that_need_large_inputs_say_so(family, monkeypatch):
    chosen = select.Choice("triton", "measured")
    monkeypatch.setattr(select, "choose", lambda *_: chosen)
    monkeypatch.setattr(fusing, "LEAST", {False: 1000, True: 2000})
    monkeypatch.setattr("laco_kernels.hf.optimize_report.LEAST", fusing.LEAST)
    model = made(family)
    small = "on at least 1,000 elements, 2,000 with gradients"
    told = {part.name: part.only for part in lk.hf.optimize(model).parts if not part.inactive}
    layers = "residual sum, LayerScale and norm in one pass"
    assert told[layers] == (None if family == "aimv2" else small)
    if family == "clip":
        assert told["quick GELU in one pass"] == small
    if family == "aimv2":
        assert told["RMSNorm in one pass"] is None
    lines = str(lk.hf.optimize(model, graphs=True)).splitlines()
    assert (f"{layers}: 4, {small}, or of any size in a graph" in lines) is (family != "aimv2")
    assert not any(part.only for part in lk.hf.optimize(model, impl="reference").parts)


@pytest.mark.parametrize(
    ("options", "error", "name"),
    [
        ({"batch_sizes": 4, "graphs": True}, TypeError, "batch_sizes"),
        ({"batch_sizes": None, "graphs": True}, TypeError, "batch_sizes"),
        ({"batch_sizes": "14", "graphs": True}, TypeError, "batch_sizes"),
        ({"batch_sizes": (0,), "graphs": True}, ValueError, "batch_sizes"),
        ({"batch_sizes": (True,), "graphs": True}, ValueError, "batch_sizes"),
        ({"batch_sizes": (2.0,), "graphs": True}, ValueError, "batch_sizes"),
        ({"batch_sizes": (1, 4)}, ValueError, "batch_sizes"),
        ({"max_bytes": "4GB"}, TypeError, "max_bytes"),
        ({"max_bytes": None}, TypeError, "max_bytes"),
        ({"max_bytes": float("nan")}, TypeError, "max_bytes"),
        ({"max_bytes": True}, TypeError, "max_bytes"),
        ({"max_bytes": -1}, ValueError, "max_bytes"),
        ({"graphs": "no"}, TypeError, "graphs"),
        ({"fuse": 1}, TypeError, "fuse"),
        ({"compile": None}, TypeError, "compile"),
        ({"clone": "yes"}, TypeError, "clone"),
        ({"impl": ["triton"]}, ValueError, "impl"),
    ],
)
def test_options_out_of_range_are_refused(options, error, name):
    model = made("clip", num_hidden_layers=1)
    before = classes(model)
    with pytest.raises(error, match=rf"^{name}: got .*, expected .*\. "):
        lk.hf.optimize(model, **options)
    assert classes(model) == before
