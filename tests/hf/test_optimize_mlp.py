"""`hf.optimize`: feed-forward blocks with GELU as one operator, what they keep for the backward pass, and what they respect."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel

import laco_kernels as lk
from laco_kernels import testing
from laco_kernels.bench import cases
from laco_kernels.hf import fused_mlps, fusing
from laco_kernels.kernels import select
from laco_kernels.ops.gelu_mlp import run_gelu_mlp
from tests.hf.encoders import pixels
from tests.hf.full_size import REAL
from tests.hf.optimised import features, made

BLOCKS = ("siglip", "internvl", "clip")
families = pytest.mark.parametrize("family", BLOCKS)


@pytest.fixture
def blocks(monkeypatch):
    """The approximation, the implementation and the norm's input of every block that ran as one operator."""
    seen = []

    def spying(*args):
        seen.append(args[5:])
        return run_gelu_mlp(*args)

    monkeypatch.setattr(fused_mlps, "run_gelu_mlp", spying)
    return seen


def blocks_of(model):
    return [module for module in model.modules() if isinstance(module, fused_mlps.FusedGeluMLP)]


def outcome(model, x):
    model.zero_grad()
    y = model(x).last_hidden_state
    y.square().sum().backward()
    return [y.detach(), *[p.grad.clone() for p in model.parameters() if p.grad is not None]]


