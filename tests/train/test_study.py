"""The study: what stands inside, what is trained, that a run can be had again, and that finished ones are kept."""

import dataclasses
import json
import os
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F

from laco_kernels.hf.compress import compress
from laco_kernels.train import study, study_runs, tiny_tower
from laco_kernels.train.study import NONE, OFF, ON, Arm, Settings

TOY = Settings(steps=2, batch=4, held_out=8)
QUARTER = [Fraction(1, 4)]
LACO_OFF = Arm("laco", OFF, "1/4", 3)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def tower(work):
    """A hardly trained tower, and its file."""
    return study_runs.prepare_tower(work, 2)


def bits(run):
    """What two runs have in common that are the same; the time they took is their own."""
    return run.arm, run.seed, dataclasses.replace(run.outcome, seconds=0)


def test_the_arms_are_those_of_the_papers_claim():
    arms = study.list_arms()
    layers = {"1/12": 1, "1/6": 2, "1/4": 3, "1/2": 6, "1": 12}
    assert all(arm.layer == layers[arm.depth] for arm in arms if arm.compressor)
    assert [arm for arm in arms if arm.compressor is None] == [Arm(None, NONE, None, None)]
    assert {(arm.residual, arm.depth) for arm in arms if arm.compressor == "laco"} == {
        (r, d) for r in (ON, OFF) for d in layers
    }
    for name in ("pixel_shuffle", "ldpv2", "token_packer"):
        assert [(arm.residual, arm.depth) for arm in arms if arm.compressor == name] == [(ON, "1/4"), (OFF, "1/4")]
    assert [arm.residual for arm in arms if arm.compressor == "avg_pool"] == [NONE]
    assert len(arms) == 18
    with pytest.raises(ValueError, match="only: got 'lacoo', expected one of laco"):
        study.list_arms(["lacoo"])


def test_what_the_layers_read():
    assert study.token_layers(Arm(None, NONE, None, None)) == 1
    assert study.token_layers(Arm("laco", ON, "1", 12)) == 1
    assert study.token_layers(LACO_OFF) == (3 * 64 + 9 * 16) / (12 * 64)


@pytest.mark.parametrize("arm", [Arm(None, NONE, None, None), LACO_OFF, Arm("avg_pool", NONE, "1", 12)], ids=str)
def test_a_run_by_hand(tower, arm):
    """Two steps written out: the same pictures, rates, clipping and schedule give the same weights, bit for bit."""
    found = study.fine_tune(tower[0], arm, 5, TOY)
    with study.one_thread():
        assert by_hand(tower[0], arm) == dataclasses.replace(found, seconds=0)


def by_hand(tower, arm):
    encoder, reader, grid = tiny_tower.build_tiny_tower(), tiny_tower.QuadrantReader(64), (8, 8)
    encoder.load_state_dict(tower.encoder.state_dict())
    reader.load_state_dict(tower.reader.state_dict())
    slow, new = list(encoder.parameters()), []
    if arm.compressor:
        torch.manual_seed(5)
        options = {"residual": False} if arm.compressor == "laco" else {}
        encoder, grid = compress(encoder, compressor=arm.compressor, layer=arm.layer, **options), (4, 4)
        new = [parameter for merge in encoder.merges for parameter in merge.parameters()]
    fast = [*new, *reader.parameters()]
    held_out = tiny_tower.held_out_digits(8)
    before = tiny_tower.accuracy(encoder, reader, held_out, grid)
    optimizer = torch.optim.AdamW([{"params": slow, "lr": 4e-6}, {"params": fast, "lr": 1e-3}], weight_decay=0)
    pictures = study.draw_digits(8, torch.Generator().manual_seed(study.PICTURES_SEED))
    order = torch.randperm(8, generator=torch.Generator().manual_seed(5)).view(2, 4)
    for chosen, share in zip(order, (1.0, 0.5), strict=True):  # a cosine over two steps, warmed up in one
        optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = 4e-6 * share, 1e-3 * share
        logits = reader(encoder(pictures.pixels[chosen]).last_hidden_state, grid)
        loss = F.cross_entropy(logits.flatten(0, 1), pictures.labels[chosen].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*slow, *fast], 1.0)
        optimizer.step()
    weights = study.digest({**encoder.state_dict(), **reader.state_dict()})
    after = tiny_tower.accuracy(encoder, reader, held_out, grid)
    return study.Outcome(before, after, loss.item(), 0, sum(p.numel() for p in new), weights)


def test_a_run_leaves_everything_as_it_is(tower):
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    weights = study.digest(tower[0].encoder.state_dict())
    study.fine_tune(tower[0], LACO_OFF, 0, TOY)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads
    assert study.digest(tower[0].encoder.state_dict()) == weights


