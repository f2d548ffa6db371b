"""What is known of an optimiser step before it is taken, in all processes alike: :class:`Step`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object

from laco_kernels.train.finite import NonFinite, first_non_finite
from laco_kernels.train.resuming import whole

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

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
        """Return the ids of the samples to blame, and where it began; together with the other processes.

        Those are the samples of the first batch whose loss is no number. Where all losses are numbers, they are those of the
        batches whose gradients are not, and all of them where the gradients are finite each by itself.

        Args:
            model: what was computed with, without DDP around it. Its gradients are lost.
        """
        own = [not bool(batch.loss.isfinite()) for batch in self.batches]
        bad = [any(flags) for flags in zip(*gather_object([own]), strict=True)]
        if any(bad):
            blamed = [bad.index(True)]
            found = [self._again(model, self.batches[blamed[0]], first_non_finite)]  # all take part, as FSDP wants
            guilty = [own[blamed[0]]]
        else:
            blamed = list(range(len(self.batches)))
            found = [self._again(model, batch, _first_gradient) for batch in self.batches]
            guilty = [where is not None for where in found]
        reports = [(self.batches[i].notes.ids, where) for i, where, is_it in zip(blamed, found, guilty, strict=True) if is_it]
        reports = gather_object(reports)
        if not reports:
            return gather_object([name for batch in self.batches for name in batch.notes.ids]), None
        return [name for ids, _ in reports for name in ids], next((where for _, where in reports if where), None)

    def _again(
        self, model: nn.Module, batch: Batch, look: Callable[[nn.Module, Mapping[str, Any]], NonFinite | None]
    ) -> NonFinite | None:
        """Look at a batch with the random numbers it was computed with."""
        cpu, cuda = batch.random
        device = batch.loss.device
        with torch.random.fork_rng([device] if cuda is not None else []):
            torch.set_rng_state(cpu)
            if cuda is not None:
                torch.cuda.set_rng_state(cuda, device)
            return look(model, batch.inputs)


def _first_gradient(model: nn.Module, inputs: Mapping[str, Any]) -> NonFinite | None:
    """Return the first gradient that is not finite, in the order in which they are computed."""
    model.zero_grad(set_to_none=True)
    named = dict(model.named_parameters())
    order: dict[str, None] = {}
    handles = [
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: order.setdefault(name))
        for name, parameter in named.items()
        if parameter.requires_grad
    ]
    try:
        model(**inputs)["loss"].backward()
    finally:
        for handle in handles:
            handle.remove()
    first = None
    for name in [*order, *(name for name in reversed(named) if name not in order)]:  # FSDP's set off no hooks
        gradient = named[name].grad
        if gradient is None:
            continue
        gradient = whole(gradient)
        if first is None and not bool(gradient.isfinite().all()):
            first = NonFinite("gradient of", name, int(gradient.isnan().sum()), int(gradient.isinf().sum()), gradient.numel())
    return first
