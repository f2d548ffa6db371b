"""What is known of an optimiser step before it is taken, in all processes alike: :class:`Step`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object

from laco_kernels.train.finite import NonFinite, first_non_finite

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from laco_kernels.train.data import Notes
    from laco_kernels.train.skipping import Skipped


@dataclass
class Batch:
    """A batch that was computed: what it is made of, what it was computed with, and its loss."""

    notes: Notes
    inputs: Mapping[str, Any]
    random: tuple[torch.Tensor, torch.Tensor | None]
    loss: torch.Tensor


@dataclass(frozen=True)
class Totals:
    """Sums over the batches of a step and over all processes.

    Args:
        loss: the mean over processes.
        tokens, samples: of the rows that are samples.
        skipped: samples that were left out.
    """

    loss: float
    tokens: int
    samples: int
    skipped: tuple[Skipped, ...]


@dataclass
class Step:
    """The batches between two optimiser steps, in this process."""

    batches: list[Batch] = field(default_factory=list)

    def totals(self, accelerator: Any) -> Totals:
        """Add up, together with the other processes; waits for the GPU once."""
        loss = torch.stack([batch.loss.double() for batch in self.batches]).sum()
        tokens = [batch.inputs["attention_mask"][: len(batch.notes.ids)].sum() for batch in self.batches]
        samples, skipped = (sum(len(getattr(b.notes, name)) for b in self.batches) for name in ("ids", "skipped"))
        counts = loss.new_tensor([samples, skipped])
        sums = torch.cat([torch.stack([loss, torch.stack(tokens).sum().to(loss)]), counts])
        total = accelerator.reduce(sums, "sum").tolist()
        found: list[Skipped] = []
        if total[3]:
            found = gather_object([sample for batch in self.batches for sample in batch.notes.skipped])
        return Totals(total[0] / accelerator.num_processes, int(total[1]), int(total[2]), tuple(found))

    def explain(self, model: nn.Module) -> tuple[list[str], NonFinite | None]:
        """Return the ids of the samples whose loss is no number, and where it began; together with the other processes.

        Where all losses are numbers, and a gradient is not, these are all samples.

        Args:
            model: what was computed with, without DDP around it.
        """
        own = [not bool(batch.loss.isfinite()) for batch in self.batches]
        bad = [any(flags) for flags in zip(*gather_object([own]), strict=True)]
        if not any(bad):
            return gather_object([name for batch in self.batches for name in batch.notes.ids]), None
        index = bad.index(True)
        where = self._again(model, self.batches[index])  # all take part, as FSDP wants
        reports = gather_object([(list(self.batches[index].notes.ids), where) if own[index] else ([], None)])
        return [name for ids, _ in reports for name in ids], next((found for _, found in reports if found), None)

    def _again(self, model: nn.Module, batch: Batch) -> NonFinite | None:
        """Compute a batch with the random numbers it was computed with."""
        cpu, cuda = batch.random
        device = batch.loss.device
        with torch.random.fork_rng([device] if cuda is not None else []):
            torch.set_rng_state(cpu)
            if cuda is not None:
                torch.cuda.set_rng_state(cuda, device)
            return first_non_finite(model, batch.inputs)
