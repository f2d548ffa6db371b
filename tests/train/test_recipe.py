"""Recipes: what they say, what overrides change, and what is refused."""

from fractions import Fraction
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig

import laco_kernels as lk
from laco_kernels.bench import cases, prefill
from laco_kernels.train.assemble import build_options, prepare_parts
from laco_kernels.train.groups import parameter_groups
from laco_kernels.train.parts import part_of
from laco_kernels.train.recipe import load_recipe, packaged, summary, to_yaml

from ..hf.llava import llava

SMALL = """
output: out
model: {vision: ./tower, text: Qwen/Qwen2.5-0.5B, depth: 1/4}
data: {path: data.json}
train: {rates: {projector: 1e-3}, batch_size: 8}
"""
LACO = {"laco-stage1", "laco-stage1.5", "laco-stage2-si", "laco-stage2-ov"}
STF = {"stf-pretrain", "stf-finetune", "stf-finetune-encoder", "stf-finetune-lora"}
ALL = {"encoder": 2e-6, "merge": 1e-5, "projector": 1e-5, "llm": 1e-5}
RATES = {
    "laco-stage1": {"merge": 1e-3, "projector": 1e-3},
    "laco-stage1.5": ALL,
    "laco-stage2-si": ALL,
    "laco-stage2-ov": ALL,
    "stf-pretrain": {"projector": 1e-3},
    "stf-finetune": {"projector": 2e-5, "llm": 2e-5},
    "stf-finetune-encoder": {"encoder": 2e-6, "projector": 2e-5, "llm": 2e-5},
    "stf-finetune-lora": {"projector": 2e-5, "llm": 2e-4},
}


@pytest.fixture
def small(tmp_path):
    file = tmp_path / "small.yaml"
    file.write_text(SMALL)
    return file


def test_the_package_has_the_stages_of_both_papers():
    assert set(packaged()) == LACO | STF
    for name, path in packaged().items():
        recipe = load_recipe(name, ["data.path=data.json"])
        assert len(name) + 2 + len(summary(path)) < 160, "two lines at 80 columns"
        assert recipe.output == Path.cwd() / "runs" / name
        assert recipe.train.rates == RATES[name]
        assert (recipe.train.epochs, recipe.train.warmup, recipe.train.precision) == (1.0, 0.03, "bfloat16")
        batch, least = (512, 1e-7) if name in LACO else (256 if name == "stf-pretrain" else 128, 0.0)
        assert (recipe.train.batch_size, recipe.train.min_lr) == (batch, least)
        before = recipe.model.checkpoint
        assert before is None or Path(before).name in packaged(), "a stage begins with what another one leaves"


@pytest.mark.parametrize(
    ("name", "built_by", "vision", "text"),
    [
        ("laco-stage1", "laco-stage1", "aimv2-l-336", "qwen2.5-0.5b"),
        ("laco-stage1.5", "laco-stage1", "aimv2-l-336", "qwen2.5-0.5b"),
        ("stf-finetune-encoder", "stf-pretrain", "clip-l-336", "vicuna-7b"),
        ("stf-finetune-lora", "stf-pretrain", "clip-l-336", "vicuna-7b"),
    ],
)
def test_groups_of_the_papers_models(name, built_by, vision, text):
    recipe = load_recipe(name, ["data.path=data.json"])
    with torch.device("meta"):
        configs = AutoConfig.from_pretrained(cases.FOLDER / vision), AutoConfig.from_pretrained(prefill.FOLDER / text)
        built = load_recipe(built_by, ["data.path=data.json"]).model
        model = prepare_parts(lk.hf.build_llava(*configs, image_token_id=5, **build_options(built)), recipe)
    groups = parameter_groups(model, recipe.train.rates)  # refuses what is trained without a rate
    assert {group["name"]: group["lr"] for group in groups} == RATES[name]
    millions = dict.fromkeys(recipe.train.rates, 0.0)
    for group in groups:
        millions[group["name"]] += sum(parameter.numel() for parameter in group["params"]) / 1e6
    expected = {"merge": 5.25, "projector": 1.72} if name in LACO else {"projector": 188.8}
    expected |= {"encoder": 309.53, "llm": 494.03} if name == "laco-stage1.5" else {}
    expected |= {"llm": 319.8} if name == "stf-finetune-lora" else {}
    assert {part: millions[part] for part in expected} == pytest.approx(expected, abs=0.06)


