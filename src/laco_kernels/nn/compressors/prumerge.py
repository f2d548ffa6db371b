"""PruMerge+: tokens that get attention, tokens evenly spaced, and the pruned ones merged into both."""

from __future__ import annotations

from typing import Any

import torch

from laco_kernels.geometry import integer
from laco_kernels.nn.compressors.training_free import AttentionCompressor, others, rows, score_tokens, similarities


class PruMergePlus(AttentionCompressor):
    """Keeps tokens by score and by place, and merges the pruned ones into them (Shang et al., *LLaVA-PruMerge*, the "+").

    Half of the budget goes to the tokens with the largest scores, the rest to evenly spaced ones of the others. Each kept token
    becomes the mean, weighted by scores, of itself and of the ``neighbours`` pruned tokens whose keys, averaged over heads,
    are nearest to its own by cosine. Tokens stay in raster order. The authors' number of tokens differs from image to image, by
    outliers among the scores; here it is the same for all, so that images form a batch. They also compare keys of all heads
    side by side, and add the pruned tokens to the kept one instead of averaging, which changes its scale.

    Scores are one number a token; the cosines are N' x (N - N') numbers.

    Args:
        in_dim, out_dim, ratio, place, prefix_tokens, num_tokens: those of :class:`AttentionCompressor`.
        neighbours: pruned tokens merged into a kept one; 32, or all where there are fewer.
        scores: ``"cls"``, ``"key_norm"``, or ``"auto"``: by the class token where there is one
            (:func:`laco_kernels.nn.compressors.training_free.score_tokens`).
    """

    places = ("behind", "inside")

    def __init__(
        self,
        in_dim: int,
        out_dim: int | None = None,
        ratio: int = 2,
        *,
        neighbours: int = 32,
        scores: str = "auto",
        **common: Any,
    ) -> None:
        super().__init__(in_dim, out_dim, ratio, **common)
        self.scores = self.read_scores(scores)
        self.neighbours = integer("neighbours", neighbours, 0)

    def select(self, patches: torch.Tensor, keys: torch.Tensor, query: torch.Tensor | None) -> torch.Tensor:
        """Compress ``[B, N, in_dim]`` into ``[B, N', in_dim]``."""
        count = patches.shape[1]
        budget = self.budget(count)
        if budget == count:
            return patches
        scores = score_tokens(keys, query, self.scores)
        best = scores.topk((budget + 1) // 2, dim=1).indices
        rest = others(best, count)
        spaced = torch.arange(budget // 2, device=rest.device) * rest.shape[1] // max(budget // 2, 1)
        kept = torch.cat([best, rest[:, spaced]], 1).sort(1).values
        pruned = others(kept, count)
        metric = keys.mean(2)
        alike = similarities(rows(metric, kept), rows(metric, pruned))  # [B, kept, pruned]
        nearest = alike.topk(min(self.neighbours, count - budget), dim=2).indices
        weights = torch.zeros_like(alike).scatter(2, nearest, 1.0) * rows(scores, pruned).unsqueeze(1)
        own = rows(scores, kept).unsqueeze(2)
        total = own + weights.sum(2, keepdim=True)
        own, total = torch.where(total == 0, 1, own), torch.where(total == 0, 1, total)  # without any score a token stays
        return own / total * rows(patches, kept) + weights / total @ rows(patches, pruned)
