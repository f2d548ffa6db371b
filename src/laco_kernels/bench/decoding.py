"""Greedy generation by a LLaVA-style model: as transformers does it, and over a static cache whose work can be CUDA graphs.

Both make a fixed number of tokens, no token ends an answer, and both note when each part of the way to the first token was
done: the encoder, the projector, the LLM's prefill.
"""

from __future__ import annotations

import contextlib
import gc
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import StaticCache, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import Cache, CacheLayerMixin

from laco_kernels.bench.timing import stamp
from laco_kernels.hf.fusing import launches_are_free
from laco_kernels.hf.graphs import WARMUPS, capturing_stream
from laco_kernels.hf.image_tokens import patches_at, prefix_tokens_of, state_number
from laco_kernels.hf.points import as_list

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import LlavaForConditionalGeneration

    from laco_kernels.bench.llava_cases import Prompt

PARTS = ("vision", "projector", "prefill", "decode")


@dataclass
class Generated:
    """Tokens ``[batch, new]``, and six stamps: start, the encoder's start and end, and the ends of the other :data:`PARTS`."""

    tokens: torch.Tensor
    stamps: list[Any]


class Eager:
    """``model.generate`` as transformers does it: a growing cache, a launch for every operator.

    The projector begins where the encoder ends; prefill is everything else up to the first token, so the parts add up.
    """

    held_bytes = 0

    def __init__(self, model: LlavaForConditionalGeneration, prompt: Prompt, new_tokens: int) -> None:
        self.model, self.prompt, self.new_tokens = model, prompt, new_tokens

    def __call__(self) -> Generated:
        """Generate."""
        device, stamps = self.prompt.ids.device, [stamp(self.prompt.ids.device)]
        parts: Any = (self.model.model.vision_tower, self.model.model.multi_modal_projector)
        handles = [part.register_forward_hook(lambda *_: stamps.append(stamp(device))) for part in parts]
        handles.append(parts[0].register_forward_pre_hook(lambda *_: stamps.append(stamp(device))))
        try:
            tokens = self.model.generate(
                **self.prompt.inputs,
                max_new_tokens=self.new_tokens,
                do_sample=False,
                stopping_criteria=StoppingCriteriaList([_FirstToken(stamps, device)]),
            )
        finally:
            for handle in handles:
                handle.remove()
        made = cast("torch.Tensor", tokens)[:, self.prompt.ids.shape[1] :]
        return Generated(made, [*stamps, stamp(device)])

    def logits(self, forced: torch.Tensor) -> torch.Tensor:
        """Return the logits ``[batch, 1 + new, vocabulary]`` behind the prompt and behind each of ``forced [batch, new]``."""
        with torch.inference_mode():
            out = self.model(**self.prompt.inputs, use_cache=True, logits_to_keep=1)
            found = [out.logits]
            for token in forced.split(1, 1):
                out = self.model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
                found.append(out.logits)
        return torch.cat(found, 1)


class _FirstToken(StoppingCriteria):
    """Stops nothing; notes when the first token is there."""

    def __init__(self, stamps: list[Any], device: torch.device) -> None:
        self.stamps, self.device = stamps, device

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> Any:
        if len(self.stamps) == 4:
            self.stamps.append(stamp(self.device))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class PromptLayer(CacheLayerMixin):
    """A layer of a static cache while the prompt is read into it: attention sees the prompt alone, without a mask.

    Over the static cache itself it would see what is not there yet, through a mask, which rules out the fastest kernels.
    """

    def __init__(self, static: Any) -> None:
        super().__init__()
        self.static, self.is_initialized = static, True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: the static cache is there."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> tuple[Any, Any]:
        """Keep the prompt's ``[batch, heads, tokens, width]`` and return them."""
        length = key_states.shape[-2]
        self.static.keys[:, :, :length].copy_(key_states)
        self.static.values[:, :, :length].copy_(value_states)
        self.static.cumulative_length.fill_(length)
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As many keys as queries."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """Nothing lies before a prompt."""
        return 0

    def get_max_length(self) -> int:
        """What the static cache holds."""
        return int(self.static.max_cache_len)


class Work:
    """Work on tensors that stay where they are: replayed as a CUDA graph once it was captured, carried out until then."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.work = work
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        """Do it."""
        if self.graph is None:
            self.work()
        else:
            self.graph.replay()

    def capture(self, device: torch.device, pool: Any) -> None:
        """Capture it."""
        side = capturing_stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        gc.collect()  # else it may free something while the graph is captured
        graph = torch.cuda.CUDAGraph()
        with launches_are_free():
            with torch.cuda.stream(side):
                for _ in range(WARMUPS):
                    self.work()
            side.synchronize()
            with torch.cuda.graph(graph, pool=pool, stream=side):
                self.work()
        torch.cuda.current_stream(device).wait_stream(side)
        self.graph = graph


