"""The compressors that read window by window, compared with the models that published them.

transformers' own modules are the yardstick, with the same random weights, in float64, forward and backward; where it has none,
plain torch operations.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers.models.gemma3.modeling_gemma3 import Gemma3MultiModalProjector
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector
from transformers.models.internvl.modeling_internvl import InternVLModel, InternVLMultiModalProjector
from transformers.models.llama4.modeling_llama4 import Llama4MultiModalProjector, Llama4VisionPixelShuffleMLP
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLPatchMerger
from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchMerger
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionPatchMerger
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMConnector

import laco_kernels as lk

C, D = 6, 10
EXACT = {"rtol": 0, "atol": 1e-10}


class Float64AllTheWay(TorchFunctionMode):
    """Some norms of transformers compute in float32 whatever they are given; here they are to be exact."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        lowers = func is torch.Tensor.float or (func is torch.Tensor.to and args[1:] == (torch.float32,))
        if lowers and args[0].dtype == torch.float64:
            return args[0]
        return func(*args, **(kwargs or {}))


def agree(compressor, published, weights, x, grid, **options):
    """Compare ``compressor(x, grid)`` and all gradients with ``published(x)``.

    ``weights`` are pairs of a parameter of the compressor and one of what was published, transposed where it is kept so.
    """
    compressor.double()
    assert {id(own) for own, _ in weights} == {id(parameter) for parameter in compressor.parameters()}
    with torch.no_grad():
        for own, theirs in weights:
            own.copy_(theirs if theirs.shape == own.shape else theirs.t())
    x, z = (x.clone().requires_grad_() for _ in range(2))
    y, _ = compressor(x, grid, **options)
    with Float64AllTheWay():
        expected = published(z)
    torch.testing.assert_close(y, expected, **EXACT)
    grad = torch.randn_like(y)
    own_grads = torch.autograd.grad(y, [x, *[own for own, _ in weights]], grad)
    their_grads = torch.autograd.grad(expected, [z, *[theirs for _, theirs in weights]], grad)
    for own, theirs in zip(own_grads, their_grads, strict=True):
        torch.testing.assert_close(own, theirs if theirs.shape == own.shape else theirs.t(), **EXACT)


def drawn(module):
    """The module in float64, with random weights everywhere: norms and matrices that begin at one or zero, too."""
    for parameter in module.double().parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def parameters(*pairs):
    """Pairs of all parameters of pairs of layers."""
    return [(own, theirs) for a, b in pairs for own, theirs in zip(a.parameters(), b.parameters(), strict=True)]


