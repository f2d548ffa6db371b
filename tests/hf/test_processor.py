"""Processors for LLaVA-style models: the placeholders in a prompt are as many as the model's tokens."""

import copy

import pytest
import torch
from jinja2 import TemplateError
from PIL import Image
from transformers import AutoConfig, AutoProcessor, CLIPImageProcessorPil, GotOcr2ImageProcessorPil, LlavaProcessor, pipeline

import laco_kernels as lk
from laco_kernels.bench import cases, prefill
from laco_kernels.hf.chat import CHAT_FORMATS
from laco_kernels.hf.processor import patch_size_for

from .encoders import STOCK, stock
from .llava import VARIANTS, llava, llm, picture, tokenizer, user

every_family = pytest.mark.parametrize("family", STOCK)
every_variant = pytest.mark.parametrize("variant", VARIANTS)
every_format = pytest.mark.parametrize("chat_format", CHAT_FORMATS)
TOGETHER = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}


def build(family="clip", side=4, chat_format="chatml", **options):
    model = llava(family, side=side, **options)
    return model, lk.hf.build_processor(model, tokenizer(chat_format))


@pytest.mark.parametrize("side", [4, 5])
@every_variant
@every_family
def test_there_are_as_many_placeholders_as_tokens(family, variant, side):
    options, even, odd = VARIANTS[variant]
    tokens = even if side == 4 else odd
    model, processor = build(family, side, **options)
    assert type(processor) is LlavaProcessor
    features = model.get_image_features(torch.randn(3, 3, side * 14, side * 14)).pooler_output
    assert [len(image) for image in features] == [tokens] * 3
    conversations = [[user(picture(), "What is it?")], [user(picture(90, 33), "and", picture(20, 20), "?")]]
    inputs = processor.apply_chat_template(conversations, **TOGETHER, processor_kwargs={"padding": True})
    assert (inputs["input_ids"] == model.config.image_token_id).sum(1).tolist() == [tokens, 2 * tokens]
    called = processor(images=[picture(), picture()], text=["<image> a", "b <image>"], padding=True)
    assert [ids.count(model.config.image_token_id) for ids in called["input_ids"]] == [tokens] * 2
    assert processor._get_num_multimodal_tokens([[10, 20], [30, 40]]).num_image_tokens == [tokens] * 2
    assert torch.isfinite(model(**inputs).logits).all()
    counts = lk.hf.check_processor(model, processor)
    assert (counts.image_size, counts.patches, counts.tokens) == ((side * 14,) * 2, (side,) * 2, tokens)


PAPERS = {"aimv2-l-336": (144, 28), "siglip-so400m-384": (196, 27), "internvit-300m-448": (256, 28), "clip-l-336": (144, 28)}


@pytest.mark.parametrize("vision", PAPERS)
def test_the_papers_encoders(vision):
    with torch.device("meta"):
        configs = AutoConfig.from_pretrained(cases.FOLDER / vision), AutoConfig.from_pretrained(prefill.FOLDER / "qwen2.5-0.5b")
        model = lk.hf.build_llava(*configs, depth=0.25)
    processor = lk.hf.build_processor(model, tokenizer())
    tokens, patch_size = PAPERS[vision]
    assert lk.hf.check_processor(model, processor).tokens == tokens
    assert processor.patch_size == patch_size
    assert model.config.text_config.vocab_size == 151936  # there is room
    if vision == "internvit-300m-448":  # its usual image processor also cuts images up, and says into how many pieces
        with pytest.raises(ValueError, match="image_processor: got one that returns pixel_values, num_patches, expected"):
            lk.hf.build_processor(model, tokenizer(), str(cases.FOLDER / vision))
        usual = GotOcr2ImageProcessorPil.from_pretrained(cases.FOLDER / vision)
    else:
        usual = lk.hf.build_processor(model, tokenizer(), str(cases.FOLDER / vision)).image_processor
    photo = Image.effect_noise((700, 500), 80).convert("RGB")
    ours, theirs = (made(images=[photo], return_tensors="pt")["pixel_values"] for made in (processor.image_processor, usual))
    torch.testing.assert_close(ours, theirs)


