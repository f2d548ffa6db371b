"""What turns a stock vision encoder of transformers into a compressed one, whatever its family.

Three mixins, each put in front of a stock class: embeddings that order the patches window by window, an encoder layer with
a merge as child module, and the model that holds both together. Parameters keep their stock names; the only new ones are
``<layers>.<k - 1>.merge.*``.
"""

from __future__ import annotations

import inspect
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from laco_kernels.errors import complaint
from laco_kernels.geometry import Windows, integer
from laco_kernels.nn import PatchMergeLayer
from laco_kernels.ops.checks import check_choice
from laco_kernels.ops.patch_merge import LAYOUTS

if TYPE_CHECKING:
    from transformers.utils import ModelOutput


class CompressionConfig:
    """Mixin for the config of a compressed encoder.

    ``compression`` is a dictionary: ``layer`` (tokens are merged after it, counted from 1), ``compressor``, ``ratio``,
    ``layout`` and the compressor's own ``options``.
    """

    model_type: ClassVar[str]
    prefix_tokens: ClassVar[int]
    compression: Any
    hidden_size: int
    num_hidden_layers: int
    image_size: int | list[int] | tuple[int, ...]
    patch_size: int | list[int] | tuple[int, ...]


COMPRESSORS = ("laco",)
FIXED_OPTIONS = ("dim", "ratio", "out_dim", "prefix_tokens", "pad", "device", "dtype")

# The windows of the images that this thread is encoding, from the model down to its merging layer.
_current_windows: ContextVar[Windows | None] = ContextVar("current_windows", default=None)


def build_merge(config: Any, device: torch.device | str | None = None) -> PatchMergeLayer:
    """Build the merge that ``config.compression`` describes.

    Raises:
        TypeError: if an entry has the wrong type, or an option is unknown or not the user's to choose.
        ValueError: if there is no compression, an entry is missing, unknown or out of range.
    """
    compression = config.compression
    wanted = ("layer", "compressor", "ratio", "layout", "options")
    if not isinstance(compression, dict) or set(compression) != set(wanted):
        given = f"a {type(config).__name__} with compression={compression!r}"
        remedy = "Build the model with laco_kernels.hf.compress"
        raise ValueError(complaint("config", given, f"a dictionary of {', '.join(wanted)}", remedy))
    if integer("layer", compression["layer"], 1) > config.num_hidden_layers:
        expected = f"1 to {config.num_hidden_layers}, the layers of this encoder"
        remedy = f"Pass layer={config.num_hidden_layers} to compress behind the encoder"
        raise ValueError(complaint("layer", compression["layer"], expected, remedy))
    check_choice("compressor", compression["compressor"], COMPRESSORS)
    check_choice("layout", compression["layout"], LAYOUTS)
    options = compression["options"]
    if not isinstance(options, dict):
        raise ValueError(complaint("options", repr(options), "a dictionary, empty for none", "Pass options={}"))
    for name in options:
        if name in FIXED_OPTIONS:
            raise TypeError(complaint(name, repr(options[name]), "no value, since the encoder decides it", f"Drop {name}"))
        if name not in inspect.signature(PatchMergeLayer).parameters:
            known = [key for key in inspect.signature(PatchMergeLayer).parameters if key not in FIXED_OPTIONS]
            raise TypeError(complaint("options", name, f"some of {', '.join(known)}", "Correct the spelling"))
    return PatchMergeLayer(
        config.hidden_size,
        compression["ratio"],
        prefix_tokens=config.prefix_tokens,
        pad=True,
        device=device,
        **options,
    )


