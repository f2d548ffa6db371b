"""The engine of training: :class:`LacoTrainer`, a ``transformers.Trainer`` that loses nothing.

What the stock Trainer does is left to it: loops, accumulation, autocast, DDP and FSDP2 by Accelerate, reporting. Its own are
here: learning rates by part, checkpoints that are whole or not picked and from which a run goes on exactly as if it had not
stopped, losses that are no number, samples that are left out, and what a run writes down.
"""

from __future__ import annotations

import json
import logging
import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, broadcast_object_list, gather_object
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.training_args import OptimizerNames

from laco_kernels.errors import complaint
from laco_kernels.geometry import integer
from laco_kernels.train import checkpoint
from laco_kernels.train.data import Collator, EpochSampler, take_notes
from laco_kernels.train.finite import check_loss
from laco_kernels.train.groups import cosine, parameter_groups
from laco_kernels.train.guard import Batch, Step
from laco_kernels.train.loss_picture import draw_loss
from laco_kernels.train.metrics import Ledger, MetricsFile
from laco_kernels.train.resuming import (
    OPTIMIZER,
    RUN,
    SCHEDULER,
    check_run,
    load_optimizer_state,
    load_weights,
    model_state,
    optimizer_state,
    random_file,
    random_state,
    save_model,
    save_state,
    set_random_state,
    whole,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn
    from transformers import LlavaProcessor
    from transformers.trainer_utils import TrainOutput

    from laco_kernels.train.data import Inspection

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
PICTURE = "loss.png"


class LacoTrainer(Trainer):
    """Trains a LLaVA-style model on inspected data.

    Each part has a learning rate of its own, which warms up as ``args`` says and then follows a cosine down to ``min_lr``,
    whatever ``args.learning_rate`` and ``args.lr_scheduler_type`` are. Checkpoints are written into ``args.output_dir`` when
    ``args.save_strategy`` says so, beside ``metrics.jsonl``, a line a logged step, and at the end ``loss.png``.

    Args:
        model: of :func:`laco_kernels.hf.build_llava`, wrapped by PEFT or not, with ``requires_grad=False`` where it is frozen.
        args: of the stock Trainer.
        processor: of :func:`laco_kernels.hf.build_processor`; saved with every checkpoint.
        inspection: what :func:`~laco_kernels.train.data.inspect` found. Its tally counts what loading leaves out.
        rates: learning rates by part, for all parts that are trained and no others.
        min_lr: the learning rate of all parts at the end.
        keep: how many checkpoints stay, all if ``None``.
        non_finite_budget: how many optimiser steps may be left out as their loss or gradient is NaN or infinite.
        callbacks: more of them.

    Raises:
        ValueError: ``args`` ask for what would break a promise, or ``rates`` do not fit what is trained.
        CheckpointError: ``args.output_dir`` cannot be written to.
    """

    optimizer: Any
    lr_scheduler: Any

    def __init__(
        self,
        model: PreTrainedModel | nn.Module,
        args: TrainingArguments,
        *,
        processor: LlavaProcessor,
        inspection: Inspection,
        rates: Mapping[str, float],
        min_lr: float = 0.0,
        keep: int | None = 2,
        non_finite_budget: int = 0,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        _check_arguments(args, non_finite_budget)
        for group in parameter_groups(model, rates, args.weight_decay):
            cosine(group["lr"], min_lr, 0, 1)
        _check_folder(args)
        self.rates, self.min_lr = dict(rates), min_lr
        self.keep = None if keep is None else integer("keep", keep, 1)
        self.non_finite_budget = integer("non_finite_budget", non_finite_budget, 0)
        self.inspection = inspection
        self.ledger = Ledger()
        self.metrics = MetricsFile(Path(args.output_dir) / METRICS)
        self._step = Step()
        self._step_rates: dict[str, float] = {}
        self._run: dict[str, Any] = {}
        args.logging_nan_inf_filter = False  # which logs a NaN as 0.0
        if args.ddp_find_unused_parameters is None:
            # Of an encoder, what comes behind the layer that the projector reads has no gradient; all else has.
            args.ddp_find_unused_parameters = "encoder" in rates
        super().__init__(
            model,
            args,
            data_collator=Collator(processor),
            train_dataset=inspection.dataset,
            processing_class=processor,
            callbacks=[*(callbacks or []), _Housekeeping(self)],
        )
        if self.is_fsdp_enabled and not self.accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap:
            # Accelerate refuses what a family's encoder may have and this one has not.
            self.accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = _layers(self._unwrapped())

    def create_accelerator_and_postprocess(self) -> None:
        """Create what spreads the model over processes; by FSDP2 also over those without a GPU."""
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        if self.args.fsdp and state.distributed_type == DistributedType.MULTI_CPU:
            # Accelerate drops FSDP on CPUs without a word, although all that it does works there.
            state.distributed_type = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = True
        if self.args.fsdp and state.mixed_precision == "bf16":
            # Accelerate would round losses to three digits, and add gradients up in bfloat16, unlike under DDP.
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            state.fsdp_plugin.mixed_precision_policy = policy

    # What is trained, and at which rate.

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create ``args.optim`` on a group for every part."""
        if self.optimizer is None:
            model = self.model if model is None else model
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            if not isinstance(kind, type) or {"params", "model", "optimizer_dict"} & options.keys():
                remedy = "Pass optim='adamw_torch'"
                raise ValueError(complaint("optim", self.args.optim, "an optimiser that takes groups of parameters", remedy))
            self.optimizer = kind(parameter_groups(model, self.rates, self.args.weight_decay), **options)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        """Create a cosine for every group."""
        if self.lr_scheduler is None:
            optimizer = self.optimizer if optimizer is None else optimizer
            warmup = self.args.get_warmup_steps(num_training_steps)
            rates = [self.rates[group["name"]] for group in optimizer.param_groups]
            self.lr_scheduler = LambdaLR(optimizer, [cosine(rate, self.min_lr, warmup, num_training_steps) for rate in rates])
            self._created_lr_scheduler = True
        return self.lr_scheduler

    # The data.

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        return EpochSampler(len(self.train_dataset), self._data_seed())

    def _data_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def get_batch_samples(self, *args: Any, **options: Any) -> tuple[list[Any], Any]:
        """Return the batches of a step, and how many answer tokens to divide by: at least 1, for a loss of 0 of none."""
        batches, count = super().get_batch_samples(*args, **options)
        return batches, count if count is None else torch.as_tensor(count).clamp(min=1)

    # A step.

    def _run_epoch(self, *args: Any, **options: Any) -> None:
        """Run an epoch; of one in which a run had come to its end before it was resumed, the Trainer would take a step more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **options)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Compute the gradients of a batch."""
        notes = take_notes(inputs)
        device = self.args.device
        random = torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        loss = super().training_step(model, inputs, num_items_in_batch)
        given = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
        self._step.batches.append(Batch(notes, self._prepare_inputs(inputs) | given, random, loss))
        # The Trainer adds losses up, and its sum would stay NaN. What is logged is counted by the ledger.
        return torch.where(loss.isfinite(), loss, torch.zeros_like(loss))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> float | None:
        """Decide over the step, which is taken right after this."""
        norm = super()._get_grad_norm(model, grad_norm)
        return self._decide(float(whole(norm)) if isinstance(norm, torch.Tensor) else norm)

    def _decide(self, norm: float | None) -> float | None:
        step, self._step = self._step, Step()
        totals = step.totals(self.accelerator)
        self.ledger.count(totals.tokens, totals.samples)
        self.inspection.tally.add(totals.skipped)
        self._step_rates = {group["name"]: group["lr"] for group in self.optimizer.param_groups}
        what, value = ("loss", totals.loss) if not math.isfinite(totals.loss) else ("gradient norm", norm)
        if value is None or math.isfinite(value):
            self.ledger.add(totals.loss)
            return norm
        number = self.state.global_step + 1
        ids, where = step.explain(self.model)
        self.ledger.non_finite += 1
        if self.ledger.non_finite > self.non_finite_budget:
            check_loss(value, number, ids, where, what)
        left = self.non_finite_budget - self.ledger.non_finite
        message = "Left out step %d: %s %s, samples: %s%s; %d more may be left out."
        logger.warning(message, number, what, value, ", ".join(ids), f", beginning in {where}" if where else "", left)
        self.model.zero_grad(set_to_none=True)  # an optimiser does nothing where there is no gradient
        return norm

    # What is written down.

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with what the ledger counted."""
        if "train_loss" in logs:
            logs["train_loss"] = self._mean_loss()
        if "loss" not in logs:
            return super().log(logs, start_time)
        loss, speed = self.ledger.close_window()
        counted = {"skipped": len(self.inspection.tally.skipped), "non_finite": self.ledger.non_finite}
        counted |= {"tokens": self.ledger.tokens, "samples": self.ledger.samples}
        rates = dict(self._step_rates)
        line = {"step": self.state.global_step, "epoch": self.state.epoch, "loss": loss, "grad_norm": logs.get("grad_norm")}
        line |= {"lr": rates, **counted, "samples_per_second": speed, "seconds": self.ledger.seconds}
        logs["loss"] = math.nan if loss is None else loss
        logs |= {f"learning_rate_{part}": rate for part, rate in rates.items()}
        logs |= counted | {"samples_per_second": speed}
        super().log(logs, start_time)
        if self.is_world_process_zero():
            self.metrics.write(line)
        return None

    def _mean_loss(self) -> float:
        return self.ledger.loss / self.ledger.steps if self.ledger.steps else math.nan

    # Checkpoints.

    def train(self, resume_from_checkpoint: bool | str | Path | None = None, **options: Any) -> TrainOutput:
        """Train.

        Args:
            resume_from_checkpoint: ``True`` for the latest complete checkpoint in ``args.output_dir``, or the path of one.
            options: those of the stock Trainer.

        Raises:
            ValueError: there is no checkpoint to resume from, it is one of another run, or there are checkpoints in the
                folder in which a new run should begin.
            DamagedCheckpointError: the checkpoint given is not as it was written.
            NonFiniteError: more losses or gradients than the budget allows are NaN or infinite.
            TooManySkippedError: more samples were left out than the cap allows.
            CheckpointError: a checkpoint could not be written; those before it are as they were.
            OSError: the metrics could not be written.
        """
        path = self._find(resume_from_checkpoint)
        self._run = self._describe()
        if path is None:
            self._together(self._begin)
            self.ledger = Ledger()
        else:
            check_run(path, self._run)
            if not self.is_deepspeed_enabled:
                load_weights(self._unwrapped(), path)
        output = super().train(resume_from_checkpoint=None if path is None else str(path), **options)
        if self.is_world_process_zero():
            draw_loss(self.metrics.read(), Path(self.args.output_dir) / PICTURE, self._title())
        return output._replace(training_loss=self._mean_loss())

    def _find(self, given: bool | str | Path | None) -> Path | None:
        """Return the checkpoint to resume from, complete; one process reads it for all."""
        if given is None or given is False:
            return None

        def find() -> Path:
            if given is not True:
                checkpoint.verify(Path(given))
                return Path(given)
            if (path := checkpoint.latest(Path(self.args.output_dir))) is None:
                expected = f"a complete checkpoint in {self.args.output_dir}"
                raise ValueError(complaint("resume_from_checkpoint", True, expected, "Begin a new run, or pass a checkpoint"))
            return path

        return self._together(find)

    def _begin(self) -> None:
        folder = Path(self.args.output_dir)
        if (found := checkpoint.latest(folder)) is not None:
            remedy = "Resume with resume_from_checkpoint=True, or begin the new run in another folder"
            raise ValueError(complaint("output_dir", f"{folder} with {found.name}", "a folder without checkpoints", remedy))
        self.metrics.begin()

    def _describe(self) -> dict[str, Any]:
        """Return what decides over the steps to come; a run is resumed with the same."""
        steps = self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]
        data = self.inspection.dataset
        groups = [
            f"{len(group['params'])} of {group['name']} {'with' if group['weight_decay'] else 'without'} weight decay"
            for group in parameter_groups(self._unwrapped(), self.rates, 1.0)
        ]
        return {
            "data": data.records.fingerprint(),
            "samples": len(data),
            "processes": self.args.world_size,
            "batch size": self.args.per_device_train_batch_size,
            "accumulation": self.args.gradient_accumulation_steps,
            "seed": self._data_seed(),
            "steps": steps,
            "warm-up": self.args.get_warmup_steps(steps),
            "rates": self.rates,
            "min_lr": self.min_lr,
            "weight decay": self.args.weight_decay,
            "parameters": groups,
            "optimizer": _optimizer(self.args),
        }

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.store_flos()
        folder, step = Path(self.args.output_dir), self.state.global_step
        part = self._together(lambda: checkpoint.begin(folder, step))
        error: Exception | None = None
        try:
            self._write(part)
        except Exception as raised:
            error = raised
        errors = gather_object([error and (error if isinstance(error, OSError) else RuntimeError(str(error)))])

        def finish() -> None:
            for failed in errors:
                if failed is not None:
                    raise checkpoint.give_up(part, failed) from error
            checkpoint.commit(part, self.keep)

        self._together(finish)

    def _write(self, part: Path) -> None:
        # What takes all processes comes first: none may wait for one that could not write.
        keep = self.is_world_process_zero()
        optimizer = None
        if self.is_deepspeed_enabled:
            weights = self.accelerator.get_state_dict(self.deepspeed)
            super()._save_optimizer_and_scheduler(str(part))
        else:
            weights = model_state(self._unwrapped(), keep)
            optimizer = optimizer_state(self._unwrapped(), _inner(self.optimizer), keep)
        save_state(random_state(self.args.device), part / random_file(self.args.process_index))
        if not keep:
            return
        save_model(self._unwrapped(), part, weights)
        self.processing_class.save_pretrained(part)
        if optimizer is not None:
            save_state(optimizer, part / OPTIMIZER)
        save_state(self.lr_scheduler.state_dict(), part / SCHEDULER)
        self.state.save_to_json(part / TRAINER_STATE_NAME)
        run = {"run": self._run, "ledger": self.ledger.state_dict(), "tally": self.inspection.tally.state_dict()}
        (part / RUN).write_text(json.dumps(run, indent=1), encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Do nothing: :meth:`train` has loaded the weights, by their own names and all of them."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        path = Path(checkpoint)
        if not self.is_deepspeed_enabled:  # which has loaded its own files
            load_optimizer_state(self._unwrapped(), _inner(self.optimizer), torch.load(path / OPTIMIZER, weights_only=True))
        self.lr_scheduler.load_state_dict(torch.load(path / SCHEDULER, weights_only=True))
        content = check_run(path, self._run)
        self.ledger = Ledger(**content["ledger"])
        self.inspection.tally.load_state_dict(content["tally"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            file = Path(checkpoint) / random_file(self.args.process_index)
            set_random_state(torch.load(file, weights_only=True), self.args.device)

    # Other things.

    def _unwrapped(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _together(self, action: Callable[[], Any]) -> Any:
        """Return what an action returns in the main process, or raise in all processes what it raises."""
        if self.args.world_size == 1:
            return action()
        result: list[Any] = [None, None]
        if self.is_world_process_zero():
            try:
                result[0] = action()
            except Exception as error:
                result[1] = error
        broadcast_object_list(result)
        if result[1] is not None:
            raise result[1]
        return result[0]

    def _title(self) -> str:
        model = self._unwrapped()
        trained, size = (sum(p.numel() for p in model.parameters() if p.requires_grad or all_) for all_ in (False, True))
        parts = ", ".join(f"{part} at {rate:g}" for part, rate in self.rates.items())
        return f"{parts}\n{trained:,} of {size:,} parameters trained"


class _Housekeeping(TrainerCallback):
    """What is to be done at certain moments."""

    def __init__(self, trainer: LacoTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        self.trainer.ledger.start_clock()
        if state.is_world_process_zero:
            self.trainer.metrics.resume(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        if self.trainer._step.batches:
            given = "a version that takes a step without asking for the gradient's norm"
            raise RuntimeError(
                complaint("transformers", given, "one of those this is tested with", "Install transformers 5.17")
            )
        control.should_log = control.should_log or state.global_step >= state.max_steps


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    """Return an optimiser without what Accelerate puts around it."""
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


def _optimizer(args: TrainingArguments) -> str:
    """Say which optimiser it is, with what a checkpoint of its state would otherwise overrule without a word."""
    more = f", {args.optim_args}" if args.optim_args else ""
    name = OptimizerNames(args.optim).value
    return f"{name}, betas {args.adam_beta1} and {args.adam_beta2}, epsilon {args.adam_epsilon}{more}"


def _layers(model: nn.Module) -> list[str]:
    """Return the classes of the layers that FSDP gathers one by one."""
    wanted = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    return sorted(wanted & {type(module).__name__ for module in model.modules()})


def _check_folder(args: TrainingArguments) -> None:
    """Refuse a folder that cannot be written to before the first step, not at the first checkpoint."""
    if not args.should_save:
        return
    try:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=args.output_dir):
            pass
    except OSError as error:
        given = f"{args.output_dir}, which cannot be written to ({error.strerror})"
        remedy = "Make it writable, free some space, or pass another one"
        raise checkpoint.CheckpointError(complaint("output_dir", given, "a folder for checkpoints", remedy)) from error


def _check_arguments(args: TrainingArguments, non_finite_budget: int) -> None:
    """Refuse what would break a promise, and say of DeepSpeed that it is untested."""
    if args.deepspeed:
        logger.warning("DeepSpeed is accepted here, but untested; it keeps its state in files of its own that it unpickles.")
    refused = {
        "fp16": (args.fp16, "Compute in bf16=True, or in float32"),
        "auto_find_batch_size": (args.auto_find_batch_size, "Set the batch size"),
        "ignore_data_skip": (args.ignore_data_skip, "Drop it: a resumed run goes on in the order of its samples"),
        "save_only_model": (args.save_only_model, "Drop it: a run could not be resumed"),
        "push_to_hub": (args.push_to_hub, "Drop it, and push the model when it is trained"),
        "non_finite_budget with DeepSpeed": (args.deepspeed and non_finite_budget, "Pass 0: it takes steps by itself"),
        "load_best_model_at_end": (args.load_best_model_at_end, "Drop it"),
        "label_smoothing_factor": (args.label_smoothing_factor, "Drop it: the Trainer would compare tokens with themselves"),
        "dispatch_batches": (args.accelerator_config.dispatch_batches, "Drop it: each process counts what it leaves out"),
        "split_batches": (
            args.accelerator_config.split_batches,
            "Drop it: a batch would be as small as the processes are many",
        ),
        "even_batches=False": (not args.accelerator_config.even_batches, "Drop it: processes would wait for each other"),
        "fsdp_config": (args.fsdp_plugin_args and args.fsdp_plugin_args["fsdp_version"] == 1, "Set version to 2"),
        "several GPUs in one process": (args.n_gpu > 1, "Start with torchrun, or choose one with CUDA_VISIBLE_DEVICES"),
    }
    for name, (given, remedy) in refused.items():
        if given:
            raise ValueError(complaint("args", f"{name}", "training that can be resumed exactly", remedy))
