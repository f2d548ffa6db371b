"""VisionZip: the tokens that get most attention, and means of the others."""

from __future__ import annotations

from typing import Any

import torch

from laco_kernels.errors import complaint
from laco_kernels.geometry import integer
from laco_kernels.nn.compressors.training_free import AttentionCompressor, others, rows, score_tokens, similarities


class VisionZip(AttentionCompressor):
    """Keeps dominant tokens and merges the others into contextual ones (Yang et al., *VisionZip*).

    Dominant are the tokens with the largest scores. Of the others, evenly spaced ones become contextual: each is the mean of
    itself and of the tokens whose keys, averaged over heads, are nearest to its own by cosine. Dominant tokens come first, in
    raster order, then the contextual ones. The authors score by the class token's attention in the encoder's last layer but
    one, and by attention received where there is no class token; that needs all N x N weights, and the keys' norms stand for
    it here. Their released code adds up a contextual token and the mean of those merged into it, which doubles its scale;
    here it is the mean of all of them.

    Args:
        in_dim, out_dim, ratio, place, prefix_tokens, num_tokens: those of :class:`AttentionCompressor`.
        contextual: how many of the tokens are contextual; 10 of 64 unless given, the paper's share.
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
        contextual: int | None = None,
        scores: str = "auto",
        **common: Any,
    ) -> None:
        super().__init__(in_dim, out_dim, ratio, **common)
        self.contextual = None if contextual is None else integer("contextual", contextual, 0)
        self.scores = self.read_scores(scores)
        if self.num_tokens is not None and self.contextual is not None and self.contextual > self.num_tokens:
            expected = f"at most num_tokens = {self.num_tokens}"
            raise ValueError(complaint("contextual", self.contextual, expected, "Pass fewer, or leave contextual out"))

    def budget(self, num_patches: int) -> int:
        """Return how many tokens come out; refuses more contextual ones than that."""
        count = super().budget(num_patches)
        if self.contextual is not None and self.contextual > count:
            expected = f"at most {count}, the tokens that come out of {num_patches}"
            raise ValueError(complaint("contextual", self.contextual, expected, "Pass fewer, or leave contextual out"))
        return count

    def select(self, patches: torch.Tensor, keys: torch.Tensor, query: torch.Tensor | None) -> torch.Tensor:
        """Compress ``[B, N, in_dim]`` into ``[B, N', in_dim]``."""
        count = patches.shape[1]
        budget = self.budget(count)
        if budget == count:
            return patches
        contextual = round(budget * 10 / 64) if self.contextual is None else self.contextual
        best = score_tokens(keys, query, self.scores).topk(budget - contextual, dim=1).indices.sort(1).values
        dominant = rows(patches, best)
        if contextual == 0:
            return dominant
        rest = others(best, count)
        spaced = torch.arange(contextual, device=rest.device) * rest.shape[1] // contextual
        metric, tokens = rows(keys.mean(2), rest), rows(patches, rest)
        nearest = similarities(metric, metric[:, spaced]).argmax(-1)
        nearest = nearest.index_copy(1, spaced, torch.arange(contextual, device=rest.device).expand(len(rest), -1))
        joins = torch.nn.functional.one_hot(nearest, contextual).to(patches.dtype).transpose(1, 2)  # [B, contextual, rest]
        return torch.cat([dominant, joins / joins.sum(2, keepdim=True) @ tokens], 1)
