"""An LLM small enough to be pretrained on the spot, by answering questions about scenes that are told and not shown.

Its tokenizer is trained on the same conversations.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from laco_kernels.train.conversation import IGNORED
from laco_kernels.train.questions import ask_several, describe
from laco_kernels.train.scenes import NEW_WORDS, WORDS, imagine
from laco_kernels.train.tiny_tower import pretrain

if TYPE_CHECKING:
    from collections.abc import Callable

WIDTH, LAYERS, HEADS, HIDDEN = 96, 3, 4, 288
VOCABULARY = 400
LEARNING_RATE = 3e-3
#: Of the normal distribution that weights are drawn from. Qwen2's own 0.02 is for a width of thousands: at this one attention
#: hardly leaves the uniform, and it takes several times as many steps until the LLM looks anything up.
SPREAD = 0.07
END, BEGIN, PADDING, IMAGE = "<|im_end|>", "<|im_start|>", "<|endoftext|>", "<image>"


def train_tokenizer(seed: int = 0) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer with ChatML's marks, trained on scenes told in words.

    Capital letters and digits are tokens of their own, so that an LLM spells words it has never seen.
    """
    source = random.Random(f"tokenizer {seed}")
    texts = []
    for _ in range(2000):
        scene = imagine(source)
        texts += [
            describe(scene),
            *[f"user\n{question.text}\nassistant\n{question.answer}" for question in ask_several(scene, source, 4)],
        ]
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex("[A-Z](?![a-z])|[0-9]"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    marks = [PADDING, BEGIN, END, IMAGE]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=marks, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PADDING,
        additional_special_tokens=[BEGIN, IMAGE],
        padding_side="left",
    )


def build_tiny_llm(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    """Return an untrained Qwen2 for a tokenizer."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=SPREAD,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config)


def told(source: random.Random, tokenizer: PreTrainedTokenizerFast, questions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and labels ``[tokens]`` of a conversation about a told scene; labels are -100 but for the answers."""
    scene = imagine(source, WORDS + NEW_WORDS)
    parts = [(f"{BEGIN}user\n{describe(scene)}\n", False)]
    for number, question in enumerate(ask_several(scene, source, questions)):
        parts += [
            (f"{BEGIN}user\n" * (number > 0) + f"{question.text}{END}\n{BEGIN}assistant\n", False),
            (f"{question.answer}{END}", True),
            ("\n", False),
        ]
    ids: list[int] = []
    labels: list[int] = []
    for (_, answered), tokens in zip(
        parts, tokenizer([text for text, _ in parts], add_special_tokens=False)["input_ids"], strict=True
    ):
        ids += tokens
        labels += tokens if answered else [IGNORED] * len(tokens)
    return torch.tensor(ids), torch.tensor(labels)


def pretrain_tiny_llm(
    tokenizer: PreTrainedTokenizerFast,
    steps: int,
    batch: int,
    seed: int = 0,
    on_step: Callable[[float], object] = lambda _: None,
    rate: float = LEARNING_RATE,
) -> Qwen2ForCausalLM:
    """Pretrain an LLM on the CPU, every step on new conversations, and return it frozen, in evaluation mode.

    Args:
        tokenizer: of :func:`train_tokenizer`.
        steps: how many.
        batch: conversations a step.
        seed: of weights and conversations.
        on_step: called before every step with how much is done.
        rate: the learning rate.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_tiny_llm(tokenizer)
    source = random.Random(f"told {seed}")

    def loss(_: float) -> torch.Tensor:
        rows = [told(source, tokenizer, 6) for _ in range(batch)]
        ids = pad_sequence([row[0] for row in rows], True, tokenizer.pad_token_id)
        labels = pad_sequence([row[1] for row in rows], True, IGNORED)
        return model(input_ids=ids, labels=labels).loss

    pretrain([model], loss, steps, on_step, rate)
    return model
