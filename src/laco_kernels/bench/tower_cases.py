"""What ``laco bench ops`` measures of the operators inside an encoder: the norms and activations of the papers' encoders."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from laco_kernels.bench.op_cases import OpCase
from laco_kernels.kernels import select
from laco_kernels.testing_tower import TowerCase

if TYPE_CHECKING:
    import torch

NORM, GATE, ACTIVATION = select.TOWER_OPERATORS
# What a norm is taken of: the input itself before the first block, later a sum.
INPUT, SUM, SCALED_SUM = "x", "x+delta", "x+scale*delta"
WITHOUT = {INPUT: ("delta", "scale"), SUM: ("scale",), SCALED_SUM: ()}


@dataclass(frozen=True)
class TowerOpCase:
    """One operator on one shape in one direction; the counterpart of :class:`laco_kernels.bench.op_cases.OpCase`.

    ``channels`` is the width of the result; ``form`` the kind of norm or the activation; ``terms`` what is normalised.
    """

    op: str
    encoder: str
    form: str
    terms: str
    channels: int
    tokens: int
    batch: int
    direction: str
    dtype: str

    suite = "tower"
    goal = None
    frozen: tuple[str, ...] = ()  # inputs that need no gradient

    @property
    def case(self) -> TowerCase:
        """The same for :mod:`laco_kernels.testing`, which draws its tensors and calls the operator."""
        options: dict[str, Any] = {select.FORMS[self.op]: self.form} if self.form else {}
        without = (*WITHOUT[self.terms], *(["bias"] if self.form == "rms" else [])) if self.op == NORM else ()
        return TowerCase(self.op, (self.batch, self.tokens, self.channels), options, without)

    @property
    def shared(self) -> tuple[str, ...]:
        """Names of inputs whose gradient is another one's: a backward pass moves nothing for them alone."""
        return ("delta",) if self.terms == SUM else ()

    @property
    def facts(self) -> dict[str, Any]:
        """The case as it stands in a results file."""
        facts: dict[str, Any] = {"op": self.op, "encoder": self.encoder}
        facts |= {select.FORMS[self.op]: self.form} if self.form else {}
        facts |= {"terms": self.terms} if self.terms else {}
        return {**facts, **{name: getattr(self, name) for name in ("channels", "tokens", "batch", "direction", "dtype")}}

    @property
    def tiny(self) -> TowerOpCase:
        """The case at a size that a processor computes in no time."""
        return replace(self, encoder=f"tiny-{self.encoder}", channels=24, tokens=self.tokens // 36, batch=min(self.batch, 4))

    def apart(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return inputs, or their gradients, as stock layers have them: gate and up are results of two products."""
        if self.op != GATE or "h" not in tensors:
            return tensors
        gate, up = tensors["h"].chunk(2, dim=-1)
        return {"gate": gate, "up": up}

    def __str__(self) -> str:
        what = " ".join(filter(None, [self.op, self.encoder, self.form, self.terms]))
        return f"{what} tokens={self.tokens} batch={self.batch} channels={self.channels} {self.direction} {self.dtype}"


AnyCase = OpCase | TowerOpCase

# Operator, form, terms; encoder and width; pairs of tokens and batch, after a merge of 2 x 2 tokens first.
SHAPES: tuple[tuple[str, str, str, str, int, tuple[tuple[int, int], ...]], ...] = (
    (NORM, "rms", SUM, "aimv2-l-336", 1024, ((144, 1), (576, 1), (576, 16), (576, 64))),
    (GATE, "", "", "aimv2-l-336", 2816, ((144, 1), (576, 1), (576, 16), (576, 64))),
    (NORM, "layer", SUM, "siglip-so400m-384", 1152, ((196, 1), (729, 1), (729, 16))),
    (NORM, "layer", SCALED_SUM, "internvit-300m-448", 1024, ((1025, 1), (1025, 16))),
    (NORM, "layer", SUM, "clip-l-336", 1024, ((577, 16),)),
    (ACTIVATION, "quick_gelu", "", "clip-l-336", 4096, ((577, 1), (577, 16))),
    (NORM, "rms", INPUT, "aimv2-l-336", 1024, ((576, 16),)),
    (NORM, "layer", INPUT, "siglip-so400m-384", 1152, ((729, 16),)),
    (ACTIVATION, "gelu_tanh", "", "siglip-so400m-384", 4304, ((729, 1), (729, 16))),
    (ACTIVATION, "gelu", "", "internvit-300m-448", 4096, ((1025, 1), (1025, 16))),
)


def tower_cases(dtype: str) -> list[TowerOpCase]:
    """Return every case, forward and backward of each shape beside each other."""
    return [
        TowerOpCase(op, encoder, form, terms, channels, tokens, batch, direction, dtype)
        for op, form, terms, encoder, channels, sizes in SHAPES
        for tokens, batch in sizes
        for direction in ("forward", "backward")
    ]
