"""Tiny configs of families other than Llama and Qwen, with all switches: case -> (transformers class, its keys)."""

from __future__ import annotations

from typing import Any

YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 64}
PLAIN = {"rope_type": "default", "rope_theta": 500.0}
LOCAL = {"rope_type": "default", "rope_theta": 60.0}
LONG = {  # a factor for each pair of the 8 channels that turn
    "rope_type": "longrope",
    "rope_theta": 500.0,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.1, 1.3, 1.7],
    "long_factor": [1.5, 2.0, 4.0, 6.5],
}
HYBRID = {
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_conv_kernel_dim": 3,
}
SHARED = {
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "shared_expert_intermediate_size": 24,
}
SIGMOID = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "n_shared_experts": 2,
    "routed_scaling_factor": 1.7,
    "first_k_dense_replace": 1,
}
LATENT = {
    "head_dim": 8,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "n_group": 1,
    "topk_group": 1,
}
GEMMA4 = {
    "sliding_window": 37,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_hidden_layers": 4,
    "global_head_dim": 24,
    "hidden_size_per_layer_input": 0,
    "pad_token_id": None,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "full_attention": {"rope_type": "proportional", "rope_theta": 9e3, "partial_rotary_factor": 0.25},
        "sliding_attention": LOCAL,
    },
}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("Mistral", {"sliding_window": 37}),
    "mistral-full-tied": ("Mistral", {"sliding_window": None, "tie_word_embeddings": True, "rope_parameters": YARN}),
    "ministral": ("Ministral", {"sliding_window": 37, "layer_types": MIXED}),
    "smollm3": ("SmolLM3", {"pad_token_id": 0, "no_rope_layers": [1, 0, 1], "tie_word_embeddings": True}),
    "smollm3-biases": (
        "SmolLM3",
        {"pad_token_id": 0, "no_rope_layer_interval": 2, "attention_bias": True, "mlp_bias": True},
    ),
    "granite": (
        "Granite",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.3,
            "logits_scaling": 0.25,
            "attention_bias": True,
        },
    ),
    "olmo2": ("Olmo2", {}),
    "olmo3": (
        "Olmo3",
        {
            "sliding_window": 37,
            "layer_types": MIXED,
            "attention_bias": True,
            "rope_parameters": {"full_attention": YARN, "sliding_attention": LOCAL},
        },
    ),
    "olmoe": ("Olmoe", {"pad_token_id": None, "hidden_size": 64, "num_experts": 8, "num_experts_per_tok": 3}),
    "olmoe-renormalised-biases": (
        "Olmoe",
        {
            "pad_token_id": None,
            "hidden_size": 64,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
            "attention_bias": True,
        },
    ),
    "exaone4": ("Exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 3}),
    "exaone4-window-tied": (
        "Exaone4",
        {"sliding_window": 37, "layer_types": MIXED, "tie_word_embeddings": True, "rope_parameters": YARN},
    ),
    "seed-oss": ("SeedOss", {}),
    "seed-oss-biases": ("SeedOss", {"attention_bias": False, "attention_out_bias": True, "mlp_bias": True}),
    "arcee": ("Arcee", {}),
    "arcee-biases-tied": ("Arcee", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "glm4": ("Glm4", {"pad_token_id": 0}),
    "glm4-full-yarn-tied": (
        "Glm4",
        {
            "pad_token_id": 0,
            "attention_bias": False,
            "tie_word_embeddings": True,
            "rope_parameters": {**YARN, "partial_rotary_factor": 1.0},
        },
    ),
    "qwen3-next": (
        "Qwen3Next",
        {
            **HYBRID,
            **SHARED,
            "num_hidden_layers": 3,
            "layer_types": ["linear_attention", "linear_attention", "full_attention"],
            "mlp_only_layers": [1],
            "norm_topk_prob": False,
        },
    ),
    "qwen3.5": ("Qwen3_5Text", {**HYBRID, "attention_bias": True, "tie_word_embeddings": True}),
    "qwen3.5-moe": ("Qwen3_5MoeText", {**HYBRID, **SHARED}),
    # With 3 experts of a token, two scores of one are within rounding of each other.
    "glm4-moe": ("Glm4Moe", {**SIGMOID, "num_experts_per_tok": 2, "use_qk_norm": True, "attention_bias": True}),
    "glm4-moe-groups": (
        "Glm4Moe",
        {
            **SIGMOID,
            "n_group": 4,
            "topk_group": 2,
            "norm_topk_prob": False,
            "first_k_dense_replace": 0,
            "tie_word_embeddings": True,
            "rope_parameters": {**PLAIN, "partial_rotary_factor": 1.0},
        },
    ),
    "deepseek-v3": (
        "DeepseekV3",
        {
            **SIGMOID,
            **LATENT,
            "n_group": 4,
            "topk_group": 2,
            "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3},
        },
    ),
    "moonlight": (
        "DeepseekV3",
        {
            **SIGMOID,
            **LATENT,
            "q_lora_rank": None,
            "rope_interleave": False,
            "attention_bias": True,
            "norm_topk_prob": False,
            "tie_word_embeddings": True,
        },
    ),
    "phi3": ("Phi3", {"pad_token_id": 0, "sliding_window": 37}),
    "phi3-longrope-tied": (
        "Phi3",
        {
            "pad_token_id": 0,
            "hidden_size": 64,  # transformers measures the factors by hidden_size / heads
            "original_max_position_embeddings": 256,
            "rope_parameters": LONG,
            "tie_word_embeddings": True,
        },
    ),
    "gemma2": (
        "Gemma2",
        {
            "sliding_window": 37,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 4.0,
            "final_logit_softcapping": 3.0,
            "tie_word_embeddings": True,
        },
    ),
    "gemma3": (
        "Gemma3Text",
        {
            "sliding_window": 37,
            "layer_types": MIXED,
            "query_pre_attn_scalar": 24,
            "tie_word_embeddings": True,
            "rope_parameters": {"full_attention": {**PLAIN, "rope_theta": 9e3}, "sliding_attention": LOCAL},
        },
    ),
    "gemma3-untied-cap-biases": (
        "Gemma3Text",
        {
            "sliding_window": 37,
            "final_logit_softcapping": 3.0,
            "attention_bias": True,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 9e3},
                "sliding_attention": LOCAL,
            },
        },
    ),
    "qwen2-moe": ("Qwen2Moe", SHARED),
    "qwen2-moe-some-dense": (
        "Qwen2Moe",
        {**SHARED, "norm_topk_prob": True, "mlp_only_layers": [1], "qkv_bias": False, "tie_word_embeddings": True},
    ),
    # As E2B and E4B.
    "gemma4": (
        "Gemma4Text",
        {
            **GEMMA4,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": 101,
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
            "final_logit_softcapping": 3.0,
        },
    ),
    # As 31B.
    "gemma4-keys-as-values": (
        "Gemma4Text",
        {**GEMMA4, "attention_k_eq_v": True, "num_global_key_value_heads": 1, "attention_bias": True},
    ),
    # As 26B-A4B.
    "gemma4-moe": (
        "Gemma4Text",
        {
            **GEMMA4,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "enable_moe_block": True,
            "num_experts": 8,
            "top_k_experts": 3,
            "moe_intermediate_size": 40,
            "tie_word_embeddings": False,
        },
    ),
}
