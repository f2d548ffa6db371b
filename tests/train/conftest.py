"""What the tests of training share."""

import pytest

import laco_kernels as lk

from ..hf.llava import llava, tokenizer


@pytest.fixture(scope="module")
def models():
    """A model and its processor for each way to write a conversation."""
    made = {}
    for chat_format in ("chatml", "llama3", "vicuna"):
        model = llava(depth=0.5)
        made[chat_format] = model, lk.hf.build_processor(model, tokenizer(chat_format))
    return made


@pytest.fixture
def processor(models):
    return models["chatml"][1]
