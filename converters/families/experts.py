"""Common rows of mixtures of experts that store the tensors of each expert separately."""

from converters.weight_rows import Transpose, Weight

_LAYER = "model.layers.{layer}"
_MATRIX = (Transpose((1, 0)),)  # [out, in] -> [in, out]


def router_rows(name: str) -> tuple[Weight, ...]:
    """`name` within a layer."""
    return (
        Weight("layers.mlp.router.kernel", f"{_LAYER}.{name}.weight", _MATRIX),
        Weight("layers.mlp.router.bias", f"{_LAYER}.{name}.bias"),
    )


def expert_rows(experts: str, gate: str, up: str, down: str) -> tuple[Weight, ...]:
    """One tensor for each expert and matrix. `experts` is a name within a layer, the others are within an expert."""
    names = {"gate_proj": gate, "up_proj": up, "down_proj": down}
    return tuple(
        Weight(f"layers.mlp.experts.{ours}.kernel", f"{_LAYER}.{experts}.{{expert}}.{theirs}.weight", _MATRIX)
        for ours, theirs in names.items()
    )