def test_patch_sizes():
    assert patch_size_for(336, 336, 576) == 14
    assert patch_size_for(384, 384, 729) == 14
    assert patch_size_for(384, 384, 196) == 27
    assert patch_size_for(56, 112, 8) == 28
    assert patch_size_for(336, 336, 32) is None
    assert patch_size_for(10, 10, 16) is None


def test_a_number_that_no_patch_size_gives_is_a_constant():
    options = {"num_queries": 7, "hidden_dim": 24, "num_layers": 1, "num_heads": 2}
    model, processor = build("siglip", projector="qformer", projector_options=options)
    assert processor.num_additional_image_tokens == 7
    assert lk.hf.check_processor(model, processor).tokens == 7


def test_a_wide_encoder():
    tower = STOCK["internvl"].config_class(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=[28, 112],
        patch_size=[14, 14],
    )
    model = lk.hf.build_llava(tower, llm().config, depth=0.5)
    processor = lk.hf.build_processor(model, tokenizer())
    counts = lk.hf.check_processor(model, processor)
    assert (counts.image_size, counts.patches, counts.tokens) == ((28, 112), (2, 8), 4)
    inputs = processor(images=picture(), text="<image>", return_tensors="pt")
    assert torch.isfinite(model(**inputs).logits).all()


def test_frames_of_a_video_are_images():
    model, processor = build("siglip", **VARIANTS["mbtf+stf"][0])
    frames = [picture(colour=(10 * i, 0, 0)) for i in range(8)]
    inputs = processor.apply_chat_template([user(*frames, "What happens?")], **TOGETHER)
    assert inputs["pixel_values"].shape == (8, 3, 56, 56)
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 8 * 4
    other = processor.apply_chat_template([user(*reversed(frames), "What happens?")], **TOGETHER)
    assert not torch.allclose(model(**inputs).logits, model(**other).logits)
    with pytest.raises(TemplateError, match=r"got a part of type 'video', expected 'image' or 'text'\. Pass the frames"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "video", "path": "a.mp4"}]}])


@pytest.mark.parametrize("variant", ["laco", "mbtf+stf"])
def test_a_batch_generates_what_each_prompt_does(variant):
    model, processor = build(**VARIANTS[variant][0], dtype=torch.float64)
    prompts = [[user(picture(), "What is this?")], [user(picture(), picture(30, 99), "Which of the two is red?")]]
    alone = []
    for prompt in prompts:
        inputs = processor.apply_chat_template(prompt, **TOGETHER)
        written = model.generate(**inputs.to(torch.float64), max_new_tokens=5, do_sample=False)
        alone.append(written[0, inputs["input_ids"].shape[1] :])
    inputs = processor.apply_chat_template(prompts, **TOGETHER, processor_kwargs={"padding": True})
    together = model.generate(**inputs.to(torch.float64), max_new_tokens=5, do_sample=False)
    assert torch.equal(together[:, inputs["input_ids"].shape[1] :], torch.stack(alone))


@pytest.mark.parametrize("variant", ["laco", "twice", "stf"])
@every_family
def test_model_and_processor_come_back_from_one_folder(family, variant, tmp_path):
    model, processor = build(family, 5, **VARIANTS[variant][0])
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    reloaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(reloaded) is LlavaProcessor
    assert lk.hf.check_processor(model, reloaded) == lk.hf.check_processor(model, processor)
    prompt = [user(picture(), "What is it?")]
    before, after = (made.apply_chat_template(prompt, **TOGETHER) for made in (processor, reloaded))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert reloaded.tokenizer.padding_side == "left"
    if family == "clip":
        run = pipeline("image-text-to-text", model=str(tmp_path), processor=reloaded, device="cpu")
        written = run(text=prompt, max_new_tokens=4, do_sample=False, return_full_text=False)[0]["generated_text"]
        new = model.generate(**before, max_new_tokens=4, do_sample=False)[:, before["input_ids"].shape[1] :]
        assert written == processor.batch_decode(new, skip_special_tokens=True)[0]


WRITTEN = {
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<image>\n<image>\nWhich?<|im_end|>\n"
    "<|im_start|>assistant\nThe first.<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n<image>\n<image>\nWhich?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nThe first.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nSure?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "vicuna": "Be brief. USER: <image>\n<image>\nWhich? ASSISTANT: The first.</s>USER: Sure? ASSISTANT:",
}


