"""What is asked, how answers are counted, and what guessing the most frequent answer gets."""

import json

import pytest
import torch

from laco_kernels.train import evaluate
from laco_kernels.train.evaluate import Answer
from laco_kernels.train.mixture import read_data

from ..hf.llava import picture


@pytest.fixture
def records(tmp_path):
    picture().save(tmp_path / "a.png")
    turns = [("<image>\nWhat is it?", "A square."), ("Which colour?", "red")]
    conversation = [{"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn, strict=True)]
    samples = [
        {"id": "one", "image": "a.png", "conversations": conversation, "types": ["shape", "colour"]},
        {"id": "two", "image": "a.png", "conversations": conversation[:2], "types": ["shape"]},
        {"conversations": [{"from": "human", "value": "Hm?"}, {"from": "gpt", "value": "yes"}]},
    ]
    (tmp_path / "held_out.json").write_text(json.dumps(samples))
    return read_data(tmp_path / "held_out.json")


def test_every_question_is_asked_behind_the_true_answers_before_it(models, records, monkeypatch):
    model, processor = models["chatml"]
    prompts, options = [], []

    def generate(input_ids, attention_mask, pixel_values=None, **others):
        texts = [processor.decode(row[mask.bool()]) for row, mask in zip(input_ids, attention_mask, strict=True)]
        prompts.extend(texts)
        options.append((others, 0 if pixel_values is None else len(pixel_values), model.training))
        said = [processor.tokenizer.encode("red" if "Which" in text else " A square.")[:30] for text in texts]
        end, length = processor.tokenizer.convert_tokens_to_ids("<|im_end|>"), max(map(len, said)) + 1
        padding = processor.tokenizer.pad_token_id
        rows = [[*ids, end, *[padding] * (length - 1 - len(ids))] for ids in said]
        return torch.cat([input_ids, torch.tensor(rows)], dim=1)

    monkeypatch.setattr(model, "generate", generate)
    model.train()
    answers = evaluate.answer(model, processor, records, batch=3, new_tokens=5)
    assert model.training
    model.eval()
    image = "<image>" * 4 + "\n"
    asked = f"<|im_start|>user\n{image}What is it?<|im_end|>\n<|im_start|>assistant\n"
    assert prompts[:2] == [
        asked,
        f"{asked}A square.<|im_end|>\n<|im_start|>user\nWhich colour?<|im_end|>\n<|im_start|>assistant\n",
    ]
    assert prompts[3] == "<|im_start|>user\nHm?<|im_end|>\n<|im_start|>assistant\n"
    assert options == [({"max_new_tokens": 5, "do_sample": False}, images, False) for images in (3, 0)]
    assert answers == [
        Answer("one", "shape", "What is it?", "A square.", "A square."),
        Answer("one", "colour", "Which colour?", "red", "red"),
        Answer("two", "shape", "What is it?", "A square.", "A square."),
        Answer("held_out.json#2", evaluate.UNTYPED, "Hm?", "yes", "A square."),
    ]
    assert [answer.right for answer in answers] == [True, True, True, False]


def test_batches_answer_as_one_by_one(models, records):
    model, processor = models["chatml"]
    single, together = (evaluate.answer(model, processor, records, batch=batch, new_tokens=4) for batch in (1, 8))
    assert single == together


def test_scores_and_the_majority_answer():
    def given(kind, expected, said):
        return Answer("", kind, "", expected, said)

    colours = [("red", "red"), ("red", "blue"), ("blue", "blue"), ("red", ""), ("green", "Green")]
    answers = [given("colour", *pair) for pair in colours] + [given("count", "2", "2")]
    colour, count = evaluate.score(answers)
    assert (colour.kind, colour.asked, colour.right, colour.majority, colour.majority_right) == ("colour", 5, 2, "red", 3)
    assert (colour.accuracy, colour.baseline) == (0.4, 0.6)
    assert (count.kind, count.accuracy, count.baseline) == ("count", 1, 1)


def test_refusals(models, records, tmp_path):
    model, processor = models["chatml"]
    for option in ({"batch": 0}, {"new_tokens": 1.5}):
        with pytest.raises((TypeError, ValueError), match=f"{next(iter(option))}: got"):
            evaluate.answer(model, processor, records, **option)
    (tmp_path / "none.json").write_text("[]")
    with pytest.raises(ValueError, match="records: got none"):
        evaluate.answer(model, processor, read_data(tmp_path / "none.json"))
    record = dict(records[1][2], types=["shape", "colour"])
    (tmp_path / "types.json").write_text(json.dumps([record]))
    with pytest.raises(ValueError, match="types: got 2 for 1 questions in two"):
        evaluate.answer(model, processor, read_data(tmp_path / "types.json"))
