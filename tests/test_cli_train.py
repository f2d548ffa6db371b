"""``laco train`` through its runner: the stages one after the other, on models small enough for seconds."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import laco_kernels.cli.common as common
import laco_kernels.hf as hf
from laco_kernels.train.parts import part_of, parts_of
from laco_kernels.train.recipe import load_recipe, packaged
from laco_kernels.train.run import prepare

from .hf.encoders import stock
from .hf.llava import llm, picture, tokenizer
from .test_cli import laco
from .train.samples import sample
from .train.test_recipe import LACO, RATES

SAMPLES = 9


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Tiny encoders, LLMs and data on disk; one of the samples has no image."""
    folder = tmp_path_factory.mktemp("place")
    stock("aimv2", dtype=torch.float32).save_pretrained(folder / "aimv2")
    stock("clip", dtype=torch.float32, num_hidden_layers=24).save_pretrained(folder / "clip")
    for kind, chat_format in (("qwen2", "chatml"), ("llama", "vicuna")):
        llm(kind).save_pretrained(folder / kind)
        tokenizer(chat_format).save_pretrained(folder / kind)
    picture().save(folder / "a.png")
    picture(50, 60, (20, 150, 60)).convert("L").save(folder / "b.png")
    samples = [
        sample("ab"[i % 2] + ".png", answer=("A red square.", "It is grey.")[i % 2]) | {"id": f"s{i}"} for i in range(SAMPLES)
    ]
    (folder / "data.json").write_text(json.dumps([*samples, sample("gone.png")]))
    return folder


def options(place, to, **changes):
    """What makes a recipe of the package a small one."""
    usual = {
        "output": to,
        "data.path": place / "data.json",
        "data.cap": 1,
        "train.batch_size": 4,
        "train.per_device_batch_size": 2,
        "train.max_steps": 4,
        "train.save_every": 2,
        "train.warmup": 0,
        "train.precision": "float32",
        "trainer": "null",
    }
    usual |= {key.replace("__", "."): value for key, value in changes.items()}
    return [part for key, value in usual.items() for part in ("--set", f"{key}={value}")]


def parts(place, encoder="aimv2", text="qwen2"):
    return {"model__vision": place / encoder, "model__text": place / text}


def weights(folder, name="model.safetensors"):
    return load_file(folder / name)


@pytest.fixture(scope="module")
def stage1(place):
    done = laco("train", "laco-stage1", *options(place, place / "stage1", **parts(place)))
    assert done.exit_code == 0, done.output
    return done, place / "stage1"


@pytest.fixture(scope="module")
def stf(place):
    done = laco("train", "stf-pretrain", *options(place, place / "stf", train__max_steps=1, **parts(place, "clip", "llama")))
    assert done.exit_code == 0, done.output
    return place / "stf"


def test_the_first_stage_trains_merge_and_projector_alone(place, stage1):
    done, folder = stage1
    text = " ".join(done.stdout.split())
    lines = [line for line in done.stdout.splitlines() if str(place) not in line]  # which is as long as it is
    assert max(map(len, lines)) <= 80
    assert re.search(r"encoder │ 63,776 │ frozen", text)
    assert re.search(r"merge │ 5,184 │ 5,184 │ 0\.001 │ 0 ", text)
    for fact in (
        "4 x 4 patches of an image become 4 tokens: laco, 2 x 2 after layer 1 of 4",
        f"{SAMPLES} samples, {SAMPLES} images",
        "left out 1 missing file",
        "made RGB 4 L",
        "batch 4 = 1 device x 2 at once x 2 accumulated",
        "steps 4, 0 of them warming up, then a cosine down to 1e-07",
        "precision float32, parameters float32, gradient checkpointing",
    ):
        assert fact in text
    assert "step 4 of 4: loss" in done.stderr
    model = AutoModelForImageTextToText.from_pretrained(folder)
    trained = {"": model.model.vision_tower.state_dict(), "model.": model.model.language_model.state_dict()}
    for prefix, kept in (("", weights(place / "aimv2")), ("model.", weights(place / "qwen2"))):
        assert all(
            torch.equal(trained[prefix][name.removeprefix(prefix)], kept[name]) for name in kept if name.startswith(prefix)
        )
    merge = parts_of(model)["merge"]
    assert any(parameter.abs().max() > 0 for name, parameter in merge.items() if "linear2" in name)
    last = AutoModelForImageTextToText.from_pretrained(folder / "checkpoint-4").state_dict()
    assert all(torch.equal(last[name], tensor) for name, tensor in model.state_dict().items())


