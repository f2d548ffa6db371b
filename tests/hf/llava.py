"""Small LLaVA-style models, tokenizers trained on the spot, and pictures."""

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

import laco_kernels as lk

from .encoders import stock

TEXT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 320,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
LLMS = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}
MARKS = {
    "chatml": ["<|endoftext|>", "<|im_end|>", "<|im_start|>"],
    "llama3": ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"],
    "vicuna": ["<s>", "</s>"],
}
# Inside and behind, as build_llava takes them, with the tokens of 4 x 4 and of 5 x 5 patches.
VARIANTS = {
    "llava": ({}, 16, 25),
    "laco": ({"depth": 0.5}, 4, 9),
    "laco@1": ({"compressor": "laco", "layer": 4}, 4, 9),
    "tome": ({"compressor": "tome", "layer": 2}, 4, 7),
    "mbtf+stf": ({"projector": "mbtf+stf", "projector_options": {"num_blocks": 2}}, 4, 9),
    "stf": ({"projector": "stf", "projector_options": {"num_tokens": 2}}, 8, 18),
    "mbtf": ({"projector": "mbtf", "projector_options": {"num_blocks": 3}}, 16, 25),
    "pixel_shuffle": ({"projector": "pixel_shuffle"}, 4, 9),
    "twice": ({"depth": 0.5, "projector": "ldpv2", "projector_options": {"ratio": 2}}, 1, 4),
}


def llm(kind="qwen2", **changes):
    config_class, model_class = LLMS[kind]
    torch.manual_seed(4)
    return model_class(config_class(**TEXT | changes)).eval()


def llava(family="clip", kind="qwen2", side=4, text=None, **options):
    """A small model in float32 whose every parameter matters, in evaluation mode."""
    tower = stock(family, side=side, dtype=torch.float32)
    torch.manual_seed(5)
    model = lk.hf.build_llava(tower, llm(kind) if text is None else text, **options).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "projector" in name or ".merge." in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def tokenizer(chat_format="chatml"):
    """Bytes, merged where a few sentences suggest it, and the tokens that mark a format's turns."""
    marks = MARKS[chat_format]
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=marks, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    trained.train_from_iterator(["What is in this picture? A red square, and two blue circles."] * 4, trainer)
    if chat_format != "chatml":  # Llama's tokenizers put a token in front of a text, Qwen's do not
        trained.post_processor = processors.TemplateProcessing(single=f"{marks[0]} $A", special_tokens=[(marks[0], 0)])
    bos = {"bos_token": marks[0]} if chat_format != "chatml" else {}
    return PreTrainedTokenizerFast(tokenizer_object=trained, eos_token=marks[1], **bos)


def picture(width=70, height=50, colour=(200, 30, 30)):
    image = Image.new("RGB", (width, height), colour)
    image.paste((20, 20, 220), (width // 4, height // 4, width // 2, height // 2))
    return image


def user(*parts):
    """A message of a user; a picture where a part is ``None`` or an image, text else."""
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", **({"image": part} if part else {})}
        for part in parts
    ]
    return {"role": "user", "content": content}
