"""Modules that hold the parameters and call the operators; pure torch."""

from laco_kernels.nn.multi_block_fusion import MultiBlockTokenFusion, sampled_blocks
from laco_kernels.nn.patch_merge import PatchMergeLayer
from laco_kernels.nn.token_fusion import SpatialTokenFusion

__all__ = ["MultiBlockTokenFusion", "PatchMergeLayer", "SpatialTokenFusion", "sampled_blocks"]