def test_a_loss_that_is_no_number_ends_the_run(tower):
    with pytest.raises(RuntimeError, match=r"loss: got nan at step 1 of laco off @1/4, seed 0, expected a finite number"):
        study.fine_tune(tower[0], LACO_OFF, 0, dataclasses.replace(TOY, rate=float("nan")))


def test_the_tower_is_kept(tower, work, monkeypatch):
    monkeypatch.setattr(study_runs, "pretrain_tiny_tower", None)  # not to be called
    again, path = study_runs.prepare_tower(work, 2)
    assert path == tower[1]
    assert study.digest(again.encoder.state_dict()) == study.digest(tower[0].encoder.state_dict())
    assert (again.accuracy, again.steps, again.seed) == (tower[0].accuracy, 2, 0)
    assert not any(p.requires_grad for p in [*again.encoder.parameters(), *again.reader.parameters()])
    with pytest.raises(TypeError):  # another number of steps is another tower
        study_runs.prepare_tower(work, 3)


def test_the_same_outcomes_in_one_process_and_in_two_and_what_is_finished_is_not_run_again(tower, tmp_path, monkeypatch):
    arms = study.list_arms(["laco", "avg_pool"], QUARTER)
    alone = study_runs.carry_out(tower[1], arms, 2, TOY, tmp_path / "alone")
    assert [(run.arm, run.seed) for run in alone] == [(arm, seed) for arm in arms for seed in (0, 1)]
    together = study_runs.carry_out(tower[1], arms, 2, TOY, tmp_path / "together", jobs=2)
    assert [bits(run) for run in together] == [bits(run) for run in alone]
    off = [run.outcome.weights for run in alone if run.arm == LACO_OFF]
    assert off[0] != off[1]

    files = sorted((tmp_path / "together").iterdir())
    assert len(files) == len(together) == 8
    files[3].unlink()
    ran, kept = [], []
    stock = study_runs.fine_tune
    monkeypatch.setattr(study_runs, "fine_tune", lambda *job: ran.append(job[1:3]) or stock(*job))
    again = study_runs.carry_out(tower[1], arms, 2, TOY, tmp_path / "together", on_run=lambda run, known: kept.append(known))
    assert [bits(run) for run in again] == [bits(run) for run in together]
    assert len(ran) == 1
    assert kept == [True] * 7 + [False]


def test_runs_of_other_settings_are_not_mixed(tower, tmp_path, monkeypatch):
    def runs(tower_path=tower[1], arm=LACO_OFF, settings=TOY, seeds=1):
        ran = []
        outcome = study.Outcome(0.1, 0.2, 1.0, 3.0, 4, "")
        monkeypatch.setattr(study_runs, "fine_tune", lambda *job: ran.append(job) or outcome)
        study_runs.carry_out(tower_path, [arm], seeds, settings, tmp_path / "runs")
        return len(ran)

    other, changed = study_runs.prepare_tower(tmp_path, 1)
    assert other.steps == 1
    assert [runs(), runs()] == [1, 0]
    for field in dataclasses.fields(Settings):
        assert runs(settings=dataclasses.replace(TOY, **{field.name: getattr(TOY, field.name) * 2})) == 1
    assert runs(tower_path=changed) == 1
    assert runs(arm=dataclasses.replace(LACO_OFF, residual=ON)) == 1
    assert runs(seeds=2) == 1
    monkeypatch.setattr(study_runs, "FORMAT", study_runs.FORMAT + 1)
    assert runs() == 1


def test_damaged_files_are_named(tower, tmp_path):
    (run,) = study_runs.carry_out(tower[1], [LACO_OFF], 1, TOY, tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_text()
    other = json.loads(whole)
    other["key"]["seed"] = 7
    for text in (whole[:90], "{}", json.dumps(other)):
        path.write_text(text)
        with pytest.raises(RuntimeError, match=r"work: got '.*run-.*json' \(.*Delete this file"):
            study_runs.carry_out(tower[1], [LACO_OFF], 1, TOY, tmp_path)
    path.write_text(whole)
    assert study_runs.carry_out(tower[1], [LACO_OFF], 1, TOY, tmp_path) == [run]
    bad = tmp_path / "tower.safetensors"
    bad.write_bytes(tower[1].read_bytes()[:-9])
    with pytest.raises(RuntimeError, match=r"work: got '.*tower.safetensors' \("):
        study_runs.load_tower(bad)


def test_what_cannot_be_written_whole_is_not_there(tower, tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        study_runs.carry_out(tower[1], [LACO_OFF], 1, TOY, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("argument", "value"), [("seeds", 0), ("jobs", 1.5)])
def test_numbers_out_of_range(tower, tmp_path, argument, value):
    with pytest.raises((TypeError, ValueError), match=f"{argument}: got"):
        study_runs.carry_out(tower[1], [LACO_OFF], **{"seeds": 1, "settings": TOY, "work": tmp_path, argument: value})
