"""Multimodal models on a GPU: generation and training steps as CUDA graphs make what eager makes."""

from fractions import Fraction

import pytest
import torch

from laco_kernels.bench import generate, llava_cases, step
from laco_kernels.bench.decoding import Eager, Static

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
NEW = 12


@pytest.fixture(autouse=True)
def plain_numbers():
    torch.use_deterministic_algorithms(False)  # cuDNN's attention warns that it is not
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.backends.cudnn.allow_tf32 = before


def tiny(method, dtype=torch.float32):
    setting = llava_cases.setting(method, torch.device("cuda", 0), tiny=True)
    names = llava_cases.subjects(method, [Fraction(1, 4)])
    return llava_cases.build(setting, names, torch.device("cuda", 0), dtype)


@pytest.mark.parametrize("graph_prompt", [False, True])
@pytest.mark.parametrize("method", ["laco", "stf"])
def test_captured_generation_makes_the_tokens_of_eager(method, graph_prompt):
    for model in tiny(method).values():
        asked = llava_cases.prompt(model, 3, 24)
        eager = Eager(model, asked, NEW)
        static = Static(model, asked, NEW, graphs=True, graph_prompt=graph_prompt)
        theirs = eager().tokens
        for _ in range(3):  # each answer begins on the cache of the one before
            assert torch.equal(static().tokens, theirs)
        forced = torch.randint(6, 300, (3, 4), device="cuda")
        torch.testing.assert_close(static.logits(forced), eager.logits(forced), rtol=1e-4, atol=1e-5)
        assert torch.equal(static().tokens, theirs), "forced tokens leave nothing behind"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["laco", "stf"])
def test_captured_and_uncaptured_work_give_the_same_bits(method, dtype):
    """A prompt that is captured would get another kernel if attention saw a mask there."""
    model = list(tiny(method, dtype).values())[-1]
    asked = llava_cases.prompt(model, 2, 24)
    forced = torch.randint(6, 300, (2, 4), device="cuda")
    captured, plain = Static(model, asked, NEW, graphs=True, graph_prompt=True), Static(model, asked, NEW)
    assert torch.equal(captured.logits(forced), plain.logits(forced))
    for static in (captured, plain):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")  # nothing waits for the device within an answer
        try:
            made = static()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert made.tokens.shape == (2, NEW)


def test_what_is_captured_reads_pictures_and_words_where_they_are():
    model = tiny("stf")[llava_cases.STF]
    asked = llava_cases.prompt(model, 2, 24)
    static = Static(model, asked, NEW, graphs=True, graph_prompt=True)
    before = static().tokens.clone()
    asked.pixels.copy_(torch.randn_like(asked.pixels))
    asked.ids[:, -3:] = 7
    assert torch.equal(static().tokens, Eager(model, asked, NEW)().tokens)
    assert not torch.equal(static().tokens, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["laco", "stf"])
def test_every_mode_of_generation_is_right(method, dtype):
    device = torch.device("cuda", 0)
    setting = llava_cases.setting(method, device, tiny=True)
    modes = ["eager", "static", *generate.modes_for(device, compiled=True)[1:]]
    asked = {"batch": 2, "text_tokens": 24, "new_tokens": NEW, "rounds": 2, "depths": [Fraction(1, 4)]}
    result = generate.measure_generate(setting, device, dtype, modes=modes, **asked)
    assert not result.left_out
    assert [(row.subject, row.mode) for row in result.rows if not row.correct] == []
    assert {row.mode for row in result.rows} == set(generate.MODES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["laco", "stf"])
def test_every_mode_of_a_training_step_is_right(method, dtype):
    device = torch.device("cuda", 0)
    setting = llava_cases.setting(method, device, tiny=True)
    modes = step.modes_for(device, method, compiled=True)
    asked = {"batch": 2, "text_tokens": 24, "rounds": 2, "depths": [Fraction(1, 4)]}
    result = step.measure_step(setting, device, dtype, modes=modes, **asked)
    assert not result.left_out
    assert [(row.stage, row.subject, row.mode) for row in result.rows if not row.correct] == []


def test_a_frozen_encoder_is_replayed_while_the_rest_is_trained():
    device = torch.device("cuda", 0)
    setting = llava_cases.setting("stf", device, tiny=True)
    run = step._StageRun(setting, "pretrain", [llava_cases.STF], device, torch.float32, False)
    models = run._models(setting)
    asked = llava_cases.prompt(models[llava_cases.STF], 2, 24)
    plain, graphed = (
        step.Trained(llava_cases.twin(models[llava_cases.STF]), step.MODES[mode], asked)
        for mode in ("fused+head", "fused+graphs+head")
    )
    replays, replay = [], torch.cuda.CUDAGraph.replay
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (replays.append(graph), replay(graph))[1])
        losses = [step._loss_and_gradients(made) for made in (plain, graphed, graphed)]
    assert len(replays) == 2
    for found in losses[1:]:
        for ours, theirs in zip(found, losses[0], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
