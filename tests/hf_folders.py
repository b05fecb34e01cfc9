"""Tiny random checkpoints written by transformers, as the reference for files and logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hf_families
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from converters.import_hf import import_params, read_config
from converters.reference import token_by_token
from jaxtrain.config import MeshSection
from jaxtrain.nn.config import ModelConfig
from jaxtrain.nn.model import Model
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.parallel.sharding import RULES, param_specs
from jaxtrain.types import Params

# Nothing here is anybody's default: a key that is not read shows. 101 is no multiple of 64, 16 is not 56 / 4.
SIZES = {
    "vocab_size": 101,
    "hidden_size": 56,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 3e-4,
    "initializer_range": 0.1,
    "max_position_embeddings": 1024,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}
WINDOW = {"use_sliding_window": True, "sliding_window": 37, "max_window_layers": 1}

MOE = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
GPT_OSS = {"num_local_experts": 6, "num_experts_per_tok": 2, "swiglu_limit": 0.7, "sliding_window": 37}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 64,
}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-3.1-rope": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-linear-rope": ("Llama", {"rope_parameters": LINEAR}),
    "llama-gelu-derived-head": ("Llama", {"hidden_act": "gelu_pytorch_tanh", "head_dim": None}),
    "qwen2": ("Qwen2", {}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2", WINDOW),
    "qwen3": ("Qwen3", {}),
    "qwen3-tied": ("Qwen3", {"tie_word_embeddings": True}),
    "qwen3-biases": ("Qwen3", {"attention_bias": True}),
    "qwen3-moe": ("Qwen3Moe", MOE),
    "qwen3-moe-renormalised-window": (
        "Qwen3Moe",
        {**MOE, "norm_topk_prob": True, "tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 37},
    ),
    "qwen3-moe-some-dense": ("Qwen3Moe", {**MOE, "decoder_sparse_step": 2}),
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "mixtral-window": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 1, "sliding_window": 37}),
    "gpt-oss": ("GptOss", {**GPT_OSS, "rope_parameters": YARN}),
    "qwen3-window": ("Qwen3", {**WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    **hf_families.FAMILIES,
}
MIXTURES = (  # of which test_mixtures.py compares more
    *("qwen3-moe", "qwen3-moe-renormalised-window", "qwen3-moe-some-dense", "mixtral", "mixtral-window", "gpt-oss"),
    *("qwen3-next", "qwen3.5-moe", "olmoe", "glm4-moe", "glm4-moe-groups"),
    *("deepseek-v3", "moonlight", "gemma4-moe", "qwen2-moe", "qwen2-moe-some-dense"),
)
# The last case of each family is the one with windows, where it has them.
ONE_OF_EACH = tuple({family: case for case, (family, _) in CASES.items()}.values())


def hf_config(case: str, **changes: Any) -> transformers.PreTrainedConfig:
    family, extra = CASES[case]
    return getattr(transformers, f"{family}Config")(**json.loads(json.dumps({**SIZES, **extra, **changes})))


def hf_model(case: str, seed: int = 0, **changes: Any) -> transformers.PreTrainedModel:
    """Random everywhere: a norm of ones or a bias of zeros would hide a mistake."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(hf_config(case, **changes), dtype=torch.float32).eval()
    token_by_token(model)
    with torch.no_grad():
        endings = ("e_score_correction_bias", "layer_scalar")
        balances = [each for name, each in model.named_buffers() if name.endswith(endings)]
        for parameter in (*model.parameters(), *balances):
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def save(folder: Path, case: str = "qwen3", dtype: torch.dtype = torch.float32, shard: str = "5GB", **changes: Any):
    """Write a checkpoint folder; returns it."""
    hf_model(case, **changes).to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def edit_config(folder: Path, *removed: str, **changes: Any) -> Path:
    edit_json(folder / "config.json", *removed, **changes)
    return folder


def edit_json(file: Path, *removed: str, **changes: Any) -> None:
    content = {key: value for key, value in read_json(file).items() if key not in removed}
    file.write_text(json.dumps({**content, **changes}))


def read_json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())


def tensors(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a folder, as the safetensors package reads it."""
    return {name: array for file in sorted(folder.glob("*.safetensors")) for name, array in load_file(file).items()}


def target(config: ModelConfig, dtype: Any = jnp.float32, preset: Any = None) -> Params:
    """The abstract tree to import into: on one device, or on eight by a preset of `RULES`."""
    model = Model(config)
    if preset is None:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), model.abstract())
    mesh = make_mesh(MeshSection(preset=preset, **{} if preset == "fsdp" else {preset.removeprefix("fsdp_"): 2}))
    specs = param_specs(model.axes(), model.abstract(), RULES[preset], mesh)
    return jax.tree.map(
        lambda leaf, spec: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=spec), model.abstract(), specs
    )


def load(folder: Path, dtype: Any = jnp.float32, preset: str | None = None) -> tuple[Params, ModelConfig, dict]:
    config, hf = read_config(folder)
    return import_params(folder, config, target(config, dtype, preset)), config, hf
