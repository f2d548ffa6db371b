"""Patch embeddings as one product, and embeddings whose tokens leave that product in block order.

A patch embedding copies the image's patches side by side in any case. Read window by window, they make tokens in block order,
and what is added to them, the positions, is put in that order for all images at once.
"""

from __future__ import annotations

import functools
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers.models.aimv2.modeling_aimv2 import Aimv2VisionEmbeddings
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings
from transformers.models.internvl.modeling_internvl import InternVLVisionEmbeddings, InternVLVisionPatchEmbeddings
from transformers.models.siglip.modeling_siglip import SiglipVisionEmbeddings

from laco_kernels.geometry import Cascade, Cuts, find_cuts
from laco_kernels.hf.encoders import (
    LacoAimv2VisionEmbeddings,
    LacoCLIPVisionEmbeddings,
    LacoInternVLVisionEmbeddings,
    LacoSiglipVisionEmbeddings,
)
from laco_kernels.hf.fused import RMS_NORMS
from laco_kernels.hf.fusing import Fused, is_patched, is_plain, know, pays
from laco_kernels.hf.mixins import BlockOrderEmbeddings

# Elements. cuBLAS's fast kernels read 16 bytes at a time; 588 values a patch took 105 us on an H200, padded to 592 60 us.
ALIGNMENT = 8


@dataclass
class Embedding:
    """A call in which the stock embeddings see no patches, but make what is added to those of every image."""

    pixels: torch.Tensor  # of all images
    cuts: Cuts
    tokens: torch.Tensor | None = None  # [B, N, C], what the patch embedding makes of them, in the order of the cuts


# From the embeddings down to their patch embedding, beside the stock code in between.
_current: ContextVar[Embedding | None] = ContextVar("current", default=None)


class PatchProduct(Fused, nn.Conv2d):
    """A patch embedding as one matrix product, whose result lies token by token: what the encoder flattens it to."""

    stock = nn.Conv2d

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Embed images ``[B, 3, height, width]`` into ``[B, C, H, W]``, a view of ``[B, H * W, C]``."""
        if not self.applies(pixels):
            return super().forward(pixels)
        rows, columns = grid = self.grid(pixels)
        call = None if torch.compiler.is_compiling() else _current.get()
        if call is not None:
            call.tokens = self.product(call.pixels.to(pixels.dtype), call.cuts)
            return call.tokens.new_zeros(len(pixels), call.tokens.shape[-1], *grid)
        return self.product(pixels, Cuts((rows,), (columns,), (0, 1))).transpose(1, 2).unflatten(2, grid)

    def applies(self, pixels: torch.Tensor) -> bool:
        """Return whether this is a product for such images."""
        if not (pixels.is_cuda or self.impl is not None) or pixels.dim() != 4 or is_patched(type(self)):
            return False
        # For torch.jit.trace the numbers of a grid are tensors.
        return torch._C._get_tracing_state() is None and min(self.grid(pixels)) > 0

    def grid(self, pixels: torch.Tensor) -> tuple[int, int]:
        """Return rows and columns of patches."""
        return pixels.shape[2] // self.kernel_size[0], pixels.shape[3] // self.kernel_size[1]

    def product(self, pixels: torch.Tensor, cuts: Cuts) -> torch.Tensor:
        """Embed images ``[B, 3, height, width]`` into ``[B, N, C]``, in the order of the cuts."""
        (down, across), (rows, columns) = self.kernel_size, self.grid(pixels)
        pixels = pixels[:, :, : rows * down, : columns * across]
        patches = pixels.unflatten(3, (*cuts.columns, across)).unflatten(2, (*cuts.rows, down))
        # [B, 3, *rows, down, *columns, across]
        inside = 2 + len(cuts.rows)
        order = [2 + axis + (axis >= len(cuts.rows)) for axis in cuts.order]
        patches = patches.permute(0, *order, 1, inside, -1).reshape(
            len(pixels), rows * columns, pixels.shape[1] * down * across
        )
        weight = self.weight.flatten(1)
        if lacking := -weight.shape[1] % ALIGNMENT:
            patches, weight = (nn.functional.pad(tensor, (0, lacking)) for tensor in (patches, weight))
        return nn.functional.linear(patches, weight, self.bias)


# What may stand in embeddings whose patches are taken past the stock code; everything but the norm is passed over.
KNOWN = (PatchProduct, InternVLVisionPatchEmbeddings, nn.Embedding, nn.Dropout, *RMS_NORMS)


@functools.lru_cache(maxsize=1024)
def cuts_of(order: Cascade, prefix: int, grid: tuple[int, int]) -> Cuts | None:
    """Return the cuts of an order of ``prefix`` tokens and a ``grid`` of patches."""
    with _disable_current_modes():  # whatever watches or fakes tensors, these numbers are looked at
        tokens = order.to_block_order(torch.arange(prefix + grid[0] * grid[1], device="cpu"), 0)
        return find_cuts((tokens[prefix:] - prefix).tolist(), grid)


class FusedEmbeddings(Fused, BlockOrderEmbeddings):
    """Mixin for embeddings whose patch embedding makes the tokens in block order: no pass over them puts them there.

    The stock code runs on one image whose patches are embedded as zeros, and so makes what is added to every image: class
    token and positions, interpolated or not. That is put in block order, and added to the tokens.
    """

    def in_block_order(self, order: Cascade, pixel_values: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Embed images into tokens in this order."""
        cuts = self._cuts(order, pixel_values, *args, *kwargs.values())
        if cuts is None:
            return super().in_block_order(order, pixel_values, *args, **kwargs)
        call = Embedding(pixel_values, cuts)
        token = _current.set(call)
        try:
            added = super(BlockOrderEmbeddings, self).forward(pixel_values[:1], *args, **kwargs)
        finally:
            _current.reset(token)
        assert call.tokens is not None
        added, prefix = order.to_block_order(added), self.config.prefix_tokens
        tokens = self.normalise(call.tokens) + added[:, prefix:]
        return torch.cat([added[:, :prefix].expand(len(tokens), -1, -1), tokens], 1) if prefix else tokens

    def normalise(self, tokens: torch.Tensor) -> torch.Tensor:
        """Do to tokens ``[B, N, C]`` what the stock code does before it adds to them."""
        return tokens

    def _cuts(self, order: Cascade, pixels: torch.Tensor, *options: Any) -> Cuts | None:
        """Return in which order to read the patches, or ``None`` for the stock code."""
        # A compiler puts the tokens in order while it adds the positions. A tensor is InternViT's mask, of every image its own.
        if torch.compiler.is_compiling() or is_patched(type(self)):
            return None
        if any(isinstance(option, torch.Tensor) for option in options):
            return None
        products = []
        for module in self.modules():
            if module is self:
                continue
            if not is_plain(module, *KNOWN) or (type(module) is nn.Dropout and module.training and module.p > 0):
                return None
            if type(module) is PatchProduct:
                products.append(module)
        if len(products) != 1 or not products[0].applies(pixels):
            return None
        product, grid = products[0], products[0].grid(pixels)
        # A copy of few tokens takes less time than the launches that make one image's positions apart from them.
        if product.impl is None and not pays(len(pixels) * grid[0] * grid[1] * product.out_channels):
            return None
        return cuts_of(order, self.config.prefix_tokens, grid)


