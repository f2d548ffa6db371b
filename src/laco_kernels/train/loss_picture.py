"""A picture of how the loss went: :func:`draw_loss`."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path


def draw_loss(lines: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draw the loss of every logged step, and the median of those around it.

    Args:
        lines: of a :class:`~laco_kernels.train.metrics.MetricsFile`; those without a loss are left out.
        path: of the PNG.
        title: what was trained.
    """
    points = [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]
    steps, losses = [step for step, _ in points], [loss for _, loss in points]
    reach = max(1, len(losses) // 40)
    median = [statistics.median(losses[max(0, i - reach) : i + reach + 1]) for i in range(len(losses))]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="#9db7d5", linewidth=1, label="loss")
    axes.plot(steps, median, color="#1f4e8c", linewidth=2, label=f"median of {2 * reach + 1}")
    axes.set(xlabel="optimiser step", ylabel="loss per answer token", title=title)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
