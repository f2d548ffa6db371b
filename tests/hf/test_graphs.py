"""What decides whether a CUDA graph may be replayed; the graphs themselves are tested on a GPU."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import laco_kernels as lk
from laco_kernels.hf import graphs
from laco_kernels.hf.graphs import Anatomy, Captured, GraphedForward
from tests.hf.encoders import compressed, pixels, stock
from tests.hf.optimised import features


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


class Replay:
    """What stands in for a graph and for what orders it among streams: it computes again."""

    def __init__(self, again=lambda: None):
        self.replay = again

    def wait_event(self, _):
        pass

    def record(self, _):
        pass


class Captures(list):
    replays = 0


@pytest.fixture
def captures(monkeypatch):
    """The batch sizes of which a graph of 100 bytes was made, on a processor that passes for a GPU; ``replays`` of all."""
    made = Captures()

    def capture(self, args, kwargs, tensors, padded):
        made.append(padded)
        inputs = [torch.zeros(padded, *t.shape[1:], dtype=t.dtype) for t in tensors]

        def run():
            with torch.no_grad():
                return tree_flatten(self.forward(*inputs, **kwargs))

        def again():
            made.replays += 1
            for output, new in zip(outputs, run()[0], strict=True):
                output.copy_(new)

        outputs, spec = run()
        return Captured(Replay(again), inputs, outputs, spec, 100)

    monkeypatch.setattr(GraphedForward, "_capture", capture)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Replay())
    monkeypatch.setattr(torch.cuda, "Event", Replay)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    return made


def graphed(**options):
    model = stock("siglip", attn_implementation="eager").requires_grad_(False)
    lk.hf.optimize(model, fuse=False, graphs=True, **options)
    return model


def vmapped(model, x):
    return torch.func.vmap(lambda image: model(image[None]).last_hidden_state[0])(x)


def jvp(model, x):
    return torch.func.jvp(lambda x: model(x).last_hidden_state, (x,), (x.cos(),))[1]


def dual(model, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(x, x.cos())).last_hidden_state).tangent


def derived(model, x):
    return torch.func.grad(lambda x: model(x).last_hidden_state.square().sum())(x)


class Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def dispatched(model, x):
    with Dispatch():
        return features(model, x)


class Function(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def overridden(model, x):
    with Function():
        return features(model, x)


class Subclass(torch.Tensor):
    pass


def subclassed(model, x):
    return features(model, x.as_subclass(Subclass)).as_subclass(torch.Tensor)


SEEN = [vmapped, jvp, dual, derived, dispatched, overridden, subclassed]


@pytest.mark.parametrize("call", SEEN)
def test_what_looks_at_the_pass_sees_it(call, captures):
    model, x = graphed(), pixels()
    expected = call(stock("siglip", attn_implementation="eager").requires_grad_(False), x)
    features(model, x)
    torch.testing.assert_close(call(model, x), expected)
    assert captures == [2]
    assert captures.replays == 1
    with torch.device("cpu"):  # a mode, too, which is no reason
        features(model, pixels(batch=3))
    assert captures == [2, 3]
    assert captures.replays == 2


def test_shapes_for_which_there_is_no_room_run_without_a_graph(captures, monkeypatch):
    monkeypatch.setattr(graphs, "PATIENCE", 5)
    model = graphed(max_bytes=250)
    expected = {batch: features(stock("siglip"), pixels(batch=batch)) for batch in range(1, 5)}

    def held(*batches):
        for batch in batches:
            torch.testing.assert_close(features(model, pixels(batch=batch)), expected[batch])
        return sum(captured.nbytes for captured in model.forward.graphs.values())

    assert held(1, 2, 1) == 200
    with pytest.warns(UserWarning, match=r"no room for 100 bytes more among max_bytes=250") as told:
        assert held(3, 1, 2, 3, 4, 3) == 200
    assert len(told) == 1
    assert captures == [1, 2, 3, 4]
    assert held(2, 2, 2, 3) == 200
    assert captures == [1, 2, 3, 4, 3], "batches of one have not come for a while"
    assert held(3, 2, 3, 2) == 200
    assert len(captures) == 5
    model = graphed(max_bytes=99)
    with pytest.warns(UserWarning, match="no room"):
        assert held(1, 1, 1, 1, 1, 1, 1, 1) == 0
    assert len(captures) == 6
