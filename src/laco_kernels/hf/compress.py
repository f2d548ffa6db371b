"""Put a token merge inside a vision encoder: :func:`compress`."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import operator
import os
from collections.abc import Sequence
from fractions import Fraction
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from laco_kernels.errors import complaint
from laco_kernels.geometry import integer
from laco_kernels.hf.encoders import FAMILIES
from laco_kernels.hf.optimize import optimize, settings_of
from laco_kernels.hf.points import CompressionConfig, as_list, build_merges

if TYPE_CHECKING:
    from laco_kernels.hf.mixins import CompressedEncoder

DEFAULT_DEPTH = Fraction(1, 4)


def compress(
    encoder: PreTrainedModel | PreTrainedConfig | str | os.PathLike[str],
    *,
    depth: float | Fraction | None = None,
    layer: int | None = None,
    layers: Sequence[int] | None = None,
    compressor: str = "laco",
    ratio: int | Sequence[int] = 2,
    layout: str = "block",
    **options: Any,
) -> CompressedEncoder:
    """Return ``encoder`` with its tokens merged ``ratio x ratio`` to one after one of its layers (LaCo), or several.

    The layers behind a merge run on ``N' = ceil(H / ratio) * ceil(W / ratio)`` tokens; class tokens pass through. The
    result is a transformers model of its own registered class: ``save_pretrained``, ``AutoModel.from_pretrained``,
    gradient checkpointing, ``output_hidden_states``, ``torch.compile`` and PEFT work as usual. Its parameters keep the
    stock names; the new ones are ``<layers>.<layer - 1>.merge.*``.

    Args:
        encoder: an ``Aimv2VisionModel``, ``SiglipVisionModel``, ``InternVLVisionModel`` or ``CLIPVisionModel``; or a
            config of one (random weights); or a local folder or hub name of a checkpoint in safetensors format, also
            of a larger model that contains one. The weights of a *model* are shared with the result, not copied, and
            ``encoder`` itself stays usable; pass ``copy.deepcopy(encoder)`` to keep the two apart. Hooks stay behind.
        depth: where to merge as a fraction of the depth, in ``(0, 1]``; layers are rounded half up, and 1 merges behind
            the last layer, in front of the final norm. 1/4 if neither ``depth`` nor ``layer`` is given.
        layer: the same as a number of layers, 1 to ``num_hidden_layers``.
        layers: several of them, ascending, to compress step by step: each point reads what the one before it leaves.
        compressor: one of :data:`laco_kernels.nn.COMPRESSORS` that may stand inside an encoder.
        ratio: side of a window in patches, at least 2; a sequence has one for each of ``layers``. Windows of grids that it does
            not divide are zero-padded.
        layout: ``"block"`` (default) lets tokens lie window by window in front of a merge that reads nothing but its
            windows, which is then a view; ``"raster"`` gathers the windows instead. Outputs are the same, and in raster
            order where the compressor leaves a grid.
        **options: the compressor's own options, of all points: ``residual`` of any that learns, and for ``"laco"``
            ``hidden_dim``, ``norm``, ``bias``, ``zero_init_last`` and ``approximate``
            (:class:`laco_kernels.nn.PatchMergeLayer`).

    Returns:
        The compressed encoder, on the device, in the dtype and in the training mode of ``encoder``, and optimised
        (:func:`optimize`) where that is.

    Raises:
        TypeError: ``encoder`` is not a supported kind of object or class, or an option has the wrong type.
        ValueError: an argument is out of range or contradicts another one, ``encoder`` is compressed already, or a
            checkpoint lacks weights of the encoder.
        RuntimeError: a checkpoint cannot be read, for instance a hub name without a network.
    """
    config, source = resolve("encoder", encoder)
    stock = stock_class("encoder", config)
    if isinstance(source, PreTrainedModel) and type(source) is not stock:
        # A subclass may do something else, which the compressed class would not.
        remedy = "Pass the vision model inside it, such as model.vision_model"
        raise TypeError(complaint("encoder", f"a {type(source).__name__}", f"one of {_supported()}", remedy))
    config_class, model_class = FAMILIES[stock]
    compression = {
        "layer": _layers(depth, layer, layers, config.num_hidden_layers),
        "compressor": compressor,
        "ratio": _ratios(ratio, layers),
        "layout": layout,
        "options": {name: _plain(option) for name, option in options.items()},
    }
    inherited = {k: v for k, v in config.to_dict().items() if k not in ("model_type", "architectures")}
    compressed = config_class(**inherited, compression=compression, attn_implementation=config._attn_implementation)
    build_merges(compressed, device="meta")  # refuses wrong options before weights are touched
    if source is None:
        model = model_class(compressed)
        return model.to(config.dtype) if config.dtype is not None else model
    given = load_stock(source) if isinstance(source, str) else source
    model = _share_weights(given, model_class, compressed)
    if settings := settings_of(given):
        optimize(model, **dataclasses.asdict(settings))
    return model


def load_stock(source: str, argument: str = "encoder") -> PreTrainedModel:
    """Load the stock vision encoder of a checkpoint, which may be that of a larger model (CLIP, InternVL, LLaVA).

    Args:
        source: a local folder or hub name; weights in safetensors format.
        argument: what complaints call it.

    Raises:
        TypeError: the checkpoint holds no supported encoder.
        ValueError: it lacks weights of the encoder.
        RuntimeError: it cannot be read.
    """
    config, _ = resolve(argument, source)
    stock = stock_class(argument, config)
    try:
        model, info = stock.from_pretrained(
            source,
            config=config,
            output_loading_info=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are named below
            # Inside a larger model the encoder's keys have the tower's prefix.
            key_mapping={r"^(model\.)?(vision_tower\.vision_model|vision_tower|vision_model)\.": ""},
        )
    except Exception as error:  # a damaged file raises whatever its reader raises
        raise unreadable(argument, source, error) from error
    lacking = [*sorted(info["missing_keys"]), *map(str, info["mismatched_keys"])]
    if lacking:
        given = f"{source!r}, which lacks or misshapes {', '.join(lacking[:3])}"
        remedy = f"Load the encoder with transformers and pass the {stock.__name__} itself"
        raise ValueError(complaint(argument, given, f"all weights of a {stock.__name__}", remedy))
    return model


def layer_at(depth: float | Fraction, num_layers: int) -> int:
    """Return the layer, 1 to ``num_layers``, that lies at ``depth`` in ``(0, 1]``; half a layer rounds up."""
    return max(1, math.floor(depth * num_layers + Fraction(1, 2)))


def _layers(depth: float | Fraction | None, layer: int | None, layers: Sequence[int] | None, count: int) -> int | list[int]:
    given = [f"{name}={value}" for name, value in (("depth", depth), ("layer", layer), ("layers", layers)) if value is not None]
    if len(given) > 1:
        raise ValueError(complaint("depth, layer, layers", " together with ".join(given), "one of them", "Drop the others"))
    if layers is not None:
        if not isinstance(layers, Sequence) or isinstance(layers, str):
            raise TypeError(complaint("layers", repr(layers), "a list of integers", "Pass for instance layers=[6, 18]"))
        return [int(integer("layers", number, 1)) for number in layers]  # build_merges looks at the other end
    if layer is not None:
        return int(integer("layer", layer, 1))
    depth = DEFAULT_DEPTH if depth is None else depth
    if isinstance(depth, bool) or not isinstance(depth, Real):
        raise TypeError(complaint("depth", repr(depth), "a number in (0, 1]", "Pass a fraction such as depth=1/4"))
    if not 0 < depth <= 1:
        remedy = "Pass a fraction such as depth=1/4, or layer=... for a number of layers"
        raise ValueError(complaint("depth", depth, "a fraction in (0, 1]", remedy))
    return layer_at(depth if isinstance(depth, Fraction) else float(depth), count)


def _ratios(ratio: Any, layers: Sequence[int] | None) -> int | list[int]:
    ratios = [int(integer("ratio", number, 2)) for number in as_list(ratio)]
    if layers is None and len(ratios) == 1:
        return ratios[0]
    return ratios * len(layers or ()) if not isinstance(ratio, (list, tuple)) else ratios


def _plain(option: Any) -> Any:
    """Return a number of NumPy's, say, as JSON can hold it."""
    if isinstance(option, (list, tuple)):
        return [_plain(part) for part in option]
    if type(option).__name__ in ("bool_", "bool"):
        return bool(option)
    with contextlib.suppress(TypeError, ValueError):  # an array of several numbers is left to whoever looks at it
        return operator.index(option)
    return float(option) if isinstance(option, Real) else option


