"""Keys of models whose layers with full attention have sizes of their own, and whose last layers reuse the keys and
values of others."""

from collections.abc import Mapping, Sequence
from typing import Any

from converters.errors import ConversionError
from converters.families.keys import ConfigKeys
from jaxtrain.nn.config import ModelConfig


def read_global_sizes(keys: ConfigKeys, sliding: Sequence[bool]) -> tuple[int, int]:
    """The number of heads of keys and values, and the width of heads, in the layers without a window.

    From `per_layer_config`, which transformers writes, or else from `global_head_dim` and `num_global_key_value_heads`,
    which published folders have.
    """
    plain = keys.size("num_key_value_heads"), keys.size("head_dim")
    if keys.get("per_layer_config") is None:
        count = keys.get("num_global_key_value_heads")
        own = keys.flag("attention_k_eq_v") and count is not None
        return keys.size("num_global_key_value_heads") if own else plain[0], keys.size("global_head_dim")
    section = keys.section("per_layer_config")
    overrides = ConfigKeys(section, {}, section="per_layer_config.")
    by_layer = {int(name): overrides.section(name) for name in section if name.isdecimal()}  # "05" is layer 5
    if len(by_layer) < len(section) or not by_layer.keys() <= set(range(len(sliding))):
        raise ConversionError(f"config.json: per_layer_config must name layers by number, not {sorted(section)}")
    found: dict[bool, set[tuple[int, int]]] = {True: set(), False: set()}
    for layer, slides in enumerate(sliding):
        found[slides].add(_sizes(by_layer.get(layer, {}), layer, plain))
    if len(found[False]) > 1 or not found[True] <= {plain}:
        raise ConversionError(
            "config.json: per_layer_config has sizes that are not supported; only the same ones for all layers with "
            "full attention, and none for those with a window, are"
        )
    return next(iter(found[False]), plain)


def _sizes(override: Mapping[str, Any], layer: int, plain: tuple[int, int]) -> tuple[int, int]:
    defaults = {"num_key_value_heads": plain[0], "head_dim": plain[1]}
    if strange := sorted(map(str, override.keys() - defaults.keys())):
        raise ConversionError(f"config.json: per_layer_config.{layer}.{strange[0]} is not supported by this family")
    keys = ConfigKeys(override, defaults, section=f"per_layer_config.{layer}.")
    return keys.size("num_key_value_heads"), keys.size("head_dim")


def read_reuse(keys: ConfigKeys, sliding: Sequence[bool]) -> tuple[bool, ...]:
    """Whether each layer reuses keys and values: the last `num_kv_shared_layers`."""
    first = len(sliding) - keys.index("num_kv_shared_layers")
    if first < 0 or not set(sliding[first:]) <= set(sliding[:first]):
        raise ConversionError(
            f"config.json: num_kv_shared_layers={keys.get('num_kv_shared_layers')} of {len(sliding)} layers: before "
            "the first of them there must be a layer of every layer type among them"
        )
    return tuple(layer >= first for layer in range(len(sliding)))


def write_global_sizes(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_global_sizes`."""
    sizes = config.global_attention
    assert sizes is not None
    own = {"head_dim": sizes.head_dim}
    if sizes.num_kv_heads != config.num_kv_heads:
        own["num_key_value_heads"] = sizes.num_kv_heads
    digits = len(str(config.num_layers - 1))
    layers = [layer for layer, kind in enumerate(config.pattern) if kind.mixer == "global"]
    return {
        "attention_k_eq_v": sizes.values_are_keys,
        "global_head_dim": sizes.head_dim,
        "num_global_key_value_heads": sizes.num_kv_heads if sizes.values_are_keys else None,
        "per_layer_config": {f"{layer:0{digits}}": own for layer in layers},
    }
