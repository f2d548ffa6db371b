"""``impl="cuda"`` on the CPU: the kernels of ``csrc/`` on an emulated GPU."""

import pytest
import torch

from laco_kernels.kernels import cuda, cuda_products, select
from tests.csrc.emulator import build


def choose(seed: int, capability: tuple[int, int], multiprocessors: int) -> None:
    """Choose the GPU, and in what order happens what may happen at the same time."""
    build.load().emulator.choose(seed=seed, capability=capability, multiprocessors=multiprocessors)


def emulate(patch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0)) -> None:
    """Have every product of ``impl="cuda"`` done by the emulator, for as long as ``patch`` holds."""
    modules = build.load()
    choose(0, capability, 3)
    patch.setattr(cuda_products, "_call", lambda product, _, **problem: cuda_products.call(modules.cuda, product, **problem))
    patch.setattr(cuda, "_back_through_last_activation", back_through_activation)
    patch.setattr(select, "_no_cuda_kernels", lambda *_: None)


def back_through_activation(grad, pre, approximate, with_sums):
    """In place of a Triton pass, which is not interpreted in bfloat16 and has tests of its own."""
    dpre = torch.ops.aten.gelu_backward(grad.float(), pre.float(), approximate=approximate)
    return dpre.to(pre.dtype), dpre.sum((0, 1)).to(pre.dtype) if with_sums else None
