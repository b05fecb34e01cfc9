"""Adapters as tree functions: which leaves are adapters, and what the model is once they are merged."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jaxtrain.nn.config import Lora, NewTokens, names_linear
from jaxtrain.ops.quantize import dense
from jaxtrain.types import Params

NEW = ("lora_a", "lora_b", "new_rows", "new_columns", "value_head", "custom_head")
"""What a base checkpoint does not hold: adapters, rows of new tokens, and heads that are put on a language model."""


def split_adapters(params: Params) -> tuple[Params, Params]:
    """(adapters and new heads, base): two trees that share no leaf and together hold them all."""
    adapters: Params = {}
    base: Params = {}
    for name, node in params.items():
        if name in NEW:
            adapters[name] = node
        elif isinstance(node, dict):
            inside = split_adapters(node)
            for part, found in zip((adapters, base), inside, strict=True):
                if found:
                    part[name] = found
        else:
            base[name] = node
    return adapters, base


def join(one: Params, other: Params) -> Params:
    """The union of two trees that share no leaf; `split_adapters` undone."""
    joined = dict(one)
    for name, node in other.items():
        if name in joined:
            assert isinstance(node, dict) and isinstance(joined[name], dict), f"both trees hold {name}"
            joined[name] = join(joined[name], node)
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
    """The same model with the rows of new tokens in the tables, whose dtype they take."""
    merged = dict(params)
    for part, table, rows, axis in (("embed", "weight", "new_rows", 0), ("lm_head", "kernel", "new_columns", 1)):
        if part in params and rows in params[part]:
            node = dict(params[part])
            values = node.pop(rows).astype(node[table].dtype)
            node[table] = jax.lax.dynamic_update_slice_in_dim(node[table], values, new.first, axis)
            merged[part] = node
    return merged


def mean_rows(base: Params, new: NewTokens) -> dict[str, Any]:
    """What new tokens begin as: the mean of the tokens before them, float32 [count, D] and [D, count] if untied."""
    weight = base["embed"]["weight"][: new.first].astype(jnp.float32).mean(0)
    begun: Params = {"embed": {"new_rows": jnp.tile(weight, (new.count, 1))}}
    if "lm_head" in base:
        column = base["lm_head"]["kernel"][:, : new.first].astype(jnp.float32).mean(1)
        begun["lm_head"] = {"new_columns": jnp.tile(column[:, None], (1, new.count))}
    return begun


def _merged_kernel(linear: dict[str, Any], lora: Lora) -> Any:
    kernel, a, b = linear["kernel"], linear["lora_a"], linear["lora_b"]
    stacked = a.ndim + b.ndim - 2 - kernel.ndim  # axes that both share with the kernel: layers, and experts
    many = kernel.shape[:stacked]
    a, b = a.astype(jnp.float32).reshape(*many, -1, lora.rank), b.astype(jnp.float32).reshape(*many, lora.rank, -1)
    product = (a @ b).reshape(kernel.shape)
    return (dense(kernel, jnp.float32) + lora.scale * product).astype(kernel.dtype)


def check_targets(targets: Iterable[str], params: Params) -> None:
    """Raise ValueError for a target that names no linear of the model."""
    known = sorted(_linears(params["layers"]))
    for target in targets:
        if not any(names_linear(target, path) for path in known):
            last = {path.rpartition(".")[2]: None for path in known}
            near = difflib.get_close_matches(target, [*last, *known], 1)
            hint = f"; did you mean {near[0]}?" if near else ""
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
