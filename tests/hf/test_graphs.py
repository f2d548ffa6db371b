"""What decides whether a CUDA graph may be replayed; the graphs themselves are tested on a GPU."""

import copy
import pickle

import pytest
import torch
from torch import nn

import laco_kernels as lk
from laco_kernels.hf.graphs import Anatomy, GraphedForward
from tests.hf.encoders import compressed, pixels, stock


@pytest.fixture
def model():
    return compressed(stock("internvl"), layer=2)


def test_weights_that_change_in_place_are_where_they_were(model):
    anatomy = Anatomy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
    assert not anatomy.has_moved()
    assert not anatomy.has_changed()


@pytest.mark.parametrize(
    "move", [lambda m: m.float(), lambda m: lk.hf.optimize(m, impl="reference"), lambda m: m.encoder.layer[3].mlp.half()]
)
def test_weights_that_move_are_noticed(model, move):
    anatomy = Anatomy(model)
    move(model)
    assert anatomy.has_moved()


def test_what_is_replaced_is_noticed(model):
    anatomy = Anatomy(model)
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    assert anatomy.has_changed()
    anatomy = Anatomy(model)
    model.encoder.layer[1].mlp = nn.Identity()
    assert anatomy.has_changed()
    del model.layernorm
    assert Anatomy(model) is not None
    assert anatomy.has_changed()


def test_only_hooks_of_others_forbid_a_replay(model):
    anatomy = Anatomy(model)
    with torch.no_grad():
        model(pixels(), output_hidden_states=True)  # transformers puts its own hooks in place
    assert any(module._forward_hooks for module in model.modules())
    assert not anatomy.is_watched()
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        handle = getattr(model.encoder.layer[0].attention, register)(lambda *_: None)
        assert anatomy.is_watched()
        handle.remove()
    handle = model.register_forward_hook(lambda *_: None)  # the model itself is called
    assert not anatomy.is_watched()
    handle.remove()


def test_adapters_and_layers_that_train_forbid_it_too(model):
    from peft import LoraConfig, get_peft_model

    anatomy = Anatomy(model)
    model.encoder.layer[1].train()
    assert anatomy.is_watched()
    model.eval()
    assert not anatomy.is_watched()
    assert not anatomy.is_adapted
    assert Anatomy(get_peft_model(model, LoraConfig(target_modules=["q_proj"])).get_base_model()).is_adapted


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda graphed: pickle.loads(pickle.dumps(graphed))])
def test_copies_begin_without_graphs(model, copied):
    graphed = GraphedForward(model, model.forward, max_bytes=7, batch_sizes=(4, 2), clone=False)
    graphed.anatomy = Anatomy(model)
    twin = copied(graphed)
    assert (twin.max_bytes, twin.batch_sizes, twin.clone) == (7, [2, 4], False)
    assert twin.encoder is not model
    assert twin.anatomy is None
    assert not twin.graphs
    assert torch.equal(twin(pixels()).last_hidden_state, model(pixels()).last_hidden_state)
