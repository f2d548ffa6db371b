"""What the tests of `hf.optimize` look at."""

import torch

from laco_kernels.hf.packs import PackedLinear
from tests.hf.encoders import compressed, stock


def made(family, kind="stock", **changes):
    encoder = stock(family, **changes)
    return encoder if kind == "stock" else compressed(encoder, layer=2)


def features(model, x):
    with torch.no_grad():
        return model(x).last_hidden_state


def classes(model):
    return {name: type(module) for name, module in model.named_modules()}


def packs_of(model):
    return list({id(m.pack): m.pack for m in model.modules() if isinstance(m, PackedLinear)}.values())
