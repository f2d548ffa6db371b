"""The encoder and the LLM that are pretrained on the spot for the task, and what they are taught."""

import random
from types import SimpleNamespace

import torch

from laco_kernels.train import scene_tower, scenes, tiny_llm
from laco_kernels.train.conversation import IGNORED
from laco_kernels.train.scene_tower import WHAT
from laco_kernels.train.scenes import Thing

SCENE = (Thing("shape", "star", "red"), None, Thing("word", "OX", "blue"), Thing("digit", "7", "white"))


def test_labels_say_what_is_drawn():
    colours = list(scenes.COLOURS)
    none = [IGNORED] * 2
    assert scene_tower.labels_of(SCENE) == [
        [WHAT.index("star"), colours.index("red"), *none, 0],
        [0, IGNORED, *none, 1],
        [WHAT.index("word"), colours.index("blue"), 14, 23, 2],
        [WHAT.index("7"), colours.index("white"), *none, 3],
    ]
    assert [len(WHAT), len(colours), 26, 26, 4] == list(scene_tower.CLASSES)
    top, bottom = [0] * 4 + [1] * 4, [2] * 4 + [3] * 4
    assert top * 4 + bottom * 4 == scene_tower.QUADRANTS


def test_pixels_are_those_of_the_image_processor():
    from transformers import SiglipImageProcessorPil

    image = scenes.draw(SCENE, random.Random(0))
    size = {"height": scenes.SIDE, "width": scenes.SIDE}
    expected = SiglipImageProcessorPil(size=size)(images=[image], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(scene_tower.pixels_of([image]), expected)


def test_a_tower_comes_from_its_seed_and_a_step_without_words_is_a_number(monkeypatch):
    monkeypatch.setattr(scene_tower, "HELD_OUT", 8)
    before = torch.get_rng_state()
    one, seen = scene_tower.pretrain_scene_tower(2, 2)
    assert torch.equal(torch.get_rng_state(), before)
    with monkeypatch.context() as patch:
        patch.setattr(scene_tower, "imagine_much", lambda _: SCENE[:1] * 4)
        other, _ = scene_tower.pretrain_scene_tower(2, 1)
    again, same = scene_tower.pretrain_scene_tower(2, 2)
    assert seen == same
    assert set(seen) == {"things", "colours", "letters"}
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(one.parameters(), again.parameters(), strict=True))
    assert all(bool(parameter.isfinite().all()) for parameter in other.parameters())


def test_the_tokenizer_spells_words_and_knows_the_marks():
    tokenizer = tiny_llm.train_tokenizer()
    text = "<|im_start|>user\n<image>\nWhat word is at the top left?<|im_end|>\n<|im_start|>assistant\nBED<|im_end|>\n"
    tokens = tokenizer.tokenize(text)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokens[-5:] == ["B", "E", "D", "<|im_end|>", "Ċ"]
    assert len(tokens) <= 24
    for answer in [*scenes.COLOURS, *scenes.SHAPES, *scenes.DIGITS]:
        assert tokenizer.decode(tokenizer.encode(answer)) == answer
    strange = "Zażółć gęślą jaźń 😀"
    assert tokenizer.decode(tokenizer.encode(strange)) == strange


def test_what_is_told_is_asked_and_only_answers_are_learned():
    tokenizer = tiny_llm.train_tokenizer()
    ids, labels = tiny_llm.told(random.Random(3), tokenizer, 2)
    text, answers = tokenizer.decode(ids), tokenizer.decode(labels[labels != IGNORED])
    assert text.startswith("<|im_start|>user\ntop left: ")
    assert text.count("<|im_start|>assistant\n") == answers.count("<|im_end|>") == 2
    turns = text.split("<|im_start|>assistant\n")[1:]
    assert answers == "".join(turn.partition("<|im_end|>")[0] + "<|im_end|>" for turn in turns)
    assert torch.equal(labels[labels != IGNORED], ids[labels != IGNORED])


def test_an_llm_comes_from_its_seed_and_learns():
    tokenizer = tiny_llm.train_tokenizer()
    one, again, later = (tiny_llm.pretrain_tiny_llm(tokenizer, steps, 3) for steps in (1, 1, 20))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(one.parameters(), again.parameters(), strict=True))

    def loss(model):
        ids, labels = tiny_llm.told(random.Random("new"), tokenizer, 6)
        with torch.no_grad():
            return float(model(input_ids=ids[None], labels=labels[None]).loss)

    assert loss(later) < loss(one) - 0.5


def test_what_is_not_there_counts_neither_as_read_nor_as_not(monkeypatch):
    monkeypatch.setattr(scene_tower, "HELD_OUT", 4)
    monkeypatch.setattr(scene_tower, "pretrain", lambda *_: None)
    monkeypatch.setattr(scene_tower, "imagine_much", lambda _: SCENE)

    class Knowing(torch.nn.Module):  # answers as the scene is, with a wrong colour for the digit
        def __init__(self, *_):
            super().__init__()
            self.labels = torch.tensor(scene_tower.labels_of(SCENE)).clamp(min=0)
            self.labels[3, 1] -= 1

        def forward(self, tokens):
            labels = self.labels[scene_tower.QUADRANTS]
            logits = [torch.eye(size)[labels[:, i]] for i, size in enumerate(scene_tower.CLASSES)]
            return torch.cat(logits, -1).expand(len(tokens), -1, -1)

    monkeypatch.setattr(scene_tower, "nn", SimpleNamespace(Linear=Knowing))
    _, seen = scene_tower.pretrain_scene_tower(1, 1)
    assert seen == {"things": 1, "colours": float(torch.tensor(2 / 3)), "letters": 1}
