"""STF and MBTF behind the door to all compressors, compared with convolutions and concatenations of plain torch."""

import pytest
import torch
import torch.nn.functional as F

import laco_kernels as lk

from .test_token_fusion import by_hand

C, D = 8, 12
EXACT = {"rtol": 0, "atol": 1e-10}
VARIANTS = ("paper", "released")


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def on_meta(name, **options):
    with torch.device("meta"):
        return lk.nn.build_compressor(name, in_dim=1024, **options)


def concatenated(fusion, blocks):
    """MBTF by hand."""
    hidden = F.gelu(fusion.linear1(torch.cat([block[:, 1:] for block in blocks], dim=-1)))
    fused = fusion.linear2(hidden)
    return F.gelu(fused) if fusion.variant == "paper" else fused


def compare(compressor, expected, x, grid):
    """Forward and all gradients."""
    inputs = [*(x if isinstance(x, list) else [x]), *compressor.parameters()]
    y = compressor(x, grid)[0]
    torch.testing.assert_close(y, expected, **EXACT)
    grad = torch.randn_like(y)
    both = (torch.autograd.grad(tokens, inputs, grad) for tokens in (y, expected))
    for own, theirs in zip(*both, strict=True):
        torch.testing.assert_close(own, theirs, **EXACT)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("ratio", [1, 2, 4, 8])
@pytest.mark.parametrize("num_tokens", [1, 4])
def test_stf_is_convolutions(variant, ratio, num_tokens):
    compressor = lk.nn.build_compressor(
        "stf", in_dim=4, out_dim=D, ratio=ratio, num_tokens=num_tokens, variant=variant, prefix_tokens=1
    ).double()
    x = torch.randn(1, 1 + 2 * ratio**2, 4, dtype=torch.float64, requires_grad=True)
    grid = (ratio, 2 * ratio)
    compare(compressor, by_hand(compressor.fusion, x[:, 1:], grid), x, grid)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("num_blocks", [1, 3])
def test_mbtf_is_a_concatenation(variant, num_blocks):
    compressor = lk.nn.build_compressor(
        "mbtf", in_dim=C, num_blocks=num_blocks, num_layers=6, variant=variant, prefix_tokens=1
    ).double()
    blocks = [torch.randn(2, 25, C, dtype=torch.float64, requires_grad=True) for _ in range(num_blocks)]
    expected = concatenated(compressor.fusion, blocks)
    compare(compressor, expected, blocks if num_blocks > 1 else blocks[0], (4, 6))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("num_tokens", [1, 4])
