"""LLaVA-style models of this package as models of lmms-eval: ``--model laco --model_args pretrained=FOLDER``."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.model import lmms
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

import laco_kernels.hf  # noqa: F401 - registers the compressed models
from laco_kernels.errors import complaint
from laco_kernels.geometry import integer
from laco_kernels.hf.answer import load_pair, prepare
from laco_kernels.images import open_image

logger = logging.getLogger(__name__)

MAX_NEW_TOKENS = 1024  # where a task does not say
#: What tasks say about generation; other entries are of models that they were written for.
KNOWN = ("max_new_tokens", "max_gen_toks", "temperature", "top_p", "num_beams", "do_sample", "until")
IMAGE = "<image>"  # how tasks mark where an image stands in a text
Messages = list[dict[str, Any]]


class LacoLmms(lmms):
    """A saved model with its processor, asked with a text and a list of images (lmms-eval's simple models).

    Args:
        pretrained: a folder with a model and its processor, or a hub name.
        device: where it runs, ``"cuda"`` where there is a GPU; with several processes each takes the GPU of its number.
        dtype: of the weights; bfloat16 on a GPU and float32 elsewhere.
        batch_size: prompts that are answered together.
        max_new_tokens: where a task does not say.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`laco_kernels.hf.answer.load_pair`.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int | str = 1,
        max_new_tokens: int | str = MAX_NEW_TOKENS,
    ) -> None:
        super().__init__()
        from accelerate import Accelerator

        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        several = self._world_size > 1
        self.device = self.accelerator.device if several or device is None else torch.device(device)
        kind = dtype or ("bfloat16" if self.device.type == "cuda" else "float32")
        precision = getattr(torch, kind, None)
        if not isinstance(precision, torch.dtype):
            raise ValueError(complaint("dtype", repr(dtype), "float32, bfloat16 or float16", "Pass dtype=bfloat16"))
        self.batch_size = _number("batch_size", batch_size)
        self.max_new_tokens = _number("max_new_tokens", max_new_tokens)
        self.model, self.processor = load_pair(str(pretrained), device=self.device, dtype=precision, argument="pretrained")
        self.tokenizer = self.processor.tokenizer

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answer every request; those with the same settings are answered in batches."""
        asked = [self._ask(request.args) for request in requests]
        groups: dict[str, list[int]] = {}
        for i, (_, _, settings) in enumerate(asked):
            groups.setdefault(json.dumps(settings, sort_keys=True, default=str), []).append(i)
        answers: dict[int, str] = {}
        for group in groups.values():
            options, until = self._options(asked[group[0]][2])
            for batch in _chunks(group, self.batch_size):
                texts = self._generate([asked[i][1]() for i in batch], options)
                for i, text in zip(batch, texts, strict=True):
                    answers[i] = _cut(text, until)
                    context, _, settings = asked[i]
                    self.cache_hook.add_partial("generate_until", (context, settings), answers[i])
        return [answers[i] for i in range(len(asked))]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Return the log-probability of every continuation, and whether greedy decoding would write it."""
        found: list[tuple[float, bool]] = []
        for batch in _chunks(requests, self.batch_size):
            pairs = [self._continued(*request.args) for request in batch]
            scored = self._score(pairs)
            for request, pair in zip(batch, scored, strict=True):
                found.append(pair)
                self.cache_hook.add_partial("loglikelihood", request.args[:2], pair)
        return found

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refused: every round of such a task depends on the answer to the one before."""
        raise NotImplementedError(complaint("task", "one of several rounds", "one of a single round", "Leave it out"))

    def _ask(self, args: Sequence[Any]) -> tuple[str, Callable[[], Messages], dict[str, Any]]:
        """Return of a request its text, how to come by its messages, and its settings; images are opened when needed."""
        context, settings, doc_to_visual, doc_id, task, split = args
        return context, lambda: self._shown(context, doc_to_visual, doc_id, task, split), settings

    def _shown(self, context: str, doc_to_visual: Any, doc_id: Any, task: str, split: str) -> Messages:
        visuals = doc_to_visual(self.task_dict[task][split][doc_id]) or []
        return [{"role": "user", "content": self._content(context, [_picture(visual) for visual in visuals])}]

    def _content(self, text: str, images: Sequence[Image.Image]) -> list[dict[str, Any]]:
        """Put images where the text has marks for them, and in front of it where these are not as many."""
        pieces = re.split("|".join(map(re.escape, {IMAGE, self.processor.image_token})), text)
        if len(pieces) - 1 != len(images):
            if len(pieces) > 1:
                logger.warning("%d marks for %d images in a text; the images come first.", len(pieces) - 1, len(images))
            pieces = [*[""] * len(images), "".join(pieces)]
        parts: list[dict[str, Any]] = []
        for i, piece in enumerate(pieces):
            parts += [{"type": "text", "text": piece}] if piece.strip() else []
            parts += [{"type": "image", "image": images[i]}] if i < len(images) else []
        return parts

    def _options(self, settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Return what ``generate`` takes, and the texts that end an answer."""
        if ignored := [name for name in settings if name not in KNOWN]:
            logger.warning("Generation settings that mean nothing here: %s.", ", ".join(ignored))
        until = settings.get("until") or []
        most = settings.get("max_new_tokens", settings.get("max_gen_toks"))
        temperature = settings.get("temperature") or 0
        options: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens if most is None else int(most),
            "num_beams": settings.get("num_beams") or 1,
            "do_sample": bool(settings.get("do_sample", True) and temperature > 0),
        }
        if options["do_sample"]:
            options |= {"temperature": temperature, "top_p": settings.get("top_p") or None}
        return options, [until] if isinstance(until, str) else list(until)

    @torch.inference_mode()
    def _generate(self, conversations: Sequence[Messages], options: Mapping[str, Any]) -> list[str]:
        inputs = prepare(self.processor, conversations, self.device, self.model.dtype)
        written = self.model.generate(**inputs, **options)
        new = written[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.processor.batch_decode(new, skip_special_tokens=True)]

    def _continued(self, context: str, target: Any, *rest: Any) -> tuple[Messages, str]:
        """Return the messages and the continuation of a request, which of unconditional ones are all there is."""
        if not rest:
            return [{"role": "user", "content": self._content(context, [])}], target
        doc_to_visual, doc_id, task, split = rest
        continuation = target if isinstance(target, str) else target(self.task_dict[task][split][doc_id])
        return self._shown(context, doc_to_visual, doc_id, task, split), str(continuation)

    @torch.inference_mode()
    def _score(self, pairs: Sequence[tuple[Messages, str]]) -> list[tuple[float, bool]]:
        prompts = [prepare(self.processor, [messages], self.device, self.model.dtype) for messages, _ in pairs]
        targets = [
            torch.tensor(self.tokenizer.encode(text, add_special_tokens=False), dtype=torch.long, device=self.device)
            for _, text in pairs
        ]
        starts = [prompt["input_ids"].shape[1] for prompt in prompts]
        rows = [torch.cat([prompt["input_ids"][0], target]) for prompt, target in zip(prompts, targets, strict=True)]
        # Padding behind a text changes nothing in front of it.
        ids = pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        images = [prompt["pixel_values"] for prompt in prompts if "pixel_values" in prompt]
        first = min(starts) - 1  # logits are large: none is made of what only images and questions say
        logits = self.model(
            input_ids=ids,
            attention_mask=mask,
            pixel_values=torch.cat(images) if images else None,
            logits_to_keep=torch.arange(first, ids.shape[1] - 1, device=self.device),
        ).logits
        found = []
        for row, start, target in zip(logits, starts, targets, strict=True):
            precise = torch.promote_types(row.dtype, torch.float32)
            chances = row[start - 1 - first :][: len(target)].to(precise).log_softmax(-1)
            total = chances.gather(1, target[:, None]).sum()
            found.append((float(total), bool((chances.argmax(-1) == target).all())))
        return found


