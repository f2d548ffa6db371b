"""What ``laco bench ops`` measures: the operators on the shapes of the papers' encoders, and what is hoped for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from laco_kernels.geometry import Windows
from laco_kernels.testing import Case

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from laco_kernels.bench.tower_cases import AnyCase

# Grid in patches, tokens before it, width.
ENCODERS: dict[str, tuple[tuple[int, int], int, int]] = {
    "aimv2-l-224": ((16, 16), 0, 1024),
    "aimv2-l-336": ((24, 24), 0, 1024),
    "aimv2-l-448": ((32, 32), 0, 1024),
    "siglip-so400m-384": ((27, 27), 0, 1152),
    "internvit-300m-448": ((32, 32), 1, 1024),
    "clip-l-336": ((24, 24), 1, 1024),
}
BATCHES = (1, 4, 16, 64)
DIRECTIONS = ("forward", "backward", "both")
MERGE, CONV, FUSION, MLP = "patch_merge", "strided_conv_gelu", "multi_block_linear_gelu", "gelu_mlp"
# Hidden width and GELU of the feed-forward blocks that have one.
BLOCKS_OF = {
    "siglip-so400m-384": (4304, "tanh"),
    "internvit-300m-448": (4096, "none"),
    "clip-l-336": (4096, "sigmoid"),
}
BLOCKS = 8  # encoder blocks that MBTF fuses


@dataclass(frozen=True)
class OpCase:
    """One operator on one shape in one direction.

    ``hidden`` is the width that the first product makes: the merge layer's hidden width, or the operator's output.
    """

    op: str
    encoder: str
    grid: tuple[int, int]
    prefix: int
    channels: int
    hidden: int
    batch: int
    direction: str
    dtype: str
    sweep: str | None = None
    layout: str = "raster"  # how the tokens lie; what is not the merge layer knows no other
    approximate: str = "none"  # of GELU; what is no feed-forward block knows no other

    @property
    def windows(self) -> Windows:
        """How the tokens fall into 2 x 2 windows."""
        return Windows(self.grid, 2, self.prefix, pad=True)

    @property
    def rows(self) -> int:
        """Tokens that the first product makes, over the batch."""
        by_op = {FUSION: self.windows.num_patches, MLP: self.windows.num_tokens}
        return self.batch * by_op.get(self.op, self.windows.num_windows)

    @property
    def case(self) -> Case:
        """The same for :mod:`laco_kernels.testing`, which draws its tensors and calls the operator."""
        options: dict[str, Any] = {"prefix_tokens": self.prefix}
        sizes = {"batch": self.batch, "channels": self.channels}
        if self.op == FUSION:
            tokens = self.windows.num_tokens
            return Case(self.op, {**sizes, "tokens": tokens, "blocks": BLOCKS, "out": self.hidden}, options)
        if self.op == MLP:
            sizes |= {"tokens": self.windows.num_tokens, "hidden": self.hidden}
            return Case(self.op, sizes, {"approximate": self.approximate})
        options |= {"grid": self.grid, "pad": not self.windows.is_even}
        if self.op == MERGE:
            options["layout"] = self.layout
        return Case(self.op, {**sizes, "hidden" if self.op == MERGE else "out": self.hidden}, options)

    @property
    def frozen(self) -> tuple[str, ...]:
        """Names of inputs that need no gradient: STF's authors train behind a frozen encoder."""
        return tuple(f"xs[{i}]" for i in range(BLOCKS)) if self.op == FUSION else ()

    @property
    def shared(self) -> tuple[str, ...]:
        """Names of inputs whose gradient is another one's."""
        return ()

    @property
    def suite(self) -> str:
        """Where its rows belong."""
        return "sweep" if self.sweep else "tower" if self.op == MLP else "ops"

    @property
    def tiny(self) -> OpCase:
        """The case at a size that a processor computes in no time."""
        grid = (self.grid[0] // 8 * 2 + self.grid[0] % 2, self.grid[1] // 8 * 2 + self.grid[1] % 2)
        hidden = 16 * round(self.hidden / self.channels)
        name = f"tiny-{self.encoder}"
        return replace(self, encoder=name, grid=grid, channels=16, hidden=hidden, batch=min(self.batch, 4))

    def apart(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return inputs, or their gradients, as plain PyTorch has them: the same."""
        return tensors

    @property
    def facts(self) -> dict[str, Any]:
        """The case as it stands in a results file."""
        names = ("op", "encoder", "batch", "channels", "hidden", "direction", "dtype")
        facts = {**{name: getattr(self, name) for name in names}, "grid": list(self.grid)}
        if self.op == MERGE:
            facts["layout"] = self.layout
        if self.op == MLP:
            facts |= {"tokens": self.windows.num_tokens, "approximate": self.approximate}
            del facts["grid"]
        return {**facts, "sweep": self.sweep} if self.sweep else facts

    @property
    def goal(self) -> dict[str, Any] | None:
        """How many times faster than torch.compile our best is to be on an H200 in bfloat16, where that was set."""
        if self.dtype != "bfloat16" or self.sweep or self.layout != "raster":
            return None
        key = (self.op, self.encoder, self.batch, self.hidden // self.channels, self.direction)
        return {"ratio": GOALS[key], "against": "compile"} if key in GOALS else None

    def __str__(self) -> str:
        grid = f"{self.grid[0]}x{self.grid[1]}"
        name = f"sweep-{self.sweep}" if self.sweep else self.encoder
        name += {MERGE: f" {self.layout}", MLP: f" {self.approximate}"}.get(self.op, "")
        return f"{self.op} {name} grid={grid} batch={self.batch} hidden={self.hidden} {self.direction} {self.dtype}"


GOALS: dict[tuple[str, str, int, int, str], float] = {
    (MERGE, "aimv2-l-336", 1, 4, "forward"): 1.4,
    (MERGE, "aimv2-l-336", 16, 4, "forward"): 1.12,
    (MERGE, "aimv2-l-336", 64, 4, "forward"): 1.12,
    (MERGE, "aimv2-l-336", 64, 1, "forward"): 1.35,
    (MERGE, "aimv2-l-336", 64, 4, "both"): 1.08,
    (MERGE, "aimv2-l-336", 64, 1, "both"): 1.2,
    (FUSION, "clip-l-336", 1, 4, "forward"): 1.10,
    (FUSION, "clip-l-336", 64, 4, "forward"): 1.10,
    (CONV, "clip-l-336", 1, 4, "forward"): 1.05,
    (CONV, "clip-l-336", 64, 4, "forward"): 1.05,
}


def _make(op: str, encoder: str, batch: int, factor: int, direction: str, dtype: str) -> OpCase:
    grid, prefix, channels = ENCODERS[encoder]
    return OpCase(op, encoder, grid, prefix, channels, factor * channels, batch, direction, dtype)


def op_cases(dtype: str) -> list[OpCase]:
    """Return every case in raster order, the most telling first: those with a goal, then the papers' encoders, the rest."""
    keys = list(GOALS)
    for direction in DIRECTIONS:
        for encoder in ("aimv2-l-336", *[name for name in ENCODERS if name != "aimv2-l-336"]):
            keys += [(MERGE, encoder, batch, factor, direction) for batch in BATCHES for factor in (1, 4)]
        keys += [(op, "clip-l-336", batch, 4, direction) for op in (CONV, FUSION) for batch in BATCHES]
    return [_make(*key, dtype) for key in dict.fromkeys(keys)]


def encoder_cases(dtype: str) -> list[OpCase]:
    """Return the merge layer as it runs inside compressed encoders, whose tokens lie window by window.

    An odd grid such as SigLIP's keeps raster order there: its cases are among :func:`op_cases`, too.
    """
    wanted = (("aimv2-l-336", BATCHES, (1, 4)), ("internvit-300m-448", (16,), (1,)), ("siglip-so400m-384", (16,), (1,)))
    cases = [
        _make(MERGE, encoder, batch, factor, direction, dtype)
        for direction in DIRECTIONS
        for encoder, batches, factors in wanted
        for batch in batches
        for factor in factors
    ]
    return [replace(case, layout="block") if case.windows.is_even else case for case in cases]


def mlp_cases(dtype: str) -> list[OpCase]:
    """Return the feed-forward blocks with GELU of the papers' encoders."""
    return [
        OpCase(MLP, encoder, *ENCODERS[encoder], hidden, batch, direction, dtype, approximate=approximate)
        for encoder, (hidden, approximate) in BLOCKS_OF.items()
        for batch in (1, 16)
        for direction in ("forward", "backward")
    ]


def sweep_cases(dtype: str) -> list[OpCase]:
    """Return the merge layer over growing images and growing batches."""
    tokens = [OpCase(MERGE, "-", (n, n), 0, 1024, 1024, 4, "forward", dtype, "tokens") for n in (14, 16, 24, 32, 48, 64)]
    batches = [OpCase(MERGE, "-", (24, 24), 0, 1024, 1024, n, "forward", dtype, "batch") for n in (1, 2, 4, 8, 16, 32, 64)]
    return tokens + batches


def tiny(cases: Iterable[AnyCase]) -> list[AnyCase]:
    """Return the cases at a size that a processor computes in no time, to try the command."""
    return list(dict.fromkeys(case.tiny for case in cases))
