"""The patch merger of Qwen2-VL, Qwen2.5-VL and Qwen3-VL."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from laco_kernels import reference
from laco_kernels.errors import complaint
from laco_kernels.nn.children import merged_mlp, mlp
from laco_kernels.nn.compressors.base import Compressor
from laco_kernels.nn.patch_merge import NORMS
from laco_kernels.ops import checks

if TYPE_CHECKING:
    import torch


class PatchMerger(Compressor):
    """Qwen-VL: ``y = W2 gelu(W1 S(norm(x)) + b1) + b2``, or with ``norm_after`` ``y = W2 gelu(W1 norm(S(x)) + b1) + b2``.

    ``[B, N, C] -> [B, N', D]``; ``W1 [r * r * C, r * r * C]``, ``W2 [D, r * r * C]``. The models themselves hand over tokens
    window by window, ``layout="block"``. Padding is zero where it enters ``W1``, or the norm with ``norm_after``.

    Args:
        in_dim, out_dim, ratio, place, prefix_tokens, residual, pad: those of :class:`Compressor`.
        norm: ``"layer_norm"`` (Qwen2-VL, Qwen3-VL) or ``"rms_norm"`` (Qwen2.5-VL).
        norm_after: normalise the ``r * r * C`` channels of a window instead of the ``C`` of each token, as Qwen3-VL does for
            the features that it feeds into the LLM's first layers.
        eps: that of the norm.
    """

    places = ("behind", "inside")
    reads_blocks = True

    def __init__(
        self,
        in_dim: int,
        out_dim: int | None = None,
        ratio: int = 2,
        *,
        norm: str = "layer_norm",
        norm_after: bool = False,
        eps: float = 1e-6,
        **common: Any,
    ) -> None:
        super().__init__(in_dim, out_dim, ratio, **common)
        checks.check_choice("norm", norm, tuple(NORMS))
        if not isinstance(norm_after, bool):
            remedy = "Pass norm_after=True for a norm over whole windows"
            raise TypeError(complaint("norm_after", repr(norm_after), "True or False", remedy))
        self.norm_after = norm_after
        merged_dim = self.ratio**2 * self.in_dim
        self.norm = NORMS[norm](merged_dim if norm_after else self.in_dim, eps=checks.check_positive("eps", eps))
        self.linear1 = nn.Linear(merged_dim, merged_dim)
        self.linear2 = nn.Linear(merged_dim, self.out_dim)

    def compress(self, patches: torch.Tensor, grid: tuple[int, int], layout: str) -> torch.Tensor:
        """Merge ``[B, N, in_dim]`` into ``[B, N', out_dim]``."""
        windows = self.windows(grid)
        if self.norm_after:
            merged = self.norm(reference.space_to_depth(patches, windows, layout))
            return merged_mlp(self.linear1, self.linear2, merged, windows)
        return mlp(self.linear1, self.linear2, self.norm(patches), windows, layout)
