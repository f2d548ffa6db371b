"""TokenPacker: every coarse token asks the fine tokens of its own window, of several encoder blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from laco_kernels import reference
from laco_kernels.errors import complaint
from laco_kernels.geometry import integer
from laco_kernels.nn.compressors.attention import MultiHeadAttention, draw_small
from laco_kernels.nn.compressors.base import Compressor

if TYPE_CHECKING:
    from laco_kernels.geometry import Windows

#: What TokenPacker reads of the 24 blocks of CLIP ViT-L, as indices into transformers' ``hidden_states``.
HIDDEN_STATES = (12, 16, 22, 23)


class TokenPacker(Compressor):
    r"""TokenPacker: a query a window attends to the window's ``r * r`` tokens of all blocks, then a two-layer MLP.

    .. math::
        q &= \mathrm{LN}(W_q\,\mathrm{down}(x_M)), \quad
        k = \mathrm{LN}(\mathrm{MLP}_k [x_1; \ldots; x_M]), \quad v = \mathrm{LN}(\mathrm{MLP}_v [x_1; \ldots; x_M]) \\
        y &= \mathrm{MLP}(\mathrm{attention}(q, k, v))

    ``down`` is bilinear interpolation to ``grid / ratio``: the mean of a window's central 2 x 2 tokens where ``ratio`` is
    even, so all of them at ``ratio=2``, and its central token where it is odd. All MLPs are Linear, GELU, Linear, of keys
    and values ``M * C -> hidden_dim -> hidden_dim``, of the output ``hidden_dim -> D -> D``; norms have an epsilon of 1e-6;
    ``W_q`` has no bias. The attention has linear maps of its own, and a window's query reads that window only. With
    ``C = hidden_dim = h``: ``2 M h^2 + 7 h^2 + 14 h + h D + D^2 + 2 D`` parameters, 17.5 M at ``C=1024, D=896, M=4``.

    With ``pad=True`` the windows at the edge hold what is real of them: padding is masked in the attention, and the query
    is the mean of the central tokens that are real, of all that are real where no central one is.

    Args:
        in_dim, out_dim, ratio, place, prefix_tokens, residual, pad: those of :class:`Compressor`.
        num_blocks: encoder blocks ``M`` that are read, deepest last. Behind the encoder 4 unless given, the authors'
            :data:`HIDDEN_STATES` of 24; inside it 1, the layer's own tokens.
        hidden_dim: width of the attention; ``in_dim`` unless given, as 1024 for CLIP ViT-L.
        num_heads: heads of the attention, a divisor of ``hidden_dim``.
    """

    places = ("behind", "inside")
    reads_blocks = True

    def __init__(
        self,
        in_dim: int,
        out_dim: int | None = None,
        ratio: int = 2,
        *,
        num_blocks: int | None = None,
        hidden_dim: int | None = None,
        num_heads: int = 8,
        **common: Any,
    ):
        super().__init__(in_dim, out_dim, ratio, **common)
        usual = len(HIDDEN_STATES) if self.place == "behind" else 1
        self.num_blocks = usual if num_blocks is None else integer("num_blocks", num_blocks, 1)
        if self.num_blocks > 1 and self.place != "behind":
            remedy = "A layer has its own tokens only; pass num_blocks=1, or place='behind'"
            raise ValueError(complaint("num_blocks", self.num_blocks, "1, inside an encoder", remedy))
        hidden = self.in_dim if hidden_dim is None else integer("hidden_dim", hidden_dim, 1)
        self.query = nn.Linear(self.in_dim, hidden, bias=False)
        self.key, self.value = (
            nn.Sequential(nn.Linear(self.num_blocks * self.in_dim, hidden), nn.GELU(), nn.Linear(hidden, hidden))
            for _ in range(2)
        )
        self.query_norm, self.key_norm, self.value_norm = (nn.LayerNorm(hidden, eps=1e-6) for _ in range(3))
        self.attention = MultiHeadAttention(hidden, num_heads)
        self.mlp = nn.Sequential(nn.Linear(hidden, self.out_dim), nn.GELU(), nn.Linear(self.out_dim, self.out_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights (normal, standard deviation 0.02; biases zero; norms one)."""
        draw_small(self)

    def compress(self, patches: torch.Tensor, grid: tuple[int, int], layout: str) -> torch.Tensor:
        """Compress ``[B, N, in_dim]``, or the list of those of all blocks, into ``[B, N', out_dim]``."""
        blocks = [patches] if self.num_blocks == 1 else cast("list[torch.Tensor]", patches)
        windows, batch = self.windows(grid), blocks[-1].shape[0]
        stacked = torch.cat(blocks, dim=-1) if len(blocks) > 1 else blocks[0]
        keys = _split(self.key_norm(self.key(stacked)), windows, layout)
        values = _split(self.value_norm(self.value(stacked)), windows, layout)
        queries = self.query_norm(self.query(downsample(blocks[-1], windows, layout)))
        mask = None
        if not windows.is_even:
            mask = _real(windows, keys).bool().transpose(2, 3).expand(batch, -1, -1, -1).flatten(0, 1)[:, None]
        # Every window is a batch entry of its own: one query, r * r keys.
        mixed = self.attention(queries.flatten(0, 1)[:, None], keys.flatten(0, 1), values.flatten(0, 1), mask)
        return self.mlp(mixed.reshape(queries.shape))


def downsample(tokens: torch.Tensor, windows: Windows, layout: str) -> torch.Tensor:
    """Interpolate ``[B, N, C]`` bilinearly at the middle of every window, ``[B, N', C]``."""
    r = windows.ratio
    split = _split(tokens, windows, layout)
    first, last = (r - 1) // 2, r // 2
    if windows.is_even:
        return split.unflatten(2, (r, r))[:, :, first : last + 1, first : last + 1].mean((2, 3))
    real = _real(windows, tokens)
    central = torch.zeros_like(real).unflatten(2, (r, r))
    central[:, :, first : last + 1, first : last + 1] = 1
    weights = central.flatten(2, 3) * real
    weights = torch.where(weights.sum(2, keepdim=True) > 0, weights, real)
    return (split * (weights / weights.sum(2, keepdim=True))).sum(2)


def _split(tokens: torch.Tensor, windows: Windows, layout: str) -> torch.Tensor:
    """``[B, N, C] -> [B, N', r * r, C]``."""
    return reference.space_to_depth(tokens, windows, layout).unflatten(2, (windows.ratio**2, tokens.shape[2]))


def _real(windows: Windows, like: torch.Tensor) -> torch.Tensor:
    """Return one for every real token of a window and zero for padding, ``[1, N', r * r, 1]``."""
    return windows.split(like.new_ones(1, windows.num_patches, 1))