class FusedLacoAimv2VisionEmbeddings(FusedEmbeddings, LacoAimv2VisionEmbeddings):
    """AIMv2's embeddings."""

    stock = Aimv2VisionEmbeddings
    rms_norm: Any

    def normalise(self, tokens: torch.Tensor) -> torch.Tensor:
        """Normalise ``[B, N, C]``; what is added has no share in it, since the norm of zeros is zero."""
        normed: torch.Tensor = self.rms_norm(tokens)
        return normed

    def _cuts(self, order: Cascade, pixels: torch.Tensor, *options: Any) -> Cuts | None:
        cuts = super()._cuts(order, pixels, *options)
        # Without an epsilon the norm of zeros is no number.
        return cuts if cuts is not None and self.rms_norm.variance_epsilon > 0 else None


class FusedLacoSiglipVisionEmbeddings(FusedEmbeddings, LacoSiglipVisionEmbeddings):
    """SigLIP's embeddings."""

    stock = SiglipVisionEmbeddings


class FusedLacoInternVLVisionEmbeddings(FusedEmbeddings, LacoInternVLVisionEmbeddings):
    """InternViT's embeddings."""

    stock = InternVLVisionEmbeddings


class FusedLacoCLIPVisionEmbeddings(FusedEmbeddings, LacoCLIPVisionEmbeddings):
    """CLIP's embeddings."""

    stock = CLIPVisionEmbeddings


EMBEDDINGS: dict[type[nn.Module], type[nn.Module]] = {
    LacoAimv2VisionEmbeddings: FusedLacoAimv2VisionEmbeddings,
    LacoSiglipVisionEmbeddings: FusedLacoSiglipVisionEmbeddings,
    LacoInternVLVisionEmbeddings: FusedLacoInternVLVisionEmbeddings,
    LacoCLIPVisionEmbeddings: FusedLacoCLIPVisionEmbeddings,
}

know(Aimv2VisionEmbeddings, SiglipVisionEmbeddings, InternVLVisionEmbeddings, CLIPVisionEmbeddings)
know(nn.Conv2d, InternVLVisionPatchEmbeddings, nn.Embedding, nn.Dropout)