def windowed(x, grid, r):
    """``[B, H * W, C] -> [B, H / r, W / r, (dy, dx), C]`` by :func:`torch.nn.functional.unfold`."""
    columns = F.unfold(x.transpose(1, 2).unflatten(2, grid), r, stride=r)  # [B, (c, dy, dx), N']
    return columns.unflatten(1, (x.shape[2], r * r)).permute(0, 3, 2, 1).unflatten(1, (grid[0] // r, grid[1] // r))


@pytest.mark.parametrize("ps_version", ["v1", "v2"])
@pytest.mark.parametrize(("grid", "ratio"), [((4, 6), 2), ((4, 4), 2), ((8, 4), 4)])
def test_pixel_shuffle_is_internvls(ps_version, grid, ratio):
    config = SimpleNamespace(
        vision_config=SimpleNamespace(hidden_size=C),
        text_config=SimpleNamespace(hidden_size=D),
        downsample_ratio=1 / ratio,
        projector_hidden_act="gelu",
    )
    projector = drawn(InternVLMultiModalProjector(config))

    def published(x):
        shuffled = InternVLModel.pixel_shuffle(None, x[:, 1:].unflatten(1, grid), 1 / ratio)
        if ps_version == "v1":  # which lacks the last permutation
            shuffled = shuffled.permute(0, 2, 1, 3)
        return projector(shuffled.flatten(1, 2))

    compressor = lk.nn.build_compressor(
        "pixel_shuffle", in_dim=C, out_dim=D, ratio=ratio, ps_version=ps_version, prefix_tokens=1
    )
    weights = parameters(
        (compressor.norm, projector.layer_norm),
        (compressor.linear1, projector.linear_1),
        (compressor.linear2, projector.linear_2),
    )
    agree(compressor, published, weights, torch.randn(2, 1 + grid[0] * grid[1], C, dtype=torch.float64), grid)


def test_the_transposed_pixel_shuffle_says_so_and_transposes_its_residual():
    plain, transposed = (
        lk.nn.build_compressor("pixel_shuffle", in_dim=C, ps_version=version, residual=True, prefix_tokens=1)
        for version in ("v2", "v1")
    )
    transposed.load_state_dict(plain.state_dict())
    x = torch.randn(2, 25, C)
    (y, grid), (z, turned) = plain(x, (4, 6)), transposed(x, (4, 6))
    assert (grid, turned) == ((2, 3), (3, 2))
    torch.testing.assert_close(z.unflatten(1, turned), y.unflatten(1, grid).transpose(1, 2))
    with pytest.raises(ValueError, match="ps_version: got 'v1', expected 'v2', inside an encoder"):
        lk.nn.build_compressor("pixel_shuffle", in_dim=C, ps_version="v1", place="inside")


PATCH_MERGERS = {
    "qwen2": ({}, lambda r: PatchMerger(D, C, r)),
    "qwen2.5": ({"norm": "rms_norm"}, lambda r: Qwen2_5_VLPatchMerger(D, C, r)),
    "qwen3": ({}, lambda r: _qwen3(r, False)),
    "qwen3 after the shuffle": ({"norm_after": True}, lambda r: _qwen3(r, True)),
}


def _qwen3(ratio, norm_after):
    config = SimpleNamespace(hidden_size=C, spatial_merge_size=ratio, out_hidden_size=D)
    return Qwen3VLVisionPatchMerger(config, use_postshuffle_norm=norm_after)


@pytest.mark.parametrize("layout", ["raster", "block"])
@pytest.mark.parametrize("ratio", [1, 2, 3])
@pytest.mark.parametrize("model", PATCH_MERGERS)
def test_patch_merger_is_qwens(model, ratio, layout):
    """Qwen's tokens lie window by window, and its merger returns all images' tokens behind each other."""
    options, make = PATCH_MERGERS[model]
    merger, grid = drawn(make(ratio)), (2 * ratio, 3 * ratio)

    def published(x):
        tokens = x if layout == "block" else windowed(x, grid, ratio).flatten(1, 3)
        return merger(tokens.flatten(0, 1)).unflatten(0, (2, 6))

    compressor = lk.nn.build_compressor("patch_merger", in_dim=C, out_dim=D, ratio=ratio, **options)
    theirs = list(merger.parameters())
    weights = list(zip(compressor.parameters(), theirs, strict=True))
    x = torch.randn(2, grid[0] * grid[1], C, dtype=torch.float64)
    agree(compressor, published, weights, x, grid, layout=layout)


@pytest.mark.parametrize("connector", [Idefics3Connector, SmolVLMConnector])
@pytest.mark.parametrize("ratio", [1, 2, 3])
def test_idefics3_is_its_connector(connector, ratio):
    config = SimpleNamespace(
        scale_factor=ratio, vision_config=SimpleNamespace(hidden_size=C), text_config=SimpleNamespace(hidden_size=D)
    )
    connector = drawn(connector(config))
    compressor = lk.nn.build_compressor("idefics3", in_dim=C, out_dim=D, ratio=ratio)
    weights = parameters((compressor, connector))
    x = torch.randn(2, 36, C, dtype=torch.float64)
    agree(compressor, connector, weights, x, (6, 6))


@pytest.mark.parametrize("ratio", [2, 4])
def test_llama4_is_its_pixel_shuffle_mlp_and_projector(ratio):
    hidden = 12
    vision = SimpleNamespace(
        pixel_shuffle_ratio=1 / ratio,
        projector_input_dim=hidden,
        projector_output_dim=hidden,
        projector_dropout=0.0,
        hidden_size=C,
        intermediate_size=C * ratio**2,
        vision_output_dim=hidden,
    )
    shuffle = drawn(Llama4VisionPixelShuffleMLP(vision))
    projector = drawn(
        Llama4MultiModalProjector(SimpleNamespace(vision_config=vision, text_config=SimpleNamespace(hidden_size=D)))
    )
    compressor = lk.nn.build_compressor("llama4", in_dim=C, out_dim=D, ratio=ratio, hidden_dim=hidden)
    weights = parameters(
        (compressor.linear1, shuffle.mlp.fc1), (compressor.linear2, shuffle.mlp.fc2), (compressor.linear3, projector)
    )
    x = torch.randn(2, 64, C, dtype=torch.float64)
    agree(compressor, lambda x: projector(shuffle(x)), weights, x, (8, 8))


@pytest.mark.parametrize("ratio", [1, 2, 4])
def test_gemma3_is_its_projector(ratio):
    config = SimpleNamespace(
        vision_config=SimpleNamespace(hidden_size=C, layer_norm_eps=1e-6, image_size=8 * 14, patch_size=14),
        text_config=SimpleNamespace(hidden_size=D),
        mm_tokens_per_image=(8 // ratio) ** 2,
    )
    projector = drawn(Gemma3MultiModalProjector(config))
    compressor = lk.nn.build_compressor("gemma3", in_dim=C, out_dim=D, ratio=ratio)
    weights = [
        (compressor.norm.weight, projector.mm_soft_emb_norm.weight),
        (compressor.linear.weight, projector.mm_input_projection_weight),
    ]
    agree(compressor, projector, weights, torch.randn(2, 64, C, dtype=torch.float64), (8, 8))


def test_gemma3s_norm_keeps_a_small_weight_in_bfloat16():
    """``1 + w`` rounds to 1 in bfloat16 where ``w`` is below 0.004."""
    compressor = lk.nn.build_compressor("gemma3", in_dim=C, ratio=1).bfloat16()
    nn.init.constant_(compressor.norm.weight, 0.0035)
    x = torch.linspace(-3, 3, 600, dtype=torch.bfloat16).view(1, 100, C)
    normed = compressor.norm(x)
    exact = F.rms_norm(x.double(), (C,), eps=1e-6) * (1 + compressor.norm.weight.double())
    assert torch.equal(normed, exact.bfloat16())


def test_mlp2x_gelu_is_llavas_projector():
    config = SimpleNamespace(
        vision_feature_layer=-2,
        vision_config=SimpleNamespace(hidden_size=C),
        text_config=SimpleNamespace(hidden_size=D),
        multimodal_projector_bias=True,
        projector_hidden_act="gelu",
    )
    projector = drawn(LlavaMultiModalProjector(config))
    compressor = lk.nn.build_compressor("mlp2x_gelu", in_dim=C, out_dim=D, prefix_tokens=1)
    weights = parameters((compressor.linear1, projector.linear_1), (compressor.linear2, projector.linear_2))
    x = torch.randn(2, 25, C, dtype=torch.float64)
    agree(compressor, lambda x: projector(x[:, 1:]), weights, x, (4, 6))


@pytest.mark.parametrize(("grid", "ratio"), [((4, 6), 2), ((5, 3), 2), ((27, 27), 2), ((7, 4), 3)])
def test_vila_pads_shuffles_normalises_and_projects(grid, ratio):
    padded = tuple(-(-side // ratio) * ratio for side in grid)
    norm, linear1, linear2 = (drawn(m) for m in (nn.LayerNorm(C * ratio**2), nn.Linear(C * ratio**2, D), nn.Linear(D, D)))

    def published(x):
        image = x.transpose(1, 2).unflatten(2, grid)
        image = F.pad(image, (0, padded[1] - grid[1], 0, padded[0] - grid[0]))
        merged = windowed(image.flatten(2).transpose(1, 2), padded, ratio).flatten(3).flatten(1, 2)
        return linear2(F.gelu(linear1(norm(merged))))

    compressor = lk.nn.build_compressor("vila", in_dim=C, out_dim=D, ratio=ratio)
    weights = parameters((compressor.norm, norm), (compressor.linear1, linear1), (compressor.linear2, linear2))
    agree(compressor, published, weights, torch.randn(1, grid[0] * grid[1], C, dtype=torch.float64), grid)


@pytest.mark.parametrize(
    ("name", "hidden_dim"), [("token_concat", None), ("token_concat", 14), ("avg_pool", None), ("avg_pool", 14)]
)
@pytest.mark.parametrize("ratio", [2, 3])
def test_stfs_ablations_are_an_mlp_behind_an_image_operation(name, hidden_dim, ratio):
    """``token_concat`` is ``F.pixel_unshuffle``, channel-major; ``avg_pool`` is ``F.avg_pool2d``."""
    grid, width = (2 * ratio, 3 * ratio), C * ratio**2 if name == "token_concat" else C
    operation = F.pixel_unshuffle if name == "token_concat" else F.avg_pool2d
    hidden = hidden_dim or D
    projector = drawn(nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, D)))

    def published(x):
        return projector(operation(x.transpose(1, 2).unflatten(2, grid), ratio).flatten(2).transpose(1, 2))

    compressor = lk.nn.build_compressor(name, in_dim=C, out_dim=D, ratio=ratio, hidden_dim=hidden_dim)
    weights = parameters((compressor, projector))
    agree(compressor, published, weights, torch.randn(2, grid[0] * grid[1], C, dtype=torch.float64), grid)


def test_it_has_llavas_number_of_parameters():
    with torch.device("meta"):
        compressor = lk.nn.build_compressor("mlp2x_gelu", in_dim=1024, out_dim=4096)
    assert sum(parameter.numel() for parameter in compressor.parameters()) == 20_979_712


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("pixel_shuffle", {"ps_version": "v3"}, ValueError, "ps_version: got 'v3', expected one of 'v2', 'v1'"),
        (
            "patch_merger",
            {"norm": "batch_norm"},
            ValueError,
            "norm: got 'batch_norm', expected one of 'layer_norm', 'rms_norm'",
        ),
        ("patch_merger", {"norm_after": "yes"}, TypeError, "norm_after: got 'yes', expected True or False"),
        ("token_concat", {"hidden_dim": 0}, ValueError, "hidden_dim: got 0"),
        ("llama4", {"hidden_dim": 2.5}, TypeError, r"hidden_dim: got 2\.5"),
    ],
)
def test_it_refuses_options(name, options, error, message):
    with pytest.raises(error, match=message):
        lk.nn.build_compressor(name, in_dim=C, **options)
