"""What a study of compressors inside the tiny tower found: ``laco study``."""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from laco_kernels.train.study import DEPTH, ON, token_layers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from laco_kernels.train.study import Settings
    from laco_kernels.train.study_runs import Run
    from laco_kernels.train.tiny_tower import TinyTower


@dataclass(frozen=True)
class Share:
    """A share of the digits read right, or a difference of two, over the seeds."""

    mean: float
    std: float  # of a sample; 0 of a single seed
    by_seed: list[float]


@dataclass(frozen=True)
class StudyRow:
    """One compressor, or nothing, with all seeds."""

    compressor: str | None
    residual: str  # "on", "off", or "-" where there is nothing to switch
    depth: str | None
    layer: int | None
    token_layers: float  # tokens that the layers read in all, as a share of the uncompressed tower's
    parameters: int
    before: Share
    after: list[Share]  # for each number of steps
    seconds: list[float]  # of training, the median over seeds; of the processor where it ran on one


@dataclass(frozen=True)
class StudyResult:
    """Everything that one run of ``laco study`` found."""

    command: str
    accuracy: float  # of the pretrained tower
    tower_steps: int
    seeds: int
    steps: list[int]  # of runs of their own, each with its own schedule
    settings: Settings  # of the longest runs
    device: str
    environment: dict[str, Any]
    rows: list[StudyRow]

    def to_dict(self) -> dict[str, Any]:
        """Return it JSON-ready."""
        return dataclasses.asdict(self)

    def find(self, compressor: str | None, residual: str, depth: str | None = str(DEPTH)) -> StudyRow | None:
        """Return the row of ``compressor``, or None where it was not run so."""
        wanted = (compressor, residual, None if compressor is None else depth)
        return next((row for row in self.rows if (row.compressor, row.residual, row.depth) == wanted), None)


def summarise(
    runs: Sequence[Sequence[Run]],
    settings: Sequence[Settings],
    tower: TinyTower,
    *,
    command: str,
    device: str,
    environment: dict[str, Any],
) -> StudyResult:
    """Put the runs of each arm together, in the order in which they come.

    Args:
        runs: the same arms and seeds for each of ``settings``, which differ in their steps, ascending.
        settings: those of the runs.
        tower: what was fine-tuned.
        command: what does it again.
        device: where it ran.
        environment: what it ran on.
    """
    arms = list(dict.fromkeys(run.arm for run in runs[0]))
    rows = []
    for arm in arms:
        groups = [[run.outcome for run in some if run.arm == arm] for some in runs]
        rows.append(
            StudyRow(
                **dataclasses.asdict(arm),
                token_layers=token_layers(arm),
                parameters=groups[0][0].parameters,
                before=share([outcome.before for outcome in groups[0]]),
                after=[share([outcome.after for outcome in group]) for group in groups],
                seconds=[statistics.median(outcome.seconds for outcome in group) for group in groups],
            )
        )
    return StudyResult(
        command=command,
        accuracy=tower.accuracy,
        tower_steps=tower.steps,
        seeds=len({run.seed for run in runs[0]}),
        steps=[one.steps for one in settings],
        settings=settings[-1],
        device=device,
        environment=environment,
        rows=rows,
    )


def share(values: Sequence[float]) -> Share:
    """Return the mean and spread of one value a seed."""
    return Share(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0, list(values))


def difference(one: Share, other: Share) -> Share:
    """Return how much more ``one`` is, seed by seed: both saw the same pictures in the same order."""
    return share([a - b for a, b in zip(one.by_seed, other.by_seed, strict=True)])


def residual_free(result: StudyResult) -> list[StudyRow]:
    """Return what was compared at 1/4 without the residual."""
    return [row for row in result.rows if row.depth == str(DEPTH) and row.residual != ON]
