"""ToMe: token merging by bipartite matching of keys."""

from __future__ import annotations

from typing import Any

import torch

from laco_kernels.errors import complaint
from laco_kernels.nn.compressors.training_free import AttentionCompressor, full_precision, rows, similarities, wide


class Tome(AttentionCompressor):
    """Merges the tokens whose keys are most alike (Bolya et al., *Token Merging: Your ViT but Faster*).

    Tokens at even and at odd places form two sets. Each even one finds the odd one whose key, averaged over heads, has the
    largest cosine to its own; the pairs most alike are merged into means weighted by how many patches a token stands for.
    That at most halves the tokens, so a quarter takes two rounds; the cosines are N / 2 x N / 2 numbers. Inside an encoder the
    layers behind it attend in proportion: ``log(size)`` is added to the attention logits of a token that stands for ``size``
    patches, as the bias of SDPA. (A pooling head behind the encoder does not.) The authors merge between a layer's attention
    and its MLP; here it is behind the layer.

    Args:
        in_dim, out_dim, ratio, place, prefix_tokens, num_tokens: those of :class:`AttentionCompressor`.
        proportional: attend in proportion behind it; off it goes with flash attention, which takes no bias.
    """

    counts_patches = True

    def __init__(
        self, in_dim: int, out_dim: int | None = None, ratio: int = 2, *, proportional: bool = True, **common: Any
    ) -> None:
        super().__init__(in_dim, out_dim, ratio, **common)
        if not isinstance(proportional, bool):
            raise TypeError(complaint("proportional", repr(proportional), "True or False", "Leave it out for True"))
        self.in_proportion = proportional

    def select(self, patches: torch.Tensor, keys: torch.Tensor, query: torch.Tensor | None) -> torch.Tensor:
        """Merge ``[B, N, in_dim]`` into ``[B, N', in_dim]``."""
        return self._merge(patches, keys, patches.new_ones(patches.shape[:2]))[0]

    def merge_all(
        self, x: torch.Tensor, keys: torch.Tensor, sizes: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Merge tokens ``[B, P + N, C]`` that stand for ``sizes [B, P + N]`` patches, one each unless given.

        Returns:
            ``[B, P + N', C]``, patches in the order of those that others were merged into, and how many patches each token
            stands for, ``[B, P + N']``, in float32 at least; prefix tokens pass through.

        Raises:
            TypeError, ValueError: as :meth:`forward`.
        """
        self.check_attention(x, None, keys, None, "raster")
        if sizes is None:
            sizes = wide(x).new_ones(x.shape[:2])
        elif sizes.shape != x.shape[:2]:
            expected = f"{list(x.shape[:2])}, one number a token"
            raise ValueError(complaint("sizes", list(sizes.shape), expected, "Pass those that came with these tokens"))
        prefix = self.prefix_tokens
        with full_precision(x):
            patches, merged = self._merge(wide(x[:, prefix:]), wide(keys[:, prefix:]), sizes[:, prefix:])
        return torch.cat([x[:, :prefix], patches.to(x.dtype)], 1), torch.cat([sizes[:, :prefix], merged], 1)

    def _merge(self, patches: torch.Tensor, keys: torch.Tensor, sizes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        budget, metric = self.budget(patches.shape[1]), keys.mean(2)
        while patches.shape[1] > budget:
            patches, metric, sizes = _merge_pairs(patches, metric, sizes, patches.shape[1] - budget)
        return patches, sizes


def _merge_pairs(
    patches: torch.Tensor, metric: torch.Tensor, sizes: torch.Tensor, surplus: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Merge at most ``surplus`` tokens of ``[B, N, C]`` into others."""
    count = patches.shape[1]
    best, partner = similarities(metric[:, ::2], metric[:, 1::2]).max(-1)  # [B, ceil(N / 2)]
    order = best.argsort(dim=1, descending=True, stable=True)
    merged, kept = order[:, : min(surplus, count // 2)], order[:, min(surplus, count // 2) :]
    # A product with zeros and ones, as adding up at an index in parallel has no fixed order.
    joins = patches.new_zeros(len(patches), count // 2, merged.shape[1]).scatter(1, rows(partner, merged).unsqueeze(1), 1)
    gone = rows(sizes[:, ::2], merged)
    total = sizes[:, 1::2] + (joins @ gone.unsqueeze(2))[..., 0]
    new_sizes = torch.cat([rows(sizes[:, ::2], kept), total], 1)
    joins = joins * gone.unsqueeze(1) / total.unsqueeze(2)  # weights that sum to less than one, so that nothing overflows
    stays = (sizes[:, 1::2] / total).unsqueeze(2)

    def join(values: torch.Tensor) -> torch.Tensor:
        means = stays * values[:, 1::2] + joins @ rows(values[:, ::2], merged)
        return torch.cat([rows(values[:, ::2], kept), means], 1)

    odd = torch.arange(1, count, 2, device=kept.device).expand(len(kept), -1)
    places = torch.cat([kept * 2, odd], 1).argsort(1)
    patches, metric = (rows(join(values), places) for values in (patches, metric))
    return patches, metric, rows(new_sizes, places)