class Static:
    """The same over a static cache: four pieces of work on buffers, the last one repeated for every token.

    Argmax and token count stay on the device, so that nothing waits for it within an answer. With ``graphs`` the step is
    captured, with ``graph_prompt`` the other three pieces as well; without them the same code runs uncaptured.

    Args:
        model: in evaluation mode.
        prompt: what it is asked.
        new_tokens: how many tokens to generate, at least 2.
        graphs: capture the step as a CUDA graph.
        graph_prompt: capture encoder, projector and prefill as well.
    """

    def __init__(
        self,
        model: LlavaForConditionalGeneration,
        prompt: Prompt,
        new_tokens: int,
        *,
        graphs: bool = False,
        graph_prompt: bool = False,
    ) -> None:
        self.model, self.prompt, self.new_tokens = model, prompt, new_tokens
        device, text = prompt.ids.device, cast("Any", model.config.text_config)
        batch, length = prompt.ids.shape
        before = torch.cuda.memory_reserved(device) if device.type == "cuda" else 0
        self.cache = StaticCache(config=text, max_cache_len=length + max(new_tokens, WARMUPS))
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        self.cache.early_initialization(batch, text.num_key_value_heads, head_dim, model.dtype, device)
        self.reading = Cache(layers=[PromptLayer(layer) for layer in self.cache.layers])
        self.token = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.made = torch.zeros(batch, new_tokens, dtype=torch.long, device=device)
        self.count = torch.zeros(1, dtype=torch.long, device=device)
        self.last_logits = torch.zeros(batch, 1, text.vocab_size, dtype=model.dtype, device=device)
        self.image = prompt.image  # looked up on the host, which a capture could not
        self.states: list[torch.Tensor] = []
        self.features = torch.zeros(())
        self.vision, self.projector, self.prefill, self.step = map(
            Work, (self._vision, self._projector, self._prefill, self._step)
        )
        with torch.inference_mode():
            self._run()
            if graphs:
                pool = torch.cuda.graph_pool_handle()
                for work in (self.vision, self.projector, self.prefill) if graph_prompt else ():
                    work.capture(device, pool)
                self.prefill()  # the step's warm-up went on behind an answer that was full
                self.step.capture(device, pool)
        self.held_bytes = 0
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what is free again is not held
            self.held_bytes = torch.cuda.memory_reserved(device) - before

    def _vision(self) -> None:
        self.states = image_states(self.model, self.prompt.pixels)

    def _projector(self) -> None:
        self.features = project(self.model, self.states, self.prompt.pixels)

    def _prefill(self) -> None:
        embeddings = self.model.get_input_embeddings()(self.prompt.ids)
        embeddings[:, self.image] = self.features
        self.count.zero_()
        self._take(read_prompt(self.model.model.language_model, embeddings, self.reading))

    def _step(self) -> None:
        language: Any = self.model.model.language_model
        embeddings = self.model.get_input_embeddings()(self.token)
        self._take(language(inputs_embeds=embeddings, past_key_values=self.cache, use_cache=True).last_hidden_state)

    def _take(self, hidden: torch.Tensor) -> None:
        logits = self.model.lm_head(hidden)
        self.last_logits.copy_(logits)
        self.token.copy_(logits.argmax(-1))
        self.made.index_copy_(1, self.count.remainder(self.new_tokens), self.token)  # warm-ups count on
        self.count.add_(1)

    def _run(self) -> list[Any]:
        device = self.prompt.ids.device
        stamps = [stamp(device)]
        for work in (self.vision, self.projector, self.prefill):
            work()
            stamps.append(stamp(device))
        for _ in range(self.new_tokens - 1):
            self.step()
        return [stamps[0], *stamps, stamp(device)]

    def __call__(self) -> Generated:
        """Generate; the tokens are overwritten by the next call."""
        with torch.inference_mode():
            stamps = self._run()
        return Generated(self.made, stamps)

    def logits(self, forced: torch.Tensor) -> torch.Tensor:
        """Return what :meth:`Eager.logits` does."""
        with torch.inference_mode():
            for work in (self.vision, self.projector, self.prefill):
                work()
            found = [self.last_logits.clone()]
            for token in forced.split(1, 1):
                self.token.copy_(token)
                self.step()
                found.append(self.last_logits.clone())
        return torch.cat(found, 1)


