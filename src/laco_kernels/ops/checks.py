"""The validation that the operators share. Every refusal names the argument, what was given, what is expected and a remedy."""

from __future__ import annotations

import math
from numbers import Real
from typing import TYPE_CHECKING

import torch

from laco_kernels.errors import complaint

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from laco_kernels.geometry import Windows

APPROXIMATIONS = ("none", "tanh")
MLP_APPROXIMATIONS = (*APPROXIMATIONS, "sigmoid")
LAYOUTS = ("raster", "block")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        names = ", ".join(map(repr, choices))
        raise ValueError(complaint(name, repr(value), f"one of {names}", f"Pass {name}={choices[0]!r}"))


def check_layout(layout: str, windows: Windows) -> None:
    """Raise ValueError unless the patch tokens of these windows can lie in ``layout``."""
    check_choice("layout", layout, LAYOUTS)
    if layout == "block" and not windows.is_even:
        given = f"'block' with a grid of {windows.grid[0]} x {windows.grid[1]}"
        raise ValueError(complaint("layout", given, f"'raster' unless {windows.ratio} divides both sides", "Keep raster order"))


def check_positive(name: str, value: object) -> float:
    """Return ``value`` as a float; raise unless it is a finite number above zero."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(complaint(name, repr(value), "a number above zero", f"Pass {name} as a float"))
    number = float(value)
    if not 0 < number < math.inf:
        raise ValueError(complaint(name, value, "a number above zero", f"Leave {name} out for its default"))
    return number


def check_tensor(name: str, tensor: object) -> None:
    """Raise TypeError unless ``tensor`` is a real floating-point tensor."""
    if not isinstance(tensor, torch.Tensor):
        kind = type(tensor).__name__
        raise TypeError(complaint(name, kind, "a torch.Tensor", f"Convert {name} with torch.as_tensor"))
    if tensor.dtype not in DTYPES:
        remedy = f"Convert it, e.g. {name}.float()"
        raise TypeError(complaint(name, tensor.dtype, "a floating-point dtype (float32, bfloat16, float16, float64)", remedy))


def check_tokens(name: str, tokens: torch.Tensor) -> None:
    """Raise unless ``tokens`` is a floating-point ``[B, tokens, C]``."""
    check_tensor(name, tokens)
    if tokens.dim() != 3:
        given = f"{tokens.dim()} dimensions {tuple(tokens.shape)}"
        remedy = "Flatten an image [B, C, H, W] with x.flatten(2).transpose(1, 2)"
        raise ValueError(complaint(name, given, "3 dimensions [B, tokens, C]", remedy))


def check_channels(name: str, tensor: torch.Tensor) -> None:
    """Raise unless ``tensor`` is a floating-point ``[..., C]``."""
    check_tensor(name, tensor)
    if tensor.dim() == 0 or tensor.shape[-1] == 0:
        given = f"{tensor.dim()} dimensions {tuple(tensor.shape)}"
        raise ValueError(complaint(name, given, "[..., C] with at least one channel", "Put the channels last"))


def check_image_tokens(x: torch.Tensor, windows: Windows) -> None:
    """Raise unless ``x`` is ``[B, P + H * W, C]`` for this grid and prefix."""
    check_tokens("x", x)
    if x.shape[1] != windows.num_tokens:
        height, width = windows.grid
        expected = f"{windows.num_tokens} = {windows.prefix_tokens} prefix + {height} * {width} patches"
        remedy = "Pass the grid of this image in patches, and as prefix_tokens the class and register tokens before it"
        raise ValueError(complaint("x", f"{x.shape[1]} tokens", expected, remedy))


def check_linear(suffix: str, weight: torch.Tensor, bias: torch.Tensor | None, factors: Sequence[int], order: str) -> None:
    """Raise unless ``weight`` is ``[out, in]``, where ``in`` is the product of ``factors``, and ``bias`` ``[out]`` or ``None``.

    ``order`` says what the factors count. Messages are built after the test: under ``torch.compile`` sizes are symbols.
    """
    name = f"weight{suffix}"
    check_tensor(name, weight)
    in_features = math.prod(factors)
    if weight.dim() != 2 or weight.shape[1] != in_features:
        remedy = "Weights are [out, in] as in torch.nn.Linear"
        if weight.dim() == 2 and weight.shape[0] == in_features:
            remedy += f"; this one looks transposed, pass {name}.t()"
        elif weight.dim() == 4:
            remedy += f"; a Conv2d weight [out, C, k, k] becomes one by {name}.permute(0, 2, 3, 1).flatten(1)"
        expected = f"[out, {in_features}], the columns ordered {order} = {' * '.join(map(str, factors))}"
        raise ValueError(complaint(name, list(weight.shape), expected, remedy))
    if bias is None:
        return
    check_tensor(f"bias{suffix}", bias)
    if bias.dim() != 1 or bias.shape[0] != weight.shape[0]:
        expected = f"[{weight.shape[0]}], one entry a row of {name}"
        raise ValueError(complaint(f"bias{suffix}", list(bias.shape), expected, "Pass None for no bias"))


def check_alike(tensors: Mapping[str, torch.Tensor | None]) -> None:
    """Raise unless all tensors share the first one's device and, outside autocast, its dtype."""
    given = [(name, tensor) for name, tensor in tensors.items() if tensor is not None]
    first_name, first = given[0]
    for name, tensor in given[1:]:
        if tensor.device != first.device:
            remedy = f"Move it with {name}.to({str(first.device)!r})"
            raise ValueError(complaint(name, f"device {tensor.device}", f"{first.device}, the device of {first_name}", remedy))
        if tensor.dtype != first.dtype and not is_autocast(first):
            remedy = f"Convert one of them, or run under torch.autocast({first.device.type!r})"
            raise TypeError(complaint(name, tensor.dtype, f"{first.dtype}, the dtype of {first_name}", remedy))


def autocast_dtype(x: torch.Tensor) -> torch.dtype:
    """Return the dtype an operator computes in: autocast's where it is on and ``x`` is no float64, else that of ``x``."""
    return torch.get_autocast_dtype(x.device.type) if is_autocast(x) and x.dtype != torch.float64 else x.dtype


def is_autocast(x: torch.Tensor) -> bool:
    """Return whether autocast is on where ``x`` is."""
    if x.is_meta:  # the one device without autocast that is traced: Dynamo does not hand on what is raised there
        return False
    try:  # torch.amp.is_autocast_available would ask, but Dynamo of torch 2.11 cannot trace it
        return torch.is_autocast_enabled(x.device.type)
    except RuntimeError:
        return False


def cast(tensor: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """``tensor.to(dtype)``, passing ``None`` on."""
    return None if tensor is None else tensor.to(dtype)
