"""All compressors of visual tokens behind one door: :func:`build_compressor`.

A new one is a file with a subclass of :class:`Compressor` beside this one, and a line in ``_CLASSES``.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from typing import TYPE_CHECKING, Any

from laco_kernels.errors import complaint
from laco_kernels.nn.compressors.base import PLACES, Compressor

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

_CLASSES = {
    "laco": "laco.Laco",
    "pixel_shuffle": "pixel_shuffle.PixelShuffle",
    "ldpv2": "ldpv2.LDPv2",
    "token_packer": "token_packer.TokenPacker",
    "avg_pool": "avg_pool.AvgPool",
    "token_concat": "token_concat.TokenConcat",
    "stf": "stf.Stf",
    "mbtf": "mbtf.Mbtf",
    "mbtf+stf": "mbtf.MbtfStf",
    "qformer": "qformer.QFormer",
    "c_abstractor": "c_abstractor.CAbstractor",
    "patch_merger": "patch_merger.PatchMerger",
    "idefics3": "idefics3.Idefics3",
    "llama4": "llama4.Llama4",
    "gemma3": "gemma3.Gemma3",
    "vila": "vila.Vila",
    "mlp2x_gelu": "mlp2x_gelu.Mlp2xGelu",
    "downsample": "downsample.Downsample",
    "tome": "tome.Tome",
    "visionzip": "visionzip.VisionZip",
    "prumerge_plus": "prumerge.PruMergePlus",
}


def _load(path: str) -> type[Compressor]:
    module, _, name = path.partition(".")
    kind: type[Compressor] = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    return kind


#: Every compressor by name.
COMPRESSORS: dict[str, type[Compressor]] = {name: _load(path) for name, path in _CLASSES.items()}

__all__ = ["COMPRESSORS", "PLACES", "Compressor", "build_compressor", "check_options", "find_compressor"]


# What people call them by who know the model and not the name here.
_MODELS = {
    "internvl": "pixel_shuffle",
    "mobilevlm": "ldpv2",
    "qwen2_vl": "patch_merger",
    "qwen2.5_vl": "patch_merger",
    "qwen3_vl": "patch_merger",
    "smolvlm": "idefics3",
    "honeybee": "c_abstractor",
    "blip2": "qformer",
    "llava": "mlp2x_gelu",
    "nvila": "vila",
    "prumerge": "prumerge_plus",
}


def find_compressor(name: object, argument: str = "compressor") -> type[Compressor]:
    """Return the class of that name, the value of ``argument``; ValueError with the closest names where there is none."""
    if not isinstance(name, str) or name not in COMPRESSORS:
        known = {**_MODELS, **{own: own for own in COMPRESSORS}}
        wanted = name.lower() if isinstance(name, str) else ""
        matches = [wanted] if wanted in known else difflib.get_close_matches(wanted, known, n=3, cutoff=0.5)
        close = list(dict.fromkeys(known[match] for match in matches))
        remedy = f"Did you mean {' or '.join(map(repr, close))}" if close else "Pass one of these"
        raise ValueError(complaint(argument, repr(name), f"one of {', '.join(COMPRESSORS)}", remedy))
    return COMPRESSORS[name]


def check_options(kind: type[Compressor], options: Mapping[str, Any], fixed: Collection[str] = ()) -> None:
    """Raise TypeError unless a compressor takes these options, and leaves them to its user: ``fixed`` ones it does not."""
    known: dict[str, None] = {}
    for base in kind.__mro__[: kind.__mro__.index(Compressor) + 1]:
        own = inspect.signature(base).parameters.values()
        known |= {parameter.name: None for parameter in own if parameter.kind is not parameter.VAR_KEYWORD}
    for option in options:
        if option in fixed:
            raise TypeError(
                complaint(option, repr(options[option]), "no value, since the encoder decides it", f"Drop {option}")
            )
        if option not in known:
            names = [name for name in known if name not in fixed]
            close = difflib.get_close_matches(option, names, n=1)
            remedy = f"Did you mean {close[0]!r}" if close else "Drop it"
            raise TypeError(complaint("options", option, f"some of {', '.join(names)}", remedy))


def build_compressor(name: str, **options: Any) -> Compressor:
    """Build the compressor ``name``, one of :data:`COMPRESSORS`.

    All take ``in_dim``, ``out_dim``, ``ratio``, ``place``, ``prefix_tokens``, ``residual`` and ``pad`` (:class:`Compressor`);
    their own options stand with their classes. In training mode, with random weights, on the CPU, in the default dtype.

    Raises:
        TypeError: an option is unknown or of the wrong type.
        ValueError: the name is unknown (the closest ones are named), or an option is out of range.
    """
    kind = find_compressor(name)
    check_options(kind, options)
    if "in_dim" not in options:
        raise TypeError(complaint("in_dim", "nothing", "the width of the tokens", "Pass in_dim=encoder.config.hidden_size"))
    return kind(**options)