def image_states(model: LlavaForConditionalGeneration, pixels: torch.Tensor) -> list[torch.Tensor]:
    """Return the ``hidden_states`` that the projector reads, ``[batch, P + N, C]`` each."""
    tower: Any = model.model.vision_tower
    states = tower(pixels, output_hidden_states=True, return_dict=True).hidden_states
    vision = model.config.vision_config
    return [states[state_number(vision, layer)] for layer in as_list(model.config.vision_feature_layer)]


def project(model: LlavaForConditionalGeneration, states: list[torch.Tensor], pixels: torch.Tensor) -> torch.Tensor:
    """Return the image's tokens ``[batch, N', D]``, by a projector of ours or by LLaVA's own."""
    projector: Any = model.model.multi_modal_projector
    vision = model.config.vision_config
    if hasattr(projector, "compressor"):
        merges = getattr(model.model.vision_tower, "merges", ())
        layer = as_list(model.config.vision_feature_layer)[0]
        height, width = pixels.shape[-2:]
        _, grid = patches_at(vision, merges, height, width, state_number(vision, layer))
        return cast("torch.Tensor", projector(states, grid))
    return cast("torch.Tensor", projector(states[0][:, prefix_tokens_of(vision) :]))


def read_prompt(language: Any, embeddings: torch.Tensor, cache: Cache) -> torch.Tensor:
    """Return what an LLM makes of the last token ``[batch, 1, D]`` of a prompt ``[batch, tokens, D]`` of which none is padding.

    Its own forward pass lays a mask over the prompt where a CUDA graph is captured, and only there; with it attention takes
    a slower kernel and copies keys and values for every head that shares them.
    """
    positions = torch.arange(embeddings.shape[1], device=embeddings.device)[None]
    common: dict[str, Any] = {"position_ids": positions, "position_embeddings": language.rotary_emb(embeddings, positions)}
    common |= {"attention_mask": None, "past_key_values": cache, "use_cache": True}
    *layers, last = language.layers
    for layer in layers:
        embeddings = layer(embeddings, **common)
    attended, _ = last.self_attn(hidden_states=last.input_layernorm(embeddings), **common)
    hidden = (embeddings + attended)[:, -1:]  # nobody reads what the last layer would make of the others from here on
    return cast("torch.Tensor", language.norm(hidden + last.mlp(last.post_attention_layernorm(hidden))))


@contextlib.contextmanager
def exactly(model: LlavaForConditionalGeneration) -> Iterator[None]:
    """Let ``model`` compute in float64: each part's weights are cast while it runs, so that only one of them is in memory.

    Weights come back as they were. Norms that compute in float32 do so here, too.
    """
    inner: Any = model.model
    language = inner.language_model
    parts = [inner.vision_tower, inner.multi_modal_projector, language.embed_tokens, *language.layers, language.norm]
    kept: dict[int, list[tuple[torch.nn.Parameter, torch.Tensor]]] = {}

    def widen(part: Any, args: Any, kwargs: Any) -> Any:
        kept[id(part)] = [(parameter, parameter.data) for parameter in part.parameters()]
        for parameter, data in kept[id(part)]:
            parameter.data = data.double()
        return _doubled(args), _doubled(kwargs)

    def narrow(part: Any, *_: Any) -> None:
        for parameter, data in kept.pop(id(part), ()):
            parameter.data = data

    handles = [part.register_forward_pre_hook(widen, with_kwargs=True) for part in (*parts, model.lm_head)]
    handles += [part.register_forward_hook(narrow, always_call=True) for part in (*parts, model.lm_head)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _doubled(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, (list, tuple)):
        return type(value)(map(_doubled, value))
    return {name: _doubled(part) for name, part in value.items()} if type(value) is dict else value