@pytest.mark.parametrize("trained", [("llm",), ("projector", "llm"), ("merge", "llm"), ("encoder", "llm"), tuple(ALL)])
def test_lora_trains_adapters_and_the_other_parts_with_a_rate(small, trained):
    rates = ", ".join(f"{part}: 1e-3" for part in trained)
    recipe = load_recipe(small, [f"train.rates={{{rates}}}", "lora={r: 2, alpha: 4, targets: [q_proj], merge: true}"])
    model = prepare_parts(llava("clip", compressor="laco", layer=2), recipe)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert {part_of(name) for name in names} == set(trained)
    assert all(("q_proj.lora_" in name) == (part_of(name) == "llm") for name in names)
    assert not any("original_module" in name for name in names)
    parameter_groups(model, recipe.train.rates)


def test_lora_on_layers_that_are_not_there_is_refused(small):
    recipe = load_recipe(small, ["train.rates={llm: 1}", "lora={r: 2, alpha: 4, targets: [c_attn], merge: true}"])
    with pytest.raises(ValueError, match=r"lora\.targets: got c_attn .*expected names of linear layers of the LLM"):
        prepare_parts(llava("clip"), recipe)


def test_what_is_not_said_is_usual_and_paths_are_relative_to_the_file(small, monkeypatch):
    monkeypatch.chdir("/")
    recipe = load_recipe(small)
    assert (recipe.output, recipe.data.path) == (small.parent / "out", small.parent / "data.json")
    assert (recipe.model.vision, recipe.model.text) == (str(small.parent / "tower"), "Qwen/Qwen2.5-0.5B")
    assert (recipe.model.depth, recipe.train.rates, recipe.train.seed) == (Fraction(1, 4), {"projector": 0.001}, 0)
    (small.parent / "Qwen" / "Qwen2.5-0.5B").mkdir(parents=True)
    assert load_recipe(small).model.text == str(small.parent / "Qwen/Qwen2.5-0.5B"), "a folder that is there is meant"


