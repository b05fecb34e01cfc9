"""Common parts of mixtures whose routers score by sigmoids, with shared experts and dense first layers."""

from collections.abc import Mapping
from typing import Any

from converters.families.dense import MATRIX
from converters.families.experts import DENSE_LAYERS, expert_rows, router_rows
from converters.families.keys import ConfigKeys
from converters.weight_rows import Weight
from jaxtrain.nn.config import ModelConfig, MoE

_MLP = "model.layers.{layer}.mlp"
SIGMOID_EXPERTS = (
    *(*router_rows("mlp.gate"), *DENSE_LAYERS),
    Weight("layers.mlp.balance", f"{_MLP}.gate.e_score_correction_bias"),
    *(
        Weight(f"layers.mlp.shared.{name}.kernel", f"{_MLP}.shared_experts.{name}.weight", MATRIX)
        for name in ("gate_proj", "up_proj", "down_proj")
    ),
    *expert_rows("mlp.experts", gate="gate_proj", up="up_proj", down="down_proj"),
)
INERT: dict[str, tuple[Any, ...]] = {
    "scoring_func": (None, "sigmoid"),
    "topk_method": (None, "noaux_tc"),
    "moe_layer_freq": (None, 1),
    "mlp_bias": (None, False),
    "num_experts": (None,),
}
"""Keys of configs of before transformers 5, whose code knows one value of each."""


def with_routed_experts(hf: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with `n_routed_experts`, which transformers also reads as `num_local_experts`."""
    return {"n_routed_experts" if key == "num_local_experts" else key: value for key, value in hf.items()}


def read_sigmoid_experts(keys: ConfigKeys) -> MoE:
    width = keys.size("moe_intermediate_size")
    return MoE(
        num_experts=keys.size("n_routed_experts"),
        experts_per_token=keys.size("num_experts_per_tok"),
        intermediate_size=width,
        renormalise=keys.flag("norm_topk_prob"),
        shared_size=width * keys.size("n_shared_experts"),
        scores="sigmoid",
        weight_scale=keys.number("routed_scaling_factor"),
        groups=keys.size("n_group"),
        groups_per_token=keys.size("topk_group"),
    )


def read_dense_first(keys: ConfigKeys) -> tuple[bool, ...]:
    """Whether each layer is dense: the first `first_k_dense_replace`."""
    first = keys.index("first_k_dense_replace")
    return tuple(layer < first for layer in range(keys.size("num_hidden_layers")))


def write_sigmoid_experts(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_sigmoid_experts` and `read_dense_first`."""
    moe = config.moe
    assert moe is not None
    return {
        "n_routed_experts": moe.num_experts,
        "num_experts_per_tok": moe.experts_per_token,
        "moe_intermediate_size": moe.intermediate_size,
        "norm_topk_prob": moe.renormalise,
        "n_shared_experts": moe.shared_size // moe.intermediate_size,
        "routed_scaling_factor": moe.weight_scale,
        "n_group": moe.groups,
        "topk_group": moe.groups_per_token,
        "first_k_dense_replace": sum(kind.dense for kind in config.pattern),
    }
