"""Qwen3-Next: three gated delta nets to a layer of gated attention, and experts beside a shared one."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from converters.families import hybrid
from converters.families.dense import BASE, HEADS_OUT, MATRIX, O_BIAS, QK_NORM, QKV_BIAS, read_sizes, write_sizes
from converters.families.experts import (
    DENSE_LAYERS,
    SHARED_EXPERT,
    expert_rows,
    read_dense_layers,
    read_experts,
    router_rows,
    with_num_experts,
    write_dense_layers,
    write_experts,
)
from converters.families.keys import ConfigKeys
from converters.weight_rows import SideBySide, Weight
from jaxtrain.nn.config import ModelConfig

ARCHITECTURE = "Qwen3NextForCausalLM"
MODEL_TYPE = "qwen3_next"


def _projected_sizes(config: ModelConfig) -> tuple[int, ...]:
    """Of each head of keys: its query and key, and the values and gates of its group."""
    sizes = hybrid.delta_sizes(config)
    values = sizes.groups * sizes.value_width
    return sizes.key_width, sizes.key_width, values, values


def _scalar_sizes(config: ModelConfig) -> tuple[int, int]:
    groups = hybrid.delta_sizes(config).groups
    return groups, groups


def _key_heads(config: ModelConfig) -> int:
    return hybrid.delta_sizes(config).key_heads


_PROJECTIONS = "model.layers.{layer}.linear_attn.in_proj"
WEIGHTS = (
    *(row for row in (*BASE, *QKV_BIAS) if ".q_proj." not in row.ours),
    *(*O_BIAS, *QK_NORM, *hybrid.GATED_ATTENTION, *hybrid.DELTA),
    *(
        Weight(
            f"layers.delta.{name}_proj.kernel",
            f"{_PROJECTIONS}_qkvz.weight",
            HEADS_OUT,
            part=SideBySide(0, place, _projected_sizes, _key_heads),
        )
        for place, name in enumerate(("q", "k", "v", "gate"))
    ),
    *(
        Weight(
            f"layers.delta.{name}_proj.kernel",
            f"{_PROJECTIONS}_ba.weight",
            MATRIX,
            part=SideBySide(0, place, _scalar_sizes, _key_heads),
        )
        for place, name in enumerate(("beta", "decay"))
    ),
    *(*router_rows("mlp.gate"), *SHARED_EXPERT, *DENSE_LAYERS),
    *expert_rows("mlp.experts", gate="gate_proj", up="up_proj", down="down_proj"),
)

# transformers.Qwen3NextConfig (5.24)
DEFAULTS: dict[str, Any] = {
    **hybrid.DEFAULTS,
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 48,
    "num_key_value_heads": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": None,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "num_experts_per_tok": 10,
    "num_experts": 512,
    "norm_topk_prob": True,
}
INERT = {"mlp_bias": (None, False), "qk_norm": (None, True), "use_qk_norm": (None, True)}


def from_hf(hf: Mapping[str, Any], vocab_multiple: int = 64) -> ModelConfig:
    """config.json to ours. Raises ConversionError naming a key that is not supported."""
    keys = ConfigKeys(with_num_experts(hf), DEFAULTS, INERT)
    fields, dense = hybrid.read_hybrid(keys), read_dense_layers(keys)
    pattern = tuple(replace(kind, dense=each) for kind, each in zip(fields.pop("pattern"), dense, strict=True))
    return ModelConfig(
        family=MODEL_TYPE,
        **read_sizes(keys),
        **fields,
        pattern=pattern,
        moe=read_experts(keys, renormalise=keys.flag("norm_topk_prob"), shared=True),
        vocab_multiple=vocab_multiple,
    )


def hf_keys(config: ModelConfig) -> dict[str, Any]:
    assert config.moe is not None
    return {
        **write_sizes(config),
        **hybrid.write_hybrid(config),
        **write_dense_layers(config),
        **write_experts(config),
        "norm_topk_prob": config.moe.renormalise,
    }
