"""The folder of a run, whose result is whole or is not there."""

import errno

import pytest

from laco_kernels.train.output import PART, check_output, claim, write_result
from laco_kernels.train.recipe import load_recipe

OLD = {"config.json": "old", "model.safetensors": "old weights", "adapter/adapter_config.json": "old"}


def fill(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_result_takes_the_place_of_an_earlier_one_with_its_config_last(tmp_path, monkeypatch):
    fill(tmp_path, OLD | {"checkpoint-1/model.safetensors": "kept", f"{PART}/model.safetensors": "of a killed process"})
    order = []
    replace = type(tmp_path).replace
    monkeypatch.setattr(type(tmp_path), "replace", lambda path, to: order.append(path.name) or replace(path, to))
    new = {"config.json": "new", "model.safetensors": "new", "adapter/adapter_model.safetensors": "new", "a.json": "{}"}
    write_result(tmp_path, lambda part: fill(part, new))
    assert files(tmp_path) == new | {"checkpoint-1/model.safetensors": "kept"}
    assert order[-1] == "config.json"


def test_nothing_of_an_earlier_result_is_read_beside_a_later_one(tmp_path):
    """An adapter that was merged later, or weights in fewer files."""
    adapter = {"adapter_config.json": "{}", "adapter_model.safetensors": "old"}
    sharded = {"model-00001-of-00001.safetensors": "old", "model.safetensors.index.json": "{}"}
    mine = {"notes.txt": "mine", "checkpoint-1/adapter_config.json": "kept", "metrics.jsonl": "kept"}
    fill(tmp_path, adapter | sharded | mine)
    new = {"config.json": "new", "model.safetensors": "new", "adapter/adapter_config.json": "new"}
    write_result(tmp_path, lambda part: fill(part, new))
    assert files(tmp_path) == new | mine


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("wrong"), ValueError),
        (OSError(errno.EACCES, "Permission denied"), PermissionError),
        (RuntimeError("I/O error: No space left on device (os error 28)"), OSError),  # as safetensors says it
    ],
)
def test_a_result_that_cannot_be_written_leaves_the_earlier_one(tmp_path, error, expected):
    fill(tmp_path, OLD)

    def write(part):
        fill(part, {"config.json": "new"})
        raise error

    with pytest.raises(expected) as failed:
        write_result(tmp_path, write)
    assert files(tmp_path) == OLD
    if isinstance(error, RuntimeError):
        assert failed.value.errno == errno.ENOSPC


def test_a_folder_belongs_to_one_run(tmp_path):
    (tmp_path / "small.yaml").write_text(
        "output: out\nmodel: {checkpoint: ./m}\ndata: {path: d.json}\ntrain: {rates: {llm: 1e-3, merge: 1e-3}, batch_size: 8}\n"
    )

    def recipe(*changes):
        return load_recipe(tmp_path / "small.yaml", changes)

    check_output(recipe(), resume=True)  # there is none
    claim(recipe())
    with pytest.raises(ValueError, match=r"output: got .*out', which has things in it, expected an empty folder"):
        check_output(recipe(), resume=False)
    check_output(recipe("train.keep=5", "trainer.dataloader_num_workers=3", "train.report_to=[wandb]"), resume=True)
    for change, words in (
        ("train.rates={llm: 1e-3}", "train.rates.merge None instead of 0.001, expected the recipe in"),
        ("train.seed=1", "train.seed 1 instead of 0"),
        ("lora={r: 2, alpha: 4}", "lora.r 2 instead of None, lora.alpha 4.0 instead of None"),
    ):
        with pytest.raises(ValueError, match=f"--resume: got .*{words}"):
            check_output(recipe(change), resume=True)
    (tmp_path / "out" / "recipe.yaml").unlink()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match=r"which has no recipe\.yaml, expected a folder of this command"):
        check_output(recipe(), resume=True)
