"""Released weights, given by modules that are written as the authors' checkpoints imply: channel-major, nn.Sequential."""

import sys
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

import laco_kernels as lk
from laco_kernels.nn.released import channels_last

EXACT = {"rtol": 0, "atol": 1e-12}
GRID = (4, 6)
KEYS = ("linear1.weight", "linear1.bias", "linear2.weight", "linear2.bias")


class ReleasedModel(nn.Module):
    """8 blocks of width 4, fused and projected to width 10, with something else beside the projectors."""

    def __init__(self, dim=4, out_dim=10, k=2, num_tokens=1, num_blocks=8):
        super().__init__()
        self.k, self.num_tokens = k, num_tokens
        self.mm_projector = nn.Sequential(
            nn.Linear(k * k * dim // num_tokens, 4 * k * k * dim), nn.GELU(), nn.Linear(4 * k * k * dim, out_dim)
        )
        self.mm_projector_crosslayer = nn.Sequential(nn.Linear(num_blocks * dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.embed_tokens = nn.Embedding(3, 2)
        self.double()

    def fuse_blocks(self, xs):
        return self.mm_projector_crosslayer(torch.cat(xs, dim=-1))

    def fuse_space(self, x):
        image = x.transpose(1, 2).unflatten(2, GRID)
        merged = F.pixel_unshuffle(image, self.k).flatten(2).transpose(1, 2)
        return self.mm_projector(torch.stack(merged.chunk(self.num_tokens, -1), 2).flatten(1, 2))

    def checkpoint(self, prefix="model."):
        return {prefix + key: tensor for key, tensor in self.state_dict().items()}


def fusion(**options):
    return lk.nn.SpatialTokenFusion(**{"in_dim": 4, "out_dim": 10, "variant": "released", "dtype": torch.float64} | options)


def blocks_fusion(**options):
    return lk.nn.MultiBlockTokenFusion(**{"dim": 4, "variant": "released", "dtype": torch.float64} | options)


def test_columns_move_as_the_formula_says():
    c, area = 3, 4
    weight = torch.randn(5, c * area)
    moved = channels_last(weight, area)
    for p in range(area):
        for channel in range(c):
            assert torch.equal(moved[:, p * c + channel], weight[:, channel * area + p])


@pytest.mark.parametrize("prefix", ["", "model.", "base_model.model.model."])
@pytest.mark.parametrize("form", ["state dict", "safetensors", "torch", "old torch"])
def test_a_released_model_round_trips(prefix, form, tmp_path):
    model = ReleasedModel()
    source = model.checkpoint(prefix)
    if form == "safetensors":
        save_file(source, path := tmp_path / "model.safetensors")
        source = str(path)
    elif form != "state dict":
        torch.save(OrderedDict(source), path := tmp_path / "mm_projector.bin", _use_new_zipfile_serialization=form == "torch")
        source = path
    blocks, space = blocks_fusion(), fusion()
    assert blocks.load_released(source) is blocks
    assert space.load_released(source) is space
    xs = [torch.randn(2, 24, 4, dtype=torch.float64) for _ in range(8)]
    fused = blocks(xs)
    torch.testing.assert_close(fused, model.fuse_blocks(xs), **EXACT)
    torch.testing.assert_close(space(fused, GRID), model.fuse_space(fused), **EXACT)


@pytest.mark.parametrize(("kernel_size", "num_tokens"), [(1, 1), (1, 2), (2, 2), (2, 4)])
def test_other_sizes_round_trip(kernel_size, num_tokens):
    model = ReleasedModel(k=kernel_size, num_tokens=num_tokens)
    layer = fusion(kernel_size=kernel_size, num_tokens=num_tokens).load_released(model.checkpoint())
    x = torch.randn(2, 24, 4, dtype=torch.float64)
    torch.testing.assert_close(layer(x, GRID), model.fuse_space(x), **EXACT)


def test_the_sequential_itself_and_other_names_load_too():
    model = ReleasedModel()
    x = torch.randn(2, 24, 4, dtype=torch.float64)
    sequential = model.mm_projector.state_dict()
    torch.testing.assert_close(fusion().load_released(sequential)(x, GRID), model.fuse_space(x), **EXACT)
    names = {own: f"stf.{own.upper()}" for own in KEYS}
    renamed = dict(zip(names.values(), sequential.values(), strict=True)) | {"stf.other": torch.zeros(1)}
    layer = fusion().load_released(renamed, keys=names)
    torch.testing.assert_close(layer(x, GRID), model.fuse_space(x), **EXACT)


def test_weights_take_the_modules_dtype_and_the_checkpoint_stays_as_it_is():
    checkpoint = ReleasedModel().checkpoint()
    before = {key: tensor.clone() for key, tensor in checkpoint.items()}
    layer = fusion(dtype=torch.bfloat16).load_released(checkpoint)
    nn.init.zeros_(layer.linear2.weight)
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert all(torch.equal(checkpoint[key], before[key]) for key in before)


def change(**changes):
    """The checkpoint with keys, whose dots are written ``__``, replaced or (``None``) removed."""
    checkpoint = ReleasedModel().checkpoint("")
    checkpoint.update({key.replace("__", "."): tensor for key, tensor in changes.items()})
    return {key: tensor for key, tensor in checkpoint.items() if tensor is not None}


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (
            change(mm_projector__2__bias=None),
            ValueError,
            r"source: got missing mm_projector\.2\.bias, expected exactly mm_proj",
        ),
        (change(mm_projector__4__weight=torch.zeros(1)), ValueError, r"got unexpected mm_projector\.4\.weight, expected"),
        (
            change(mm_projector__0__weight=torch.zeros(64, 8), mm_projector__2__bias=None),
            ValueError,
            r"got missing mm_projector\.2\.bias; misshapen mm_projector\.0\.weight \[64, 8\] instead of \[64, 16\], expected",
        ),
        (change(mm_projector__2__bias=torch.zeros(10, dtype=torch.int8)), TypeError, r"mm_projector\.2\.bias: got torch\.int8"),
        (change(mm_projector__2__bias=[0.0]), TypeError, r"mm_projector\.2\.bias: got list"),
        (
            change(student__mm_projector__0__bias=torch.zeros(64)),
            ValueError,
            r"keys under 'mm_projector\.' and 'student\.mm_pro",
        ),
        ({"model.other.0.weight": torch.zeros(1)}, ValueError, r"source: got no key under 'mm_projector\.', .*keys=\{'linear1"),
        ({}, ValueError, r"source: got no key under 'mm_projector\.'"),
        ([1], TypeError, "source: got list, expected a state dict"),
    ],
)
def test_it_refuses_checkpoints(source, error, message):
    layer = fusion()
    before = [p.clone() for p in layer.parameters()]
    with pytest.raises(error, match=message):
        layer.load_released(source)
    assert all(torch.equal(p, q) for p, q in zip(layer.parameters(), before, strict=True))


def test_the_projectors_are_not_mistaken_for_each_other():
    only_space = {key: tensor for key, tensor in ReleasedModel().checkpoint().items() if "crosslayer" not in key}
    with pytest.raises(ValueError, match=r"source: got no key under 'mm_projector_crosslayer\.'"):
        blocks_fusion().load_released(only_space)
    only_blocks = {key: tensor for key, tensor in ReleasedModel().checkpoint().items() if "crosslayer" in key}
    with pytest.raises(ValueError, match=r"source: got no key under 'mm_projector\.'"):
        fusion().load_released(only_blocks)


def test_it_refuses_keys_and_modules():
    checkpoint = ReleasedModel().checkpoint()
    with pytest.raises(
        ValueError, match=r"keys: got names for linear1\.weight, expected names for linear1\.weight, linear1\.bi"
    ):
        fusion().load_released(checkpoint, keys={"linear1.weight": "0.weight"})
    with pytest.raises(ValueError, match="keys: got list"):
        fusion().load_released(checkpoint, keys=list(KEYS))
    with pytest.raises(ValueError, match=r"source: got missing a\.linear1\.weight, a\.linear1\.bias"):
        fusion().load_released(checkpoint, keys={own: f"a.{own}" for own in KEYS})
    for module in (fusion, blocks_fusion):
        with pytest.raises(ValueError, match="variant: got 'paper', expected 'released'"):
            module(variant="paper").load_released(checkpoint)
        with pytest.raises(ValueError, match="device: got meta"):
            module(device="meta").load_released(checkpoint)


def test_it_refuses_files(tmp_path):
    (tmp_path / "text.bin").write_text("not a checkpoint")
    (tmp_path / "word.bin").write_text("hello")
    (tmp_path / "text.safetensors").write_text("not a checkpoint")
    (tmp_path / "empty.bin").touch()
    torch.save({"mm_projector": nn.GELU()}, tmp_path / "code.bin")
    for name in ("text.bin", "word.bin", "text.safetensors", "empty.bin", "code.bin", "absent.bin", "absent.safetensors", "."):
        with pytest.raises(RuntimeError, match=r"source: got '.*' \(.+\), expected a \.safetensors file"):
            fusion().load_released(tmp_path / name)
    torch.save(torch.zeros(1), tmp_path / "tensor.bin")
    with pytest.raises(TypeError, match="source: got Tensor, expected a state dict"):
        fusion().load_released(tmp_path / "tensor.bin")


def test_without_safetensors_it_says_what_to_install(tmp_path, monkeypatch):
    save_file(ReleasedModel().checkpoint(), tmp_path / "model.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"source: got '.*model\.safetensors'.*pip install safetensors"):
        fusion().load_released(tmp_path / "model.safetensors")
