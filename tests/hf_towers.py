"""Tiny random folders of language models beside other models, written by transformers."""

import hf_families
import hf_folders
import torch
import transformers

SIZES = {key: value for key, value in hf_folders.SIZES.items() if key not in ("rope_parameters", "tie_word_embeddings")}
SIZES |= {"hidden_size": 64, "pad_token_id": 0}
MROPE = {"rope_type": "default", "rope_theta": 500.0, "mrope_section": [2, 3, 3]}
LOCAL = {"rope_type": "default", "rope_theta": 60.0}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 1, "depth": 1}
QWEN_VISION = VISION | {"num_heads": 2, "out_hidden_size": 64, "patch_size": 4, "fullatt_block_indexes": [0]}
GEMMA_VISION = VISION | {"num_key_value_heads": 2, "head_dim": 16, "patch_size": 4, "position_embedding_size": 64}
QWEN_VISION |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
CASES = {
    "gemma3": (
        "Gemma3",
        {"sliding_window": 37, "rope_parameters": {"full_attention": LOCAL, "sliding_attention": LOCAL}},
        VISION | {"image_size": 28, "patch_size": 14},
        {"tie_word_embeddings": True, "mm_tokens_per_image": 4},
    ),
    "gemma4": ("Gemma4", hf_families.GEMMA4 | {"pad_token_id": 0}, GEMMA_VISION, {"tie_word_embeddings": True}),
    "qwen2.5-vl": ("Qwen2_5_VL", {"rope_parameters": MROPE}, QWEN_VISION, {"tie_word_embeddings": False}),
    "qwen3-vl": (
        "Qwen3VL",
        {"rope_parameters": MROPE | {"mrope_interleaved": True}},
        QWEN_VISION,
        {"tie_word_embeddings": True},
    ),
    "qwen3.5": (
        "Qwen3_5",
        {**hf_families.HYBRID, "rope_parameters": MROPE | {"partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}},
        QWEN_VISION,
        {"tie_word_embeddings": False},
    ),
    "qwen3.5-moe": (
        "Qwen3_5Moe",
        {
            **hf_families.HYBRID,
            **hf_families.SHARED,
            "rope_parameters": MROPE | {"partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]},
        },
        QWEN_VISION,
        {"tie_word_embeddings": False},
    ),
    "mistral3": (
        "Mistral3",
        {"model_type": "mistral", "sliding_window": None, "rope_parameters": LOCAL},
        VISION | {"model_type": "pixtral", "image_size": 28, "patch_size": 14, "head_dim": 16},
        {"tie_word_embeddings": False},
    ),
}


def save(folder, case):
    """A tiny random model with its other models; returns the model."""
    name, text, vision, extra = CASES[case]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(text_config=SIZES | text, vision_config=vision, **extra)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model
