"""Modules that hold the parameters and call the operators; pure torch."""

from laco_kernels.nn.patch_merge import PatchMergeLayer
from laco_kernels.nn.token_fusion import SpatialTokenFusion

__all__ = ["PatchMergeLayer", "SpatialTokenFusion"]
