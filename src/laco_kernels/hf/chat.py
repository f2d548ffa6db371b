"""How a conversation with images is written out for an LLM: ChatML (Qwen2, Qwen2.5), Llama 3 and Vicuna.

Templates are Jinja, as tokenizers keep them. An image is written as the image token and a line break, where it stands in a
message; a processor then repeats the token. A system message is written where one is given, none is made up. The token that
begins a text is left to the tokenizer, which puts it in front.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONTENT = """\
{%- macro written(content) -%}
{%- if content is string -%}{{ content }}
{%- else -%}
{%- for part in content -%}
{%- if part['type'] == 'image' -%}{{ '<image>\\n' }}
{%- elif part['type'] == 'text' -%}{{ part['text'] }}
{%- else -%}{{ raise_exception("content: got a part of type '" ~ part['type'] ~ "', expected 'image' or 'text'. \
Pass the frames of a video as images.") }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
"""

_CHATML = """\
{%- for message in messages -%}
{{ '<|im_start|>' ~ message['role'] ~ '\\n' ~ written(message['content']) ~ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""

_LLAMA3 = """\
{%- for message in messages -%}
{{ '<|start_header_id|>' ~ message['role'] ~ '<|end_header_id|>\\n\\n' ~ written(message['content']) ~ '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif -%}
"""

_VICUNA = """\
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}{{ 'USER: ' ~ written(message['content']) ~ ' ' }}
{%- elif message['role'] == 'assistant' -%}{{ 'ASSISTANT: ' ~ written(message['content']) ~ eos_token }}
{%- else -%}{{ written(message['content']) ~ ' ' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}
"""


@dataclass(frozen=True)
class ChatFormat:
    """A way to write out conversations.

    Args:
        template: in Jinja, with ``<image>`` for the image token.
        marks: tokens that a tokenizer has if it was made for this format, the one that ends a turn last.
    """

    template: str
    marks: tuple[str, ...]


#: By name, in the order in which a tokenizer's tokens are compared with their marks.
CHAT_FORMATS = {
    "chatml": ChatFormat(_CONTENT + _CHATML, ("<|im_start|>", "<|im_end|>")),
    "llama3": ChatFormat(_CONTENT + _LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "vicuna": ChatFormat(_CONTENT + _VICUNA, ()),
}


def chat_format_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the name of the format whose marks a tokenizer has; ``"vicuna"``, which needs none, else."""
    vocabulary = tokenizer.get_vocab()
    return next(name for name, form in CHAT_FORMATS.items() if all(mark in vocabulary for mark in form.marks))
