"""MBTF, multi-block token fusion, as a module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from laco_kernels.errors import complaint
from laco_kernels.geometry import integer
from laco_kernels.nn import released
from laco_kernels.nn.children import is_plain
from laco_kernels.ops import checks, multi_block_linear_gelu

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

#: What the authors' code reads of the 24 blocks of CLIP ViT-L, in the order in which it concatenates them.
RELEASED_HIDDEN_STATES = (-2, 21, 18, 15, 12, 9, 6, 3)


def sampled_blocks(num_layers: int = 24, num_blocks: int = 8) -> tuple[int, ...]:
    """Return ``num_blocks`` evenly spaced block numbers out of ``1 .. num_layers``, the last block among them.

    ``(3, 6, ..., 24)`` for 8 of 24, and all 24 for 24 of 24. Where the spacing is no integer, as for 16 of 24, the number
    is rounded half up, ``(2, 3, 5, 6, ..., 24)``; the paper does not say how. Block ``n`` is ``hidden_states[n]`` in
    transformers, as ``hidden_states[0]`` are the embeddings.

    Raises:
        TypeError: if a number is not an integer.
        ValueError: if a number is smaller than 1, or there are fewer layers than blocks.
    """
    num_layers, num_blocks = integer("num_layers", num_layers, 1), integer("num_blocks", num_blocks, 1)
    if num_blocks > num_layers:
        raise ValueError(complaint("num_blocks", num_blocks, f"at most num_layers = {num_layers}", "Sample fewer blocks"))
    return tuple((2 * i * num_layers + num_blocks) // (2 * num_blocks) for i in range(1, num_blocks + 1))


class MultiBlockTokenFusion(nn.Module):
    """Fuses the tokens of ``M`` encoder blocks into one sequence of the same width (MBTF), 1x1 convolutions only.

    ``variant="paper"``, the paper's Table 1: ``M * C -> 4C``, GELU, ``4C -> C``, GELU. ``variant="released"``, the authors'
    code, has no last GELU. Both have 37.75 M parameters at ``dim=1024, num_blocks=8``. The hidden width is ``4 * dim``
    for every ``M``: the paper gives it for ``M = 8`` only, and half of the input's width would be 302 M parameters at
    ``M = 24``.

    The paper takes blocks 3, 6, ..., 24 of 24, :func:`sampled_blocks`. The authors' code concatenates ``hidden_states[-2]``,
    which is block 23, and those of blocks 21, 18, 15, 12, 9, 6 and 3, in this order (``RELEASED_HIDDEN_STATES``); with its
    weights pass them so. Tokens are raw hidden states, before any norm behind the encoder.

    Args:
        dim: width ``C`` of the tokens, in and out.
        num_blocks: encoder blocks ``M``, at least 1.
        variant: ``"paper"`` or ``"released"``.
        prefix_tokens: tokens before the patches (class, registers), which are dropped.

    Raises:
        TypeError: if a size is not an integer.
        ValueError: if a size is out of range or the variant is unknown.
    """

    def __init__(
        self,
        dim: int,
        num_blocks: int = 8,
        variant: str = "paper",
        *,
        prefix_tokens: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_dim = self.out_dim = integer("dim", dim, 1)
        self.num_blocks = integer("num_blocks", num_blocks, 1)
        self.prefix_tokens = integer("prefix_tokens", prefix_tokens, 0)
        checks.check_choice("variant", variant, released.VARIANTS)
        self.variant = variant
        self.hidden_dim = 4 * self.in_dim
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.linear1 = nn.Linear(self.num_blocks * self.in_dim, self.hidden_dim, **factory)
        self.linear2 = nn.Linear(self.hidden_dim, self.out_dim, **factory)

    def reset_parameters(self) -> None:
        """Draw weights and biases as :class:`torch.nn.Linear` and :class:`torch.nn.Conv2d` do."""
        self.linear1.reset_parameters()
        self.linear2.reset_parameters()

    def forward(self, xs: Sequence[torch.Tensor]) -> torch.Tensor:
        """Fuse ``num_blocks`` block outputs ``[B, P + N, dim]`` into ``[B, N, dim]``.

        Raises:
            ValueError: another number of blocks, or another width. Further errors are those of
                :func:`laco_kernels.multi_block_linear_gelu`.
        """
        if isinstance(xs, (list, tuple)) and xs:
            if len(xs) != self.num_blocks:
                remedy = "Pass the hidden states of the sampled blocks only"
                raise ValueError(complaint("xs", f"{len(xs)} blocks", f"num_blocks = {self.num_blocks}", remedy))
            checks.check_tokens("xs[0]", xs[0])
            if xs[0].shape[2] != self.in_dim:
                remedy = "Build the module with dim equal to the encoder's hidden size"
                raise ValueError(complaint("xs[0]", f"{xs[0].shape[2]} channels", f"dim = {self.in_dim}", remedy))
        if is_plain(self.linear1):
            y = multi_block_linear_gelu(xs, self.linear1.weight, self.linear1.bias, prefix_tokens=self.prefix_tokens)
        else:
            y = F.gelu(self.linear1(torch.cat([x[:, self.prefix_tokens :] for x in xs], dim=-1)))
        y = self.linear2(y)
        return F.gelu(y) if self.variant == "paper" else y

    def load_released(self, source: released.Source, *, keys: Mapping[str, str] | None = None) -> MultiBlockTokenFusion:
        """Load the authors' weights into this module (``variant="released"``, 8 blocks) and return it.

        Their columns are ordered block by block, as here, but deepest block first: pass ``xs`` in the order of
        ``hidden_states`` ``[-2, 21, 18, 15, 12, 9, 6, 3]``. Weights are converted to the module's dtype and device.

        Args:
            source: a state dict, a ``.safetensors`` file, or a file for ``torch.load(..., weights_only=True)``, such as
                the authors' ``mm_projector.bin``; also of the whole model, whose other keys are left alone.
            keys: the checkpoint's name of each of ``linear1.weight``, ``linear1.bias``, ``linear2.weight`` and
                ``linear2.bias``. Unless given, ``0.weight``, ``0.bias``, ``2.weight`` and ``2.bias`` are looked for under
                ``mm_projector_crosslayer.``, whatever stands before that, or with no prefix at all. These are the
                names in the authors' code; the published files themselves have not been seen.

        Raises:
            TypeError: ``source`` is neither, or holds something else than floating-point tensors under these names.
            ValueError: keys are missing, unexpected, misshapen or ambiguous, or this is not ``variant="released"``.
            RuntimeError: the file cannot be read.
        """
        released.load(self, source, "mm_projector_crosslayer", keys, 1)
        return self

    def extra_repr(self) -> str:
        """What the children's own lines do not show."""
        return f"{self.in_dim}, num_blocks={self.num_blocks}, variant={self.variant!r}, prefix_tokens={self.prefix_tokens}"
