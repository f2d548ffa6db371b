"""Linear layers of one input that share a product, inside layers whose code does not know of it."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from laco_kernels.hf.fusing import Fused, has_transforms, know, pays
from laco_kernels.ops.checks import is_autocast
from laco_kernels.ops.packed_linear import lay_together, run_packed_linear

if TYPE_CHECKING:
    from collections.abc import Sequence

    from laco_kernels.ops.gelu_mlp import Norm
    from laco_kernels.ops.packed_linear import Whole


class Call:
    """One call of an encoder layer: what is known and computed ahead for the modules inside, gone when it returns."""

    __slots__ = ("feeds", "normed", "shares")

    def __init__(self) -> None:
        # By pack, which computes once a call; by linear layer: the input, what else must not have changed, and the output.
        self.shares: dict[Any, Any] = {}
        self.feeds: nn.Module | None = None  # a norm whose output nothing but products read
        self.normed: tuple[torch.Tensor, int, Norm] | None = None  # what the second norm made, its version, and from what


class Running(threading.local):
    """The call that this thread is in, innermost first."""

    call: Call | None = None


running = Running()


class Pack:
    """Linear layers that are called one after the other on the same input, by code that does not know of each other.

    Within a call of the encoder layer around them the first computes them all, and the others are handed their share; called
    from elsewhere each computes itself. Their parameters are tensors of their own to everybody else, with storages of their
    own, but lie behind each other in one piece of memory (:meth:`lay_together`), also where several encoders share them.
    """

    def __init__(self, members: Sequence[nn.Linear]) -> None:
        self.members: list[Any] = list(members)
        self.weights: Whole | None = None
        self.biases: Whole | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle without the memory that a copy's parameters leave."""
        return {"members": self.members}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Undo :meth:`__getstate__`."""
        self.__init__(**state)  # type: ignore[misc]

    def lay_together(self) -> None:
        """Move the parameters behind each other, unless they are there; those on the meta device stay without memory."""
        found = self.parameters()
        if found is None or found[0][0].is_meta or not are_alike([*found[0], *found[1]]):
            return
        weights, biases = found
        with torch.inference_mode(False):
            self.weights, self.biases = lay_together(weights), lay_together(biases) if biases else None

    def parameters(self) -> tuple[list[Any], list[Any]] | None:
        """Return weights and biases; ``None`` where one is no parameter, but computed, or only some layers have a bias."""
        tables = [member._parameters for member in self.members]  # a module's own look-up takes its time
        weights = [table.get("weight") for table in tables]
        biases = [table.get("bias", False) for table in tables]  # which is None where there is none
        if biases[0] is None and biases.count(None) == len(biases):
            biases = []
        for parameter in (*weights, *biases):
            if type(parameter) is not nn.Parameter:
                return None
        return weights, biases

    def is_together(self) -> bool:
        """Return whether the parameters lie where :meth:`lay_together` has moved them."""
        found = self.parameters()
        return found is not None and self._holds(*found)

    def _holds(self, weights: Sequence[nn.Parameter], biases: Sequence[nn.Parameter]) -> bool:
        if self.weights is None or not self.weights.holds(weights):
            return False
        return self.biases is None if not biases else self.biases is not None and self.biases.holds(biases)

    def leave(self) -> None:
        """Let memory go that the parameters have left, lest it is kept; in other encoders that share them, too."""
        if not self.is_together():
            for whole in (self.weights, self.biases):
                if whole is not None:
                    whole.forget()

    def product(self, x: torch.Tensor) -> torch.Tensor | None:
        """Return what the layers make of ``x`` side by side, or ``None`` where each has to compute by itself."""
        # A compiler cannot trace addresses, and fuses what comes behind two products by itself.
        if torch.compiler.is_compiling() or has_transforms() or not (x.is_cuda or self.members[0].impl is not None):
            return None
        found = self.parameters()
        if found is None or not self._holds(*found):
            return None
        weight = None if self.weights is None else self.weights.tensor
        if weight is None or weight.device != x.device:
            return None
        return run_packed_linear(x, weight, None if self.biases is None else self.biases.tensor, *found)

    def share(self, call: Call, member: PackedLinear, x: torch.Tensor) -> torch.Tensor | None:
        """Return what ``member`` makes of ``x``, or ``None`` where it has to compute it by itself."""
        shares = call.shares
        state = (torch.is_grad_enabled(), is_autocast(x), None if x.is_inference() else x._version)
        if self not in shares:
            shares[self] = None
            if member not in self.members:  # a copy
                return None
            for own in self.members:
                if own._forward_pre_hooks:  # which may change its weights or its input
                    return None
            y = self.product(x) if member.impl is not None or pays(x.numel()) else None
            if y is None:
                return None
            # Not views to autograd, so that a hook may change one in place.
            outputs = y.unsafe_split_with_sizes([own.out_features for own in self.members], -1)
            for own, output in zip(self.members, outputs, strict=True):
                shares[own] = x, state, output
        given, before, mine = shares.pop(member, (None, None, None))
        return mine if given is x and before == state else None


def are_alike(parameters: Sequence[torch.Tensor]) -> bool:
    """Return whether these are different tensors of one dtype on one device."""
    first = parameters[0]
    alike = all((tensor.dtype, tensor.device) == (first.dtype, first.device) for tensor in parameters)
    return alike and len(set(map(id, parameters))) == len(parameters)


class PackedLinear(Fused, nn.Linear):
    """One of the linear layers of a :class:`Pack`."""

    stock = nn.Linear
    pack: Pack

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer to ``[..., C]``."""
        # A compiler's graph has no other thread, but no memory between calls either.
        call = None if torch.compiler.is_compiling() else running.call
        share = None if call is None else self.pack.share(call, self, x)
        return super().forward(x) if share is None else share

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._apply(*args, **kwargs)
        self.pack.leave()
        return result


know(nn.Linear)
