"""Tokens that leave the patch embedding in block order: the same numbers, and no pass over them that puts them there."""

import copy
import pickle
import threading
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import laco_kernels as lk
from laco_kernels.geometry import Cascade
from laco_kernels.hf import fused_embeddings, fusing
from tests.hf.encoders import STOCK, compressed, pixels, stock
from tests.hf.optimised import classes, features

# Everything that these families' embeddings can be told: class tokens or none, positions learned, computed, interpolated, none.
VARIANTS = {
    "aimv2": ("aimv2", {}, {}),
    "aimv2 native": ("aimv2", {"is_native": True}, {}),
    "siglip": ("siglip", {}, {}),
    "siglip interpolated": ("siglip", {}, {"interpolate_pos_encoding": True}),
    "internvl": ("internvl", {}, {}),
    "internvl without positions": ("internvl", {"use_absolute_position_embeddings": False}, {}),
    "clip": ("clip", {}, {}),
    "clip interpolated": ("clip", {}, {"interpolate_pos_encoding": True}),
}
families = pytest.mark.parametrize("family", list(STOCK))
variants = pytest.mark.parametrize("variant", list(VARIANTS))
ANY_SIZE = ["aimv2 native", "siglip interpolated", "internvl", "clip interpolated"]


def pair(family, side=4, **changes):
    """A compressed encoder and the same one optimised."""
    model = compressed(stock(family, side, **changes), layer=2)
    twin = copy.deepcopy(model)
    lk.hf.optimize(twin, impl="reference")
    return model, twin


def images(rows, columns, batch=2):
    return torch.randn(batch, 3, rows * 14, columns * 14, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.fixture
def reordered(monkeypatch):
    """How many images' tokens have been put in block order by a pass over them, call by call."""
    calls, to_block_order = [], Cascade.to_block_order

    def spy(self, tokens, dim=1):
        if tokens.dim() == 3:  # else patch numbers
            calls.append(len(tokens))
        return to_block_order(self, tokens, dim)

    monkeypatch.setattr(Cascade, "to_block_order", spy)
    return calls


@pytest.mark.parametrize("ratio", [2, 3])
@variants
def test_features_and_gradients_stay(variant, ratio, reordered):
    family, changes, options = VARIANTS[variant]
    x = pixels(6).requires_grad_()
    model = compressed(stock(family, 6, **changes), layer=2, ratio=ratio)
    leaves = [x, *model.parameters()]

    def everything():
        y = model(x, **options).last_hidden_state
        grad = torch.linspace(-1, 1, y.numel(), dtype=x.dtype).view_as(y)
        return [y, *[g for g in torch.autograd.grad(y, leaves, grad, allow_unused=True) if g is not None]]

    expected = everything()
    assert reordered == [2]
    lk.hf.optimize(model, impl="reference")
    reordered.clear()
    found = everything()
    assert reordered == [1], "only what is added to every image"
    assert len(found) == len(expected) > len(list(model.embeddings.parameters()))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


class Written(TorchDispatchMode):
    """The operators that write all tokens of a batch: whose result is as large as they are and shares no memory with inputs."""

    def __init__(self, shape):
        super().__init__()
        self.size, self.width, self.names = torch.Size(shape).numel(), shape[-1], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        y = func(*args, **(kwargs or {}))
        if isinstance(y, torch.Tensor) and y.shape[-1:] == (self.width,) and y.numel() >= self.size:
            inputs = [x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)]
            if y.untyped_storage().data_ptr() not in inputs:
                self.names.append(func._schema.name.removeprefix("aten::"))
        return y


@families
def test_block_order_takes_no_pass_over_the_tokens(family):
    encoder, x, passes = stock(family, hidden_size=40), pixels(batch=5), {}
    for layout, optimised in (("raster", True), ("block", True), ("block", False)):
        model = compressed(encoder, layer=2, layout=layout)
        if optimised:
            lk.hf.optimize(model, impl="reference")
        with torch.no_grad(), Written((5, 16, 40)) as written:
            model.embeddings(x)
        passes[layout, optimised] = sorted(written.names)
    assert passes["block", True] == passes["raster", True]
    assert "add" in passes["block", True]
    assert "clone" in passes["block", False]


@dataclass(frozen=True)
class Order:
    """Any order of the patches behind a class token or none."""

    numbers: tuple[int, ...]
    prefix: int

    def to_block_order(self, tokens, dim=1):
        first = torch.arange(self.prefix)
        return tokens.index_select(dim, torch.cat([first, torch.tensor(self.numbers) + self.prefix]))


