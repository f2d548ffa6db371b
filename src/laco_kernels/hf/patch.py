"""Have the connectors of stock multimodal models run the fused operators: :func:`patch` and :func:`unpatch`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from laco_kernels.errors import complaint
from laco_kernels.hf.connectors import FAMILIES, Connector, Family, family_of, fused_class, has_foreign_forward, is_as_made
from laco_kernels.kernels import select

# What stands between vision encoder and LLM in other models of transformers.
LIKE_A_CONNECTOR = re.compile(r"(MultiModalProjector|PatchMerger|Connector)$")
SINGLE_PRODUCTS = ("Llama4MultiModalProjector", "PaliGemmaMultiModalProjector")


@dataclass(frozen=True)
class Replaced:
    """A connector that runs the operators, or why it does not as things are now."""

    name: str
    kind: str
    by: str
    inactive: str | None = None

    def __str__(self) -> str:
        """Return it as a line."""
        reason = f", inactive: {self.inactive}" if self.inactive else ""
        return f"{_line(self.name, self.kind)}: {self.by}{reason}"


@dataclass(frozen=True)
class Left:
    """A part of the model that stays as it is, and why."""

    name: str
    kind: str
    reason: str

    def __str__(self) -> str:
        """Return it as a line."""
        return f"{_line(self.name, self.kind)}: left as it is, {self.reason}"


@dataclass(frozen=True)
class Report:
    """What :func:`patch` did; names are those of ``model.named_modules()``."""

    replaced: tuple[Replaced, ...]
    left: tuple[Left, ...]

    def __str__(self) -> str:
        """Return it as lines."""
        return "\n".join(map(str, (*self.replaced, *self.left)))


def patch(model: nn.Module, *, impl: str | None = None) -> Report:
    """Have the connectors in ``model`` compute what they compute by the fused operators, in place.

    Their weights, the weights' names, hooks, outputs and gradients stay what they are, as does the config; what is saved is a
    stock checkpoint. :func:`unpatch` undoes it. Each connector looks at every call whether the operators apply, and runs the
    stock code where they do not: with an adapter, a quantised layer or a hook in it, another activation than GELU, in
    ``torch.func``. Patching again is allowed, for instance to pass another ``impl``. Gradients are first derivatives only, and
    ``torch.jit.trace`` does not see through the operators.

    ==========================  =================================================================================
    InternVL                    ``patch_merge`` behind its LayerNorm
    Qwen2-VL, Qwen3-VL          ``patch_merge`` behind their LayerNorm
    Qwen2.5-VL                  ``add_norm`` for the RMSNorm (it rounds once), ``patch_merge``
    Llama 4                     ``strided_conv_gelu`` twice, in the vision model
    Gemma 3                     pooling without copies, ``add_norm`` for the RMSNorm
    Idefics3, SmolVLM           ``strided_conv``
    LLaVA, -NeXT, -OneVision    ``patch_merge`` of single tokens
    ==========================  =================================================================================

    Args:
        model: a model of transformers, a part of one, or a connector itself. Patch before ``fully_shard``.
        impl: the operators' implementation; ``None`` is the measured choice (``laco env`` names it). ``add_norm`` has
            ``"reference"`` and ``"triton"`` only.

    Returns:
        Which connectors were replaced by what, which of them are inactive now and why, and what else looks like a connector
        and was left; ``print`` it.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: there is no connector in it that has a fused form, or ``impl`` is none that its operators have.
        RuntimeError: ``impl`` cannot run here.
    """
    _check(model, "Pass the model, not its name or config")
    found, left = _look(model)
    if not found:
        raise ValueError(_nothing(model, left))
    if impl is not None:
        for _, module, family in found:
            like = next(module.parameters())
            for op in family.mixin.operators:
                select.check(impl, like.device, like.dtype, op)
    replaced = []
    for name, module, family in found:
        if not isinstance(module, Connector):
            _become(module, fused_class(family))
        assert isinstance(module, Connector)
        module.__dict__["impl"] = impl
        replaced.append(Replaced(name, family.name, family.mixin.by, module.obstacle()))
    return Report(tuple(replaced), tuple(left))


def unpatch(model: nn.Module) -> None:
    """Undo :func:`patch`; a model that is not patched stays as it is.

    Raises:
        TypeError: ``model`` is no module.
        RuntimeError: something else has changed a patched connector since, such as ``fully_shard``, a parametrisation or a
            hook of accelerate; nothing is undone then.
    """
    _check(model, "Pass the model that was patched")
    patched: list[Any] = [module for module in model.modules() if isinstance(module, Connector)]
    for module in patched:
        if not is_as_made(module) or has_foreign_forward(module):
            given = f"a connector that has become a {type(module).__name__} or got another forward since it was patched"
            raise RuntimeError(complaint("model", given, "connectors as patch left them", "Undo first what came last"))
    for module in patched:
        module.__dict__.pop("impl", None)
        _become(module, module.stock)


def _become(module: nn.Module, kind: Any) -> None:
    module.__dict__.pop("forward", None)  # no other than the class's own, which accelerate leaves where it removes a hook
    module.__class__ = kind


def _check(model: Any, remedy: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(complaint("model", type(model).__name__, "a torch.nn.Module", remedy))


def _look(model: nn.Module) -> tuple[list[tuple[str, nn.Module, Family]], list[Left]]:
    """Return the connectors that have a fused form, and what else looks like one."""
    found, left = [], []
    for name, module in model.named_modules():
        kind = type(module)
        family = next((family for base in kind.__mro__ if (family := family_of(base))), None)
        reason = None
        if family is not None:
            if not isinstance(module, Connector):
                reason = _not_stock(module, family)
            if reason is None:
                found.append((name, module, family))
        elif kind.__name__ in SINGLE_PRODUCTS:
            reason = "a single product, with nothing around it to fuse"
        elif LIKE_A_CONNECTOR.search(kind.__name__):
            reason = "of which there is no fused form"
        if reason is not None:
            left.append(Left(name, kind.__name__, reason))
    return found, left


def _not_stock(module: nn.Module, family: Family) -> str | None:
    if family_of(type(module)) is None:
        return f"a subclass of {family.name} that may compute something else"
    if has_foreign_forward(module):
        return "with a forward of somebody else's; patch before accelerate dispatches or offloads the model"
    return None


def _nothing(model: nn.Module, left: list[Left]) -> str:
    given = f"a {type(model).__name__} without a connector to replace"
    if left:
        given += f" ({'; '.join(map(str, left))})"
    names = ", ".join(family.name for family in FAMILIES)
    return complaint("model", given, f"one that is or contains one of {names}", "Leave this model as it is")


def _line(name: str, kind: str) -> str:
    return f"{name} ({kind})" if name else kind
