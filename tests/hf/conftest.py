"""transformers rounds to float32 inside some float64 models; lifted here, so that float64 comparisons mean something."""

import pytest
import torch
from transformers.models.aimv2 import modeling_aimv2

from laco_kernels.hf import fused  # noqa: F401  knows the forward passes
from laco_kernels.hf.fusing import FORWARDS


@pytest.fixture(autouse=True)
def _float64_all_the_way(monkeypatch):
    softmax, stock_norm = torch.nn.functional.softmax, modeling_aimv2.Aimv2RMSNorm.forward

    def rms_norm(self, x):
        if x.dtype != torch.float64:
            return stock_norm(self, x)
        return torch.nn.functional.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)

    def softmax_in_float64(x, *args, dtype=None, **kwargs):
        return softmax(x, *args, dtype=None if x.dtype == torch.float64 else dtype, **kwargs)

    monkeypatch.setattr(modeling_aimv2.Aimv2RMSNorm, "forward", rms_norm)
    monkeypatch.setitem(FORWARDS, modeling_aimv2.Aimv2RMSNorm, rms_norm)
    monkeypatch.setattr(torch.nn.functional, "softmax", softmax_in_float64)
