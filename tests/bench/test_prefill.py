"""Operations of an LLM's prefill: against a closed formula, and against the column that the STF paper prints."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from laco_kernels.bench import prefill

# Parameters in millions as published with the models: tied embeddings counted once.
PARAMETERS = {"vicuna-7b": 6738.4, "vicuna-13b": 13015.9, "llama-3.1-8b": 8030.3, "qwen2.5-0.5b": 494.0}


def closed_formula(name: str, length: int) -> int:
    """Two operations a weight and position, attention's two products, the angles of the positions, one row of the head."""
    config = AutoConfig.from_pretrained(prefill.FOLDER / name)
    width, layers, heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
    head_dim = width // heads
    weights = 2 * width * width + 2 * width * head_dim * config.num_key_value_heads + 3 * width * config.intermediate_size
    attention = 2 * 2 * heads * head_dim * length**2
    return layers * (2 * weights * length + attention) + head_dim * length + 2 * width * config.vocab_size


@pytest.mark.parametrize("name", PARAMETERS)
def test_it_counts_what_the_formula_says(name):
    for visual, text in ((576, 0), (144, 40), (1, 0), (0, 3)):
        assert prefill.prefill_tflops(name, visual, text) * 1e12 == pytest.approx(
            closed_formula(name, visual + text), rel=1e-12
        )


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_shapes_are_those_of_the_published_models(name):
    assert prefill.llm_names() == sorted(PARAMETERS)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(prefill.FOLDER / name))
    assert [type(model).__name__] == model.config.architectures
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(PARAMETERS[name], abs=0.06)


def reproduced(text_tokens: int) -> bool:
    column = prefill.PAPER_TFLOPS.items()
    return all(round(prefill.prefill_tflops("vicuna-7b", n, text_tokens), 1) == printed for n, printed in column)


def test_the_stf_papers_column_is_that_of_no_text():
    assert prefill.PAPER_TFLOPS == {576: 7.6, 288: 3.8, 144: 1.9, 72: 0.9, 36: 0.5}
    assert [text for text in (0, 1, 2, 10, 40) if reproduced(text)] == [0, 1]


def test_other_ways_of_counting_miss_the_column():
    config = AutoConfig.from_pretrained(prefill.FOLDER / "vicuna-7b")

    def ways(tokens: int) -> list[float]:
        whole = prefill.prefill_tflops("vicuna-7b", tokens)
        attention = config.num_hidden_layers * 4 * config.hidden_size * tokens**2 / 1e12
        head = 2 * config.hidden_size * config.vocab_size * (tokens - 1) / 1e12
        return [whole + head, whole - attention / 2, whole - attention, whole / 2, whole + head - attention]

    assert [round(tflops, 3) for tflops in ways(576)] == [7.785, 7.548, 7.461, 3.817, 7.611]
    assert [round(tflops, 1) == 7.6 for tflops in ways(576)] == [False] * 4 + [True]
    assert round(ways(72)[-1], 3) == 0.951  # printed as 0.9


def test_the_counter_sees_attention_on_the_meta_device():
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        q = torch.empty(1, 2, 5, 8)
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert counter.get_total_flops() == 2 * (2 * 2 * 5 * 5 * 8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("vicuna", 576), ValueError, "model_name: got 'vicuna', expected one of llama-3.1-8b, qwen2.5-0.5b, vicuna-13b"),
        (("vicuna-7b", -1), ValueError, "visual_tokens: got -1"),
        (("vicuna-7b", 576, 0.5), TypeError, r"text_tokens: got 0\.5"),
        (("vicuna-7b", 0), ValueError, "visual_tokens: got 0, expected at least one token"),
    ],
)
def test_it_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        prefill.prefill_tflops(*arguments)
