"""Losses that are no number: named, with the module they began in."""

import pytest
import torch
from torch import nn

from laco_kernels.train.finite import NonFinite, NonFiniteError, check_loss, first_non_finite

from ..hf.llava import llava


class Root(nn.Module):
    def forward(self, x):
        return {"state": (x, x.sqrt())}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), Root())
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 1)

    def forward(self, x, ids=None):
        return self.head(self.drop(self.inner(x)["state"][1]))


def positive():
    model = Model()
    with torch.no_grad():
        model.inner[0].weight.fill_(1)
        model.inner[0].bias.fill_(0)
    return model


def test_the_innermost_module_that_was_first_is_named():
    model = positive()
    x = torch.tensor([[1.0, 1, 1, 1], [-1, -1, -1, -1]])
    found = first_non_finite(model, {"x": x, "ids": ["a", "b"]})
    assert found == NonFinite("output", "inner.1", 4, 0, 8)
    assert str(found) == "the output of inner.1 (4 NaN and 0 infinite of 8 values)"
    assert first_non_finite(model, {"x": x.abs()}) is None
    assert not any(module._forward_hooks for module in model.modules())


def test_the_batch_and_the_weights_are_looked_at_first():
    model = positive()
    x = torch.ones(2, 4)
    x[0, 0] = torch.inf
    assert first_non_finite(model, {"x": x}) == NonFinite("input", "x", 0, 1, 8)
    with torch.no_grad():
        model.head.bias.fill_(torch.nan)
    assert str(first_non_finite(model, {"x": torch.ones(2, 4)})) == "the parameter head.bias (1 NaN and 0 infinite of 1 values)"


def test_random_numbers_are_as_if_nothing_was_drawn_and_the_mode_stays():
    model = positive()
    state = torch.random.get_rng_state()
    assert first_non_finite(model, {"x": torch.ones(2, 4)}) is None
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training


def test_an_error_of_the_model_is_raised_unless_something_was_found_before_it(monkeypatch):
    model = positive()

    def refuse(x):
        raise ValueError("out of range")

    monkeypatch.setattr(model.head, "forward", refuse)
    with pytest.raises(ValueError, match="out of range"):
        first_non_finite(model, {"x": torch.ones(1, 4)})
    assert first_non_finite(model, {"x": -torch.ones(1, 4)}).name == "inner.1"
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("place", ["model.vision_tower.encoder.layers.1.merge", "model.language_model.layers.1.mlp.up_proj"])
def test_in_a_real_model(place):
    model = llava("aimv2", depth=0.5)
    model.config.image_token_id = 9
    ids = torch.tensor([[5, 9, 9, 9, 9, 7]])

    def overflow(module, arguments, output):
        return (output[0] * torch.inf, *output[1:]) if isinstance(output, tuple) else output * torch.inf

    batch = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 56, 56), "labels": ids}
    assert first_non_finite(model, batch) is None
    handle = model.get_submodule(place).register_forward_hook(overflow)
    found = first_non_finite(model, batch)
    handle.remove()
    assert (found.kind, found.name) == ("output", place)


def test_a_loss_that_is_no_number_stops_with_step_samples_and_module():
    assert check_loss(torch.tensor(1.5), 3, ["a"]) == 1.5
    where = NonFinite("output", "inner.1", 4, 0, 8)
    with pytest.raises(
        NonFiniteError, match=r"loss: got nan at step 7, samples: a, 12, beginning in the output of inner\.1 \("
    ):
        check_loss(torch.tensor(torch.nan), 7, ["a", 12], where)
    with pytest.raises(NonFiniteError, match=r"loss: got -inf at step 0, samples: not known, expected a finite number\. Look"):
        check_loss(-torch.inf, 0)
