"""Groups of parameters and their learning rates."""

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from laco_kernels.train.groups import cosine, parameter_groups
from laco_kernels.train.parts import PARTS, freeze, part_of

from ..hf.llava import llava


@pytest.mark.parametrize("family", ["aimv2", "internvl", "clip"])
def test_every_trained_parameter_is_in_one_group_of_its_part(family):
    model = llava(family, depth=0.5)
    rates = {"merge": 1e-3, "projector": 2e-3, "encoder": 1e-5}
    freeze(model, rates)
    groups = parameter_groups(model, rates, weight_decay=0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    grouped = [names[id(p)] for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(name for name, p in model.named_parameters() if p.requires_grad)
    norms = {id(p) for m in model.modules() if "Norm" in type(m).__name__ for p in m.parameters()}
    for group in groups:
        assert group["lr"] == rates[group["name"]]
        assert {part_of(names[id(p)]) for p in group["params"]} == {group["name"]}
        for p in group["params"]:
            bias_or_norm = names[id(p)].endswith("bias") or id(p) in norms
            assert not (bias_or_norm and group["weight_decay"]), names[id(p)]
            assert p.ndim < 2 or group["weight_decay"] == 0.1
    assert [group["name"] for group in groups] == [part for part in PARTS[:3] for _ in range(2)]


@pytest.mark.parametrize(
    ("rates", "words"),
    [
        ({"projector": 1e-3}, "rates: got none for llm, but model.language_model.embed_tokens.weight is trained"),
        (
            {"projector": 1e-3, "llm": 1e-3, "encoder": 1e-3},
            "rates: got 'encoder', expected a part that is trained; projector, llm",
        ),
        ({"projector": 1e-3, "llm": float("inf")}, "rates: got inf for llm"),
        ({"projector": 1e-3, "llm": 1e-3, "head": 1e-3}, "rates: got 'head'"),
    ],
)
def test_refusals(rates, words):
    model = llava("siglip")
    freeze(model, {"projector": 1e-3, "llm": 1e-3})
    with pytest.raises(ValueError, match=words):
        parameter_groups(model, rates)


@pytest.mark.parametrize("warmup", [0, 3])
def test_each_group_has_its_own_cosine(warmup):
    rates, least, steps = [1e-2, 3e-4], 1e-4, 11
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in rates]
    together = torch.optim.SGD([{"params": [p], "lr": rate} for p, rate in zip(parameters, rates, strict=True)])
    schedule = LambdaLR(together, [cosine(rate, least, warmup, steps) for rate in rates])
    alone = [torch.optim.SGD([p], lr=rate) for p, rate in zip(parameters, rates, strict=True)]
    others = [get_cosine_with_min_lr_schedule_with_warmup(o, warmup, steps, min_lr=least) for o in alone]
    for _ in range(steps + 1):
        assert schedule.get_last_lr() == pytest.approx([other.get_last_lr()[0] for other in others], rel=1e-12)
        for thing in (together, *alone, schedule, *others):
            thing.step()
    assert schedule.get_last_lr() == pytest.approx([least, least])


@pytest.mark.parametrize("least", [-1e-5, 2e-3])
def test_a_lowest_rate_that_is_none(least):
    with pytest.raises(ValueError, match=r"min_lr: got .*, expected a number from 0 to the smallest rate, here 0\.001"):
        cosine(1e-3, least, 0, 10)
