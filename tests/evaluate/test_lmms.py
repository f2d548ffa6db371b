"""The plugin of lmms-eval, against a stand-in for what it imports of lmms-eval."""

import abc
import importlib.metadata
import logging
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import laco_kernels as lk
from laco_kernels import evaluate

from ..hf.llava import llava, picture, tokenizer, user

ROOT = Path(__file__).parents[2]
GREEDY = {"max_new_tokens": 6, "temperature": 0, "do_sample": False, "num_beams": 1, "top_p": 1.0}


class Lmms(abc.ABC):
    """What lmms-eval's base class does and demands."""

    is_simple = True

    def __init__(self):
        self.kept = []
        self._rank, self._world_size = 0, 1
        self.cache_hook = SimpleNamespace(add_partial=lambda *entry: self.kept.append(entry))
        self.task_dict = {}

    @abc.abstractmethod
    def loglikelihood(self, requests):
        """Score."""

    @abc.abstractmethod
    def generate_until(self, requests):
        """Write."""

    @abc.abstractmethod
    def generate_until_multi_round(self, requests):
        """Write in rounds."""

    @property
    def rank(self):
        return self._rank


@dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple = ()


@pytest.fixture(scope="module")
def plugin():
    """The module of the plugin, with the stand-in in place while its tests run."""
    modules = {name: ModuleType(name) for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model")}
    modules |= {name: ModuleType(name) for name in ("lmms_eval.models", "lmms_eval.models.registry_v2")}
    modules["lmms_eval.api.model"].lmms = Lmms
    modules["lmms_eval.models.registry_v2"].ModelManifest = ModelManifest
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        (line,) = re.findall(
            r'\[project.entry-points."lmms_eval.models"\]\n(\w+) = "(.*)"', (ROOT / "pyproject.toml").read_text()
        )
        manifest = importlib.metadata.EntryPoint(*line, "lmms_eval.models").load()()
        assert manifest.model_id == "laco"
        found = {}
        for kind in ("simple", "chat"):
            module, name = getattr(manifest, f"{kind}_class_path").rsplit(".", 1)
            found[kind] = getattr(importlib.import_module(module), name)
            assert issubclass(found[kind], Lmms)
            assert found[kind].is_simple == (kind == "simple")
        yield SimpleNamespace(**found)
    sys.modules.pop("laco_kernels.evaluate.lmms", None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    model = llava("siglip", depth=0.5)
    place = tmp_path_factory.mktemp("model")
    processor = lk.hf.build_processor(model, tokenizer())
    model.save_pretrained(place)
    processor.save_pretrained(place)
    return place


DOCS = [
    {"question": "What is it?", "images": [picture()]},
    {"question": "Which of these two pictures is red?", "images": [picture(), picture(30, 99, (10, 10, 10))]},
    {"question": "First <image> and then <image>: which?", "images": [picture(20, 20), picture(90, 20, (9, 90, 9))]},
    {"question": "Two and two?", "images": []},
]


def simple(docs, settings):
    """Requests as lmms-eval makes them for simple models."""
    return [
        SimpleNamespace(args=(doc["question"], dict(setting), lambda doc: doc["images"], i, "task", "test"))
        for i, (doc, setting) in enumerate(zip(docs, settings, strict=True))
    ]


def made(kind, folder, docs=DOCS, **options):
    model = kind(str(folder), device="cpu", **options)
    model.task_dict = {"task": {"test": docs}}
    return model


def by_hand(model, messages, **options):
    inputs = model.processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    written = model.model.generate(**inputs, do_sample=False, **options)
    return model.tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


EXPECTED = [
    [user(*DOCS[0]["images"], "What is it?")],
    [user(*DOCS[1]["images"], "Which of these two pictures is red?")],
    [user("First ", DOCS[2]["images"][0], " and then ", DOCS[2]["images"][1], ": which?")],
    [user("Two and two?")],
]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_answers_are_those_of_each_prompt_by_itself(plugin, folder, batch_size):
    model = made(plugin.simple, folder, batch_size=str(batch_size), dtype="float64")
    settings = [GREEDY, GREEDY, {**GREEDY, "max_new_tokens": 2}, GREEDY]
    answers = model.generate_until(simple(DOCS, settings))
    hands = [by_hand(model, message, max_new_tokens=s["max_new_tokens"]) for message, s in zip(EXPECTED, settings, strict=True)]
    assert answers == hands
    assert len(set(answers)) > 1
    assert {(name, context): answer for name, (context, _), answer in model.kept} == {
        ("generate_until", doc["question"]): answer for doc, answer in zip(DOCS, answers, strict=True)
    }


def test_chat_messages_are_asked_as_they_stand(plugin, folder):
    docs = [{"messages": [{"role": "user", "content": [*map(as_lmms, doc[0]["content"])]}]} for doc in EXPECTED]
    model = made(plugin.chat, folder, docs, batch_size=2, dtype="float64")
    requests = [
        SimpleNamespace(args=("", lambda doc: doc["messages"], dict(GREEDY), i, "task", "test")) for i in range(len(docs))
    ]
    assert model.generate_until(requests) == [by_hand(model, message, max_new_tokens=6) for message in EXPECTED]
    docs[0]["messages"][0]["content"].append({"type": "video", "url": "a.mp4"})
    with pytest.raises(TypeError, match="task: got one that shows videos, expected text and images"):
        model.generate_until(requests)


def as_lmms(part):
    return {"type": "image", "url": part["image"]} if part["type"] == "image" else part


def test_an_answer_ends_where_the_task_says(plugin, folder):
    model = made(plugin.simple, folder)
    (whole,) = model.generate_until(simple(DOCS[:1], [GREEDY]))
    ends = [whole[3], "never"]
    (cut,) = model.generate_until(simple(DOCS[:1], [{**GREEDY, "until": ends}]))
    assert cut == whole[: whole.index(whole[3])].strip()
    assert model.generate_until(simple(DOCS[:1], [{**GREEDY, "until": whole[3]}])) == [cut]
    assert model.generate_until(simple(DOCS[:1], [{**GREEDY, "until": []}])) == [whole]


def test_what_generation_settings_mean(plugin, folder, caplog):
    model = made(plugin.simple, folder, max_new_tokens="7")
    plain = {"max_new_tokens": 7, "num_beams": 1, "do_sample": False}
    assert model._options({}) == (plain, [])
    assert model._options({"temperature": 0.2, "do_sample": False, "top_p": 0, "num_beams": None}) == (plain, [])
    assert model._options({"max_gen_toks": 3, "until": "\n"}) == ({**plain, "max_new_tokens": 3}, ["\n"])
    sampled = {**plain, "do_sample": True, "temperature": 0.2, "top_p": None}
    assert model._options({"temperature": 0.2}) == (sampled, [])
    with caplog.at_level(logging.WARNING):
        model._options({"image_aspect_ratio": "original"})
    assert "mean nothing here: image_aspect_ratio" in caplog.text


@pytest.mark.parametrize("batch_size", [1, 4])
def test_log_probabilities_are_those_of_each_continuation_by_itself(plugin, folder, batch_size):
    model = made(plugin.simple, folder, batch_size=batch_size, dtype="float64")
    greedy = by_hand(model, EXPECTED[0], max_new_tokens=1)
    targets = [" a red square", lambda doc: doc["question"], " no", greedy]
    order = [0, 1, 3, 0]
    requests = [
        SimpleNamespace(args=(DOCS[i]["question"], target, lambda doc: doc["images"], i, "task", "test"))
        for i, target in zip(order, targets, strict=True)
    ]
    requests.append(SimpleNamespace(args=("", " no")))  # what a choice is worth by itself
    found = model.loglikelihood(requests)
    texts = [" a red square", DOCS[1]["question"], " no", greedy, " no"]
    messages = [*(EXPECTED[i] for i in order), [{"role": "user", "content": []}]]
    for (total, likeliest), text, message in zip(found, texts, messages, strict=True):
        prompt = model.processor.apply_chat_template(message, add_generation_prompt=True)
        images = [part["image"] for part in message[0]["content"] if part["type"] == "image"]
        inputs = model.processor(images=images or None, text=prompt, return_tensors="pt")
        new = torch.tensor([model.tokenizer.encode(text, add_special_tokens=False)])
        inputs["input_ids"] = torch.cat([inputs["input_ids"], new], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.no_grad():
            logits = model.model(**inputs.to(torch.float64)).logits[0, -new.shape[1] - 1 : -1]
        expected = -torch.nn.functional.cross_entropy(logits, new[0], reduction="sum")
        assert total == pytest.approx(float(expected), abs=1e-10)
        assert likeliest == bool((logits.argmax(-1) == new[0]).all())
    assert len(model.kept) == len(requests)
    assert found[3][0] > found[0][0]


def test_marks_that_are_not_as_many_as_images(plugin, folder, caplog):
    model = made(plugin.simple, folder)
    parts = model._content("See <image> and <image>.", [picture()])
    assert [part["type"] for part in parts] == ["image", "text"]
    assert parts[1]["text"] == "See  and ."
    assert "2 marks for 1 images" in caplog.text


def test_what_cannot_be_asked_is_refused(plugin, folder):
    model = made(plugin.simple, folder, [{"question": "What happens?", "images": ["a.mp4"]}])
    with pytest.raises(TypeError, match="doc_to_visual: got a str, as of a video, expected images"):
        model.generate_until(simple(model.task_dict["task"]["test"], [GREEDY]))
    with pytest.raises(NotImplementedError, match="task: got one of several rounds"):
        model.generate_until_multi_round([])
    with pytest.raises(ValueError, match="dtype: got 'float12', expected float32"):
        plugin.simple(str(folder), dtype="float12")
    with pytest.raises(ValueError, match="batch_size: got 'auto', expected a positive integer"):
        plugin.simple(str(folder), batch_size="auto")
    with pytest.raises(RuntimeError, match=r"pretrained: got '.*nowhere'"):
        plugin.simple(str(folder / "nowhere"))


def test_it_is_inert_without_lmms_eval(monkeypatch):
    for name in ("lmms_eval", "lmms_eval.models.registry_v2"):
        monkeypatch.setitem(sys.modules, name, None)  # as where it is not installed
    with pytest.raises(ModuleNotFoundError, match="lmms_eval"):
        evaluate.manifest()
    sources = [path for path in (ROOT / "src").rglob("*.py") if path.parent.name != "evaluate"]
    assert sources
    assert not [path for path in sources if re.search(r"laco_kernels.evaluate|import evaluate", path.read_text())]
