"""What a compressor leaves of the final features: against a computation by hand, and how it is told."""

import dataclasses
import json
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console

from laco_kernels.bench import kept, kept_report
from laco_kernels.hf.compress import compress
from laco_kernels.nn import COMPRESSORS

from ..hf.encoders import pixels, stock

QUARTER = [Fraction(1, 4)]


def measure(encoder, batches, **options):
    return kept.measure_kept(encoder, "small", batches, **{"depths": QUARTER, "seeds": 2, **options})


def by_name(result):
    return {(row.compressor, row.residual, row.depth): row for row in result.rows}


def pool(tokens, side):
    """Average ``[B, side * side, C]`` over 2 x 2 windows, of real tokens only where ``side`` is odd."""
    image = tokens.transpose(1, 2).unflatten(2, (side, side))
    return F.avg_pool2d(image, 2, ceil_mode=True, count_include_pad=False).flatten(2).transpose(1, 2)


def cosine(a, b):
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))


@pytest.mark.parametrize("side", [4, 5], ids=["even", "odd"])
@pytest.mark.parametrize(("family", "prefix"), [("siglip", 0), ("clip", 1)])
@torch.inference_mode()
def test_average_pooling_by_hand(family, prefix, side):
    encoder, images = stock(family, side=side), pixels(side=side, batch=3)
    result = measure(encoder, images.split(2), depths=[Fraction(1, 2), Fraction(1)], names=["avg_pool"])
    assert [row.layer for row in result.rows] == [2, 4]
    assert (result.images, result.tokens_in) == (3, side**2)
    states = encoder(images, output_hidden_states=True).hidden_states
    norm = encoder.post_layernorm if family == "siglip" else torch.nn.Identity()
    whole = norm(states[-1])[:, prefix:]
    for row in result.rows:
        x = states[row.layer]
        x = torch.cat([x[:, :prefix], pool(x[:, prefix:], side)], 1)
        for layer in encoder.encoder.layers[row.layer :]:
            x = layer(x, None)
        compressed = norm(x)[:, prefix:]
        assert row.tokens == compressed.shape[1]
        windows = cosine(compressed, pool(whole, side)).mean(1)
        mean_token = cosine(compressed.mean(1), whole.mean(1))
        for found, expected in ((row.windows, windows), (row.mean_token, mean_token)):
            assert found.mean == pytest.approx(float(expected.mean()), abs=1e-12)
            assert found.std == pytest.approx(float(expected.std(correction=0)), abs=1e-12)
            assert found.by_seed == pytest.approx([found.mean])
    others = cosine(pool(whole, side), pool(whole, side)[[2, 0, 1]]).mean()
    assert result.other_windows == pytest.approx(float(others), abs=1e-12)
    assert result.other_mean_token == pytest.approx(float(cosine(whole.mean(1), whole.mean(1)[[2, 0, 1]]).mean()), abs=1e-12)


def test_without_layers_and_norm_behind_it_average_pooling_keeps_everything():
    (row,) = measure(stock("clip"), [pixels()], depths=[Fraction(1)], names=["avg_pool"]).rows
    assert row.windows.mean == pytest.approx(1, abs=1e-12)
    assert row.mean_token.mean == pytest.approx(1, abs=1e-12)


@torch.inference_mode()
def test_every_compressor_that_may_stand_inside_in_all_its_variations():
    encoder, images = stock("siglip"), pixels()
    result = measure(encoder, [images])
    rows = by_name(result)
    inside = {name for name, kind in COMPRESSORS.items() if "inside" in kind.places}
    assert {row.compressor for row in result.rows} | set(result.left_out) == inside
    assert not result.left_out
    for name in inside:
        variations = {residual for compressor, residual, _ in rows if compressor == name}
        assert variations in ({"on", "off"}, {"on", "on*", "off"}, {"-"})
    assert rows["laco", "on", "1/4"].windows.mean == pytest.approx(rows["avg_pool", "-", "1/4"].windows.mean, abs=1e-12)
    assert ("laco", "on*", "1/4") in rows
    assert rows["tome", "-", "1/4"].windows is None
    assert rows["tome", "-", "1/4"].tokens == 4


