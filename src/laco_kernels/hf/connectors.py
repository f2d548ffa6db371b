"""Connectors between vision encoder and LLM that compute the same as those of transformers by the fused operators.

Each is a mixin that, with the stock class behind it, becomes a subclass which takes the stock one's place by
``module.__class__ = ...``: parameters, names, hooks and children stay what they are. Wherever a precondition fails, when it is
called, the stock ``forward`` runs: a hook, an adapter or a quantised layer among the children, another activation than GELU.

The subclasses are made when they are first asked for, and by name when one is unpickled, as importing every model of
transformers that has a connector would take seconds.
"""

from __future__ import annotations

import functools
import importlib
import types
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn
from transformers.activations import GELUActivation, GELUTanh

from laco_kernels.geometry import Windows
from laco_kernels.hf.fusing import is_plain, is_transformed
from laco_kernels.ops import add_norm, patch_merge, strided_conv, strided_conv_gelu
from laco_kernels.ops.checks import DTYPES
from laco_kernels.ops.library import BODIES_ON

PLAIN_TENSORS = (nn.Parameter, torch.Tensor)


class Connector(nn.Module):
    """Mixin for a connector whose class was swapped; ``impl`` is what :func:`laco_kernels.hf.patch` was told."""

    stock: ClassVar[type[nn.Module]]
    part: ClassVar[type[nn.Module]]  # the stock class of a child whose work is done here
    operators: ClassVar[tuple[str, ...]]
    by: ClassVar[str]  # what a report says
    impl: str | None

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Connect, called as the stock class is."""
        given = (*inputs, *named.values())
        x = given[0] if len(given) == 1 else None
        y = self.fused(x) if isinstance(x, torch.Tensor) and _is_usual(x) and self.obstacle() is None else None
        return super().forward(*inputs, **named) if y is None else y

    def obstacle(self) -> str | None:
        """Say why the stock ``forward`` has to run whatever the input, as things are now."""
        raise NotImplementedError

    def fused(self, x: torch.Tensor) -> torch.Tensor | None:
        """Connect by the operators, or return ``None`` where ``x`` is not of the form that this is for."""
        raise NotImplementedError


def _is_usual(x: torch.Tensor) -> bool:
    return x.dtype in DTYPES and x.device.type in BODIES_ON and x.numel() > 0 and not is_transformed()


def _changed(module: nn.Module, *kinds: type[nn.Module]) -> str | None:
    """Say why ``module`` must be called instead of being passed over."""
    if is_plain(module, *kinds):
        return None
    kind = type(module).__name__
    if type(module) not in kinds:
        return f"a {kind} in place of a {kinds[0].__name__}"
    return f"a forward of somebody else's in a {kind}" if "forward" in module.__dict__ else f"a hook on a {kind}"


def _changed_linear(layer: nn.Module) -> str | None:
    """:func:`_changed` for a linear layer, whose weights may be quantised without a class of its own."""
    if reason := _changed(layer, nn.Linear):
        return reason
    for parameter in (layer.weight, layer.bias):
        if parameter is not None and type(parameter) not in PLAIN_TENSORS:
            return f"a {type(parameter).__name__} as a parameter of a Linear"
    return None


def _changed_gelu(activation: nn.Module) -> str | None:
    return _changed(activation, nn.GELU, GELUActivation, GELUTanh)


def _approximation(activation: Any) -> str:
    if isinstance(activation, nn.GELU):
        return activation.approximate
    return "tanh" if isinstance(activation, GELUTanh) else "none"


def _square(x: torch.Tensor, ratio: int) -> Windows | None:
    """Return the windows of tokens ``[B, N, C]`` of square images, where they are some and ``ratio`` divides their sides."""
    if x.dim() != 3:
        return None
    side = int(x.shape[1] ** 0.5)
    return Windows((side, side), ratio) if side * side == x.shape[1] and side % ratio == 0 else None


def _mlp(x: torch.Tensor, first: nn.Linear, second: nn.Linear, approximate: str, impl: str | None) -> torch.Tensor:
    """Apply ``second(gelu(first(x)))`` to ``[..., C]``, as one patch merge.

    In block order the channels of a window's tokens lie side by side, so any row is an image of one window: here of four
    tokens with C / 4 channels each. A compiler takes the number of images for any, that of windows for a constant.
    """
    y = patch_merge(
        x.reshape(-1, 4, x.shape[-1] // 4),
        first.weight,
        first.bias,
        second.weight,
        second.bias,
        grid=(2, 2),
        residual="none",
        approximate=approximate,
        layout="block",
        impl=impl,
    )
    return y.reshape(*x.shape[:-1], y.shape[-1])


class MLP(Connector):
    """Linear, GELU, Linear of each token (LLaVA)."""

    operators: ClassVar[tuple[str, ...]] = ("patch_merge",)
    by = "patch_merge"
    layer_names: ClassVar[tuple[str, str, str]] = ("linear_1", "act", "linear_2")

    def layers(self) -> tuple[Any, Any, Any]:
        """Return first product, activation and second product."""
        first, activation, second = (getattr(self, name) for name in self.layer_names)
        return first, activation, second

    def obstacle(self) -> str | None:
        """Look at the layers."""
        first, activation, second = self.layers()
        reason = _changed_linear(first) or _changed_gelu(activation) or _changed_linear(second)
        if reason is None and first.in_features % 4:
            return f"{first.in_features} channels, which 4 does not divide"
        return reason

    def normed(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the first product is applied to."""
        return x

    def fused(self, x: torch.Tensor) -> torch.Tensor:
        """Apply it to ``[..., C]``."""
        first, activation, second = self.layers()
        return _mlp(self.normed(x), first, second, _approximation(activation), self.impl)