def assert_close(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def kept_bytes(model, x):
    """Return the bytes that a forward pass keeps for its backward pass, parameters left out, and the shapes of what is kept."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage, tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = model(x).last_hidden_state
    del y
    return sum(storage.nbytes() for storage, _ in kept.values()), [shape for _, shape in kept.values()]


def two_layers_of(name):
    """A real encoder at its width and with its tokens; the layers left out are alike."""
    config = AutoConfig.from_pretrained(cases.FOLDER / name)
    config.num_hidden_layers = 2
    model = AutoModel.from_config(config).bfloat16().train()
    side = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
    x = torch.zeros(1, 3, side, side, dtype=torch.bfloat16)
    return model, x


@pytest.mark.parametrize("name", REAL)
def test_a_training_step_keeps_at_most_three_quarters_of_what_eager_keeps(name):
    model, x = two_layers_of(name)
    eager, _ = kept_bytes(model, x)
    lk.hf.optimize(model, impl="reference")
    ours, _ = kept_bytes(model, x)
    assert ours <= 0.75 * eager, ours / eager


@pytest.mark.parametrize("name", REAL)
def test_where_the_norms_alone_are_trained_no_more_is_kept_than_eager_keeps(name):
    model, x = two_layers_of(name)
    for parameter, value in model.named_parameters():
        value.requires_grad_("norm" in parameter)
    eager, _ = kept_bytes(model, x)
    lk.hf.optimize(model, impl="reference")
    ours, _ = kept_bytes(model, x)
    assert ours <= 1.001 * eager, "a fused norm keeps a number more a token"


@families
def test_the_activation_and_its_input_are_not_kept(family, blocks):
    model, x = made(family, intermediate_size=52), pixels()

    def hidden():
        """How many tensors of an activation's size are kept; SigLIP's head has one token an image."""
        return sum(shape[-1] == 52 and shape.numel() >= 2 * 16 * 52 for shape in kept_bytes(model, x)[1])

    wide = [hidden()]
    lk.hf.optimize(model, impl="reference")
    wide.append(hidden())
    assert wide == [4 * (3 if family == "clip" else 2), 4]
    assert len(blocks) == 4
    assert all(norm is not None for *_, norm in blocks)


@families
def test_in_inference_only_a_measured_choice_runs_it(family, blocks, monkeypatch):
    model, x = made(family), pixels()
    expected = features(model, x)
    approximate = {"siglip": "tanh", "internvl": "none", "clip": "sigmoid"}[family]
    lk.hf.optimize(model, impl="reference")
    features(model, x)
    assert not blocks
    lk.hf.restore(model)
    asked, wins = [], ()

    def choose(op, direction, device, dtype, rows, form=None):
        asked.append((op, direction, form))
        fast = op == "gelu_mlp" and direction in wins
        return select.Choice("composite" if fast else "reference", "said so")

    monkeypatch.setattr(select, "choose", choose)
    monkeypatch.setattr(fusing, "LEAST", {False: 0, True: 0})
    lk.hf.optimize(model)
    for wins, runs in ((("forward",), (4, 0)), (("backward",), (0, 0)), (("forward", "backward"), (4, 4))):
        torch.testing.assert_close(features(model, x), expected, rtol=1e-9, atol=1e-9)
        assert len(blocks) == runs[0], wins
        blocks.clear()
        model(x)
        assert len(blocks) == runs[1], wins
        assert {tuple(args[:2]) for args in blocks} <= {(approximate, "composite")}
        blocks.clear()
    assert ("gelu_mlp", "backward", approximate) in asked


def test_named_triton_means_its_passes_between_the_products_of_torch(blocks):
    model, x = made("internvl"), pixels()
    expected = outcome(model, x)
    lk.hf.optimize(model, impl="triton")
    assert_close(outcome(model, x), expected)
    assert {args[1] for args in blocks} == {"composite"}


class Adapter(nn.Module):
    """As PEFT does it: the layer as a child, and something added to what it makes."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer

    def forward(self, x):
        return self.base_layer(x) + x.mean()


class OwnParameter(nn.Parameter):
    """As a quantised or sharded parameter is a class of its own."""


def wrap(parent, name):
    setattr(parent, name, Adapter(getattr(parent, name)))


CHANGES = {
    "an adapter on the first": lambda mlp: wrap(mlp, "fc1"),
    "an adapter on the second": lambda mlp: wrap(mlp, "fc2"),
    "another activation": lambda mlp: setattr(mlp, "activation_fn", nn.Tanh()),
    "its own forward": lambda mlp: mlp.fc2.__dict__.update(forward=lambda x: nn.Linear.forward(mlp.fc2, x) + 1),
    "a hook that changes": lambda mlp: mlp.activation_fn.register_forward_hook(lambda _m, _a, y: 2 * y),
    "a hook on a product": lambda mlp: mlp.fc1.register_forward_pre_hook(lambda _, args: (args[0] + 1,)),
    "a parameter of its own class": lambda mlp: setattr(mlp.fc2.weight, "__class__", OwnParameter),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@families
def test_what_somebody_has_changed_runs_as_it_is(family, change, blocks):
    model, x = made(family), pixels()
    twin = copy.deepcopy(model)
    lk.hf.optimize(model, impl="reference")
    change(blocks_of(model)[1])
    layers = next(module for module in twin.modules() if isinstance(module, nn.ModuleList))
    change(layers[1].mlp)
    assert_close(outcome(model, x), outcome(twin, x))
    assert len(blocks) == 3


@families
def test_an_input_that_a_hook_has_written_to_is_kept_as_it_is(family, blocks):
    model, x = made(family), pixels()
    twin = copy.deepcopy(model)
    lk.hf.optimize(model, impl="reference")
    layers = next(module for module in twin.modules() if isinstance(module, nn.ModuleList))
    for mlp in (blocks_of(model)[1], layers[1].mlp):
        mlp.register_forward_pre_hook(lambda _, args: (args[0].mul_(3),))
    layers[1].mlp.register_forward_pre_hook(lambda _, args: args)
    assert_close(outcome(model, x), outcome(twin, x))
    assert [norm is None for *_, norm in blocks] == [False, True, False, False]


@families
def test_a_hook_may_change_the_output_in_place(family, blocks):
    model, x = made(family), pixels()
    twin = copy.deepcopy(model)
    lk.hf.optimize(model, impl="reference")
    layers = next(module for module in twin.modules() if isinstance(module, nn.ModuleList))
    for mlp in (blocks_of(model)[1], layers[1].mlp):
        mlp.register_forward_hook(lambda _m, _a, y: y.mul_(3))
    assert_close(outcome(model, x), outcome(twin, x))
    assert len(blocks) == 4


@families
def test_a_norm_that_is_edited_before_the_backward_pass(family):
    """It runs again there: an edit that autograd cannot see reaches one gradient more, as ``optimize`` says."""
    results = []
    for optimised in (False, True):
        model, x = made(family), pixels()
        if optimised:
            lk.hf.optimize(model, impl="reference")
        layer = next(module for module in model.modules() if isinstance(module, nn.ModuleList))[1]
        norm = layer.layernorm_after if family == "internvl" else layer.layer_norm2
        y = model(x).last_hidden_state
        norm.weight.data.mul_(2)
        y.square().sum().backward()
        results.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        y = model(x).last_hidden_state
        with torch.no_grad():
            norm.weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
    changed = [name for name, grad in results[0].items() if not torch.allclose(grad, results[1][name], rtol=1e-8, atol=1e-8)]
    assert [name.partition("encoder.layer")[2].lstrip("s") for name in changed] == [".1.mlp.fc1.weight"]


@families
def test_patched_activations_are_respected(family, blocks, monkeypatch):
    model, x = made(family), pixels()
    lk.hf.optimize(model, impl="reference")
    activation = type(blocks_of(model)[0].activation_fn)
    stock, calls = getattr(activation, "stock", activation), []
    monkeypatch.setattr(stock, "forward", lambda self, x: calls.append(1) or x.tanh())
    outcome(model, x)
    assert not blocks
    assert len(calls) == 4 + (family == "siglip")  # whose head has one, too


@families
def test_training_under_autocast_keeps_the_promise(family, blocks):
    model, x = made(family), pixels()
    truth = outcome(model, x)
    model, x = model.float(), x.float()
    with torch.autocast("cpu", torch.bfloat16):
        eager = outcome(model, x)
        lk.hf.optimize(model, impl="reference")
        ours = outcome(model, x)
    assert len(blocks) == 4
    kept = [testing.compare(a, b, t, []) for a, b, t in zip(ours, eager, truth, strict=True)]
    broken = [(i, verdict) for i, verdict in enumerate(kept) if not verdict[2] and truth[i].abs().max() > 1e-6]
    assert not broken


@families
def test_a_compiler_traces_a_training_step(family):
    model, x = made(family, num_hidden_layers=2), pixels()
    expected = outcome(model, x)
    used = [p for p in model.parameters() if p.grad is not None]
    lk.hf.optimize(model, impl="reference")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    y = compiled(x).last_hidden_state
    model.zero_grad()
    y.square().sum().backward()
    ours = [y.detach(), *[p.grad for p in used]]
    assert_close(ours, expected)
