"""Generation over a static cache makes what transformers makes, token by token."""

from fractions import Fraction

import pytest
import torch

from laco_kernels.bench import decoding, llava_cases
from laco_kernels.bench.decoding import Eager, Static, Work, exactly

CPU = torch.device("cpu")
NEW = 7
WAITS = ("_local_scalar_dense", "item", "is_nonzero", "nonzero")


def models(method):
    setting = llava_cases.setting(method, CPU, tiny=True)
    return llava_cases.build(setting, llava_cases.subjects(method, [Fraction(1, 4)]), CPU, torch.float32)


@pytest.fixture(scope="module")
def every():
    return {**models("laco"), **models("stf")}


@pytest.fixture(params=["@1", "@1/4", llava_cases.LLAVA, llava_cases.STF])
def model(every, request):
    return every[request.param]


def test_both_make_the_same_tokens_and_logits(model):
    asked = llava_cases.prompt(model, 2, 8)
    eager, static = Eager(model, asked, NEW), Static(model, asked, NEW)
    theirs = eager()
    for _ in range(2):  # the second answer begins on the cache of the first
        ours = static()
        assert torch.equal(ours.tokens, theirs.tokens)
        assert ours.tokens.shape == (2, NEW)
        assert len(ours.stamps) == len(theirs.stamps) == 6
        assert ours.stamps == sorted(ours.stamps)
        assert theirs.stamps == sorted(theirs.stamps)
    forced = torch.randint(6, 300, (2, 3))
    torch.testing.assert_close(static.logits(forced), eager.logits(forced), rtol=1e-4, atol=1e-6)
    assert torch.equal(static().tokens, theirs.tokens), "forced tokens leave nothing behind"


def test_a_whole_pass_over_the_answer_gives_the_same_logits(every):
    model = every[llava_cases.STF]
    asked = llava_cases.prompt(model, 2, 8)
    tokens = Static(model, asked, NEW)().tokens
    with torch.no_grad():
        logits = model(input_ids=torch.cat([asked.ids, tokens], 1), pixel_values=asked.pixels).logits
    assert torch.equal(logits[:, asked.ids.shape[1] - 1 : -1].argmax(-1), tokens)


def test_the_image_takes_the_way_that_the_model_gives_it(model):
    pixels = llava_cases.prompt(model, 2, 8).pixels
    with torch.no_grad():
        features = decoding.project(model, decoding.image_states(model, pixels), pixels)
        expected = model.model.get_image_features(pixels, return_dict=True).pooler_output
    assert torch.equal(features, torch.stack(list(expected)))


def test_in_float64_all_weights_count_and_come_back(model):
    asked = llava_cases.prompt(model, 1, 8)
    before = {name: (p.data_ptr(), p.dtype) for name, p in model.named_parameters()}
    eager = Eager(model, asked, NEW)
    forced = torch.randint(6, 300, (1, 2))
    with exactly(model):
        exact = eager.logits(forced)
    assert exact.dtype == torch.float64
    assert {name: (p.data_ptr(), p.dtype) for name, p in model.named_parameters()} == before
    error = float((eager.logits(forced) - exact).norm() / exact.norm())
    assert 0 < error < 1e-5


def test_weights_come_back_from_float64_where_a_pass_breaks(every):
    model = every["@1"]
    asked = llava_cases.prompt(model, 1, 8)
    with pytest.raises(RuntimeError), exactly(model):
        model(input_ids=asked.ids, pixel_values=asked.pixels[..., :-3])
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert Eager(model, asked, NEW)().tokens.shape == (1, NEW)


def test_a_captured_prompt_is_read_without_a_mask(every, monkeypatch):
    """transformers asks whether a CUDA graph is captured, and then lays a mask over a prompt."""
    monkeypatch.setattr("transformers.utils.import_utils.is_cuda_stream_capturing", lambda: True)
    attend, seen = torch.nn.functional.scaled_dot_product_attention, []

    def noting(query, key, value, attn_mask=None, **kwargs):
        seen.append((attn_mask, kwargs["is_causal"], key.shape[1]))
        return attend(query, key, value, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noting)
    static = Static(every["@1"], llava_cases.prompt(every["@1"], 2, 8), NEW)
    seen.clear()
    with torch.inference_mode():
        static.prefill()
    assert seen == [(None, True, 2)] * 2, "two layers, two heads of keys for four of queries"


def test_captured_work_is_replayed_and_no_longer_carried_out():
    done = []

    class Graph:
        def replay(self):
            done.append("replayed")

    work = Work(lambda: done.append("carried out"))
    work()
    work.graph = Graph()
    work()
    assert done == ["carried out", "replayed"]


def test_a_step_waits_for_nothing(every):
    """What asks for a value of the device cannot be captured; on a processor such questions can be counted."""

    class Questions(torch.utils._python_dispatch.TorchDispatchMode):
        asked = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            type(self).asked += func.name().removeprefix("aten::") in WAITS
            return func(*args, **(kwargs or {}))

    for model in every.values():
        static = Static(model, llava_cases.prompt(model, 2, 8), NEW)
        with torch.inference_mode(), Questions():
            for work in (static.vision, static.projector, static.prefill, static.step):
                work()
    assert Questions.asked == 0
    with torch.inference_mode(), Questions():
        Eager(model, llava_cases.prompt(model, 1, 8), 2)()
    assert Questions.asked > 0, "transformers' own loop asks"
