"""What a large language model computes before its first token: prefill operations, counted on shapes alone."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from laco_kernels.errors import complaint
from laco_kernels.geometry import integer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FOLDER = Path(__file__).parent / "llms"
DEFAULT_LLM = "vicuna-7b"

#: STF's table: TFLOPs by visual tokens, ``E * 576 / k**2`` for windows of ``k x k`` that become ``E`` tokens each.
PAPER_TFLOPS = {576: 7.6, 288: 3.8, 144: 1.9, 72: 0.9, 36: 0.5}


def llm_names() -> list[str]:
    """Return the names of the language models whose shapes the package carries."""
    return sorted(path.name for path in FOLDER.iterdir() if path.is_dir())


def prefill_tflops(model_name: str, visual_tokens: int, text_tokens: int = 0) -> float:
    """Return the operations, in units of 10^12, of a forward pass over ``visual_tokens + text_tokens`` positions.

    Counted by :mod:`torch.utils.flop_counter` on the meta device: every matrix product of every layer, a multiply-add as
    two operations; attention as the full square of positions, causal or not; the head on the last position only, since
    prefill asks for one token. One image and one prompt, no encoder, no projector.

    The table of the STF paper (Vicuna-7B, :data:`PAPER_TFLOPS`) does not say how it was counted. This way of counting
    gives all its figures with ``text_tokens=0``, the default: 7.63, 3.77, 1.88, 0.94 and 0.47, printed as 7.6, 3.8, 1.9,
    0.9 and 0.5. One token of text still does, two no longer. Nor does it with the head on every position (7.79), with
    half the attention (7.548), without it (7.46), with the head everywhere and no attention (7.61, but 0.951 for 0.9), or
    with a multiply-add as one operation.

    Args:
        model_name: one of :func:`llm_names`.
        visual_tokens: tokens of the image that reach the model.
        text_tokens: tokens of the prompt.

    Raises:
        TypeError: a number is not an integer.
        ValueError: the model is unknown, a number is negative, or there are no tokens at all.
    """
    visual, text = integer("visual_tokens", visual_tokens, 0), integer("text_tokens", text_tokens, 0)
    if not visual + text:
        raise ValueError(complaint("visual_tokens", 0, "at least one token of image or text", "Pass the prompt's length"))
    return _count(model_name, visual + text)


@functools.cache
def _count(model_name: str, length: int) -> float:
    model = _skeleton(model_name)
    with torch.device("meta"):
        embeddings = torch.empty(1, length, model.config.hidden_size)
        # With a mask of its own transformers does not look into the positions, which have no values here.
        mask = torch.empty(1, 1, length, length)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(inputs_embeds=embeddings, attention_mask=mask, use_cache=False, logits_to_keep=1)
    return counter.get_total_flops() / 1e12


@functools.cache
def _skeleton(name: str) -> PreTrainedModel:
    """Build the model without any values in it."""
    if name not in llm_names():
        raise ValueError(complaint("model_name", repr(name), f"one of {', '.join(llm_names())}", f"Try {DEFAULT_LLM!r}"))
    config = AutoConfig.from_pretrained(FOLDER / name)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).eval()
