"""Conversations as tokens: labels on answers alone, in every format."""

import json

import pytest
import torch
from tokenizers import Tokenizer
from transformers import LlavaProcessor, PreTrainedTokenizerFast

import laco_kernels as lk
from laco_kernels.train.conversation import encode, parse
from laco_kernels.train.data import Collator, take_notes
from laco_kernels.train.skipping import BadSampleError, Cause

from ..hf.llava import llava, picture, tokenizer
from .samples import TOKENS, dataset, sample

# Pieces of each format, True where they are trained on: written by hand, from the formats' own descriptions.
HAND = {
    "chatml": [
        ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n" + "<image>" * 4 + "\nWhich of two?", False),
        ("<|im_end|>\n<|im_start|>assistant\n", False),
        ("Two blue circles: ○○!<|im_end|>", True),
        ("\n<|im_start|>user\nAnd " + "<image>" * 4 + "\n here?<|im_end|>\n<|im_start|>assistant\n", False),
        ("A red\n\nsquare.<|im_end|>", True),
        ("\n", False),
    ],
    "llama3": [
        ("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>", False),
        ("<|start_header_id|>user<|end_header_id|>\n\n" + "<image>" * 4 + "\nWhich of two?<|eot_id|>", False),
        ("<|start_header_id|>assistant<|end_header_id|>\n\n", False),
        ("Two blue circles: ○○!<|eot_id|>", True),
        ("<|start_header_id|>user<|end_header_id|>\n\nAnd " + "<image>" * 4 + "\n here?<|eot_id|>", False),
        ("<|start_header_id|>assistant<|end_header_id|>\n\n", False),
        ("A red\n\nsquare.<|eot_id|>", True),
    ],
    "vicuna": [
        ("<s>Be brief. USER: " + "<image>" * 4 + "\nWhich of two? ASSISTANT:", False),
        (" Two blue circles: ○○!</s>", True),
        ("USER: And " + "<image>" * 4 + "\n here? ASSISTANT:", False),
        (" A red\n\nsquare.</s>", True),
    ],
}
TALK = {
    "id": 1,
    "images": ["a.png", "b.png"],
    "conversations": [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "<image>\nWhich of two?"},
        {"from": "gpt", "value": "Two blue circles: ○○!\n"},
        {"from": "human", "value": "And <image> here?"},
        {"from": "gpt", "value": " A red\n\nsquare."},
    ],
}


@pytest.mark.parametrize("trimmed", [False, True])
@pytest.mark.parametrize("chat_format", HAND)
def test_labels_token_by_token(chat_format, trimmed, models):
    """Also where a tokenizer takes white space off its offsets, as Llama 3's does."""
    made = models[chat_format][1]
    if trimmed:
        state = json.loads(made.tokenizer.backend_tokenizer.to_str())
        trim = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        before = [state["post_processor"]] if state["post_processor"] else []
        state["post_processor"] = {"type": "Sequence", "processors": [*before, trim]}
        stock, made = made.tokenizer, LlavaProcessor(**vars_of(made))
        made.tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token=stock.eos_token, bos_token=stock.bos_token
        )
    messages, names = parse(TALK)
    assert names == ["a.png", "b.png"]
    ids, labels = encode(made, messages, TOKENS)
    expected_ids, expected_labels = [], []
    for text, trained in HAND[chat_format]:
        piece = made.tokenizer(text, add_special_tokens=False)["input_ids"]
        expected_ids += piece
        expected_labels += piece if trained else [-100] * len(piece)
    assert ids == expected_ids
    assert labels == expected_labels


def vars_of(processor):
    names = ("image_processor", "tokenizer", "patch_size", "vision_feature_select_strategy", "chat_template", "image_token")
    return {name: getattr(processor, name) for name in (*names, "num_additional_image_tokens")}