def windows_of(config: CompressionConfig, height: int, width: int) -> Windows:
    """Return the windows of an image of ``height x width`` pixels."""
    patch = config.patch_size
    patch_height, patch_width = (patch, patch) if isinstance(patch, int) else patch
    return Windows((height // patch_height, width // patch_width), config.compression["ratio"], config.prefix_tokens, pad=True)


def inner_layout(config: CompressionConfig, windows: Windows) -> str:
    """Return how patch tokens lie between the embeddings and the merge.

    An odd grid keeps raster order: padding tokens must not enter attention, so there are no complete blocks.
    """
    return config.compression["layout"] if windows.is_even else "raster"


class BlockOrderEmbeddings(nn.Module):
    """Mixin for embeddings that hand on the patch tokens window by window.

    The encoders' positions are added once, here, and their attention is global and unmasked; the layers in front of the
    merge do not notice the order, and the merge itself becomes a view.
    """

    def __init__(self, config: CompressionConfig) -> None:
        super().__init__(config)
        self.config = config

    def forward(self, pixel_values: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Embed images ``[B, 3, height, width]`` into ``[B, P + N, C]``."""
        windows = windows_of(self.config, *pixel_values.shape[-2:])
        if inner_layout(self.config, windows) == "block":
            return self.in_block_order(windows, pixel_values, *args, **kwargs)
        return super().forward(pixel_values, *args, **kwargs)

    def in_block_order(self, windows: Windows, pixel_values: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Embed images whose grid has complete windows; arguments and result are those of :meth:`forward`."""
        return windows.to_block_order(super().forward(pixel_values, *args, **kwargs))


class MergingLayer(nn.Module):
    """Mixin for the encoder layer that merges its output's tokens."""

    def __init__(self, config: CompressionConfig) -> None:
        super().__init__(config)
        self.config = config
        self.windows: Windows | None = None  # for a compiler's trace, which cannot follow a context variable
        self.merge = build_merge(config)

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Hand the windows on as an argument, so that a recomputation in the backward pass sees those of its forward."""
        windows = self.windows if torch.compiler.is_compiling() else _current_windows.get()
        if windows is None:  # called without the model around it
            size = self.config.image_size
            windows = windows_of(self.config, *((size, size) if isinstance(size, int) else size))
        return super().__call__(*args, windows=windows, **kwargs)

    def forward(self, hidden_states: torch.Tensor, *args: Any, windows: Windows, **kwargs: Any) -> torch.Tensor:
        """Run the stock layer on ``[B, P + N, C]``, then merge into ``[B, P + N', C]``."""
        hidden_states = super().forward(hidden_states, *args, **kwargs)
        merged = self.merge(hidden_states, windows.grid, layout=inner_layout(self.config, windows))
        # Without a residual autocast would lower the precision of the stream.
        return merged.to(hidden_states.dtype)


class CompressedEncoder(PreTrainedModel):
    """Mixin for a vision model with one :class:`MergingLayer`.

    Outputs are in raster order: ``last_hidden_state`` and ``hidden_states[layer:]`` have ``P + N'`` tokens, the states
    before the merge are those of the stock model.
    """

    layers_path: ClassVar[str]
    layer_class: ClassVar[type[MergingLayer]]
    embeddings_class: ClassVar[type[BlockOrderEmbeddings]]

    def __init__(self, config: PreTrainedConfig) -> None:
        build_merge(config, device="meta")  # refuses a wrong config before anything is built
        super().__init__(config)
        self.embeddings = self.embeddings_class(config)
        self.get_submodule(self.layers_path)[config.compression["layer"] - 1] = self.layer_class(config)
        self.post_init()

    @property
    def merging_layer(self) -> MergingLayer:
        """The encoder layer whose output is merged."""
        return self.get_submodule(self.layers_path)[self.config.compression["layer"] - 1]

    def _init_weights(self, module: nn.Module) -> None:
        # The merge itself may count as initialised, having no parameters of its own: its children are what is passed here.
        merge = getattr(self.merging_layer, "merge", None)
        if merge is not None and any(module is part for part in merge.modules()):
            merge.reset_parameters()
        else:
            super()._init_weights(module)

    def forward(
        self, pixel_values: torch.Tensor, *args: Any, return_dict: bool | None = None, **kwargs: Any
    ) -> ModelOutput | tuple[Any, ...]:
        """Encode images ``[B, 3, height, width]``; arguments and outputs are the stock model's."""
        windows = windows_of(self.config, *pixel_values.shape[-2:])
        # InternVL's encoder hands no keyword arguments on to its layers, so the windows travel beside the call: where layers
        # are compiled as an attribute, which is guarded on, and else in this thread's context.
        self.merging_layer.windows = windows
        if torch.compiler.is_compiling():
            outputs = super().forward(pixel_values, *args, return_dict=True, **kwargs)
        else:
            token = _current_windows.set(windows)
            try:
                outputs = super().forward(pixel_values, *args, return_dict=True, **kwargs)
            finally:
                _current_windows.reset(token)
        if inner_layout(self.config, windows) == "block":
            self._restore_raster_order(outputs, windows)
        if return_dict is None:
            return_dict = getattr(self.config, "return_dict", True)
        return outputs if return_dict else outputs.to_tuple()

    def _restore_raster_order(self, outputs: ModelOutput, windows: Windows) -> None:
        """Merged states are in raster order already, and shorter than those before them."""
        before = windows.num_tokens
        if outputs.hidden_states is not None:
            outputs.hidden_states = tuple(
                windows.to_raster_order(state) if state is not None and state.shape[1] == before else state
                for state in outputs.hidden_states
            )
        if outputs.attentions is not None:
            outputs.attentions = tuple(
                windows.to_raster_order(windows.to_raster_order(weights, 2), 3) if weights.shape[-1] == before else weights
                for weights in outputs.attentions
            )
