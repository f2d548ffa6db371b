"""``laco chat`` through its runner, on a small saved model."""

import json
import shutil

import pytest
import torch
from transformers import LlavaForConditionalGeneration, TextStreamer

import laco_kernels as lk
from laco_kernels.hf import answer

from .hf.encoders import stock
from .hf.llava import llava, picture, tokenizer, user
from .test_cli import laco


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with its processor, and photos."""
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("chat")
    model = llava("siglip", depth=0.5)
    processor = lk.hf.build_processor(model, tokenizer())
    model.save_pretrained(place / "model")
    processor.save_pretrained(place / "model")
    picture().save(place / "a.png")
    picture(30, 99, (10, 10, 10)).save(place / "b.png")
    (place / "broken.png").write_bytes((place / "a.png").read_bytes()[:60])
    (place / "empty.png").write_bytes(b"")
    (place / "empty").mkdir()
    shutil.copytree(place / "model", place / "alone")
    (place / "alone" / "processor_config.json").unlink()
    (place / "alone" / "tokenizer.json").unlink()
    shutil.copytree(place / "model", place / "damaged")
    (place / "damaged" / "model.safetensors").write_bytes(b"0123456789")
    shutil.copytree(place / "model", place / "other")
    lk.hf.build_processor(llava("siglip", depth=0.5, side=5), tokenizer()).save_pretrained(place / "other")
    stock("siglip").save_pretrained(place / "encoder")
    return place


def chat(folder, *arguments, model="model"):
    return laco("chat", *arguments, "--model", folder / model, "--device", "cpu", "--max-new-tokens", 9)


def by_hand(folder, *parts):
    model, processor = answer.load_pair(str(folder / "model"))
    inputs = processor.apply_chat_template(
        [user(*parts)], tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    new = model.generate(**inputs, do_sample=False, max_new_tokens=9)[0, inputs["input_ids"].shape[1] :]
    return len(new), processor.tokenizer.decode(new, skip_special_tokens=True)


@pytest.mark.parametrize("files", [["a.png"], ["b.png", "a.png"]])
def test_the_answer_is_the_models(folder, files):
    photos = [folder / name for name in files]
    shown = [picture() if name == "a.png" else picture(30, 99, (10, 10, 10)) for name in files]
    tokens, text = by_hand(folder, *shown, "What is it?")
    done = chat(folder, *photos, "What is it?")
    assert done.exit_code == 0, done.output
    assert done.stdout == "".join(c for c in text if c.isprintable() or c in "\n\t") + "\n"
    assert f"{tokens} tokens in" in done.stderr
    report = json.loads(chat(folder, *photos, "What is it?", "--json", "--dtype", "float32").stdout)
    assert (report["answer"], report["tokens"]) == (text.strip(), tokens)
    assert 0 < report["ttft"] <= report["seconds"]


def test_it_is_told_as_it_is_written(folder, monkeypatch):
    told, put, stock_put = [], [], TextStreamer.put
    model, processor = answer.load_pair(str(folder / "model"))

    def counting(self, value):
        put.append(len(told))
        stock_put(self, value)

    monkeypatch.setattr(TextStreamer, "put", counting)
    monkeypatch.setattr(processor.tokenizer, "decode", lambda ids, **_: "word " * len(ids))
    answer.answer(model, processor, [picture()], "What is it?", max_new_tokens=5, tell=told.append)
    assert put == [0, 0, 1, 2, 3, 4][: len(put)]
    assert len(put) > 3


def test_sampling_is_asked_for(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(
        LlavaForConditionalGeneration, "generate", lambda self, **options: asked.append(options) or options["input_ids"]
    )
    pair = answer.load_pair(str(folder / "model"))
    for temperature in (0.0, 0.7):
        answer.answer(*pair, [picture()], "What?", max_new_tokens=5, temperature=temperature)
    assert [options["do_sample"] for options in asked] == [False, True]
    assert asked[1]["temperature"] == 0.7


@pytest.mark.parametrize(
    ("photos", "model", "message"),
    [
        (["a.png", "broken.png"], "model", "broken.png, damaged or unreadable"),
        (["empty.png"], "model", "empty.png, an empty file; copy it again, expected a photo that can be read"),
        (["none.png"], "model", "none.png, which does not exist"),
        (["a.png"], "nowhere", "expected a folder that exists"),
        (["a.png"], "empty", "expected a folder with config.json and model.safetensors"),
        (["a.png"], "damaged", "expected a folder with config.json and model.safetensors"),
        (["a.png"], "alone", "expected a model with its processor. Save the processor beside the model"),
        (["a.png"], "encoder", "a siglip_vision_model, expected a model of images and text"),
        (["a.png"], "other", "image_processor: got one that turns"),
    ],
)
def test_what_cannot_be_used_is_one_line_and_exit_code_2(folder, photos, model, message):
    done = chat(folder, *(folder / name for name in photos), "What is it?", model=model)
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_an_image_token_in_the_question_and_an_adapter_are_refused(folder, tmp_path):
    done = chat(folder, folder / "a.png", "What is <image>?")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "question: got 'What is <image>?', expected a text without <image>" in done.stderr
    (tmp_path / "adapter_config.json").write_text("{}")
    done = chat(folder, folder / "a.png", "What?", model=tmp_path)
    assert done.exit_code == 2
    assert "which is an adapter, expected a whole model. Merge it" in done.stderr


def test_no_question_and_no_network(folder, monkeypatch):
    done = chat(folder, folder / "a.png", " ")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "question: got ' ', expected some text" in done.stderr
    done = laco("chat", folder / "a.png", "What?", "--model", "no/such-model")
    assert done.exit_code == 2
    assert "model: got 'no/such-model'" in done.stderr
    assert "a hub name with a network" in done.stderr
    assert done.stderr.count("\n") == 1

    def refuse(*_, **__):
        raise AssertionError("a network was asked")

    monkeypatch.setattr(answer, "read_config", refuse)
    for name in ("./no", "/no/such", "a/b/c", "~/model"):
        done = laco("chat", folder / "a.png", "What?", "--model", name)
        assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