def resolve(argument: str, encoder: object) -> tuple[PreTrainedConfig, PreTrainedModel | str | None]:
    """Return the vision config and what to take weights from: a model, a checkpoint's name, or nothing.

    Raises:
        TypeError: ``encoder``, the value of ``argument``, is none of these.
        RuntimeError: a checkpoint cannot be read.
    """
    config: PreTrainedConfig
    source: PreTrainedModel | str | None = None
    if isinstance(encoder, PreTrainedModel):
        config, source = encoder.config, encoder
    elif isinstance(encoder, PreTrainedConfig):
        config = getattr(encoder, "vision_config", encoder)
    elif isinstance(encoder, (str, os.PathLike)):
        source = os.fspath(encoder)
        config = read_config(argument, source)
        config = getattr(config, "vision_config", config)
    else:
        remedy = "Pass the vision model itself: before torch.compile, and out of PEFT by get_base_model()"
        expected = f"a model ({_supported()}), a config, a local folder or a hub name"
        raise TypeError(complaint(argument, type(encoder).__name__, expected, remedy))
    return config, source


def stock_class(argument: str, config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the stock encoder that a vision config is of.

    Raises:
        TypeError: it is none that can be compressed.
        ValueError: it is compressed already.
    """
    if isinstance(config, CompressionConfig):
        given = f"a {config.model_type} that merges after layer {config.compression['layer']}"
        raise ValueError(complaint(argument, given, "one that is not compressed yet", "Compress the stock encoder instead"))
    for stock in FAMILIES:
        if type(config) is stock.config_class:
            return stock
    remedy = "Pass a vision model of one of these families"
    if hasattr(config, "vision_config"):
        remedy = "Pass the vision tower inside it, such as model.vision_model or model.model.vision_tower"
    raise TypeError(complaint(argument, f"a model of type {config.model_type!r}", f"one of {_supported()}", remedy))


def _supported() -> str:
    return ", ".join(stock.__name__ for stock in FAMILIES)


def _share_weights(
    encoder: PreTrainedModel, model_class: type[CompressedEncoder], config: PreTrainedConfig
) -> CompressedEncoder:
    """Build the compressed model around the very parameters and buffers of ``encoder``."""
    if any(hasattr(module, "_hf_hook") for module in encoder.modules()):
        remedy = "Compress the model before accelerate dispatches or offloads it"
        raise ValueError(
            complaint("encoder", f"an offloaded {type(encoder).__name__}", "one whose weights are in place", remedy)
        )
    with torch.device("meta"):
        model = model_class(copy.deepcopy(config))
    given_names, own_names = set(_names(encoder)), set(_names(model))
    changed = sorted(given_names ^ {name for name in own_names if ".merge." not in name})
    if changed:
        given = f"a {type(encoder).__name__} with changed parameters ({', '.join(changed[:3])}, ...)"
        remedy = "Merge or remove adapters and quantisation first, and add them after compressing"
        raise ValueError(complaint("encoder", given, "the stock parameters", remedy))
    for owner, name, tensor in _tensors(encoder):
        target = model.get_submodule(owner)
        if isinstance(tensor, torch.nn.Parameter):
            target.register_parameter(name, tensor)
        else:
            target._buffers[name] = tensor
    for merge in model.merges:
        merge.to_empty(device=encoder.device).to(encoder.dtype)
        merge.reset_parameters()
    model.train(encoder.training)
    for name, module in encoder.named_modules():
        model.get_submodule(name).training = module.training
        if hasattr(module, "_gradient_checkpointing_func"):
            twin = model.get_submodule(name)
            twin.gradient_checkpointing = module.gradient_checkpointing
            twin._gradient_checkpointing_func = module._gradient_checkpointing_func
    return model


def _names(model: PreTrainedModel) -> list[str]:
    return [f"{owner}.{name}" for owner, name, _ in _tensors(model)]


def _tensors(model: PreTrainedModel) -> list[tuple[str, str, torch.Tensor]]:
    """All parameters and buffers, non-persistent ones included, as (module, name in it, tensor)."""
    return [
        (owner, name, tensor)
        for owner, module in model.named_modules()
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]
        if tensor is not None
    ]


def read_config(argument: str, source: str) -> PreTrainedConfig:
    """Read the config of a checkpoint; RuntimeError where that cannot be done."""
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # a damaged config raises whatever its parts raise
        raise unreadable(argument, source, error) from error


def unreadable(argument: str, source: str, error: Exception) -> RuntimeError:
    """Return the complaint that the checkpoint given as ``argument`` cannot be read."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if source and Path(source).is_dir():
        expected = "a folder with config.json and model.safetensors"
        remedy = "Save the model with save_pretrained, or convert a pickled checkpoint to safetensors"
    else:
        expected = "an existing local folder, or a hub name with a network or a filled cache"
        remedy = "Check the spelling and the connection, or download the checkpoint and pass its folder"
    return RuntimeError(complaint(argument, f"{source!r} ({reason})", expected, remedy))