@every_format
def test_conversations_are_written_as_the_llm_knows_them(chat_format):
    model, processor = build(chat_format=chat_format, depth=0.5)
    conversation = [
        {"role": "system", "content": "Be brief."},
        user(None, None, "Which?"),
        {"role": "assistant", "content": [{"type": "text", "text": "The first."}]},
        {"role": "user", "content": "Sure?"},
    ]
    assert processor.apply_chat_template(conversation, add_generation_prompt=True) == WRITTEN[chat_format]
    inputs = processor.apply_chat_template([user(picture(), "Which?")], **TOGETHER)
    ids = inputs["input_ids"][0].tolist()
    if chat_format != "chatml":  # one token in front of a text, not two
        assert ids.count(processor.tokenizer.bos_token_id) == 1
        assert ids[0] == processor.tokenizer.bos_token_id
    ends = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "vicuna": "</s>"}[chat_format]
    assert processor.tokenizer.convert_tokens_to_ids(ends) in model.generation_config.eos_token_id


def test_the_format_can_be_chosen():
    model = llava(depth=0.5)
    processor = lk.hf.build_processor(model, tokenizer("chatml"), chat_format="vicuna", image_token="<picture>")
    assert processor.apply_chat_template([user(None, "Hm?")]) == "USER: <picture>\nHm? "
    with pytest.raises(ValueError, match="chat_format: got 'alpaca', expected one of chatml, llama3, vicuna"):
        lk.hf.build_processor(model, tokenizer(), chat_format="alpaca")


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_grow_only_where_they_must(tied, caplog):
    model = llava(text=llm(vocab_size=300, tie_word_embeddings=tied), depth=0.5)
    before = model.get_input_embeddings().weight.detach().clone()
    words = tokenizer()
    assert len(words) == 300
    processor = lk.hf.build_processor(model, words)
    assert processor.tokenizer is words
    assert "Added '<image>' to the tokenizer." in caplog.text
    assert "The embedding grew from 300 to 320 rows for a tokenizer of 301." in caplog.text
    assert model.config.image_token_id == 300
    grown, head = model.get_input_embeddings().weight, model.lm_head.weight
    assert (grown is head) == tied
    assert grown.shape[0] == head.shape[0] == model.config.text_config.vocab_size == 320
    assert torch.equal(grown[:300], before)
    torch.testing.assert_close(head[300:], head[:300].mean(0).expand(20, -1))
    assert model.model.language_model.config.vocab_size == 320

    caplog.clear()
    again = lk.hf.build_processor(model, words)
    assert not caplog.records
    assert model.get_input_embeddings().weight is grown
    assert again.patch_size == processor.patch_size


def test_what_the_tokenizer_lacks():
    words = tokenizer("vicuna")
    assert words.pad_token is None
    model = llava(depth=0.5)
    lk.hf.build_processor(model, words)
    assert words.pad_token == "</s>"
    assert words.padding_side == "left"
    assert model.generation_config.pad_token_id == words.pad_token_id


@pytest.fixture
def pair():
    return build("clip", depth=0.5)


def wrong(what):
    def spoil(model, processor):
        if what == "patch_size":
            processor.patch_size = 14
        elif what == "strategy":
            processor.vision_feature_select_strategy = "full"
        elif what == "size":
            processor.image_processor = CLIPImageProcessorPil(
                size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224}
            )
        elif what == "proportions":
            processor.image_processor.do_center_crop = False
        elif what == "crop_size":
            processor.image_processor.do_center_crop, processor.image_processor.crop_size = False, None
            processor.image_processor.size = {"height": 56, "width": 56}
        elif what == "counted":
            processor.image_processor.do_center_crop, processor.image_processor.crop_size = False, {"height": 28, "width": 28}
            processor.image_processor.size = {"height": 56, "width": 56}
        elif what == "token id":
            model.config.image_token_id = 17
        elif what == "two tokens":
            processor.image_token = "<img>"
        elif what == "rows":
            model.resize_token_embeddings(200, mean_resizing=False)
        elif what == "template":
            processor.chat_template = "{% for m in messages %}{{ m['role'] }}{% endfor %}"

    return spoil


