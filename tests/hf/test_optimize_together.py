"""Optimised encoders and patched connectors with what wraps models: PEFT's adapters, data parallelism, sharded parameters."""

import pytest
import torch
from torch import nn
from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector

import laco_kernels as lk
from laco_kernels.hf import fused
from laco_kernels.hf.graphs import Anatomy
from tests.hf.encoders import STOCK, compressed, pixels, stock
from tests.hf.multimodal import built, inputs
from tests.hf.test_patch import Calls
from tests.processes import WORLD, run_together


def encoder(optimised):
    model = compressed(stock("aimv2"), layer=2).train()
    if optimised:
        lk.hf.optimize(model, impl="reference")
    return model


def loss(model, images):
    return model(images).last_hidden_state.square().sum((1, 2)).mean()


def own(images, rank):
    return images.chunk(WORLD)[rank]


def trained(wrap, rank, optimised):
    """Take a step and return the parameters in full."""
    model = encoder(optimised)
    wrapped = wrap(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=1e-3)
    loss(wrapped, own(pixels(batch=4), rank)).backward()
    optimizer.step()
    return {name: p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for name, p in model.named_parameters()}


def assert_trained_alike(wrap, rank):
    plain, ours = (trained(wrap, rank, optimised) for optimised in (False, True))
    before = dict(encoder(False).named_parameters())
    assert sum(not torch.equal(value, before[name]) for name, value in plain.items()) > 40
    for name, value in plain.items():
        # AIMv2's stock norm takes float64 through float32.
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6)


def ddp(rank):
    assert_trained_alike(nn.parallel.DistributedDataParallel, rank)


def fsdp(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def shard(model):
        mesh = init_device_mesh("cpu", (WORLD,))
        for layer in (*model.encoder.layers, model):
            fully_shard(layer, mesh=mesh)
        assert all(type(p).__name__ == "DTensor" for p in model.parameters()), "something is not sharded"
        return model

    assert_trained_alike(shard, rank)
    model = shard(encoder(False))
    for options in ({"graphs": True}, {}):
        with pytest.raises(ValueError, match=r"^encoder: got sharded parameters"):
            lk.hf.optimize(model, **options)
    with pytest.raises(RuntimeError, match=r"^graphs: got sharded parameters"):
        Anatomy(model)


def trained_behind_a_connector(wrap, rank, patched):
    """Take a step of a multimodal model and return the parameters in full."""
    model = built("internvl").train()
    if patched:
        lk.hf.patch(model)
    wrapped = wrap(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=1e-2)
    named = {name: own(value, rank) for name, value in inputs("internvl").items()}
    with Calls() as calls:
        wrapped(**named).logits.square().mean().backward()
    assert bool(calls.laco) is patched
    optimizer.step()
    return {name: p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for name, p in model.named_parameters()}


def assert_connectors_train_alike(wrap, rank):
    plain, ours = (trained_behind_a_connector(wrap, rank, patched) for patched in (False, True))
    before = dict(built("internvl").named_parameters())
    assert all(not torch.equal(plain[name], before[name]) for name in plain if "multi_modal_projector" in name)
    for name, value in plain.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-9, atol=1e-9)


def ddp_of_connectors(rank):
    def wrap(model):
        return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)

    assert_connectors_train_alike(wrap, rank)


def fsdp_of_connectors(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def shard(model):
        mesh = init_device_mesh("cpu", (WORLD,))
        for part in (model.model.multi_modal_projector, model):
            fully_shard(part, mesh=mesh)
        return model

    assert_connectors_train_alike(shard, rank)
    model = built("internvl")
    lk.hf.patch(model)
    shard(model)
    assert isinstance(model.model.multi_modal_projector, InternVLMultiModalProjector)
    with pytest.raises(RuntimeError, match=r"^model: got a connector that has become a FSDP"):
        lk.hf.unpatch(model)


CHECKS = [ddp, fsdp, ddp_of_connectors, fsdp_of_connectors]


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    return run_together(CHECKS, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_on_two_processes(failures, check):
    for rank, failed in enumerate(failures):
        assert check not in failed, f"rank {rank}:\n{failed[check]}"


@pytest.mark.parametrize("first", ["optimize", "adapt"])
@pytest.mark.parametrize("family", list(STOCK))
def test_adapters_train_alike(family, first):
    from peft import LoraConfig, get_peft_model

    targets = {
        "aimv2": ["q_proj", "gate_proj"],
        "siglip": ["k_proj", "fc1"],
        "internvl": ["v_proj"],
        "clip": ["q_proj", "v_proj"],
    }
    config = LoraConfig(target_modules=targets[family], modules_to_save=["merge"], init_lora_weights=False)
    results = []
    for optimised in (False, True):
        model = compressed(stock(family), layer=2)
        if optimised and first == "optimize":
            lk.hf.optimize(model, impl="reference")
        torch.manual_seed(7)
        tuned = get_peft_model(model, config)
        if optimised and first == "adapt":
            lk.hf.optimize(tuned.get_base_model(), impl="reference")
        assert any(isinstance(m, fused.FusedLayer) for m in tuned.modules()) is optimised
        value = loss(tuned.get_base_model(), pixels())
        value.backward()
        results.append({n: p.grad for n, p in tuned.named_parameters() if p.requires_grad})
    plain, ours = results
    assert plain.keys() == ours.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-6, atol=1e-8)