@pytest.mark.parametrize("chat_format", HAND)
def test_tokens_are_those_of_a_prompt(chat_format, models, tmp_path):
    """What the processor itself makes of the conversation, and of the prompt that asks for the answer."""
    model, made = models[chat_format]
    for name in ("a.png", "b.png"):
        picture().save(tmp_path / name)
    item = dataset(tmp_path, [TALK], made)[0]
    messages, _ = parse(TALK)
    for number in (2, 4):
        shown = [picture()] * (number // 2)
        prompt = made.apply_chat_template(messages[:number], add_generation_prompt=True)
        ids = made(images=shown, text=prompt)["input_ids"][0]
        assert item.input_ids[: len(ids)].tolist() == ids
        assert item.labels[len(ids)] != -100
        assert item.labels[len(ids) - 1] == -100
    assert item.pixel_values.shape == (2, 3, 56, 56)
    assert torch.equal(item.pixel_values[0], made(images=[picture()], text="<image>", return_tensors="pt")["pixel_values"][0])
    batch = Collator(made)([item, item])
    assert take_notes(batch).ids == ("1", "1")
    loss = model(**batch).loss
    loss.backward()
    assert torch.isfinite(loss)
    model.zero_grad()


def test_images_stay_where_they_stand():
    record = sample(question="Compare <image> and\n<image>\n", images=["a", "b"], image=None)
    content = parse(record)[0][0]["content"]
    image = {"type": "image"}
    assert content == [{"type": "text", "text": "Compare "}, image, {"type": "text", "text": " and\n"}, image]
    assert parse(sample(name=None, question="Hello?"))[1] == []
    assert parse(sample(video=None))[1] == ["a.png"], "as a table of samples writes what is not there"


BAD_RECORDS = {
    "no object": ("text", Cause.MALFORMED),
    "a list": ([1], Cause.MALFORMED),
    "no conversation": ({"id": 1, "image": "a.png"}, Cause.EMPTY),
    "an empty one": ({"conversations": []}, Cause.EMPTY),
    "no list": ({"conversations": "hello"}, Cause.MALFORMED),
    "a turn that is none": ({"conversations": ["hello"]}, Cause.MALFORMED),
    "an unknown speaker": ({"conversations": [{"from": "tool", "value": "x"}]}, Cause.MALFORMED),
    "no text": ({"conversations": [{"from": "human", "value": None}]}, Cause.MALFORMED),
    "an empty question": (sample(question=" "), Cause.EMPTY),
    "an empty answer": (sample(answer="\n"), Cause.EMPTY),
    "no answer": ({"conversations": [{"from": "human", "value": "x"}]}, Cause.MALFORMED),
    "only a system message": ({"conversations": [{"from": "system", "value": "x"}]}, Cause.MALFORMED),
    "two questions": ({"conversations": [{"from": "human", "value": "x"}] * 2}, Cause.MALFORMED),
    "no placeholder": (sample(question="What?"), Cause.PLACEHOLDERS),
    "no image": (sample(name=None), Cause.PLACEHOLDERS),
    "too few images": (sample(question="<image><image>"), Cause.PLACEHOLDERS),
    "a placeholder in an answer": (sample(answer="See <image>"), Cause.PLACEHOLDERS),
    "a video": (sample(video="a.mp4"), Cause.MALFORMED),
    "a speaker that is none": ({"conversations": [{"from": ["human"], "value": "x"}]}, Cause.MALFORMED),
    "half a character": (sample(answer="A red square \ud83d"), Cause.MALFORMED),
    "two keys": (sample(images=["b.png"]), Cause.MALFORMED),
    "no name": (sample(image=[3]), Cause.MALFORMED),
}


@pytest.mark.parametrize("kind", BAD_RECORDS)
def test_bad_records(kind):
    record, cause = BAD_RECORDS[kind]
    with pytest.raises(BadSampleError) as raised:
        parse(record)
    assert raised.value.cause is cause


def test_the_processors_own_image_token_is_no_text():
    model = llava(depth=0.5)
    made = lk.hf.build_processor(model, tokenizer(), image_token="<picture>")
    messages, _ = parse(sample())
    assert encode(made, messages, TOKENS)[0].count(made.image_token_id) == TOKENS
    with pytest.raises(BadSampleError, match="2 times <picture> for 1 images"):
        encode(made, parse(sample(answer="A <picture>."))[0], TOKENS)


def test_a_template_that_rewrites_earlier_turns_is_refused(processor):
    made = LlavaProcessor(**vars_of(processor))
    made.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'][0]['text'] }}{% endfor %}"
    with pytest.raises(ValueError, match="chat_template: got one that writes a turn differently once others follow"):
        encode(made, parse(sample(name=None, question="Hm?"))[0], TOKENS)
