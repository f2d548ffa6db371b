"""LLaVA's data: images of every broken kind, mixtures, and an order that can be taken up again."""

import errno
import json
import random
import zlib

import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import prepare_data_loader
from PIL import Image
from torch.utils.data import DataLoader

from laco_kernels.train import data
from laco_kernels.train.data import Collator, EpochSampler, Sample, inspect, take_notes
from laco_kernels.train.mixture import choose, read_data
from laco_kernels.train.skipping import Cause, Skipped, Tally, TooManySkippedError

from ..hf.llava import picture
from .samples import TOKENS, dataset, sample


def png(width, height):
    """A PNG that says it is so large, with no more than a few bytes."""

    def chunk(kind, content):
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def make_files(folder):
    """Files by name; those that are bad with their cause, and whether a header shows it."""
    picture(300, 200).save(folder / "good.jpg")
    whole = (folder / "good.jpg").read_bytes()
    picture(300, 200).save(folder / "whole.png")
    torn = bytearray((folder / "whole.png").read_bytes())
    torn[60:100] = bytes([255]) * 40
    contents = {
        "cut.jpg": (whole[: len(whole) // 2], Cause.DAMAGED, False),
        "torn.png": (bytes(torn), Cause.DAMAGED, False),
        "header.jpg": (whole[:10], Cause.DAMAGED, True),
        "empty.jpg": (b"", Cause.EMPTY_FILE, True),
        "text.jpg": (b"not an image", Cause.NO_IMAGE, True),
        "bomb.png": (png(20_000, 20_000), Cause.BOMB, True),
        "large.png": (png(10_000, 10_000), Cause.BOMB, True),
        "one.png": (png(1, 1), Cause.TINY, True),
        "line.png": (png(1, 90), Cause.TINY, True),
        "long.png": (png(4, 5000), Cause.ELONGATED, True),
    }
    for name, (content, _, _) in contents.items():
        (folder / name).write_bytes(content)
    (folder / "folder.png").mkdir()
    bad = {name: (cause, shown) for name, (_, cause, shown) in contents.items()}
    bad |= dict.fromkeys(
        ("gone.png", "folder.png", "good.jpg/x", "x" * 300, "nul\0.png", "http://a/b.png"), (Cause.MISSING, True)
    )
    Image.new("CMYK", (40, 40), (0, 200, 200, 0)).save(folder / "cmyk.jpg")
    picture().quantize(8).save(folder / "palette.png")
    picture().quantize(8).save(folder / "transparent.png", transparency=0)
    Image.fromarray(np.full((40, 40), 40000, np.uint16)).save(folder / "deep.png")
    picture().convert("RGBA").save(folder / "alpha.png")
    picture().convert("L").save(folder / "grey.png")
    picture().convert("1").save(folder / "bits.png")
    good = [
        "good.jpg",
        "whole.png",
        "cmyk.jpg",
        "palette.png",
        "transparent.png",
        "deep.png",
        "alpha.png",
        "grey.png",
        "bits.png",
    ]
    return good, bad


def test_every_broken_image_is_counted_by_cause_and_the_others_are_read(tmp_path, processor):
    good, bad = make_files(tmp_path)
    everything = dataset(tmp_path, [sample(name) for name in [*good, *bad]], processor)
    names = [*good, *bad]
    loaded = {name: everything[index] for index, name in enumerate(names)}
    assert all(isinstance(loaded[name], Sample) and loaded[name].pixel_values.shape == (1, 3, 56, 56) for name in good)
    found = {name: item.cause for name, item in loaded.items() if isinstance(item, Skipped)}
    assert found == {name: cause for name, (cause, _) in bad.items()}
    red = loaded["cmyk.jpg"].pixel_values.mean((0, 2, 3))
    assert red[0] > red[1] + 1

    seen = inspect(everything, cap=1.0)
    assert {names[sample.index]: sample.cause for sample in seen.tally.skipped.values()} == {
        name: cause for name, (cause, shown) in bad.items() if shown
    }
    assert seen.converted == {"CMYK": 1, "P": 2, "I;16": 1, "RGBA": 1, "L": 1, "1": 1}
    assert seen.images == len(seen.dataset) == len(good) + 2
    assert seen.tally.counts()[Cause.MISSING] == 6
    assert "1 empty file (empty.jpg)" in str(seen.tally)
    assert "6 missing file (gone.png, folder.png, good.jpg/x, " in str(seen.tally)
    assert str(seen.tally).startswith("14 of 25 samples left out: ")
    late = [item for item in (seen.dataset[place] for place in range(len(seen.dataset))) if isinstance(item, Skipped)]
    assert [(item.id, item.cause) for item in late] == [("cut.jpg", Cause.DAMAGED), ("torn.png", Cause.DAMAGED)]
    assert "damaged or unreadable" in late[0].detail


def test_an_id_can_be_printed(tmp_path, processor):
    samples = [sample() | {"id": "zwei Löwen"}, sample() | {"id": "\x1b[2J\ud800\n"}]
    made = dataset(tmp_path, samples, processor)
    assert [made.id_of(index) for index in range(2)] == ["zwei Löwen", r"\x1b[2J\ud800\n"]


def test_too_many_stop_the_run(tmp_path, processor):
    picture().save(tmp_path / "a.png")
    samples = [sample(), *[sample(f"gone{number}.png") for number in range(8)], sample(question="None")]
    with pytest.raises(
        TooManySkippedError, match=r"data: got 9 of 10 samples left out: 8 missing file \(gone0.*, \.\.\.\); 1 plac"
    ):
        inspect(dataset(tmp_path, samples, processor), cap=0.8)
    assert len(inspect(dataset(tmp_path, samples, processor), cap=9).dataset) == 1
    with pytest.raises(TooManySkippedError, match="expected at most 8 left out"):
        inspect(dataset(tmp_path, samples, processor), cap=8)


def test_a_tally_counts_a_sample_once_and_comes_back():
    lost = [Skipped(index, f"id{index}", Cause.DAMAGED, "cut") for index in range(3)]
    tally = Tally(100, 0.02)
    for _ in range(5):
        tally.add(lost[:2])
    again = Tally(100, 0.02)
    again.load_state_dict(json.loads(json.dumps(tally.state_dict())))
    assert again.skipped == tally.skipped
    assert str(Tally(5)) == "none of 5 samples left out"
    with pytest.raises(TooManySkippedError, match="3 of 100 samples left out: 3 damaged image"):
        again.add(lost[2:])
    for cap in (-1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="cap: got"):
            Tally(5, cap)


def test_a_failing_disk_is_no_property_of_a_sample(tmp_path, processor, monkeypatch):
    picture().save(tmp_path / "a.png")
    items = dataset(tmp_path, [sample()], processor)

    def fail(number):
        def call(file):
            raise OSError(number, "disk")

        return call

    monkeypatch.setattr(data, "open_image", fail(errno.EIO))
    with pytest.raises(OSError, match="disk"):
        items[0]
    monkeypatch.setattr(data, "open_image", fail(errno.EACCES))
    assert items[0].cause is Cause.UNREADABLE


def test_long_samples_are_left_out_not_cut(tmp_path, processor):
    picture().save(tmp_path / "a.png")
    samples = [sample(), sample(answer="A red square. " * 20)]
    free = dataset(tmp_path, samples, processor)
    short, long = len(free[0].input_ids), len(free[1].input_ids)
    limited = dataset(tmp_path, samples, processor, max_length=short)
    assert len(limited[0].input_ids) == short
    assert limited[1].detail == f"{long} tokens, more than {short}"
    seen = inspect(limited, cap=1)
    assert (seen.longest, len(seen.dataset)) == (short, 1)
    assert seen.tally.counts() == {Cause.TOO_LONG: 1}
    with pytest.raises(ValueError, match="max_length: got 0"):
        dataset(tmp_path, samples, processor, max_length=0)


def test_batches(tmp_path, processor):
    for name in ("a.png", "b.png"):
        picture().save(tmp_path / name)
    both = sample("a.png", "<image><image>", "Two.", image=["a.png", "b.png"], id="two")
    items = dataset(tmp_path, [sample(), both, sample(None, "Hello?", "Yes.", id=7), sample("gone.png")], processor)
    batch = Collator(processor)([items[index] for index in range(4)])
    notes = take_notes(batch)
    assert notes.ids == ("a.png", "two", "7")
    assert [item.id for item in notes.skipped] == ["gone.png"]
    assert list(batch) == ["input_ids", "attention_mask", "labels", "pixel_values"]
    assert batch["pixel_values"].shape == (3, 3, 56, 56)
    for row in range(3):
        length = len(items[row].input_ids)
        assert torch.equal(batch["input_ids"][row, :length], items[row].input_ids)
        assert (batch["input_ids"][row, length:] == processor.tokenizer.pad_token_id).all()
        assert batch["attention_mask"][row].sum() == length
        assert (batch["labels"][row, length:] == -100).all()
    plain = Collator(processor, always_images=False)([items[2]])
    assert "pixel_values" not in plain
    assert plain["input_ids"].shape[0] == 1


def test_a_batch_of_nothing_teaches_nothing(tmp_path, processor, models):
    """Neither do the rows that let the encoder take part; and its gradients are there, as DDP wants them."""
    model = models["chatml"][0]
    items = dataset(tmp_path, [sample("gone.png"), sample(None, "Hello?", "Yes.")], processor)
    for chosen, labelled in (([0], False), ([0, 1], True), ([1], True)):
        batch = Collator(processor)([items[index] for index in chosen])
        assert len(take_notes(batch).ids) == labelled
        count = int((batch["labels"][:, 1:] != -100).sum())
        assert (count > 0) == labelled
        model.zero_grad()
        loss = model(**batch, num_items_in_batch=max(count, 5)).loss
        loss.backward()
        tower = [parameter.grad for parameter in model.model.multi_modal_projector.parameters()]
        assert all(gradient is not None and not gradient.any() for gradient in tower)
        alone = {name: value for name, value in batch.items() if name != "pixel_values"}
        if labelled:
            alone = {name: value[:1] for name, value in alone.items()}
            torch.testing.assert_close(loss, model(**alone, num_items_in_batch=max(count, 5)).loss)
        else:
            assert loss == 0
    model.zero_grad()
    batch = Collator(processor, always_images=False)([items[0]])
    assert batch["input_ids"].tolist() == [[processor.image_token_id] * TOKENS]
    assert (batch["labels"] == -100).all()


def numbered(folder, processor, count=23):
    for number in range(count):
        picture(colour=(number * 10, 0, 0)).save(folder / f"{number}.png")
    (folder / "3.png").write_bytes(b"")
    cut = (folder / "5.png").read_bytes()
    (folder / "5.png").write_bytes(cut[: len(cut) // 2])
    return dataset(folder, [sample(f"{number}.png") for number in range(count)], processor)


def loader(items, epoch=0, **options):
    sampler = EpochSampler(len(items), seed=3)
    sampler.set_epoch(epoch)
    return DataLoader(items, batch_size=2, sampler=sampler, collate_fn=Collator(items.processor), **options)


def read(batches):
    return [(notes.ids, tuple(item.id for item in notes.skipped)) for notes in map(take_notes, batches)]


def test_the_order_depends_on_seed_and_epoch_alone(tmp_path, processor):
    items = numbered(tmp_path, processor)
    plain = read(loader(items))
    assert read(loader(items)) == plain
    assert read(loader(items, num_workers=2, multiprocessing_context="spawn")) == plain
    random.seed(5)
    torch.manual_seed(5)
    assert read(loader(items)) == plain
    other = read(loader(items, epoch=1))
    assert other != plain
    assert sorted(name for ids, lost in plain for name in ids + lost) == sorted(f"{number}.png" for number in range(23))
    assert sorted(name for _, lost in other for name in lost) == ["3.png", "5.png"]
    assert list(EpochSampler(23, 4)) != list(EpochSampler(23, 3))


def test_a_run_goes_on_where_it_was(tmp_path, processor):
    items = numbered(tmp_path, processor)
    assert read(skip_first_batches(loader(items), 5)) == read(loader(items))[5:]


def test_two_processes_share_an_epoch(tmp_path, processor):
    items = inspect(numbered(tmp_path, processor), cap=1).dataset
    shares = []
    for rank in range(2):
        share = prepare_data_loader(loader(items), num_processes=2, process_index=rank, put_on_device=False, rng_types=[])
        share.set_epoch(1)
        shares.append(read(share))
    both = [batch for pair in zip(*shares, strict=True) for batch in pair]
    assert both[:11] == read(loader(items, epoch=1))
    assert len(items) == 22


def test_mixtures(tmp_path, processor):
    (tmp_path / "sets").mkdir()
    names = [f"{number}.png" for number in range(7)]
    (tmp_path / "sets" / "a.json").write_text(json.dumps([sample(name) for name in names]))
    (tmp_path / "sets" / "b.jsonl").write_text("\n".join(json.dumps(sample(f"b{name}")) for name in names) + "\n\n")
    (tmp_path / "mix.yaml").write_text(
        "datasets:\n- {json_path: sets/a.json, sampling_strategy: 'first:30%', image_folder: pictures}\n"
        "- json_path: sets/b.jsonl\n  sampling_strategy: end:2\n- json_path: sets/a.json\n  sampling_strategy: random:4\n"
        "- json_path: sets/b.jsonl\n"
    )
    records = read_data(tmp_path / "mix.yaml", seed=1)
    ids = [record["id"] for _, _, record in (records[index] for index in range(len(records)))]
    assert ids[:5] == ["0.png", "1.png", "2.png", "b5.png", "b6.png"]
    assert ids[9:] == [f"b{name}" for name in names]
    assert len(set(ids[5:9])) == 4
    assert ids[5:9] == sorted(ids[5:9])
    assert [(source.total, source.taken) for source in records.sources] == [(7, 3), (7, 2), (7, 4), (7, 7)]
    assert records.sources[0].image_folder == tmp_path / "pictures"
    assert records.sources[1].image_folder == tmp_path / "sets"
    assert read_data(tmp_path / "mix.yaml", "/elsewhere").sources[3].image_folder.as_posix() == "/elsewhere"
    again = read_data(tmp_path / "mix.yaml", seed=1)
    assert again.fingerprint() == records.fingerprint()
    drawn = {read_data(tmp_path / "mix.yaml", seed=seed).fingerprint() for seed in range(5)}
    assert len(drawn) > 1
    with pytest.raises(IndexError):
        records[16]


def test_strategies():
    assert choose("all", 3, "") == [0, 1, 2]
    assert choose("first:0", 3, "") == []
    assert choose("first:0.1%", 1001, "") == [0, 1]
    assert choose("end:100%", 3, "") == [0, 1, 2]
    assert choose("random:29%", 100, "a") == choose("random:29", 100, "a")
    assert choose("random:50%", 100, "a") != choose("random:50%", 100, "b")
    for strategy in ("some", "first", "first:-1", "first:1.5", "random:10 %", "last:3"):
        with pytest.raises(ValueError, match=r"sampling_strategy: got .*expected all, or first:N"):
            choose(strategy, 3, "")
    for strategy in ("first:4", "random:101%"):
        with pytest.raises(ValueError, match="expected at most 3"):
            choose(strategy, 3, "")


FILES = {
    "a.json": ("[{", "a.json, which is damaged"),
    "b.jsonl": ('{"id": 1}\n{"id": 2', "b.jsonl, which is damaged in line 2"),
    "c.json": ("{}", "with dict, expected a list of samples"),
    "d.yaml": ("datasets: [", "expected a mixture in YAML"),
    "e.yaml": ("[]", "without datasets"),
    "f.yaml": ("datasets: [{json: a}]", "expected json_path and"),
    "g.yml": ("datasets: [{json_path: a.json, sampling: all}]", "expected json_path and"),
    "h.yaml": ("!!python/object/apply:os.getcwd []", "expected a mixture in YAML"),
    "i.jsonl": (b"\xff\xfe", "which is damaged"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_not_what_they_should_be(name, tmp_path):
    content, said = FILES[name]
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ValueError, match="data: got ") as raised:
        read_data(tmp_path / name)
    assert said in str(raised.value)


def test_what_a_dataset_needs(tmp_path, processor):
    with pytest.raises(TypeError, match=r"processor: got TokenizersBackend, expected a LlavaProcessor"):
        dataset(tmp_path, [], processor.tokenizer)
    assert len(dataset(tmp_path, [], processor)) == 0
    processor.tokenizer.pad_token, kept = None, processor.tokenizer.pad_token
    with pytest.raises(ValueError, match="pad_token: got None"):
        Collator(processor)
    processor.tokenizer.pad_token = kept
