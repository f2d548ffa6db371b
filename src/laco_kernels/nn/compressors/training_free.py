"""Compressors without parameters that look at what an encoder layer's attention looks at, but never at its N x N weights.

Queries and keys come from the layer's own projections: the keys of all tokens and, where there is a class token, its one
query. So SDPA and flash attention stay on in every layer.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from laco_kernels.errors import complaint
from laco_kernels.geometry import check_grid, integer
from laco_kernels.nn.compressors.base import Compressor
from laco_kernels.ops import checks

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

SCORES = ("auto", "cls", "key_norm")


class AttentionCompressor(Compressor):
    """Keeps or merges tokens by the keys of the layer in front of it; what comes out has no grid any more.

    Args:
        in_dim, out_dim, ratio, place, prefix_tokens: those of :class:`Compressor`. The width stays; no residual can be added.
        num_tokens: how many patch tokens come out; ``ceil(N / ratio²)`` unless given.

    Raises:
        ValueError: a residual or another width is asked for, or ``num_tokens`` is out of range.
    """

    places = ("inside", "behind")
    residuals = ("none",)
    reads_attention = True
    keeps_width = True
    fits_any_grid = True
    #: Whether it counts how many patches each token stands for (``merge_all``).
    counts_patches: ClassVar[bool] = False
    #: Whether the layers behind it are to attend in proportion to that.
    in_proportion: bool = False
    #: Whether it needs the class token's query.
    reads_query: bool = False

    def __init__(
        self, in_dim: int, out_dim: int | None = None, ratio: int = 2, *, num_tokens: int | None = None, **common: Any
    ) -> None:
        super().__init__(in_dim, out_dim, ratio, **common)
        self.num_tokens = None if num_tokens is None else integer("num_tokens", num_tokens, 1)

    def read_scores(self, scores: str) -> str:
        """Return by what tokens are scored, one of ``SCORES``, if there can be such scores here."""
        checks.check_choice("scores", scores, SCORES)
        self.reads_query = scores == "cls"
        if self.reads_query and self.place == "inside" and self.prefix_tokens == 0:
            remedy = "This encoder has no class token; pass scores='key_norm'"
            raise ValueError(complaint("scores", repr(scores), "'auto' or 'key_norm'", remedy))
        return scores

    def budget(self, num_patches: int) -> int:
        """Return how many of ``num_patches`` tokens come out; ValueError where the budget asks for more than there are."""
        if self.num_tokens is None:
            return -(-num_patches // self.ratio**2)
        if self.num_tokens > num_patches:
            remedy = "Pass fewer num_tokens, or larger images"
            raise ValueError(complaint("num_tokens", self.num_tokens, f"at most {num_patches}, the patches that come", remedy))
        return self.num_tokens

    def out_grid(self, grid: Sequence[int]) -> None:
        """Tokens no longer form a grid."""
        self.num_output_patches(grid)

    def num_output_patches(self, grid: Sequence[int]) -> int:
        """Tokens that come out for ``grid = (H, W)``, prefix tokens apart."""
        height, width = check_grid(grid)
        return self.budget(height * width)

    def forward(  # type: ignore[override]
        self,
        x: torch.Tensor,
        grid: Sequence[int] | None,
        *,
        keys: torch.Tensor,
        query: torch.Tensor | None = None,
        layout: str = "raster",
    ) -> tuple[torch.Tensor, None]:
        """Compress ``x [B, P + N, in_dim]``.

        Args:
            x: the tokens that leave the layer, prefix first.
            grid: the image in patches, or ``None`` where the tokens form none.
            keys: ``[B, P + N, heads, head_dim]``, the layer's keys.
            query: ``[B, heads, head_dim]``, the class token's query, for scores by it.
            layout: ``"raster"``.

        Returns:
            The tokens, ``[B, P + N', in_dim]`` inside an encoder and ``[B, N', in_dim]`` behind it, and ``None``: no grid.

        Raises:
            TypeError: a tensor or the grid is of the wrong type.
            ValueError: shapes do not fit each other, the query is missing, or the budget cannot be met.
        """
        self.check_attention(x, grid, keys, query, layout)
        prefix, patches = x[:, : self.prefix_tokens], x[:, self.prefix_tokens :]
        with full_precision(x):
            y = self.select(wide(patches), wide(keys[:, self.prefix_tokens :]), None if query is None else wide(query))
        y = y.to(x.dtype)
        return (torch.cat([prefix, y], dim=1) if self.place == "inside" and self.prefix_tokens else y), None

    def select(self, patches: torch.Tensor, keys: torch.Tensor, query: torch.Tensor | None) -> torch.Tensor:
        """Compress the patch tokens ``[B, N, in_dim]`` with keys ``[B, N, heads, head_dim]`` into ``[B, N', in_dim]``."""
        raise NotImplementedError

    def check_attention(
        self, x: torch.Tensor, grid: Sequence[int] | None, keys: torch.Tensor, query: torch.Tensor | None, layout: str
    ) -> None:
        """Raise unless :meth:`forward` can work on these."""
        checks.check_tokens("x", x)
        patches = x.shape[1] - self.prefix_tokens
        self.check_input(x, check_grid(grid) if grid is not None else (patches, 1), layout)
        checks.check_tensor("keys", keys)
        if keys.dim() != 4 or keys.shape[:2] != x.shape[:2]:
            expected = f"[{x.shape[0]}, {x.shape[1]}, heads, head_dim]"
            remedy = "Pass the key projection of the layer's input, cut into heads"
            raise ValueError(complaint("keys", list(keys.shape), expected, remedy))
        if self.reads_query and query is None:
            remedy = "Pass scores='key_norm' for an encoder without a class token"
            raise ValueError(complaint("query", None, "the class token's query, for scores='cls'", remedy))
        if query is not None:
            checks.check_tensor("query", query)
            if query.shape != (keys.shape[0], *keys.shape[2:]):
                expected = f"{[keys.shape[0], *keys.shape[2:]]}, the class token's"
                raise ValueError(complaint("query", list(query.shape), expected, "Pass the query of token 0, cut into heads"))
        self.budget(patches)


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """Return it in float32 at least: sums of hundreds of tokens overflow in half precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def full_precision(x: torch.Tensor) -> AbstractContextManager[object]:
    """Return a context in which autocast lowers nothing, as what is averaged is the encoder's own stream."""
    return contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def score_tokens(keys: torch.Tensor, query: torch.Tensor | None, scores: str) -> torch.Tensor:
    """Return how much attention each token gets, ``[B, N]``, from keys ``[B, N, heads, head_dim]``.

    ``"cls"``: the class token's attention, averaged over heads: one row of the weights, ``softmax(q K^T / sqrt(d))``, but over
    the patches alone. ``"key_norm"``: the keys' squared norm over all heads, over the largest one. Under queries that are
    normal around zero with covariance ``s I`` a key ``k`` gets ``exp(s |k|² / 2)`` of attention on average, before it is
    normalised.
    ``"auto"``: by the class token where there is one.
    """
    if scores == "key_norm" or (scores == "auto" and query is None):
        norms = keys.square().sum((2, 3))
        return norms / norms.amax(1, keepdim=True).clamp_min(torch.finfo(norms.dtype).tiny)
    assert query is not None
    logits = torch.einsum("bhd,bnhd->bhn", query, keys) * keys.shape[-1] ** -0.5
    return logits.softmax(-1).mean(1)


def similarities(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return the cosines ``[B, n, m]`` between rows of ``one [B, n, d]`` and ``other [B, m, d]``."""
    return torch.nn.functional.normalize(one, dim=-1) @ torch.nn.functional.normalize(other, dim=-1).transpose(1, 2)


def rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return the rows ``index [B, n]`` of ``x [B, N, ...]``, ``[B, n, ...]``."""
    shape = (*index.shape, *[1] * (x.dim() - 2))
    return x.gather(1, index.view(shape).expand(*index.shape, *x.shape[2:]))


def others(index: torch.Tensor, count: int) -> torch.Tensor:
    """Return the numbers below ``count`` that are not in ``index [B, n]``, ascending, ``[B, count - n]``."""
    taken = torch.zeros(len(index), count, dtype=torch.int8, device=index.device).scatter(1, index, 1)
    return taken.argsort(dim=1, stable=True)[:, : count - index.shape[1]]