def test_draws_differ_and_can_be_had_again():
    encoder, images = stock("siglip"), pixels()
    before = torch.get_rng_state()
    one = measure(encoder, [images], names=["laco"], seeds=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    assert one.rows == measure(encoder, [images], names=["laco"], seeds=3).rows
    off = by_name(one)["laco", "off", "1/4"].windows
    assert len(set(off.by_seed)) == 3
    assert off.mean == pytest.approx(sum(off.by_seed) / 3)
    on = by_name(one)["laco", "on", "1/4"].windows
    assert len(set(on.by_seed)) == 1  # it starts as average pooling, whatever the draw


def test_depths_at_one_layer_are_one():
    result = measure(stock("siglip"), [pixels()], names=["avg_pool"], depths=[Fraction(1, 12), Fraction(1, 4), Fraction(1, 2)])
    assert result.depths == ["1/12", "1/2"]
    assert [row.layer for row in result.rows] == [1, 2]


def test_what_cannot_stand_here_is_named():
    encoder = stock("siglip", hidden_size=36)  # not a multiple of TokenPacker's eight heads
    result = measure(encoder, [pixels()], names=["token_packer", "avg_pool"])
    assert {row.compressor for row in result.rows} == {"avg_pool"}
    assert "num_heads: got 8" in result.left_out["token_packer"]
    assert any(line.startswith("Left out: token_packer (num_heads") for line in kept_report.findings(result))
    with pytest.raises(ValueError, match="only: got token_packer, expected some that can stand inside this encoder: laco"):
        measure(encoder, [pixels()], names=["token_packer"])


@pytest.mark.parametrize(("argument", "value"), [("ratio", 1), ("seeds", 0)])
def test_numbers_out_of_range(argument, value):
    with pytest.raises(ValueError, match=f"{argument}: got {value}"):
        measure(stock("siglip"), [pixels()], names=["avg_pool"], **{argument: value})


def made_up(on, off, depths=("1/4",), **changes):
    """A result with one compressor, residual on and off, and one that leaves no grid."""

    def row(name, residual, depth, windows):
        value = None if windows is None else kept.Cosine(windows, 0.01, [windows])
        return kept.KeptRow(name, residual, depth, 3, 16, value, kept.Cosine(0.5, 0.1, [0.5]))

    rows = [row(*line) for d in depths for line in (("a", "on", d, on), ("a", "off", d, off), ("b", "-", d, None))]
    fields = {
        "encoder": "small",
        "weights": "checkpoint",
        "accuracy": None,
        "device": "cpu",
        "dtype": "float32",
        "ratio": 2,
        "seeds": 3,
        "images": 2,
        "tokens_in": 64,
        "depths": list(depths),
        "other_windows": 0.3,
        "other_mean_token": 0.6,
        "left_out": {},
        "environment": kept.environment(torch.device("cpu")),
        "rows": rows,
    }
    return kept.KeptResult(**fields | changes)


def test_findings_say_what_is_so_whichever_way_it_falls():
    assert kept_report.findings(made_up(0.9, 0.2)) == [
        "@1/4: closest is a on (0.90). With the residual 1 of 1 come closer than without, on average 0.90 to 0.20.",
        "By windows another image's features reach 0.30; no closer are 0 of 1 with the residual, 1 of 1 without.",
        "By mean token another image's features reach 0.60; no closer are 1 of 1 with the residual, 1 of 1 without, "
        "1 of 1 without parameters.",
    ]
    assert kept_report.findings(made_up(0.1, 0.7))[:2] == [
        "@1/4: closest is a off (0.70). With the residual 0 of 1 come closer than without, on average 0.10 to 0.70.",
        "By windows another image's features reach 0.30; no closer are 1 of 1 with the residual, 0 of 1 without.",
    ]
    assert kept_report.findings(made_up(0.702, 0.7, other_windows=None, other_mean_token=None)) == [
        "@1/4: closest is a on (0.70), 1 more within 0.005. "
        "With the residual 1 of 1 come closer than without, on average 0.70 to 0.70."
    ]


def test_the_headline_says_of_what_kind_the_weights_are():
    assert "small with RANDOM weights, which says nothing of a trained encoder" in kept_report.headline(
        made_up(0.9, 0.2, weights="random")
    )
    assert "small, pretrained here (reads 81.2% of held-out digits)" in kept_report.headline(made_up(0.9, 0.2, accuracy=0.812))
    assert "RANDOM" not in kept_report.headline(made_up(0.9, 0.2))


def test_tables_fit_into_80_columns_whatever_the_depths():
    depths = tuple(f"1/{n}" for n in range(13, 0, -1))
    result = made_up(-0.9, 0.2, depths)
    long = [dataclasses.replace(row, compressor="prumerge_plus") if row.compressor == "b" else row for row in result.rows]
    console = Console(width=80, record=True)
    for table in kept_report.tables(dataclasses.replace(result, rows=long)):
        console.print(table)
    text = console.export_text()
    assert "…" not in text
    assert text.count("-0.90±0.01") == 13
    assert text.count("n/a") == 13
    assert [text.count(f"@{depth} ") for depth in depths] == [2] * 13


def test_files_hold_everything_and_overwrite_nothing(tmp_path):
    result = made_up(0.9, 0.2, ("1/12", "1/4"))
    paths = kept_report.write(result, tmp_path)
    assert [path.name for path in paths] == [f"kept-small-ratio2.{suffix}" for suffix in ("json", "md", "png")]
    assert json.loads(paths[0].read_text()) == json.loads(json.dumps(result.to_dict()))
    markdown = paths[1].read_text()
    assert "| a | on | 0.90±0.01 | 0.90±0.01 |" in markdown
    assert "![Features kept against depth](kept-small-ratio2.png)" in markdown
    assert all(line in markdown for line in kept_report.findings(result))
    with Image.open(paths[2]) as picture:
        assert picture.size[0] > 1000
    assert [path.stem for path in kept_report.write(result, tmp_path)] == ["kept-small-ratio2-2"] * 3


def test_a_merged_token_counts_as_often_as_it_has_patches():
    encoder, images = stock("siglip", 8), pixels(8)
    (curve,), _ = kept._curves(encoder, ["tome"], 2, (8, 8))
    _, means = kept._run(encoder, curve, 4, 2, [images], 0)
    merged = compress(encoder, compressor="tome", depth=1)
    with torch.no_grad():
        features = merged(images).last_hidden_state
    sizes = merged.merging_layers[0].journey.sizes.double()
    torch.testing.assert_close(means[:, 0], torch.einsum("bnc,bn->bc", features, sizes) / 64)
    assert (features.mean(1) - means[:, 0]).abs().max() > 1e-3
