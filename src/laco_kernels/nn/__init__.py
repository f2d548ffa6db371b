"""Modules that hold the parameters and call the operators; pure torch."""

from laco_kernels.nn.compressors import COMPRESSORS, Compressor, build_compressor
from laco_kernels.nn.multi_block_fusion import MultiBlockTokenFusion, sampled_blocks
from laco_kernels.nn.patch_merge import PatchMergeLayer
from laco_kernels.nn.token_fusion import SpatialTokenFusion

__all__ = [
    "COMPRESSORS",
    "Compressor",
    "MultiBlockTokenFusion",
    "PatchMergeLayer",
    "SpatialTokenFusion",
    "build_compressor",
    "sampled_blocks",
]
