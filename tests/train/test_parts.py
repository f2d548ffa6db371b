"""Which parameters belong together, are trained, and are not."""

import pytest
from peft import LoraConfig, get_peft_model

from laco_kernels.train.parts import PARTS, freeze, part_of, parts_of

from ..hf.llava import llava


@pytest.mark.parametrize("family", ["aimv2", "siglip", "internvl", "clip"])
@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_every_parameter_belongs_to_the_module_that_holds_it(family, kind):
    model = llava(family, kind, compressor="laco", layer=2)
    tower = model.model.vision_tower
    merges = {id(p) for merge in tower.merges for p in merge.parameters()}
    expected = {
        "merge": merges,
        "encoder": {id(p) for p in tower.parameters()} - merges,
        "projector": {id(p) for p in model.model.multi_modal_projector.parameters()},
        "llm": {id(p) for module in (model.model.language_model, model.lm_head) for p in module.parameters()},
    }
    found = {part: {id(p) for p in parameters.values()} for part, parameters in parts_of(model).items()}
    assert tuple(found) == PARTS
    assert all(expected.values())
    assert found == expected


def test_a_stock_encoder_has_no_merge():
    assert "merge" not in parts_of(llava("siglip", projector="stf"))


def test_only_what_has_a_rate_is_trained():
    model = llava("aimv2", compressor="laco", layer=1)
    freeze(model, {"merge": 1e-3, "projector": 1e-3})
    assert {part_of(name) for name, p in model.named_parameters() if p.requires_grad} == {"merge", "projector"}
    freeze(model, dict.fromkeys(PARTS, 1e-5))
    assert all(p.requires_grad for p in model.parameters())


def test_adapters_belong_to_the_part_they_adapt():
    model = llava("clip", "llama", compressor="laco", layer=1)
    freeze(model, {"merge": 1e-3, "projector": 1e-3})
    target = r".*language_model.*\.(q_proj|v_proj)"
    config = LoraConfig(r=2, target_modules=target, modules_to_save=["multi_modal_projector", "merge"])
    adapted = get_peft_model(model, config)
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert {part_of(name) for name in trained} == {"merge", "projector", "llm"}
    assert all("lora_" in name for name in trained if part_of(name) == "llm")


@pytest.mark.parametrize(
    ("rates", "words"),
    [
        ({"merge": 1e-3}, "rates: got 'merge', expected some of encoder, projector, llm"),
        ({"vision": 1e-3}, "rates: got 'vision'"),
        ({"llm": 0.0}, "rates: got 0.0 for llm, expected a positive number"),
        ({"llm": float("nan")}, "rates: got nan for llm"),
    ],
)
def test_refusals_leave_the_model_as_it_is(rates, words):
    model = llava("siglip")
    before = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=words):
        freeze(model, {"projector": 1e-3} | rates)
    assert [p.requires_grad for p in model.parameters()] == before


def test_another_kind_of_model_is_refused():
    model = llava("siglip").model.vision_tower
    with pytest.raises(ValueError, match="expected those of a LLaVA-style model"):
        parts_of(model)
