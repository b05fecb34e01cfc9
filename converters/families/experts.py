"""Common parts of mixtures of experts: rows of those that store each expert separately, and layers without one."""

from collections.abc import Mapping
from typing import Any

from converters.errors import ConversionError
from converters.families.dense import MATRIX
from converters.families.keys import ConfigKeys
from converters.weight_rows import SideBySide, Transpose, Weight
from jaxtrain.nn.config import ModelConfig, MoE

_LAYER = "model.layers.{layer}"
DENSE_LAYERS = tuple(
    Weight(f"layers.dense_mlp.{name}.kernel", f"{_LAYER}.mlp.{name}.weight", MATRIX)
    for name in ("gate_proj", "up_proj", "down_proj")
)
"""Of the layers among mixtures that are dense."""
SHARED_EXPERT = (
    *(
        Weight(f"layers.mlp.shared.{name}.kernel", f"{_LAYER}.mlp.shared_expert.{name}.weight", MATRIX)
        for name in ("gate_proj", "up_proj", "down_proj")
    ),
    Weight("layers.mlp.shared_gate.kernel", f"{_LAYER}.mlp.shared_expert_gate.weight", MATRIX),
)


def _gate_and_up(config: ModelConfig) -> tuple[int, int]:
    assert config.moe is not None
    return config.moe.intermediate_size, config.moe.intermediate_size


_OUT_IN = (Transpose((0, 2, 1)),)  # [E, out, in] -> [E, in, out]


def fused_experts(name: str, alias: bool = False) -> tuple[Weight, ...]:
    """One tensor for all experts of a layer, gate and up together. `name` within a layer."""
    return (
        *(
            Weight(
                f"layers.mlp.experts.{ours}.kernel",
                f"{_LAYER}.{name}.gate_up_proj",  # [E, 2F, D]
                _OUT_IN,
                alias=alias,
                part=SideBySide(1, place, _gate_and_up),
            )
            for place, ours in enumerate(("gate_proj", "up_proj"))
        ),
        Weight("layers.mlp.experts.down_proj.kernel", f"{_LAYER}.{name}.down_proj", _OUT_IN, alias=alias),
    )


FUSED_EXPERTS = fused_experts("mlp.experts", alias=True)
"""Another way to store the experts of `expert_rows`."""


def with_num_experts(hf: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with `num_experts`, which transformers 5 saves as `num_local_experts`, and reads under both names."""
    return {"num_experts" if key == "num_local_experts" else key: value for key, value in hf.items()}


def read_experts(keys: ConfigKeys, *, renormalise: bool, shared: bool = False) -> MoE:
    """The experts of Qwen's mixtures; `shared`: with a gated one for all tokens."""
    return MoE(
        num_experts=keys.size("num_experts"),
        experts_per_token=keys.size("num_experts_per_tok"),
        intermediate_size=keys.size("moe_intermediate_size"),
        renormalise=renormalise,
        shared_size=keys.size("shared_expert_intermediate_size") if shared else 0,
        shared_gate=shared,
    )


def write_experts(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_experts`, without whether weights are renormalised."""
    assert config.moe is not None
    shared = {"shared_expert_intermediate_size": config.moe.shared_size} if config.moe.shared_size else {}
    return {
        "num_experts": config.moe.num_experts,
        "num_experts_per_tok": config.moe.experts_per_token,
        "moe_intermediate_size": config.moe.intermediate_size,
        **shared,
    }


def read_dense_layers(keys: ConfigKeys) -> tuple[bool, ...]:
    """Whether each layer is dense: those of `mlp_only_layers`, and all but every `decoder_sparse_step`-th."""
    layers, step = keys.size("num_hidden_layers"), keys.size("decoder_sparse_step")
    named = keys.get("mlp_only_layers") or []
    if not isinstance(named, list) or not all(type(each) is int and 0 <= each < layers for each in named):
        raise ConversionError(f"config.json: mlp_only_layers must be a list of numbers of layers, not {named!r}")
    return tuple(layer in named or (layer + 1) % step != 0 for layer in range(layers))


def write_dense_layers(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_dense_layers`."""
    return {
        "mlp_only_layers": [layer for layer, kind in enumerate(config.pattern) if kind.dense],
        "decoder_sparse_step": 1,
    }


def router_rows(name: str) -> tuple[Weight, ...]:
    """`name` within a layer."""
    return (
        Weight("layers.mlp.router.kernel", f"{_LAYER}.{name}.weight", MATRIX),
        Weight("layers.mlp.router.bias", f"{_LAYER}.{name}.bias"),
    )


def expert_rows(experts: str, gate: str, up: str, down: str) -> tuple[Weight, ...]:
    """One tensor for each expert and matrix. `experts` is a name within a layer, the others are within an expert."""
    names = {"gate_proj": gate, "up_proj": up, "down_proj": down}
    return tuple(
        Weight(f"layers.mlp.experts.{ours}.kernel", f"{_LAYER}.{experts}.{{expert}}.{theirs}.weight", MATRIX)
        for ours, theirs in names.items()
    )
