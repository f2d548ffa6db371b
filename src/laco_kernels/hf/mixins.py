"""What turns a stock vision encoder of transformers into a compressed one, whatever its family.

Three mixins, each put in front of a stock class: embeddings that order the patches window by window, an encoder layer with
a compressor as child module, and the model that holds both together. Parameters keep their stock names; the only new ones
are ``<layers>.<k - 1>.merge.*``.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from laco_kernels.errors import complaint
from laco_kernels.geometry import Cascade
from laco_kernels.hf.points import CompressionConfig, Journey, build_merges, points_of, route_of, sides

if TYPE_CHECKING:
    from transformers.utils import ModelOutput

    from laco_kernels.nn import Compressor

BIASED = ("sdpa", "eager")  # implementations of attention that take a bias [B, 1, 1, tokens]

# The images that this thread is encoding, from the model down to its embeddings and merging layers.
_current_journey: ContextVar[Journey | None] = ContextVar("current_journey", default=None)


class Guide:
    """Finds the way for a part that is called without the model around it: compressors without memory, by which grids go."""

    def __init__(self, config: CompressionConfig) -> None:
        self.config = config
        self.merges = build_merges(config, device="meta")

    def begin(self, height: int, width: int) -> Journey:
        """Set out with images of ``height x width`` pixels."""
        return Journey(route_of(self.config, self.merges, height, width))


class BlockOrderEmbeddings(nn.Module):
    """Mixin for embeddings that hand on the patch tokens window by window.

    The encoders' positions are added once, here, and their attention is global and unmasked; the layers in front of the
    merge do not notice the order, and the merge itself becomes a view.
    """

    def __init__(self, config: CompressionConfig) -> None:
        super().__init__(config)
        self.config = config
        self.guide = Guide(config)
        self.journey: Journey | None = None  # for a compiler's trace, which cannot follow a context variable

    def forward(self, pixel_values: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Embed images ``[B, 3, height, width]`` into ``[B, P + N, C]``."""
        journey = self.journey if torch.compiler.is_compiling() else _current_journey.get()
        if journey is None:
            journey = self.guide.begin(*pixel_values.shape[-2:])
        order = journey.route.order
        if order is None:
            return super().forward(pixel_values, *args, **kwargs)
        return self.in_block_order(order, pixel_values, *args, **kwargs)

    def in_block_order(self, order: Cascade, pixel_values: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Embed images into tokens in this order; arguments and result are those of :meth:`forward`."""
        return order.to_block_order(super().forward(pixel_values, *args, **kwargs))


class MergingLayer(nn.Module):
    """Mixin for an encoder layer that compresses its output's tokens, or comes behind one whose tokens have sizes.

    Args:
        config: the compressed encoder's.
        merge: the compressor; ``None`` behind it.
        point: the number of the point, from 0, where there is a compressor.
        in_proportion: whether tokens that stand for more patches get more attention.
    """

    attention_name: ClassVar[str] = "self_attn"
    norm_name: ClassVar[str] = "layer_norm1"

    def __init__(
        self, config: CompressionConfig, merge: Compressor | None, point: int = 0, *, in_proportion: bool = False
    ) -> None:
        super().__init__(config)
        self.config = config
        self.guide = Guide(config)
        self.journey: Journey | None = None  # for a compiler's trace, which cannot follow a context variable
        self.merge: Any = merge
        self.point, self.in_proportion = point, in_proportion

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Hand the journey on as an argument, so that a recomputation in the backward pass sees that of its forward."""
        journey = self.journey if torch.compiler.is_compiling() else _current_journey.get()
        if journey is None:  # called without the model around it
            journey = self.guide.begin(*sides(self.config.image_size))
        return super().__call__(*args, journey=journey, sizes=journey.sizes, **kwargs)

    def forward(
        self, hidden_states: torch.Tensor, *args: Any, journey: Journey, sizes: torch.Tensor | None, **kwargs: Any
    ) -> torch.Tensor:
        """Run the stock layer on ``[B, P + N, C]``, then compress into ``[B, P + N', C]``."""
        if sizes is None or not self.in_proportion:
            states = super().forward(hidden_states, *args, **kwargs)
        else:
            bias = sizes.log().to(hidden_states.dtype)[:, None, None, :]
            states = self.attend_with_bias(bias, hidden_states, *args, **kwargs)
        if self.merge is None:
            return states
        route = journey.route
        if not self.merge.reads_attention:
            merged, _ = self.merge(states, route.grids[self.point], layout=route.layout(self.point))
        elif self.merge.counts_patches:
            merged, journey.sizes = self.merge.merge_all(states, self.attended(hidden_states)[0], sizes)
        else:
            keys, query = self.attended(hidden_states)
            merged, _ = self.merge(states, route.grids[self.point], keys=keys, query=query)
        # Without a residual autocast would lower the precision of the stream.
        return merged.to(states.dtype)

    def attend_with_bias(self, bias: torch.Tensor, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run the stock layer, which takes an attention mask first, with ``bias [B, 1, 1, P + N]`` on attention's logits."""
        args = args or (kwargs.pop("attention_mask", None),)
        return super().forward(hidden_states, bias if args[0] is None else args[0] + bias, *args[1:], **kwargs)

    def attended(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the keys ``[B, P + N, heads, head_dim]`` of the layer's input and the class token's query, if there is one."""
        attention = getattr(self, self.attention_name)
        normed = getattr(self, self.norm_name)(hidden_states)
        heads = (attention.num_heads, -1)
        keys = attention.k_proj(normed)
        if hasattr(attention, "k_norm"):
            keys = attention.k_norm(keys)
        if self.config.prefix_tokens == 0:
            return keys.unflatten(2, heads), None
        query = attention.q_proj(normed[:, :1])
        if hasattr(attention, "q_norm"):
            query = attention.q_norm(query)
        return keys.unflatten(2, heads), query[:, 0].unflatten(1, heads)


class CompressedEncoder(PreTrainedModel):
    """Mixin for a vision model with one :class:`MergingLayer` or more.

    Outputs are in raster order where they form a grid: ``last_hidden_state`` and the ``hidden_states`` behind a merge have its
    tokens, the states before the first merge are those of the stock model.
    """

    layers_path: ClassVar[str]
    layer_class: ClassVar[type[MergingLayer]]
    embeddings_class: ClassVar[type[BlockOrderEmbeddings]]

    def __init__(self, config: PreTrainedConfig) -> None:
        build_merges(config, device="meta")  # refuses a wrong config before anything is built
        super().__init__(config)
        self.embeddings = self.embeddings_class(config)
        layers = self.get_submodule(self.layers_path)
        numbers = [layer - 1 for layer, _ in points_of(config)]
        merges = build_merges(config)
        in_proportion = bool(merges[0].reads_attention and merges[0].in_proportion)
        for i in range(numbers[0], len(layers) if in_proportion else numbers[-1] + 1):
            point = numbers.index(i) if i in numbers else 0
            if i in numbers or in_proportion:
                merge = merges[point] if i in numbers else None
                layers[i] = self.layer_class(config, merge, point, in_proportion=in_proportion and i > numbers[0])
        self.post_init()
        self._check_bias()

    def _check_bias(self) -> None:
        """Raise RuntimeError where layers attend in proportion, for which attention has to take a bias for every key."""
        if self.config._attn_implementation in BIASED:
            return
        if any(isinstance(layer, MergingLayer) and layer.in_proportion for layer in self.get_submodule(self.layers_path)):
            given = f"{self.config._attn_implementation!r} behind tokens of different sizes"
            remedy = "Compress with proportional=False, or call set_attn_implementation('sdpa')"
            raise RuntimeError(complaint("attn_implementation", given, f"one of {', '.join(map(repr, BIASED))}", remedy))

    @property
    def merging_layers(self) -> list[MergingLayer]:
        """The encoder layers whose outputs are compressed, in order."""
        layers = self.get_submodule(self.layers_path)
        return [layers[layer - 1] for layer, _ in points_of(self.config)]

    @property
    def merges(self) -> list[Compressor]:
        """The compressors, in order."""
        return [layer.merge for layer in self.merging_layers]

    def _init_weights(self, module: nn.Module) -> None:
        # The merge itself may count as initialised, having no parameters of its own: its children are what is passed here.
        for layer in self.merging_layers:
            merge = getattr(layer, "merge", None)
            if merge is not None and any(module is part for part in merge.modules()):
                merge.reset_parameters()
                return
        super()._init_weights(module)

    def forward(
        self, pixel_values: torch.Tensor, *args: Any, return_dict: bool | None = None, **kwargs: Any
    ) -> ModelOutput | tuple[Any, ...]:
        """Encode images ``[B, 3, height, width]``; arguments and outputs are the stock model's."""
        self._check_bias()
        journey = Journey(route_of(self.config, self.merges, *pixel_values.shape[-2:]))
        # InternVL's encoder hands no keyword arguments on to its layers, so the journey travels beside the call: where layers
        # are compiled as an attribute, which is guarded on, and else in this thread's context.
        self.embeddings.journey = journey
        for layer in self.get_submodule(self.layers_path):
            if isinstance(layer, MergingLayer):
                layer.journey = journey
        if torch.compiler.is_compiling():
            outputs = super().forward(pixel_values, *args, return_dict=True, **kwargs)
        else:
            token = _current_journey.set(journey)
            try:
                outputs = super().forward(pixel_values, *args, return_dict=True, **kwargs)
            finally:
                _current_journey.reset(token)
        if journey.route.order is not None:
            self._restore_raster_order(outputs, journey.route.order)
        if return_dict is None:
            return_dict = getattr(self.config, "return_dict", True)
        return outputs if return_dict else outputs.to_tuple()

    def _restore_raster_order(self, outputs: ModelOutput, order: Cascade) -> None:
        """Put what came before each merge into raster order; merged states are shorter, which tells them apart."""
        for i, windows in enumerate(order.stages):
            before, rest = windows.num_tokens, Cascade(order.stages[i:])
            if outputs.hidden_states is not None:
                outputs.hidden_states = tuple(
                    rest.to_raster_order(state) if state is not None and state.shape[1] == before else state
                    for state in outputs.hidden_states
                )
            if outputs.attentions is not None:
                outputs.attentions = tuple(
                    rest.to_raster_order(rest.to_raster_order(weights, 2), 3) if weights.shape[-1] == before else weights
                    for weights in outputs.attentions
                )