class LacoLmmsChat(LacoLmms):
    """The same, asked with messages in which text and images take turns (lmms-eval's chat models)."""

    is_simple = False

    def _ask(self, args: Sequence[Any]) -> tuple[str, Callable[[], Messages], dict[str, Any]]:
        context, doc_to_messages, settings, doc_id, task, split = args
        return context, lambda: self._written(doc_to_messages(self.task_dict[task][split][doc_id])), settings

    def _written(self, messages: Iterable[Mapping[str, Any]]) -> Messages:
        return [{"role": message["role"], "content": list(self._parts(message["content"]))} for message in messages]

    def _parts(self, content: str | Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] == "text":
                yield from self._content(part["text"], [])
            elif part["type"] == "image":
                url = part["url"]
                yield {"type": "image", "image": open_image(Path(url)) if isinstance(url, str) else _picture(url)}
            else:
                raise TypeError(complaint("task", f"one that shows {part['type']}s", "text and images", "Leave it out"))


def _number(name: str, value: int | str) -> int:
    """Read a number that comes from a command line; none is found out by trying, as ``auto`` would have it."""
    if isinstance(value, str) and not value.isdecimal():
        raise ValueError(complaint(name, repr(value), "a positive integer", f"Pass {name}=1"))
    return int(integer(name, int(value), 1))


def _picture(visual: Any) -> Image.Image:
    if not isinstance(visual, Image.Image):
        given = f"a {type(visual).__name__}, as of a video"
        raise TypeError(complaint("doc_to_visual", given, "images", "Leave the task out, or pass frames as images"))
    return visual.convert("RGB")


def _cut(text: str, until: Iterable[str]) -> str:
    """Return ``text`` up to the first of ``until``."""
    ends = [text.find(end) for end in until if end and end in text]
    return text[: min(ends)].strip() if ends else text


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
