"""A task on the disk: LLaVA's data, the same every time, held-out pictures apart."""

import hashlib
import json

import pytest
import torch

import laco_kernels as lk
from laco_kernels.train import task
from laco_kernels.train.data import ConversationDataset, inspect
from laco_kernels.train.mixture import read_data
from laco_kernels.train.questions import TYPES
from laco_kernels.train.scene_tower import LAYERS, PATCH, WIDTH
from laco_kernels.train.scenes import NEW_WORDS, SIDE
from laco_kernels.train.tiny_llm import build_tiny_llm, train_tokenizer
from laco_kernels.train.tiny_tower import build_tiny_tower

COUNT, HELD_OUT = 120, 64


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return task.write_task(tmp_path_factory.mktemp("task") / "task", COUNT, HELD_OUT)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_seed_writes_the_same_task(written, tmp_path):
    again = task.write_task(tmp_path / "again", COUNT, HELD_OUT)
    assert contents(again.train.parent) == contents(written.train.parent)
    other = task.write_task(tmp_path / "other", COUNT, HELD_OUT, seed=1)
    assert other.train.read_bytes() != written.train.read_bytes()


def test_every_sample_can_be_trained_on(written):
    tokenizer = train_tokenizer()
    model = lk.hf.build_llava(build_tiny_tower(SIDE, PATCH, WIDTH, LAYERS), build_tiny_llm(tokenizer), depth=1 / 4)
    processor = lk.hf.build_processor(model, tokenizer)
    for path, samples in ((written.train, COUNT), (written.held_out, HELD_OUT)):
        found = inspect(ConversationDataset(read_data(path), processor), cap=0)
        assert (len(found.dataset), found.images, found.converted) == (samples, samples, {})
        assert str(found.tally) == f"none of {samples} samples left out"
    ids, labels = found.dataset[0].input_ids, found.dataset[0].labels
    assert (ids == model.config.image_token_id).sum() == (SIDE // PATCH) ** 2 // 4
    answer = json.loads(written.held_out.read_text())[0]["conversations"][-1]["value"]
    assert tokenizer.decode(ids[labels != -100]).endswith(f"{answer}<|im_end|>")
    assert torch.equal(ids[labels != -100], labels[labels != -100])


def test_types_are_told_and_held_out_samples_have_all_of_them(written):
    train, held_out = (json.loads(path.read_text()) for path in (written.train, written.held_out))
    for record in train + held_out:
        assert len(record["types"]) == len(record["conversations"]) / 2
        assert set(record["types"]) <= set(TYPES)
    assert {len(record["types"]) for record in train} == {4, 5, 6, 7, 8}
    assert [record["types"][-1] for record in held_out] == list(TYPES) * (HELD_OUT // len(TYPES))
    assert {len(record["types"]) for record in held_out} == {1, 2}


def test_no_question_is_asked_behind_its_own_answer(written):
    for _, questions, _ in task.imagine_held_out(400, 0, set()):
        texts = [question.text for question in questions]
        assert len(set(texts)) == len(texts)


def test_what_lies_beside_the_folder_stays(tmp_path, monkeypatch):
    beside = tmp_path / "task.part"
    beside.mkdir()
    (beside / "precious.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"folder: got '.*task\.part' beside it, expected nothing of that name"):
        task.write_task(tmp_path / "task", 1, 8)
    assert (beside / "precious.txt").read_text() == "mine"
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    task.write_task(".", 1, 8)
    assert (tmp_path / "here" / "train.json").exists()


def test_held_out_pictures_and_words_are_in_no_training_sample(written):
    folder = written.train.parent / "images"
    digests = {
        name: {hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob(f"{name}-*")}
        for name in ("train", "held_out")
    }
    assert (len(digests["train"]), len(digests["held_out"])) == (COUNT, HELD_OUT)
    assert not digests["train"] & digests["held_out"]
    assert not any(f'"{word}"' in written.train.read_text() for word in NEW_WORDS)
    answers = {
        r["conversations"][-1]["value"] for r in json.loads(written.held_out.read_text()) if r["types"][-1] == "new word"
    }
    assert answers <= set(NEW_WORDS)
    shown = set()
    train = [scene for scene, *_ in task.imagine_train(COUNT, 0, shown)]
    held_out = [scene for scene, *_ in task.imagine_held_out(400, 0, shown)]
    assert shown == set(train)
    assert not shown & set(held_out)
    assert len(set(held_out)) == 400


def test_a_scene_that_training_shows_is_drawn_again():
    first = next(task.imagine_held_out(1, 0, set()))[0]
    assert next(task.imagine_held_out(1, 0, {first}))[0] != first


def test_lines_of_json(written, tmp_path):
    lines = task.write_task(tmp_path / "lines", COUNT, HELD_OUT, form="jsonl")
    assert lines.held_out.name == "held_out.jsonl"
    same, expected = read_data(lines.train), read_data(written.train)
    assert [same[i][2] for i in range(COUNT)] == [expected[i][2] for i in range(COUNT)]


@pytest.mark.parametrize(("option", "value"), [("count", 0), ("held_out", 1.5), ("seed", -1), ("form", "csv")])
def test_what_makes_no_task_is_refused(tmp_path, option, value):
    with pytest.raises((TypeError, ValueError), match=f"{option}: got"):
        task.write_task(tmp_path / "task", **{option: value})
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten_and_nothing_half_is_left(tmp_path, monkeypatch):
    (tmp_path / "mine").write_text("my own")
    with pytest.raises(ValueError, match=r"folder: got .* which has something in it"):
        task.write_task(tmp_path, 2, 2)
    with pytest.raises(ValueError, match="folder: got"):
        task.write_task(tmp_path / "mine", 2, 2)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(task, "_write", full)
    with pytest.raises(OSError, match="No space"):
        task.write_task(tmp_path / "new", 2, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
