"""Two processes that train together: ``torchrun --nproc-per-node 2 -m tests.train.together FOLDER``.

What they find wrong is written as ``FOLDER/<rank>.json``; what they leave behind is looked at by the test that started them.
"""

import errno
import json
import os
import sys
import traceback
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import FSDPModule

from laco_kernels.train import trainer as engine
from laco_kernels.train.checkpoint import CheckpointError, latest
from laco_kernels.train.data import EpochSampler
from laco_kernels.train.finite import NonFiniteError
from laco_kernels.train.parts import PARTS
from laco_kernels.train.skipping import TooManySkippedError

from .runs import data, model, poison, raises, trainer

STEPS, SAMPLES, SEED = 3, 16, 42
#: Samples of the first step: two in the first process, two in the second.
FIRST = list(EpochSampler(SAMPLES, SEED))[:4]
SHARDED = {"fsdp": True}
RANK = int(os.environ.get("RANK", 0))


def prepare(folder):
    (folder / "samples.json").write_text(json.dumps(data(folder, SAMPLES)))


def common(folder, out, batch=2, made=None, **options):
    """A run that comes out the same however many processes share its batches."""
    samples = json.loads((folder / "samples.json").read_text())
    settings = {"max_steps": STEPS, "per_device_train_batch_size": batch, "save_steps": 1, "seed": SEED} | options
    settings["run"] = {"keep": None} | settings.get("run", {})
    return trainer(folder, samples, made=model().double() if made is None else made, out=out, **settings)


def ddp(folder):
    common(folder, "ddp").train()


def ddp_resumes(folder):
    """With a mask drawn anew for every batch in every process."""
    common(folder, "dropout", made=model(dropout=0.3)).train()
    common(folder, "dropout again", made=model(dropout=0.3)).train(resume_from_checkpoint=folder / "dropout" / "checkpoint-2")


def ddp_recomputes_an_encoder_whose_last_layer_has_no_gradient(folder):
    rates = dict.fromkeys(PARTS, 1e-3)
    made = model(rates=rates, vision_feature_layer=-2)
    common(folder, "all", made=made, rates=rates, gradient_checkpointing=True, max_steps=1).train()


def a_loss_in_one_process_stops_both(folder):
    run = common(folder, "nan", change=lambda inspection: poison(inspection, f"s{FIRST[2]}"))
    ids = ", ".join(f"s{index}" for index in FIRST[2:])
    raises(NonFiniteError, run.train, "loss: got nan at step 1", f"samples: {ids}, beginning in the input pixel_values")


def a_loss_in_one_process_leaves_a_step_out_in_both(folder):
    made = model()
    before = {name: p.detach().clone() for name, p in made.named_parameters()}
    options = {"change": lambda inspection: poison(inspection, f"s{FIRST[2]}"), "run": {"non_finite_budget": 1}}
    common(folder, "left out", made=made, max_steps=1, **options).train()
    assert all(torch.equal(p, before[name]) for name, p in made.named_parameters())


def a_damaged_image_in_one_process_counts_in_both(folder):
    run = common(folder, "skipped", cap=1, max_steps=1, change=lambda inspection: poison(inspection, f"s{FIRST[2]}", skip=True))
    run.train()
    assert [skipped.id for skipped in run.inspection.tally.skipped.values()] == [f"s{FIRST[2]}"]
    change = {"change": lambda inspection: poison(inspection, f"s{FIRST[2]}", skip=True)}
    raises(TooManySkippedError, common(folder, "too many", cap=0, **change).train, f"1 damaged image (s{FIRST[2]})")


def one_process_without_space_fails_both(folder):
    run = common(folder, "full")
    drawn = engine.random_state

    def full(device):
        if RANK == 1 and run.state.global_step == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return drawn(device)

    engine.random_state = full
    try:
        raises(CheckpointError, run.train, "checkpoint-2 in", "No space left", "checkpoint-1 is as it was. Free some space")
    finally:
        engine.random_state = drawn
    assert latest(folder / "full").name == "checkpoint-1"


def a_run_of_two_is_not_resumed_from_nothing(folder):
    raises(ValueError, lambda: common(folder, "nothing").train(resume_from_checkpoint=True), "a complete checkpoint in")
    raises(ValueError, common(folder, "ddp").train, "with checkpoint-3, expected a folder without checkpoints")


def fsdp(folder):
    run = common(folder, "fsdp", **SHARDED)
    run.train()
    sharded = {name for name, module in run.model.named_modules() if isinstance(module, FSDPModule)}
    assert {"", "model.vision_tower.encoder.layers.2", "model.language_model.layers.1"} <= sharded


def fsdp_resumes(folder):
    path = folder / "fsdp" / "checkpoint-2"
    common(folder, "fsdp again", **SHARDED).train(resume_from_checkpoint=path)
    # What DDP wrote is as good.
    common(folder, "fsdp from ddp", **SHARDED).train(resume_from_checkpoint=folder / "ddp" / "checkpoint-2")


def fsdp_stops_where_a_loss_is_no_number(folder):
    run = common(
        folder, "fsdp nan", change=lambda inspection: poison(inspection, f"s{FIRST[2]}", 3e38), made=model(), **SHARDED
    )
    raises(NonFiniteError, run.train, "at step 1", f"s{FIRST[2]}", "beginning in the output of model.vision_tower.")


def fsdp_trains_adapters_and_recomputes(folder):
    def adapted():
        config = LoraConfig(
            r=2, target_modules=r".*language_model.*\.(q_proj|v_proj)", modules_to_save=["multi_modal_projector"]
        )
        return get_peft_model(model(), config)

    options = {"rates": {"projector": 1e-2, "llm": 1e-2}, "gradient_checkpointing": True, **SHARDED}
    common(folder, "lora", made=adapted(), **options).train()
    path = folder / "lora" / "checkpoint-2"
    common(folder, "lora again", made=adapted(), **options).train(resume_from_checkpoint=path)


def fsdp_in_bfloat16_rounds_no_losses(folder):
    options = {"batch": 1, "bf16": True, "max_steps": 1, "gradient_accumulation_steps": 4}
    runs = [common(folder, f"bfloat16 {more}", made=model(), **options, **more) for more in ({}, SHARDED)]
    for run in runs:
        run.train()
    loss, sharded = (run.ledger.loss for run in runs)
    assert abs(loss - sharded) < 1e-4 * loss, (loss, sharded)


CHECKS = [
    ddp,
    ddp_resumes,
    ddp_recomputes_an_encoder_whose_last_layer_has_no_gradient,
    a_loss_in_one_process_stops_both,
    a_loss_in_one_process_leaves_a_step_out_in_both,
    a_damaged_image_in_one_process_counts_in_both,
    one_process_without_space_fails_both,
    a_run_of_two_is_not_resumed_from_nothing,
    fsdp,
    fsdp_resumes,
    fsdp_stops_where_a_loss_is_no_number,
    fsdp_trains_adapters_and_recomputes,
    fsdp_in_bfloat16_rounds_no_losses,
]


def main(folder):
    torch.set_num_threads(1)
    os.fsync = lambda _: None  # which takes long; nothing here unplugs a disk
    failures = {}
    for check in CHECKS:
        try:
            check(folder)
        except Exception:
            failures[check.__name__] = traceback.format_exc()
    (folder / f"{RANK}.json").write_text(json.dumps(failures))
    torch.distributed.barrier()  # leave together
    torch.distributed.destroy_process_group()
    os._exit(0)  # everything is on record; the interpreter's own end is where gloo's threads can still abort a process


if __name__ == "__main__":
    main(Path(sys.argv[1]))