def test_overrides_have_yamls_types_and_the_current_folder(small, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    changes = [
        "output=mine",
        "train.rates.llm=2e-5",
        "train.max_steps=7",
        "model.layer=3",
        "lora={r: 4, alpha: 8, merge: true}",
    ]
    recipe = load_recipe(small, [*changes, "trainer.fsdp_config={version: 2}", "train.report_to=[wandb]", "data.cap=3"])
    assert recipe.output == tmp_path / "here" / "mine"
    assert recipe.data.path == tmp_path / "data.json"
    assert recipe.train.rates == {"projector": 0.001, "llm": 2e-5}
    assert (recipe.train.max_steps, recipe.train.epochs, recipe.train.report_to) == (7, None, ("wandb",))
    assert (recipe.model.layer, recipe.model.depth) == (3, None), "what the two contradict is replaced"
    assert (recipe.lora.r, recipe.lora.alpha, recipe.data.cap) == (4, 8.0, 3)
    assert recipe.trainer == {"fsdp_config": {"version": 2}}
    assert isinstance(recipe.data.cap, int), "a number of samples, and no share of them"
    assert load_recipe(small, ["lora={r: 4, alpha: 8}", "lora=null"]).lora is None


@pytest.mark.parametrize("name", sorted(LACO | STF))
def test_a_recipe_written_down_is_the_same_recipe(name, tmp_path):
    recipe = load_recipe(name, ["data.path=data.json", "train.rates.projector=3e-4"])
    (tmp_path / "record.yaml").write_text(to_yaml(recipe))
    assert load_recipe(tmp_path / "record.yaml") == recipe
    assert isinstance(yaml.safe_load(to_yaml(recipe)), dict)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["modell.text=x"], "small.yaml: modell: got an unknown key, expected one of output, model"),
        (["train.rate=1"], "small.yaml: train.rate: got an unknown key, expected one of rates, batch_size"),
        (["train=3"], "small.yaml: train: got 3, expected a section with some of rates"),
        (["train.rates.tower=1"], "train.rates.tower: got an unknown part, expected some of encoder, merge, projector, llm"),
        (["train.rates.llm=-1"], "train.rates.llm: got -1.0, expected a positive number"),
        (["train.rates.llm=.nan"], "train.rates.llm: got nan, expected a positive number"),
        (["train.rates={}"], "train.rates: got none, expected a rate for some of"),
        (["train.rates.llm=fast"], "train.rates.llm: got 'fast', expected a number"),
        (["train.batch_size=8.5"], "train.batch_size: got 8.5, expected an integer"),
        (["train.batch_size=true"], "train.batch_size: got True, expected an integer"),
        (["train.batch_size=0"], "train.batch_size: got 0, expected an integer from 1 on"),
        (["train.precision=fp8"], "train.precision: got 'fp8', expected float32 or bfloat16"),
        (["train={batch_size: 1}"], "small.yaml: train.rates: got nothing, expected a value"),
        (["train={rates: {llm: 1}, batch_size: 1, epochs: 1, max_steps: 2}"], "got 2 beside train.epochs, expected one of"),
        (["train.min_lr=1"], "train.min_lr: got 1.0, expected at most 0.001, the rate of projector"),
        (["train.warmup=1.5"], "train.warmup: got 1.5, expected a number of steps"),
        (["train.gradient_checkpointing=1"], "train.gradient_checkpointing: got 1, expected true or false"),
        (["data.path=null"], "data.path: got None, expected a path"),
        (["data.path='???'"], "data.path: got ???, expected a value of your own. Pass --set data.path=..."),
        (["data.cap=1.5"], "data.cap: got 1.5, expected a number from 0 on, or a share"),
        (["data.max_length=0"], "data.max_length: got 0, expected an integer from 1 on"),
        (["model.vision=null"], "model.vision: got nothing, expected a folder or hub name"),
        (["model.checkpoint=x"], "model.checkpoint: got one beside vision, text, depth, expected it alone"),
        (["model.depth=2"], "model.depth: got 2, expected a fraction of the depth"),
        (["model.depth=1/0"], "model.depth: got '1/0', expected a number or a fraction"),
        (["model.vision_feature_layer=[x]"], "model.vision_feature_layer: got ['x'], expected an integer or"),
        (["trainer.learning_rate=1"], "trainer.learning_rate: got what the recipe decides itself"),
        (["lora={r: 4, alpha: 8, merge: true}"], "lora: got adapters for a frozen LLM, expected a rate in train.rates.llm"),
        (["train.rates.llm=1", "lora={r: 4, alpha: 8}"], "lora.merge: got false for a model that is put together here"),
        (["train.rates.llm=1", "lora={r: 0, alpha: 8, merge: true}"], "lora.r: got 0, expected an integer from 1 on"),
        (
            ["train.rates.llm=1", "lora={r: 4, alpha: 8, merge: true}", "trainer.fsdp=full_shard"],
            "lora.merge: got true with sharded parameters, expected false",
        ),
        (["train.batch_size"], "--set: got 'train.batch_size', expected key=value"),
        (["=3"], "--set: got '=3', expected key=value"),
        (["train.rates=[1"], "--set: got 'train.rates=[1', expected a value in YAML"),
    ],
)
def test_refusals_name_file_and_key(small, changes, message):
    with pytest.raises(ValueError) as refused:  # noqa: PT011 - the message is compared below
        load_recipe(small, changes)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_refused_files(tmp_path):
    for text, message in ((":\n  - [", "expected YAML"), ("- 1", "expected sections in YAML"), ("\xff", "expected")):
        (tmp_path / "broken.yaml").write_text(text, encoding="latin-1")
        with pytest.raises(ValueError, match=message):
            load_recipe(tmp_path / "broken.yaml")
    with pytest.raises(ValueError, match=r"recipe: got 'laco-stage9', expected a file, or one of laco-stage1"):
        load_recipe("laco-stage9")