def test_both_are_one_behind_the_other(variant, num_tokens):
    compressor = lk.nn.build_compressor(
        "mbtf+stf", in_dim=C, out_dim=D, num_blocks=3, num_layers=6, variant=variant, num_tokens=num_tokens, prefix_tokens=1
    ).double()
    assert compressor.fusion.variant == compressor.blocks_fusion.variant == variant
    blocks = [torch.randn(2, 25, C, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    fused = concatenated(compressor.blocks_fusion, blocks)
    compare(compressor, by_hand(compressor.fusion, fused, (4, 6)), blocks, (4, 6))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["mbtf", "mbtf+stf"])
def test_the_residual_is_that_of_the_deepest_block(name, variant):
    with_, without = (
        lk.nn.build_compressor(name, in_dim=C, num_blocks=3, num_layers=6, variant=variant, residual=residual)
        for residual in (True, False)
    )
    without.load_state_dict(with_.state_dict())
    blocks = [torch.randn(2, 24, C) for _ in range(3)]
    deepest = blocks[with_.blocks.index(6)]
    added = with_(blocks, (4, 6))[0] - without(blocks, (4, 6))[0]
    pooled = F.avg_pool2d(deepest.transpose(1, 2).unflatten(2, (4, 6)), with_.ratio).flatten(2).transpose(1, 2)
    torch.testing.assert_close(added, pooled)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("mbtf", {}, 37_753_856),
        ("mbtf", {"variant": "released"}, 37_753_856),
        ("stf", {"out_dim": 4096}, 151_019_520),
        ("stf", {"out_dim": 4096, "variant": "released"}, 134_238_208),
        ("mbtf+stf", {"out_dim": 4096}, 37_753_856 + 151_019_520),
        ("mbtf+stf", {"out_dim": 4096, "variant": "released"}, 37_753_856 + 134_238_208),
    ],
)
def test_they_have_the_papers_numbers_of_parameters(name, options, expected):
    assert count(on_meta(name, **options)) == expected


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("num_tokens", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("ratio", [1, 2, 4, 8])
def test_every_size_of_the_papers_ablation_can_be_built_and_counted(ratio, num_tokens, variant):
    compressor = on_meta("stf", out_dim=4096, ratio=ratio, num_tokens=num_tokens, variant=variant)
    window = ratio**2 * 1024
    last_two = (window // num_tokens + 1) * 4 * window + (4 * window + 1) * 4096
    assert count(compressor) == last_two + ((window + 1) * window if variant == "paper" else 0)
    assert compressor.num_output_tokens((24, 24)) == (24 // ratio) ** 2 * num_tokens
    tokens, _ = compressor.to(torch.bfloat16)(torch.empty(1, 576, 1024, dtype=torch.bfloat16, device="meta"), (24, 24))
    assert tokens.shape == (1, compressor.num_output_tokens((24, 24)), 4096)


@pytest.mark.parametrize("num_blocks", [8, 16, 24])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["mbtf", "mbtf+stf"])
def test_blocks_are_sampled_evenly(name, variant, num_blocks):
    compressor = on_meta(name, num_blocks=num_blocks, variant=variant)
    fusion = compressor.fusion if name == "mbtf" else compressor.blocks_fusion
    assert count(fusion) == (num_blocks * 1024 + 1) * 4096 + (4096 + 1) * 1024
    assert len(set(compressor.blocks)) == compressor.num_blocks == num_blocks
    evenly = {8: list(range(3, 25, 3)), 16: [2, 3, 5, 6, 8, 9, 11, 12, 14, 15, 17, 18, 20, 21, 23, 24], 24: list(range(1, 25))}[
        num_blocks
    ]
    if variant == "released":
        evenly = evenly[::-1]
        if num_blocks == 8:
            evenly[0] = 23  # hidden_states[-2]
    assert list(compressor.blocks) == evenly
    assert compressor.blocks[compressor.deepest] == max(evenly)


def test_several_tokens_a_window_form_no_grid():
    compressor = lk.nn.build_compressor("stf", in_dim=C, num_tokens=4)
    tokens, grid = compressor(torch.randn(2, 24, C), (4, 6))
    assert tokens.shape == (2, 24, C)
    assert grid is None is compressor.out_grid((4, 6))
    with pytest.raises(ValueError, match="grid: got 5 x 6"):
        compressor.out_grid((5, 6))


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("stf", {"num_tokens": 3}, ValueError, "num_tokens: got 3, expected a divisor of 32, the channels of a window"),
        (
            "stf",
            {"num_tokens": 16, "variant": "released"},
            ValueError,
            "num_tokens: got 16, expected a divisor of 8, the channels of a token",
        ),
        ("stf", {"num_tokens": 2, "place": "inside"}, ValueError, "num_tokens: got 2, expected 1 inside an encoder"),
        ("stf", {"num_tokens": 2, "residual": True}, ValueError, "num_tokens: got 2, expected 1 with residual='mean'"),
        ("stf", {"num_tokens": 0}, ValueError, "num_tokens: got 0"),
        ("stf", {"variant": "new"}, ValueError, "variant: got 'new', expected one of 'paper', 'released'"),
        ("mbtf", {"variant": "new"}, ValueError, "variant: got 'new', expected one of 'paper', 'released'"),
        ("mbtf", {"out_dim": D}, ValueError, r"out_dim: got 12, expected 8, .*which it keeps"),
        ("mbtf", {"num_blocks": 0}, ValueError, "num_blocks: got 0"),
        ("mbtf", {"num_blocks": 25}, ValueError, "num_blocks: got 25, expected at most num_layers = 24"),
        ("mbtf+stf", {"num_blocks": 8, "num_layers": 6}, ValueError, "num_blocks: got 8, expected at most num_layers = 6"),
        ("mbtf+stf", {"num_layers": 0}, ValueError, "num_layers: got 0"),
        ("mbtf+stf", {"num_tokens": 3}, ValueError, "num_tokens: got 3, expected a divisor"),
    ],
)
def test_they_refuse_options(name, options, error, message):
    with pytest.raises(error, match=message):
        lk.nn.build_compressor(name, in_dim=C, **options)
