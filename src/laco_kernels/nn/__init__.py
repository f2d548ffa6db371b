"""Modules that hold the parameters and call the operators; pure torch."""

from laco_kernels.nn.patch_merge import PatchMergeLayer

__all__ = ["PatchMergeLayer"]
