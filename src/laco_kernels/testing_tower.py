"""The operators inside an encoder as cases for :mod:`laco_kernels.testing`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from laco_kernels import ops

NORM_ARGUMENTS = ("x", "delta", "weight", "bias", "scale")


@dataclass(frozen=True)
class TowerCase:
    """One operator on ``shape``, the shape of its result; ``without`` names the arguments that are ``None``."""

    op: str
    shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()

    def __str__(self) -> str:
        given = [f"{name}={value}" for name, value in self.options.items()] + [f"no {name}" for name in self.without]
        return " ".join([self.op, "x".join(map(str, self.shape)), *given])

    def inputs(self, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> dict[str, torch.Tensor]:
        """Draw the operator's tensors by name."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> torch.Tensor:
            if str(device) == "meta":
                return torch.empty(shape, dtype=dtype, device="meta")
            return torch.randn(shape, generator=generator).to(device, dtype)

        if self.op != "add_norm":
            return {"h": draw(*self.shape[:-1], self.shape[-1] * (2 if self.op == "gated_silu" else 1))}
        shapes = (self.shape, self.shape, *[self.shape[-1:]] * 3)
        drawn = {name: draw(*shape) for name, shape in zip(NORM_ARGUMENTS, shapes, strict=True)}
        return {name: tensor for name, tensor in drawn.items() if name not in self.without}

    def __call__(self, inputs: dict[str, torch.Tensor], impl: str | None) -> dict[str, torch.Tensor]:
        """Run the operator; return its new tensors by name."""
        if self.op != "add_norm":
            return {"y": getattr(ops, self.op)(inputs["h"], **self.options, impl=impl)}
        x, delta, weight, bias, scale = (inputs.get(name) for name in NORM_ARGUMENTS)
        assert x is not None
        assert weight is not None
        total, normed = ops.add_norm(x, delta, weight, bias, scale=scale, **self.options, impl=impl)
        return {"normed": normed} if delta is None else {"total": total, "normed": normed}


def norm(*shape: int, without: tuple[str, ...] = (), **options: Any) -> TowerCase:
    """Return a case of ``add_norm``."""
    return TowerCase("add_norm", shape, options, without)


# Small enough for Triton's interpreter; no width is a power of two, and most counts of rows end inside a tile.
CASES = (
    norm(2, 7, 40),
    norm(2, 5, 24, kind="rms", without=("bias", "scale")),
    norm(3, 9, 130, kind="layer", eps=1e-5, without=("scale",)),
    norm(2, 17, 72, kind="rms", eps=1e-3),
    norm(1, 33, 20, without=("delta", "scale")),
    norm(5, 56, kind="rms", without=("delta", "bias", "scale")),
    norm(2, 3, 2, 12, without=("bias",)),
    norm(21, without=("scale",)),
    norm(0, 4, 16),
    TowerCase("gated_silu", (2, 7, 40)),
    TowerCase("gated_silu", (9, 300)),
    TowerCase("gated_silu", (0, 3, 8)),
    TowerCase("activate", (2, 7, 40), {"activation": "gelu"}),
    TowerCase("activate", (11, 260), {"activation": "gelu_tanh"}),
    TowerCase("activate", (2, 3, 5, 24), {"activation": "quick_gelu"}),
    TowerCase("activate", (13,), {"activation": "quick_gelu"}),
)

# The encoders of the papers, for a GPU.
LARGE_CASES = (
    norm(4, 576, 1024, kind="rms", eps=1e-5, without=("bias", "scale")),
    norm(4, 576, 1024, kind="rms", eps=1e-5, without=("delta", "bias", "scale")),
    norm(2, 729, 1152, without=("scale",)),
    norm(2, 1025, 1024),
    norm(1, 1025, 3200, kind="rms", without=("bias",)),
    norm(1, 9, 8192),
    TowerCase("gated_silu", (4, 576, 2816)),
    TowerCase("activate", (2, 729, 4304), {"activation": "gelu_tanh"}),
    TowerCase("activate", (2, 1025, 4096), {"activation": "gelu"}),
    TowerCase("activate", (2, 577, 4096), {"activation": "quick_gelu"}),
)