COMPLAINTS = {
    "patch_size": "processor: got 16 placeholders an image, expected 4. Build one with laco_kernels.hf.build_processor",
    "strategy": "processor: got 5 placeholders an image, expected 4",
    "size": "image_processor: got one that turns 113 x 56 pixels into 1 x 3 x 224 x 224, expected 1 x 3 x 56 x 56",
    "proportions": "image_processor: got one that turns 113 x 56 pixels into 1 x 3 x 56 x 113, expected 1 x 3 x 56 x 56",
    "crop_size": "crop_size: got an image processor without one .*expected the size of images",
    "counted": "processor: got 1 placeholders counted without an image, expected 4",
    "token id": r"image_token_id: got 300 for '<image>', expected 17, the model's\. Set model\.config\.image_token_id = 300",
    "two tokens": "image_token: got '<img>', which is . tokens, expected one special token",
    "rows": r"tokenizer: got 301 tokens, expected at most 200.*resize_token_embeddings\(301\)",
    "template": "chat_template: got one that writes 0 image tokens for an image, expected one that writes one",
}


@pytest.mark.parametrize("what", COMPLAINTS)
def test_what_is_wrong_is_said_in_one_line(pair, what):
    model, processor = pair
    lk.hf.check_processor(model, processor)
    wrong(what)(model, processor)
    with pytest.raises(ValueError, match=COMPLAINTS[what]) as caught:
        lk.hf.check_processor(model, processor)
    assert "\n" not in str(caught.value)


def test_a_lost_patch_is_complained_of():
    model, processor = build("siglip", depth=0.5)
    model.config.vision_feature_select_strategy = "default"
    with pytest.raises(
        ValueError, match=r"vision_feature_select_strategy: got 'default', expected 'full'.*first patch is dropped"
    ):
        lk.hf.check_processor(model, processor)


def test_the_class_token_counts_where_it_is_read():
    model = llava("clip")
    assert lk.hf.build_processor(model, tokenizer()).patch_size == 14
    model.config.vision_feature_select_strategy = "full"
    processor = lk.hf.build_processor(model, tokenizer())
    assert (processor.patch_size, processor.num_additional_image_tokens) == (14, 1)
    assert lk.hf.check_processor(model, processor).tokens == 17
    inputs = processor(images=picture(), text="<image>", return_tensors="pt")
    assert torch.isfinite(model(**inputs).logits).all()


def test_arguments_of_the_wrong_kind_are_refused(pair, tmp_path):
    model, processor = pair
    words = tokenizer()
    with pytest.raises(TypeError, match="model: got LlavaModel, expected a LlavaForConditionalGeneration"):
        lk.hf.build_processor(model.model, words)
    with pytest.raises(TypeError, match="tokenizer: got int, expected a tokenizer of transformers"):
        lk.hf.build_processor(model, 3)
    with pytest.raises(TypeError, match="processor: got CLIPImageProcessorPil, expected a LlavaProcessor"):
        lk.hf.check_processor(model, processor.image_processor)
    with pytest.raises(RuntimeError, match=r"tokenizer: got .*tokenizer_config\.json"):
        lk.hf.build_processor(model, tmp_path)
    with pytest.raises(RuntimeError, match=r"image_processor: got .*preprocessor_config\.json"):
        lk.hf.build_processor(model, words, str(tmp_path))
    given = CLIPImageProcessorPil(size={"height": 56, "width": 56}, do_center_crop=False, crop_size=None)
    before = copy.deepcopy(given.to_dict())
    assert lk.hf.build_processor(model, words, given).image_processor is not given
    assert given.to_dict() == before


def test_processors_read_folders(tmp_path):
    model, processor = build("clip", depth=0.5)
    processor.tokenizer.save_pretrained(tmp_path / "text")
    processor.image_processor.save_pretrained(tmp_path / "vision")
    again = lk.hf.build_processor(model, tmp_path / "text", tmp_path / "vision")
    assert again.image_processor.to_dict() == processor.image_processor.to_dict()
    assert lk.hf.check_processor(model, again).tokens == 4
    assert stock("clip").config.image_size == 56
