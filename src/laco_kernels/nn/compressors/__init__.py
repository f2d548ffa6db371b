"""All compressors of visual tokens behind one door: :func:`build_compressor`.

A new one is a file with a subclass of :class:`Compressor` beside this one, and a line in :data:`COMPRESSORS`.
"""

from __future__ import annotations

import difflib
import inspect
from typing import Any

from laco_kernels.errors import complaint
from laco_kernels.nn.compressors import (
    avg_pool,
    downsample,
    gemma3,
    idefics3,
    laco,
    llama4,
    mbtf,
    mlp2x_gelu,
    patch_merger,
    pixel_shuffle,
    stf,
    token_concat,
    vila,
)
from laco_kernels.nn.compressors.base import PLACES, Compressor

#: Every compressor by name.
COMPRESSORS: dict[str, type[Compressor]] = {
    "laco": laco.Laco,
    "pixel_shuffle": pixel_shuffle.PixelShuffle,
    "avg_pool": avg_pool.AvgPool,
    "token_concat": token_concat.TokenConcat,
    "stf": stf.Stf,
    "mbtf": mbtf.Mbtf,
    "mbtf+stf": mbtf.MbtfStf,
    "patch_merger": patch_merger.PatchMerger,
    "idefics3": idefics3.Idefics3,
    "llama4": llama4.Llama4,
    "gemma3": gemma3.Gemma3,
    "vila": vila.Vila,
    "mlp2x_gelu": mlp2x_gelu.Mlp2xGelu,
    "downsample": downsample.Downsample,
}

__all__ = ["COMPRESSORS", "PLACES", "Compressor", "build_compressor", "find_compressor"]


def find_compressor(name: object) -> type[Compressor]:
    """Return the class of that name; ValueError with the closest names where there is none."""
    if not isinstance(name, str) or name not in COMPRESSORS:
        close = difflib.get_close_matches(str(name), COMPRESSORS, n=3, cutoff=0.4)
        remedy = f"Did you mean {' or '.join(map(repr, close))}" if close else "Pass one of these"
        raise ValueError(complaint("compressor", repr(name), f"one of {', '.join(COMPRESSORS)}", remedy))
    return COMPRESSORS[name]


def options_of(kind: type[Compressor]) -> list[str]:
    """Return the names of the options that a compressor takes, those of all its base classes included."""
    names: dict[str, None] = {}
    for base in kind.__mro__[: kind.__mro__.index(Compressor) + 1]:
        for name, parameter in list(inspect.signature(base).parameters.items()):
            if parameter.kind is not parameter.VAR_KEYWORD:
                names[name] = None
    return list(names)


def build_compressor(name: str, **options: Any) -> Compressor:
    """Build the compressor ``name``, one of :data:`COMPRESSORS`.

    All take ``in_dim``, ``out_dim``, ``ratio``, ``place``, ``prefix_tokens``, ``residual`` and ``pad`` (:class:`Compressor`);
    their own options stand with their classes. In training mode, with random weights, on the CPU, in the default dtype.

    Raises:
        TypeError: an option is unknown or of the wrong type.
        ValueError: the name is unknown (the closest ones are named), or an option is out of range.
    """
    kind = find_compressor(name)
    known = options_of(kind)
    for option in options:
        if option not in known:
            close = difflib.get_close_matches(option, known, n=1)
            remedy = f"Did you mean {close[0]!r}" if close else "Drop it"
            raise TypeError(complaint("options", option, f"some of {', '.join(known)}", remedy))
    if "in_dim" not in options:
        raise TypeError(complaint("in_dim", "nothing", "the width of the tokens", "Pass in_dim=encoder.config.hidden_size"))
    return kind(**options)
