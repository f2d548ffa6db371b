"""Q-Former against transformers' BLIP-2 with the same weights."""

import pytest
import torch
import torch.nn.functional as F
from transformers import Blip2QFormerConfig, Blip2QFormerModel

import laco_kernels as lk

from . import yardstick

SMALL = {"num_queries": 5, "hidden_dim": 12, "num_layers": 3, "num_heads": 4}
NAMES = {  # ours: BLIP-2's, within a layer
    "attention.query": "attention.attention.query",
    "attention.key": "attention.attention.key",
    "attention.value": "attention.attention.value",
    "attention.output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "cross_attention.query": "crossattention.attention.query",
    "cross_attention.key": "crossattention.attention.key",
    "cross_attention.value": "crossattention.attention.value",
    "cross_attention.output": "crossattention.output.dense",
    "cross_attention_norm": "crossattention.output.LayerNorm",
    "linear1": "intermediate_query.dense",
    "linear2": "output_query.dense",
    "mlp_norm": "output_query.LayerNorm",
}


def blip2s(name):
    """BLIP-2's name of our parameter ``name``."""
    if not name.startswith("layers."):
        return name.replace("query_norm", "layernorm")
    _, index, module = name.rsplit(".", 1)[0].split(".", 2)
    return f"encoder.layer.{index}.{NAMES[module]}.{name.rsplit('.', 1)[1]}"


def stock(**options):
    config = Blip2QFormerConfig(
        hidden_size=12, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, encoder_hidden_size=7,
        use_qformer_text_input=False, **options,
    )  # fmt: skip
    return Blip2QFormerModel(config).double().eval()


def test_it_is_blip2s():
    compressor, model = lk.nn.build_compressor("qformer", in_dim=7, out_dim=9, prefix_tokens=1, **SMALL), stock()
    theirs = dict(model.named_parameters())
    ours = {name: p for name, p in compressor.named_parameters() if name.startswith(("layers.", "query_norm."))}
    assert {blip2s(name) for name in ours} == set(theirs)

    def expected(x):
        weights = {blip2s(name): parameter for name, parameter in ours.items()}
        arguments = {"query_embeds": compressor.queries.expand(2, -1, -1), "encoder_hidden_states": x[:, 1:]}
        made = torch.func.functional_call(model, weights, (), arguments).last_hidden_state
        return F.linear(made, compressor.linear.weight, compressor.linear.bias)

    for grid in [(4, 6), (5, 3)]:
        yardstick.assert_agrees(compressor, grid, expected)


def test_it_has_blip2s_shape_unless_told_otherwise():
    with torch.device("meta"):
        compressor = lk.nn.build_compressor("qformer", in_dim=1408, out_dim=2560)
        model = Blip2QFormerModel(Blip2QFormerConfig(use_qformer_text_input=False))
    count = sum(p.numel() for p in model.parameters()) + 32 * 768 + 768 * 2560 + 2560
    assert sum(p.numel() for p in compressor.parameters()) == count
    assert {blip2s(n): p.shape for n, p in compressor.named_parameters() if n.startswith("layers.")} == {
        name: p.shape for name, p in model.named_parameters() if name.startswith("encoder.")
    }
    assert compressor.query_norm.eps == compressor.layers[0].mlp_norm.eps == model.config.layer_norm_eps


def test_the_budget_is_what_it_was_built_with():
    compressor = lk.nn.build_compressor("qformer", in_dim=7, ratio=4, **SMALL)
    for grid in [(4, 6), (1, 1), (5, 7)]:
        tokens, out_grid = compressor(torch.randn(2, grid[0] * grid[1], 7), grid)
        assert (tokens.shape, out_grid, compressor.out_grid(grid)) == ((2, 5, 7), None, None)
        assert compressor.num_output_tokens(grid) == 5


def test_precision_compilation_and_reset():
    def build():
        return lk.nn.build_compressor("qformer", in_dim=7, out_dim=9, **SMALL)

    yardstick.assert_runs_in_low_precision(build(), (4, 6))
    yardstick.assert_resets(build())
    yardstick.assert_compiles(build(), [(4, 6), (5, 7)])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"place": "inside"}, ValueError, "place: got 'inside', expected 'behind'"),
        ({"residual": True}, ValueError, "residual: got True, expected False"),
        ({"num_queries": 0}, ValueError, "num_queries: got 0"),
        ({"num_heads": 5}, ValueError, "num_heads: got 5, expected a divisor of 12"),
        ({"num_layers": 1.0}, TypeError, r"num_layers: got 1\.0"),
    ],
)
def test_it_refuses_options(options, error, message):
    with pytest.raises(error, match=message):
        lk.nn.build_compressor("qformer", in_dim=7, **(SMALL | options))
