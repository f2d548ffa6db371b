"""Small multimodal models of transformers, one of each family whose connector `hf.patch` knows, and inputs for them."""

import importlib

import torch

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 50,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 4,  # 8 x 8 patches
}
IMAGE = 45  # the token that stands for a piece of an image
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
QWEN = {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_heads": 2, "depth": 2}
QWEN_IDS = {"image_token_id": IMAGE, "video_token_id": 46, "vision_start_token_id": 47, "vision_end_token_id": 48}
LLAVA = {
    "text_config": {"model_type": "llama", **TEXT},
    "vision_config": {"model_type": "clip_vision_model", **VISION},
    "image_token_index": IMAGE,
    "image_seq_length": 64,
}
LLAMA_ATTENTION = {"layer_types": ["full_attention"], "attention_chunk_size": 64}

# By package: the model's class, the arguments of its config, image tokens of an image, and where the connectors are.
MODELS = {
    "internvl": (
        "InternVLForConditionalGeneration",
        {
            "text_config": {"model_type": "qwen2", **TEXT},
            "vision_config": {**VISION, "image_size": [32, 32], "patch_size": [4, 4]},
            "image_token_id": IMAGE,
        },
        16,
        ["model.multi_modal_projector"],
    ),
    "qwen2_vl": (
        "Qwen2VLForConditionalGeneration",
        {
            "text_config": {**TEXT, "rope_parameters": MROPE},
            "vision_config": {**QWEN, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2},
            **QWEN_IDS,
        },
        16,
        ["model.visual.merger"],
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLForConditionalGeneration",
        {
            "text_config": {**TEXT, "rope_parameters": MROPE},
            "vision_config": {
                **QWEN,
                "hidden_size": 16,
                "out_hidden_size": 32,
                "intermediate_size": 24,
                "window_size": 16,
                "fullatt_block_indexes": [1],
            },
            **QWEN_IDS,
        },
        16,
        ["model.visual.merger"],
    ),
    "qwen3_vl": (
        "Qwen3VLForConditionalGeneration",
        {
            "text_config": {**TEXT, "rope_parameters": MROPE},
            "vision_config": {
                **QWEN,
                "hidden_size": 16,
                "out_hidden_size": 32,
                "intermediate_size": 24,
                "num_position_embeddings": 64,
                "deepstack_visual_indexes": [0],
            },
            **QWEN_IDS,
        },
        16,
        ["model.visual.merger", "model.visual.deepstack_merger_list.0"],
    ),
    "idefics3": (
        "Idefics3ForConditionalGeneration",
        {"text_config": {"model_type": "llama", **TEXT}, "vision_config": VISION, "image_token_id": IMAGE},
        16,
        ["model.connector"],
    ),
    "smolvlm": (
        "SmolVLMForConditionalGeneration",
        {
            "text_config": {"model_type": "llama", **TEXT},
            "vision_config": VISION,
            "image_token_id": IMAGE,
            "scale_factor": 4,
        },
        4,
        ["model.connector"],
    ),
    "llama4": (
        "Llama4ForConditionalGeneration",
        {
            "text_config": {**TEXT, **LLAMA_ATTENTION, "intermediate_size_mlp": 48, "num_local_experts": 2},
            "vision_config": {
                **VISION,
                "intermediate_size": 64,
                "vision_output_dim": 24,
                "projector_input_dim": 24,
                "projector_output_dim": 24,
            },
            "image_token_index": IMAGE,
        },
        16,
        ["vision_model.vision_adapter"],
    ),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        {
            "text_config": {**TEXT, "query_pre_attn_scalar": 8, "layer_types": ["full_attention"]},
            "vision_config": VISION,
            "mm_tokens_per_image": 16,
            "image_token_index": IMAGE,
            "boi_token_index": 47,
            "eoi_token_index": 48,
        },
        16,
        ["model.multi_modal_projector"],
    ),
    "llava": ("LlavaForConditionalGeneration", LLAVA, 64, ["model.multi_modal_projector"]),
}
# Those whose connector is that of another family by another name: package, class of the connector.
ALIKE = {
    "qwen3_vl_moe": "Qwen3VLMoeVisionPatchMerger",
    "llava_next": "LlavaNextMultiModalProjector",
    "llava_next_video": "LlavaNextVideoMultiModalProjector",
    "llava_onevision": "LlavaOnevisionMultiModalProjector",
}


def built(package, dtype=torch.float64, **changes):
    """A model whose parameters are all random, in training mode as transformers build them without dropout."""
    name, options, *_ = MODELS[package]
    cls = getattr(importlib.import_module(f"transformers.models.{package}.modeling_{package}"), name)
    torch.manual_seed(1)
    model = cls(cls.config_class(**options | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
            parameter.data = parameter.data.to(dtype)  # not the model: Llama 4 has complex buffers
    return model


def inputs(package, dtype=torch.float64):
    """Two images and a few words."""
    generator = torch.Generator().manual_seed(2)
    tokens = MODELS[package][2]
    words = torch.randint(3, 40, (2, 5), generator=generator)
    before = torch.full((2, 1), 47)
    ids = torch.cat([words[:, :2], before, torch.full((2, tokens), IMAGE), words[:, 2:]], 1)
    pixels = torch.randn(2, 3, 32, 32, generator=generator).to(dtype)
    named = {"input_ids": ids, "pixel_values": pixels}
    if package.startswith("qwen"):
        named["pixel_values"] = torch.randn(2 * 64, 3 * 2 * 4 * 4, generator=generator).to(dtype)
        named["image_grid_thw"] = torch.tensor([[1, 8, 8]] * 2)
        named["mm_token_type_ids"] = (ids == IMAGE).int()
    if package in ("idefics3", "smolvlm"):
        named["pixel_values"] = pixels[:, None]
    if package == "gemma3":
        named["token_type_ids"] = (ids == IMAGE).long()
    return named


def connectors_of(package, model):
    return [model.get_submodule(name) for name in MODELS[package][3]]


def features_of(package, dtype=torch.float64):
    """What the connectors of `built(package)` are given."""
    torch.manual_seed(4)
    shape = {"internvl": (2, 16, 64), "qwen2_vl": (128, 16), "qwen2_5_vl": (128, 16), "qwen3_vl": (128, 16)}
    shape = shape.get(package, (2, 64, 16))
    return [torch.randn(shape).to(dtype) for _ in MODELS[package][3]]


def alike(package):
    """The connector of a family of `ALIKE`, and an input for it."""
    modeling = importlib.import_module(f"transformers.models.{package}.modeling_{package}")
    configuration = importlib.import_module(f"transformers.models.{package}.configuration_{package}")
    torch.manual_seed(1)
    kind = getattr(modeling, ALIKE[package])
    if package == "qwen3_vl_moe":
        sizes = {"hidden_size": 16, "out_hidden_size": 32, **QWEN}
        connector = kind(configuration.Qwen3VLMoeVisionConfig(**sizes), use_postshuffle_norm=True)
    else:
        connector = kind(getattr(configuration, ALIKE[package].removesuffix("MultiModalProjector") + "Config")(**LLAVA))
    return connector.double(), torch.randn(2, 64, 16, dtype=torch.float64, requires_grad=True)