class NormedMLP(MLP):
    """LayerNorm of a window, Linear, GELU, Linear (InternVL)."""

    layer_norm: nn.Module

    def normed(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise windows ``[..., r * r * C]``."""
        out: torch.Tensor = self.layer_norm(x)
        return out


class Merger(MLP):
    """LayerNorm of each patch, Linear, GELU, Linear of those of a window (Qwen2-VL)."""

    hidden_size: int
    ln_q: Any
    mlp: Any

    def layers(self) -> tuple[Any, Any, Any]:
        """Return those of ``mlp``."""
        first, activation, second = self.mlp
        return first, activation, second

    def obstacle(self) -> str | None:
        """Look at the layers and what they are in."""
        reason = _changed(self.mlp, nn.Sequential)
        if reason is None and len(self.mlp) != 3:
            return f"{len(self.mlp)} layers in place of 3"
        return reason or super().obstacle()

    def normed(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise patches ``[N, C]`` and lay those of a window side by side."""
        out: torch.Tensor = self.ln_q(x)
        return out.view(-1, self.hidden_size)


class RMSMerger(Merger):
    """The same with RMSNorm in one pass, which rounds once (Qwen2.5-VL)."""

    operators = ("patch_merge", "add_norm")
    by = "add_norm and patch_merge"

    def normed(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise patches ``[N, C]`` and lay those of a window side by side."""
        norm = self.ln_q
        alike = norm.weight.dtype == x.dtype or torch.is_autocast_enabled(x.device.type)
        if not (alike and _is_ours(norm, self.part, x)):
            return super().normed(x)
        out = add_norm(x, None, norm.weight, kind="rms", eps=norm.variance_epsilon, impl=self.impl)[1]
        return out.view(-1, self.hidden_size)


def _is_ours(norm: Any, kind: type[nn.Module], x: torch.Tensor) -> bool:
    """Return whether ``add_norm`` may stand in for an RMSNorm; not in float64, which stock ones round to float32."""
    return x.dtype != torch.float64 and is_plain(norm, kind) and type(norm.weight) in PLAIN_TENSORS


class VisionMerger(MLP):
    """LayerNorm of each patch or of each window, Linear, GELU, Linear of a window (Qwen3-VL)."""

    layer_names = ("linear_fc1", "act_fn", "linear_fc2")
    hidden_size: int
    use_postshuffle_norm: bool
    norm: nn.Module

    def normed(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise patches ``[N, C]`` and lay those of a window side by side, or the other way round."""
        out: torch.Tensor = self.norm(x.view(-1, self.hidden_size) if self.use_postshuffle_norm else x)
        return out.view(-1, self.hidden_size)


class PixelShuffle(Connector):
    """Space-to-depth and a product (Idefics3, SmolVLM)."""

    operators = ("strided_conv",)
    by = "strided_conv"
    scale_factor: int
    modality_projection: Any

    def obstacle(self) -> str | None:
        """Look at the projection and the product in it."""
        return _changed(self.modality_projection, self.part) or _changed_linear(self.modality_projection.proj)

    def fused(self, x: torch.Tensor) -> torch.Tensor | None:
        """Apply it to ``[B, N, C]``."""
        windows, layer = _square(x, self.scale_factor), self.modality_projection.proj
        if windows is None:
            return None
        return strided_conv(x, layer.weight, layer.bias, grid=windows.grid, kernel_size=windows.ratio, impl=self.impl)


class PixelShuffleMLP(Connector):
    """Space-to-depth, Linear, GELU, Linear, GELU (Llama 4): a GELU in the epilogue of each product."""

    operators = ("strided_conv_gelu",)
    by = "strided_conv_gelu"
    pixel_shuffle_ratio: float
    mlp: Any

    def obstacle(self) -> str | None:
        """Look at the layers and what they are in."""
        mlp = self.mlp
        return (
            _changed(mlp, self.part) or _changed_linear(mlp.fc1) or _changed_gelu(mlp.activation_fn) or _changed_linear(mlp.fc2)
        )

    def fused(self, x: torch.Tensor) -> torch.Tensor | None:
        """Apply it to ``[B, N, C]``."""
        mlp, ratio = self.mlp, round(1 / self.pixel_shuffle_ratio)
        windows = _square(x, ratio) if ratio * self.pixel_shuffle_ratio == 1 else None
        if windows is None or (mlp.training and mlp.dropout):
            return None
        options: dict[str, Any] = {"approximate": _approximation(mlp.activation_fn), "impl": self.impl}
        h = strided_conv_gelu(x, mlp.fc1.weight, mlp.fc1.bias, grid=windows.grid, kernel_size=ratio, **options)
        return strided_conv_gelu(h, mlp.fc2.weight, mlp.fc2.bias, grid=windows.out_grid, kernel_size=1, **options)


class Pooling(Connector):
    """Average pooling where the tokens lie, RMSNorm in one pass, a product (Gemma 3)."""

    operators = ("add_norm",)
    by = "pooling without copies and add_norm"
    patches_per_image: int
    kernel_size: int
    avg_pool: nn.Module
    mm_soft_emb_norm: Any
    mm_input_projection_weight: torch.Tensor

    def obstacle(self) -> str | None:
        """Look at the pooling."""
        return _changed(self.avg_pool, nn.AvgPool2d)

    def fused(self, x: torch.Tensor) -> torch.Tensor | None:
        """Apply it to ``[B, N, C]``."""
        windows = _square(x, self.kernel_size)
        # In float64 the stock norm rounds to float32, and then sums in an order that depends on strides.
        if windows is None or windows.grid[0] != self.patches_per_image or x.dtype == torch.float64:
            return None
        norm, tiles = self.mm_soft_emb_norm, windows.tiles(x)
        if _is_ours(norm, self.part, x):
            # In float32 up to the end of the norm, as the stock one, whose weight counts from one: too fine for bfloat16.
            pooled = tiles.mean((2, 4), dtype=torch.float32).flatten(1, 2)
            weight = 1.0 + norm.weight.float()
            normed = add_norm(pooled, None, weight, kind="rms", eps=norm.eps, impl=self.impl)[1].to(x.dtype)
        else:
            normed = norm(tiles.mean((2, 4)).flatten(1, 2))
        return torch.matmul(normed, self.mm_input_projection_weight).type_as(x)


class Family(NamedTuple):
    """A connector of transformers: its package and class, what computes it, and the name of :attr:`Connector.part`."""

    package: str
    name: str
    mixin: type[Connector]
    part: str | None = None

    @property
    def module(self) -> str:
        """Return where the stock class is defined."""
        return f"transformers.models.{self.package}.modeling_{self.package}"


FAMILIES = (
    Family("internvl", "InternVLMultiModalProjector", NormedMLP),
    Family("qwen2_vl", "PatchMerger", Merger),
    Family("qwen2_5_vl", "Qwen2_5_VLPatchMerger", RMSMerger, "Qwen2_5_VLRMSNorm"),
    Family("qwen3_vl", "Qwen3VLVisionPatchMerger", VisionMerger),
    Family("qwen3_vl_moe", "Qwen3VLMoeVisionPatchMerger", VisionMerger),
    Family("idefics3", "Idefics3Connector", PixelShuffle, "Idefics3SimpleMLP"),
    Family("smolvlm", "SmolVLMConnector", PixelShuffle, "SmolVLMSimpleMLP"),
    Family("llama4", "Llama4VisionPixelShuffleMLP", PixelShuffleMLP, "Llama4VisionMLP2"),
    Family("gemma3", "Gemma3MultiModalProjector", Pooling, "Gemma3RMSNorm"),
    Family("llava", "LlavaMultiModalProjector", MLP),
    Family("llava_next", "LlavaNextMultiModalProjector", MLP),
    Family("llava_next_video", "LlavaNextVideoMultiModalProjector", MLP),
    Family("llava_onevision", "LlavaOnevisionMultiModalProjector", MLP),
)
_BY_STOCK = {(family.module, family.name): family for family in FAMILIES}
_BY_NAME = {f"Fused{family.name}": family for family in FAMILIES}


def family_of(kind: type) -> Family | None:
    """Return the family whose stock class ``kind`` is."""
    return _BY_STOCK.get((kind.__module__, kind.__qualname__))


@functools.cache
def fused_class(family: Family) -> type[Connector]:
    """Return the subclass of the stock class that runs the operators."""
    module = importlib.import_module(family.module)
    stock = getattr(module, family.name)
    members: dict[str, Any] = {"__module__": __name__, "__doc__": f"{family.name} by fused operators.", "stock": stock}
    if family.part is not None:
        members["part"] = getattr(module, family.part)
    return type(f"Fused{family.name}", (family.mixin, stock), members)


def is_as_made(connector: Connector) -> bool:
    """Return whether the class is one of :func:`fused_class`, and not what somebody made of it."""
    family = family_of(connector.stock)
    return family is not None and type(connector) is fused_class(family)


def has_foreign_forward(module: nn.Module) -> bool:
    """Return whether ``module`` runs another ``forward`` than its class's."""
    forward = module.__dict__.get("forward")
    return forward is not None and forward != types.MethodType(type(module).forward, module)


def __getattr__(name: str) -> type[Connector]:
    """Make a class that something pickled refers to."""
    if name in _BY_NAME:
        return fused_class(_BY_NAME[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