@pytest.mark.parametrize("kind", ["windows of windows", "shuffled"])
@families
def test_any_order(family, kind, monkeypatch):
    model, twin = pair(family, 8)
    numbers = torch.arange(64)
    if kind == "shuffled":
        numbers = numbers[torch.randperm(64, generator=torch.Generator().manual_seed(3))]
    else:
        numbers = numbers.view(2, 2, 2, 2, 2, 2).permute(0, 3, 1, 4, 2, 5).flatten()
    order, x = Order(tuple(numbers.tolist()), model.config.prefix_tokens), pixels(8)
    products, product = [], fused_embeddings.PatchProduct.product
    spy = lambda self, pixels, cuts: products.append(cuts.order) or product(self, pixels, cuts)  # noqa: E731
    monkeypatch.setattr(fused_embeddings.PatchProduct, "product", spy)
    found, expected = (encoder.embeddings.in_block_order(order, x) for encoder in (twin, model))
    assert products == [(0, 1) if kind == "shuffled" else (0, 3, 1, 4, 2, 5)]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (2, 6), (6, 2), (8, 8), (2, 2)])
@pytest.mark.parametrize("variant", ANY_SIZE)
def test_images_of_any_size(variant, rows, columns, reordered):
    family, changes, options = VARIANTS[variant]
    model, twin = pair(family, **changes)
    x = images(rows, columns)
    with torch.no_grad():
        expected, found = (encoder(x, **options).last_hidden_state for encoder in (model, twin))
    assert reordered == [2, 1]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_pixels_beyond_the_last_patch_are_left_out():
    model, twin = pair("siglip")
    x = torch.cat([pixels(), torch.full((2, 3, 56, 5), torch.nan, dtype=torch.float64)], 3)
    torch.testing.assert_close(features(twin, x), features(model, x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("variant", ANY_SIZE)
def test_an_odd_grid_keeps_raster_order(variant, reordered):
    family, changes, options = VARIANTS[variant]
    model, twin = pair(family, side=5, **changes)
    assert "inactive: a grid of 5 x 5 keeps raster order" in str(lk.hf.optimize(twin, impl="reference"))
    x = images(3, 4)
    with torch.no_grad():
        expected, found = (encoder(x, **options).last_hidden_state for encoder in (model, twin))
    assert not reordered
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_an_encoder_in_raster_layout_keeps_its_embeddings():
    model = compressed(stock("clip"), layer=2, layout="raster")
    before = type(model.embeddings)
    assert "window" not in str(lk.hf.optimize(model, impl="reference"))
    assert type(model.embeddings) is before


@families
def test_names_copies_and_the_way_back(family, reordered):
    model, twin = pair(family)
    assert isinstance(twin.embeddings, fused_embeddings.FusedEmbeddings)
    assert list(twin.state_dict()) == list(model.state_dict())
    assert "patches embedded window by window: 1" in str(lk.hf.optimize(twin, impl="reference")).splitlines()
    expected = features(model, pixels())
    for copied in (copy.deepcopy(twin), pickle.loads(pickle.dumps(twin))):
        reordered.clear()
        torch.testing.assert_close(features(copied, pixels()), expected, rtol=1e-10, atol=1e-10)
        assert reordered == [1]
    lk.hf.restore(twin)
    assert classes(twin) == classes(model)
    assert torch.equal(features(twin, pixels()), expected)


@families
def test_hooks_see_what_they_always_saw(family, reordered):
    model, twin = pair(family)
    names = [name for name, _ in model.embeddings.named_modules(prefix="embeddings")]

    def watched(encoder, chosen):
        seen, handles = {}, []
        for name in chosen:
            hook = lambda _, inputs, output, name=name: seen.__setitem__(name, (*inputs, output))  # noqa: E731
            handles.append(encoder.get_submodule(name).register_forward_hook(hook))
        features(encoder, pixels())
        for handle in handles:
            handle.remove()
        return seen

    for chosen in (names, *[[name] for name in names]):
        expected, found = watched(model, chosen), watched(twin, chosen)
        assert found.keys() == expected.keys() == set(chosen)
        for name in chosen:
            for ours, theirs in zip(found[name], expected[name], strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    reordered.clear()
    watched(twin, ["embeddings"])
    assert reordered == [1], "the embeddings themselves always made tokens in block order"


class Around(nn.Module):
    """As adapters do it: the module as a child, and something added to what it makes."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    @property
    def weight(self):
        return self.inner.weight

    def forward(self, x):
        y = self.inner(x)
        return y + torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("aimv2", "patch_embed"),
        ("aimv2", "rms_norm"),
        ("siglip", "patch_embedding"),
        ("siglip", "position_embedding"),
        ("internvl", "patch_embeddings"),
        ("internvl", "dropout"),
        ("clip", "patch_embedding"),
        ("clip", "position_embedding"),
    ],
)
def test_adapters_see_raster_order(family, name, reordered):
    results = []
    for encoder in pair(family):
        setattr(encoder.embeddings, name, Around(getattr(encoder.embeddings, name)))
        results.append(features(encoder, pixels()))
    assert reordered == [2, 2]
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


def test_masks_and_dropout_lie_as_they_always_did(reordered):
    model, twin = pair("internvl", use_mask_token=True, hidden_dropout_prob=0.5)
    mask = torch.rand(2, 16, generator=torch.Generator().manual_seed(4)) < 0.5
    with torch.no_grad():
        results = [encoder(pixels(), bool_masked_pos=mask).last_hidden_state for encoder in (model, twin)]
        torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(features(twin, pixels()), features(model, pixels()), rtol=1e-10, atol=1e-10)
        results = []
        for encoder in (model, twin):
            torch.manual_seed(6)
            results.append(encoder.embeddings.train()(pixels()))
        torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)
    assert reordered == [2, 2, 1, 2, 2, 2]


@variants
def test_no_images_and_one(variant):
    family, changes, options = VARIANTS[variant]
    model, twin = pair(family, **changes)
    for batch in (0, 1):
        found, expected = (encoder.embeddings(pixels()[:batch], **options) for encoder in (twin, model))
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_pixels_in_another_dtype():
    for family in ("siglip", "internvl", "clip"):
        model, twin = pair(family)
        x = pixels().float()
        torch.testing.assert_close(features(twin, x), features(model, x), rtol=1e-10, atol=1e-10)


def test_threads_and_sizes_do_not_meet():
    _, twin = pair("siglip")
    inputs = [images(rows, columns) for rows, columns in ((2, 4), (4, 2), (4, 4), (6, 2))]
    options = {"interpolate_pos_encoding": True}
    with torch.no_grad():
        expected = [twin(x, **options).last_hidden_state for x in inputs]
    wrong = []

    def work(i):
        for _ in range(20):
            with torch.no_grad():
                found = twin(inputs[i], **options).last_hidden_state  # threads may split a sum differently
                if found.shape != expected[i].shape or (found - expected[i]).abs().max() > 1e-10:
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_few_tokens_are_left_to_the_copy_unless_launches_are_free(monkeypatch, reordered):
    """As the measured choice goes on a GPU, where the copy of few tokens takes less time than what spares it."""
    model = compressed(stock("siglip"), layer=2)
    expected = features(model, pixels())
    lk.hf.optimize(model)
    monkeypatch.setattr(fusing, "LEAST", {False: 0, True: 0})
    assert torch.equal(features(model, pixels()), expected), "on a processor nothing changes, however many tokens"
    reordered.clear()
    monkeypatch.setattr(fused_embeddings.PatchProduct, "applies", lambda *_: True)
    monkeypatch.setattr(fusing, "LEAST", {False: 3 * 16 * 32, True: 4 * 16 * 32})
    for batch in (2, 3):
        features(model, pixels(batch=batch))
    with fusing.launches_are_free():
        features(model, pixels(batch=2))
    model(pixels(batch=3))
    model(pixels(batch=4))
    assert reordered == [2, 1, 1, 3, 1]


@families
def test_transforms_compilers_and_fake_tensors(family):
    model, twin = pair(family, num_hidden_layers=2)
    x = pixels()
    expected = model.embeddings(x)
    fused_embeddings.cuts_of.cache_clear()
    one_by_one = torch.func.vmap(lambda image: twin.embeddings(image[None])[0])(x)
    torch.testing.assert_close(one_by_one, expected, rtol=1e-10, atol=1e-10)
    fused_embeddings.cuts_of.cache_clear()
    gradient, theirs = (torch.func.grad(lambda x, m=m: m.embeddings(x).square().sum())(x) for m in (twin, model))
    torch.testing.assert_close(gradient, theirs, rtol=1e-10, atol=1e-10)
    fused_embeddings.cuts_of.cache_clear()
    derivatives = [torch.func.jvp(lambda x, m=m: m.embeddings(x), (x,), (x.cos(),))[1] for m in (twin, model)]
    torch.testing.assert_close(*derivatives, rtol=1e-10, atol=1e-10)
    compiled = torch.compile(twin.embeddings, fullgraph=True)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-10, atol=1e-10)
    fused_embeddings.cuts_of.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert twin.embeddings(mode.from_tensor(x)).shape == expected.shape


@pytest.mark.parametrize(("family", "name"), [("siglip", "patch_embedding"), ("internvl", "patch_embeddings.projection")])
def test_a_compiled_patch_embedding_runs_as_it_is(family, name, reordered):
    model, twin = pair(family)
    twin.embeddings.get_submodule(name).compile(backend="eager")
    torch.testing.assert_close(features(twin, pixels()), features(model, pixels()), rtol=1e-10, atol=1e-10)
    assert reordered == [2, 2]


def test_a_norm_without_epsilon_sees_no_zeros(reordered):
    model, twin = pair("aimv2", rms_norm_eps=0.0)
    found = features(twin, pixels())
    assert reordered == [2]
    assert found.isfinite().all()
    torch.testing.assert_close(found, features(model, pixels()), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("variant", ANY_SIZE)
def test_images_smaller_than_a_patch_are_refused_as_ever(variant):
    family, changes, options = VARIANTS[variant]
    model = stock(family, **changes)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="Kernel size can't be greater than actual input size"):
            model(torch.zeros(1, 3, 7, 28, dtype=torch.float64), **options)
        lk.hf.optimize(model, impl="reference")
