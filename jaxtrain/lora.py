"""Functions of parameter trees: separate adapters from the base, join them, and merge adapters into kernels."""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxtrain.named import did_you_mean
from jaxtrain.nn.config import Lora, NewTokens, names_linear
from jaxtrain.ops.quantize import dense
from jaxtrain.types import Params, get_leaf

NOT_IN_BASE = ("lora_a", "lora_b", "new_rows", "new_columns", "value_head", "custom_head")
"""Names of leaves that a base checkpoint does not have: adapters, rows of new tokens, and new heads."""


def split_adapters(params: Params, full_paths: Collection[str] = (), prefix: str = "") -> tuple[Params, Params]:
    """(adapters and new heads, base): two trees without a common leaf that together have all leaves.

    The first tree also has the parameters at `full_paths`: dotted paths that begin with `prefix`.
    """
    adapters: Params = {}
    base: Params = {}
    for name, node in params.items():
        path = f"{prefix}{name}"
        if name in NOT_IN_BASE or path in full_paths:
            adapters[name] = node
        elif isinstance(node, dict):
            inside = split_adapters(node, full_paths, f"{path}.")
            for part, found in zip((adapters, base), inside, strict=True):
                if found:
                    part[name] = found
        else:
            base[name] = node
    return adapters, base


def join(one: Params, other: Params) -> Params:
    """The union of two trees without a common leaf: the inverse of `split_adapters`."""
    joined = dict(one)
    for name, node in other.items():
        if name in joined:
            ours = joined[name]
            assert isinstance(node, dict) and isinstance(ours, dict), f"both trees have {name}"
            joined[name] = join(ours, node)
        else:
            joined[name] = node
    return joined


def merge_adapters(params: Params, lora: Lora) -> Params:
    """The same model without adapters: `kernel + scale * a @ b` in float32, in the kernel's dtype.

    A quantised kernel becomes a float32 one.
    """
    merged: Params = {}
    for name, node in params.items():
        if not isinstance(node, dict):
            merged[name] = node
        elif "lora_a" in node:
            rest = {key: leaf for key, leaf in node.items() if key not in ("lora_a", "lora_b")}
            merged[name] = rest | {"kernel": _merged_kernel(node, lora)}
        else:
            merged[name] = merge_adapters(node, lora)
    return merged


def merge_tokens(params: Params, new: NewTokens) -> Params:
    """The same model with the rows of new tokens written to the tables, in the dtype of these."""
    merged = dict(params)
    for part, table, rows, axis in (("embed", "weight", "new_rows", 0), ("lm_head", "kernel", "new_columns", 1)):
        node = params.get(part)
        if isinstance(node, dict) and rows in node:
            old = get_leaf(node, table)
            values = get_leaf(node, rows).astype(old.dtype)
            rest = {name: leaf for name, leaf in node.items() if name != rows}
            merged[part] = rest | {table: jax.lax.dynamic_update_slice_in_dim(old, values, new.first, axis)}
    return merged


def mean_rows(base: Params, new: NewTokens) -> Params:
    """Initial rows of new tokens: the mean of the tokens before them, float32 [count, D], and [D, count] if untied."""
    weight = get_leaf(base, "embed", "weight")[: new.first].astype(jnp.float32).mean(0)
    initial: Params = {"embed": {"new_rows": jnp.tile(weight, (new.count, 1))}}
    if "lm_head" in base:
        column = get_leaf(base, "lm_head", "kernel")[:, : new.first].astype(jnp.float32).mean(1)
        initial["lm_head"] = {"new_columns": jnp.tile(column[:, None], (1, new.count))}
    return initial


def _merged_kernel(linear: Mapping[str, Any], lora: Lora) -> jax.Array:
    kernel, a, b = linear["kernel"], linear["lora_a"], linear["lora_b"]
    stacked = a.ndim + b.ndim - 2 - kernel.ndim  # axes that both share with the kernel: layers and experts
    shared = kernel.shape[:stacked]
    a, b = a.astype(jnp.float32).reshape(*shared, -1, lora.rank), b.astype(jnp.float32).reshape(*shared, lora.rank, -1)
    product = (a @ b).reshape(kernel.shape)
    return (dense(kernel, jnp.float32) + lora.scale * product).astype(kernel.dtype)


def check_targets(targets: Iterable[str], params: Params) -> None:
    """Raise ValueError for a target that does not name a linear of the model."""
    layers = params["layers"]
    assert isinstance(layers, dict)
    known = sorted(_linears(layers))
    for target in targets:
        if not any(names_linear(target, path) for path in known):
            last = {path.rpartition(".")[2]: None for path in known}
            hint = did_you_mean(target, [*last, *known])
            if re.search(r"\blayers\.\d", target):
                hint = "; layers are stacked, so an adapter is on all of them: write layers.*"
            raise ValueError(
                f"model.lora.targets: the model has no linear {target!r}{hint} (it has {', '.join(known)})"
            )


def _linears(node: Params) -> set[str]:
    """Dotted paths of the linears within a layer."""
    found: set[str] = set()
    for name, inner in node.items():
        if isinstance(inner, dict):
            found |= {name} if "kernel" in inner else {f"{name}.{path}" for path in _linears(inner)}
    return found
