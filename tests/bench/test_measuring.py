"""The parts that measurements are made of."""

import time
from fractions import Fraction

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel

import laco_kernels as lk
from laco_kernels.bench import cases, environment, system, timing
from laco_kernels.bench.memory import LiveTensors, peak_bytes
from laco_kernels.bench.system import measure_vec, overhead

from ..hf.encoders import pixels, stock

CPU = torch.device("cpu")
PARAMETERS = {"aimv2-l-336": 309.5, "siglip-so400m-384": 413.0, "internvit-300m-448": 304.0, "clip-l-336": 303.5}


def test_variants_are_interleaved_and_warmed_up():
    calls = []
    variants = {name: lambda i, name=name: calls.append((name, i)) for name in "ab"}
    steps = []
    samples = timing.interleave(variants, CPU, rounds=2, warmup=1, on_call=steps.append)
    assert calls == [("a", 0), ("b", 0), ("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert steps == sorted(steps)
    assert len(steps) == 6
    assert {name: len(sample) for name, sample in samples.items()} == {"a": 2, "b": 2}


def test_a_spent_budget_still_gives_five_rounds():
    assert len(timing.interleave({"a": lambda _: None}, CPU, seconds=0)["a"]) == 5


def test_spread_and_paired_ratio():
    assert timing.spread([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == timing.Spread(3.5, 2.0, 5.0, 1.0, 6.0, 6)
    assert timing.spread([7.0]) == timing.Spread(7.0, 7.0, 7.0, 7.0, 7.0, 1)
    # A machine that gets slower by the round changes no ratio of a round.
    assert timing.paired_ratio([2.0, 4.0, 8.0], [1.0, 2.0, 4.0]) == timing.Spread(2.0, 2.0, 2.0, 2.0, 2.0, 3)


def test_milliseconds_are_milliseconds():
    assert 19 < timing.milliseconds(lambda: time.sleep(0.02), CPU) < 200


def test_peak_memory_counts_what_lives_at_one_time():
    x = torch.ones(1000)
    assert peak_bytes(lambda: x.add(1).add(1).add(1), CPU) == 8000
    assert peak_bytes(lambda: x.view(10, 100)[2:].t(), CPU) == 0
    with LiveTensors() as live:
        y = x.add(1)
        y.add_(1)
        z = y.view(10, 100)
        del y
        assert live.live == 4000
        del z
    assert (live.live, live.peak) == (0, 4000)


@pytest.mark.parametrize("name", cases.encoder_names())
def test_shipped_encoders_are_the_real_ones(name):
    config = AutoConfig.from_pretrained(cases.FOLDER / name)
    with torch.device("meta"):
        encoder = AutoModel.from_config(config)
    assert sum(p.numel() for p in encoder.parameters()) / 1e6 == pytest.approx(PARAMETERS[name], abs=0.1)


@pytest.mark.parametrize(("depth", "layer"), [("1/12", 2), ("1/4", 6), ("1", 24)])
def test_counted_flops_are_those_of_the_architecture(depth, layer):
    """AIMv2-L 336 by hand: 4 projections, a SwiGLU of 3 and attention for each layer, the patch embedding and the merge."""
    config = AutoConfig.from_pretrained(cases.FOLDER / "aimv2-l-336")
    with torch.device("meta"):
        model = lk.hf.compress(config, depth=Fraction(depth)).eval()
        with FlopCounterMode(display=False) as flops:
            tokens = model(torch.empty(1, 3, 336, 336)).last_hidden_state.shape[1]
    width, ffn = 1024, 2816

    def block(n):
        return 2 * n * (4 * width**2 + 3 * width * ffn) + 4 * n**2 * width

    merge = 2 * 144 * (4 * width**2 + width**2)
    embedding = 2 * 576 * 3 * 14**2 * width
    assert tokens == 144
    assert model.config.compression["layer"] == layer
    assert flops.get_total_flops() == embedding + layer * block(576) + merge + (24 - layer) * block(144)


def test_paper_figures():
    assert cases.paper_ratio("aimv2-l-336", Fraction(1, 4)) == pytest.approx(58.0 / 29.3)
    assert cases.paper_ratio("siglip-so400m-384", Fraction(1, 4)) == pytest.approx(146.5 / 57.3)
    assert cases.paper_ratio("siglip-so400m-384", Fraction(1, 2)) is None
    assert cases.paper_ratio("clip-l-336", Fraction(1)) is None


def test_depths_are_read_sorted_and_with_their_yardstick():
    assert cases.parse_depths("1/4, 1/12,0.25") == [Fraction(1, 12), Fraction(1, 4), Fraction(1)]
    for bad in ("", "0", "5/4", "1/0", "x", "1/4;1/2"):
        with pytest.raises(ValueError, match=r"depths: got '.*', expected fractions in \(0, 1\]"):
            cases.parse_depths(bad)


def test_the_environment_names_what_it_ran_on():
    report = environment.environment(CPU)
    assert report["torch"] == torch.__version__
    assert report["laco_kernels"] == lk.__version__
    assert report["device"] == report["cpu"]
    assert environment.implementations()["reference"] is None


@pytest.mark.parametrize("layout", ["block", "raster"])
def test_overhead_is_the_time_outside_the_parts(layout):
    model = lk.hf.compress(stock("clip", side=8, dtype=torch.float32), layer=2, layout=layout)
    images = pixels(side=8, batch=8, dtype=torch.float32)
    with torch.inference_mode():
        without = overhead(model, images)
        handle = model.encoder.register_forward_pre_hook(lambda *_: time.sleep(0.05))
        total = timing.milliseconds(lambda: model(images), CPU)
        with_pause = overhead(model, images)
        handle.remove()
    # 50 ms of pause over what is left of the pass; half of it leaves room for a busy machine.
    assert with_pause - without > 0.5 * 50 / total
    assert not model.embeddings._forward_hooks


def test_more_depths_than_the_compiler_keeps_by_itself():
    encoder, images = stock("siglip", dtype=torch.float32, num_hidden_layers=3), pixels(dtype=torch.float32)
    depths = [Fraction(i, 3) for i in range(1, 4)]
    with torch._dynamo.config.patch(recompile_limit=2):
        result = measure_vec(encoder, "x", depths, [images], weights="random", images=2, modes=["compile"], rounds=1)
    assert [row.layer for row in result.rows] == [1, 2, 3]


@pytest.mark.parametrize("mode", ["eager", "compile"])
def test_what_a_row_is_made_of(monkeypatch, mode):
    """Known times instead of measured ones; everything else against counts by hand."""
    encoder, images = stock("siglip", side=6, dtype=torch.float32, vision_use_head=False), pixels(6, 3, torch.float32)
    compilations = []
    times = {f"1/4 {mode}": [1.0, 3.0, 2.0], f"1 {mode}": [4.0, 9.0, 8.0]}

    def interleave(variants, device, **_):
        for call in variants.values():
            call(0)
            call(1)
        return times

    def compile_(model):
        compilations.append(model)
        return model

    monkeypatch.setattr(system, "interleave", interleave)
    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setitem(cases.PAPER_MS, "toy", {Fraction(1, 4): 5.0, Fraction(1): 10.0})
    batches = [images, images + 1]
    result = measure_vec(encoder, "toy", [Fraction(1, 4), Fraction(1)], batches, weights="w", images=6, modes=[mode])
    quarter, whole = result.rows
    assert len(compilations) == 2 * (mode == "compile")
    assert (quarter.ratio.median, quarter.vec_ms.median, whole.ratio.median) == (4.0, 2.0, 1.0)
    assert (quarter.paper_ratio, whole.paper_ratio) == (2.0, 1.0)
    assert (result.batch, result.tokens_in, quarter.tokens, quarter.layer) == (3, 36, 9, 1)

    def block(n):
        return 2 * n * (4 * 32**2 + 2 * 32 * 64) + 4 * n**2 * 32

    embedding, merge = 2 * 36 * 3 * 14**2 * 32, 2 * 9 * (4 * 32**2 + 32**2)
    assert quarter.gflops == pytest.approx(3 * (embedding + block(36) + merge + 3 * block(9)) / 1e9)
    assert whole.gflops == pytest.approx(3 * (embedding + 4 * block(36) + merge) / 1e9)
    # At least the activations of the feed-forward network and the residual stream of a whole batch.
    assert quarter.peak_mib * 2**20 >= 3 * 36 * (64 + 32) * 4
    assert quarter.error <= quarter.error_budget < 1e-5