def test_a_result_loads_with_its_processor_and_generates(stage1):
    _, folder = stage1
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    hf.check_processor(model, processor)
    assert (model.dtype, model.config.text_config.use_cache) == (torch.float32, True)
    assert "use_cache" not in json.loads((folder / "config.json").read_text()), "which training turns off"
    prompt = processor(images=Image.open(folder.parent / "a.png"), text="<image>\nWhat is it?", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=3, do_sample=False).shape[1] > prompt["input_ids"].shape[1]
    assert not list(folder.glob("*.part")) + list(folder.glob("*.bin"))


def test_a_stage_begins_with_what_the_one_before_left(place, stage1):
    done = laco("train", "laco-stage1.5", *options(place, place / "stage15", model__checkpoint=stage1[1], train__max_steps=2))
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in (place / "stage15" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["lr"] == RATES["laco-stage1.5"], "the merge has a rate of its own"
    before, after = weights(stage1[1]), weights(place / "stage15")
    changed = {part_of(name) for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"encoder", "merge", "projector", "llm"}
    largest = {part_of(name): 0.0 for name in before}
    for name in before:
        largest[part_of(name)] = max(largest[part_of(name)], float((before[name] - after[name]).abs().max()))
    assert largest["encoder"] < 5e-6 < largest["merge"] < 5e-5, "two steps of Adam move a weight by at most two rates"


def test_resuming_ends_where_an_uninterrupted_run_does(place, stage1, tmp_path):
    again = ["train", "laco-stage1", *options(place, tmp_path / "out", **parts(place))]
    assert laco(*again).exit_code == 0
    whole = weights(tmp_path / "out")
    assert all(torch.equal(tensor, whole[name]) for name, tensor in weights(stage1[1]).items()), "as the seed is"
    for name in ("model.safetensors", "config.json"):
        (tmp_path / "out" / name).unlink()
    (tmp_path / "out" / "checkpoint-4" / "manifest.json").unlink()
    done = laco(*again, "--resume", "--set", "train.keep=1")
    assert done.exit_code == 0, done.output
    assert "going on after step 2\nstep 3 of 4" in done.stderr
    assert all(torch.equal(tensor, whole[name]) for name, tensor in weights(tmp_path / "out").items())
    copy = laco("train", tmp_path / "out" / "recipe.yaml", "--resume", "--dry-run")
    assert copy.exit_code == 0, copy.output


def test_lora_leaves_an_adapter_or_a_merged_model(place, stf):
    common = {"model__checkpoint": stf, "train__max_steps": 2, "lora__r": 2, "lora__dropout": 0, "train__rates__llm": 0.01}
    for merge in ("true", "false"):
        done = laco("train", "stf-finetune-lora", *options(place, place / f"lora-{merge}", **common, lora__merge=merge))
        assert done.exit_code == 0, done.output
    assert "LoRA" in done.stdout
    merged = AutoModelForImageTextToText.from_pretrained(place / "lora-true")
    for adapter in (place / "lora-false", place / "lora-true" / "adapter"):
        base = AutoModelForImageTextToText.from_pretrained(stf)
        joined = PeftModel.from_pretrained(base, adapter).merge_and_unload()
        for (name, one), (_, other) in zip(joined.named_parameters(), merged.named_parameters(), strict=True):
            torch.testing.assert_close(one, other, msg=name)
    before = weights(stf)
    changed = {part_of(name) for name, tensor in weights(place / "lora-true").items() if not torch.equal(tensor, before[name])}
    assert changed == {"projector", "llm"}
    AutoProcessor.from_pretrained(place / "lora-false")
    refused = laco("train", "stf-finetune", *options(place, place / "no", model__checkpoint=place / "lora-false"))
    assert refused.exit_code == 2
    assert "which is an adapter, expected a whole model" in refused.stderr


@pytest.mark.parametrize("name", sorted(packaged()))
def test_every_recipe_of_the_package_can_be_prepared(name, place, stage1, stf):
    built = name in ("laco-stage1", "stf-pretrain")
    model = parts(place, *(("aimv2", "qwen2") if name in LACO else ("clip", "llama")))
    begin = model if built else {"model__checkpoint": stage1[1] if name in LACO else stf}
    changes = options(place, place / "never", trainer="{dataloader_num_workers: 4}", **begin)[1::2]
    run = prepare(load_recipe(name, changes))
    assert {part.name: part.rate for part in run.plan.parts if part.trained} == RATES[name]
    assert run.plan.image.tokens == 4
    assert not (place / "never").exists()


def test_a_dry_run_writes_nothing_and_knows_the_steps(place, stage1, tmp_path):
    halves = [{"json_path": str(place / "data.json"), "sampling_strategy": which} for which in ("first:5", "end:50%")]
    (place / "mixture.yaml").write_text(json.dumps({"datasets": halves}))
    changes = options(place, tmp_path / "out", **parts(place), train__epochs=3, data__path=place / "mixture.yaml")
    done = laco("train", "laco-stage1", *changes, "--dry-run")
    assert done.exit_code == 0, done.output
    text = " ".join(done.stdout.split())
    assert "steps 9, 0 of them" in text
    assert "data.json: 5 of 10 (first:5) data.json: 5 of 10 (end:50%)" in text
    assert list(tmp_path.iterdir()) == []
    begun = laco("train", "laco-stage1", *changes, "--resume")
    assert begun.exit_code == 0, "where nothing is, it begins"
    assert "going on at the beginning, as there is no checkpoint" in begun.stderr
    assert json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 9


def test_what_only_decoding_shows_is_told_and_steps_are_known_where_batches_are_dropped(place, tmp_path):
    (place / "cut.png").write_bytes((place / "a.png").read_bytes()[:-40])
    samples = [sample("ab"[i % 2] + ".png") for i in range(8)] + [sample("cut.png") | {"id": "cut"}]
    (place / "cut.json").write_text(json.dumps(samples))
    changes = {"data__path": place / "cut.json", "train__epochs": 3, "trainer": "{dataloader_drop_last: true}"}
    done = laco("train", "laco-stage1", *options(place, tmp_path / "out", **parts(place), **changes))
    assert done.exit_code == 0, done.output
    assert re.search(r"steps +6, 0 of them", done.stdout)
    assert "step 6 of 6" in done.stderr
    assert "1 of 9 samples left out: 1 damaged image (cut)" in done.stdout


def test_recipes_are_listed_and_shown():
    done = laco("train", "--list")
    assert done.exit_code == 0
    assert all(name in done.stdout for name in packaged())
    assert max(map(len, done.stdout.splitlines())) <= 80
    done = laco("train", "stf-finetune-lora", "--show")
    assert done.stdout == packaged()["stf-finetune-lora"].read_text()


def test_a_loss_that_is_no_number_ends_the_run_and_nothing_else(place, tmp_path):
    changes = options(place, tmp_path / "out", **parts(place), train__save_every=1, train__rates__projector="1e38")
    done = laco("train", "laco-stage1", *changes)
    assert done.exit_code == 1
    assert re.search(r"error: (loss|gradient norm): got (nan|inf).* at step 2", done.stderr)
    assert (tmp_path / "out" / "checkpoint-1").exists()
    assert not (tmp_path / "out" / "config.json").exists()
    again = laco("train", "laco-stage1", *changes)
    assert "which has things in it, expected an empty folder. Pass --resume" in again.stderr
    other = laco("train", "laco-stage1", *changes, "--set", "train.rates.projector=0.001", "--resume")
    assert other.exit_code == 2
    assert "--resume: got train.rates.projector 0.001 instead of 1e+38, expected the recipe in" in other.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__batch_size": 5}, "train.batch_size: got 5, expected a multiple of 1 device x 2 samples at once"),
        ({"data__cap": 0}, "data: got 1 of 10 samples left out: 1 missing file (gone.png), expected at most 0 left out"),
        ({"data__max_length": 3}, "too long"),
        ({"data__max_length": 3, "data__cap": 1.0}, "with no sample to train on"),
        ({"data__path": "nowhere.json"}, "nowhere.json"),
        ({"train__report_to": "[clearml]"}, "train.report_to: got clearml, expected a tracker that is installed"),
        (
            {"trainer": "{dataloader_drop_last: true}", "train__batch_size": 20, "train__per_device_batch_size": 10},
            "data.path: got 9 samples, expected 10 or more, for one batch",
        ),
        ({"model__text": "no/such-llm"}, "text: got 'no/such-llm'"),
        (
            {"train__rates__encoder": 1e-5, "model__depth": "null", "model__compressor": "null", "model__ratio": "null"},
            "rates: got 'merge'",
        ),
        ({"trainer": "{learning_rat: 1}"}, "trainer.learning_rat: got an unknown key"),
        ({"trainer": "{optim: adamm}"}, "trainer: got {'optim': 'adamm'} (adamm is not a valid OptimizerNames"),
        ({"trainer": "{deepspeed: zero.json}"}, "trainer: got {'deepspeed': 'zero.json'} ("),
        (
            {"train__rates": "{llm: 1}", "train__min_lr": 0, "output": "/proc/nowhere"},
            "got /proc/nowhere, which cannot be written to",
        ),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(place, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    done = laco("train", "laco-stage1", *options(place, tmp_path / "out", **parts(place) | changes))
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_lacks_weights_is_refused(place, stage1, tmp_path):
    from safetensors.torch import save_file

    for file in stage1[1].glob("*.json*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    kept = {name: tensor for name, tensor in weights(stage1[1]).items() if "linear_1" not in name}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    done = laco("train", "laco-stage1.5", *options(place, tmp_path / "out", model__checkpoint=tmp_path))
    assert done.exit_code == 2
    assert "which lacks model.multi_modal_projector.linear_1.bias" in done.stderr


def test_nothing_and_missing_packages(monkeypatch):
    assert "recipe: got nothing, expected a YAML file" in laco("train").stderr
    monkeypatch.setitem(sys.modules, "peft", None)
    done = laco("train", "--list")
    assert done.exit_code == 2
    assert "laco train needs peft, which is not installed. Run: pip install 'laco_kernels[train]'" in done.stderr


def test_two_processes_shard_the_model_and_print_once(place, stage1, tmp_path):
    settings = "{fsdp: full_shard, fsdp_config: {version: 2, transformer_layer_cls_to_wrap: [Qwen2DecoderLayer]}}"
    changes = options(place, tmp_path / "out", **parts(place), train__per_device_batch_size=1, trainer=settings)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port", 0, "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(common.__file__).parents[2])}
    command += ["-m", "laco_kernels.cli", "train", "laco-stage1", *changes]
    done = subprocess.run(
        [str(part) for part in command], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("What is trained") == 1
    assert done.stderr.count("step 4 of 4") == 1
    assert "batch 4 = 2 devices x 1 at once x 2 accumulated" in " ".join(done.stdout.replace("      ", " ").split())
    alone, shared = (
        AutoModelForImageTextToText.from_pretrained(folder).state_dict() for folder in (stage1[1], tmp_path / "out")
    )
    for name, tensor in shared.items():
        torch.testing.assert_close(tensor, alone[name], rtol=1e-3, atol=1e-5, msg=name)
