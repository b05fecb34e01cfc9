"""The parameters that a role begins with: read from its checkpoint, or drawn from a seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from converters.adapters import import_adapter
from converters.families.registry import has_scalar_head
from converters.import_hf import import_params, read_config
from converters.rows import flatten, unflatten
from jaxtrain.config import ModelSection
from jaxtrain.lora import join, mean_rows, merge_tokens, split_adapters
from jaxtrain.nn.heads import LANGUAGE, SCALAR
from jaxtrain.nn.model import Model
from jaxtrain.ops.quantize import Quantized, quantize
from jaxtrain.roles.declare import Declaration
from jaxtrain.roles.torch_model import TorchModel
from jaxtrain.types import Params


def initial_params(section: ModelSection, declared: Declaration, seed: int) -> tuple[Params, Params]:
    """(adapters and new heads, base): two trees without a common leaf that together are all of `declared.target`."""
    base = base_params(section, declared, seed)
    return adapter_params(section, declared, seed, base), base


def base_params(section: ModelSection, declared: Declaration, seed: int) -> Params:
    """Every parameter but adapters and new heads: read from the checkpoint, or random where there is none."""
    target = split_adapters(declared.target)[1]
    if isinstance(declared.model, TorchModel):
        return declared.model.initial(target)
    finish = _quantizer(declared) if declared.quantize and declared.model.base_frozen else None
    if section.path is not None:
        # The checkpoint may hold a head that the run does not use.
        partial = declared.model.output != LANGUAGE or has_scalar_head(declared.hf)
        in_file, _ = read_config(declared.hf, declared.model.config.vocab_multiple)  # without the new tokens
        params = import_params(section.path, in_file, target, partial=partial, finish=finish)
    else:
        params = _random(declared.model, 1, target, seed)
        params = unflatten({path: finish(path, leaf) for path, leaf in flatten(params).items()}) if finish else params
    if declared.added is None:
        return params
    added, shardings = declared.added, jax.tree.map(lambda leaf: leaf.sharding, params)

    def with_new_rows(params: Params) -> Params:
        return merge_tokens(join(params, mean_rows(params, added)), added)

    return jax.jit(with_new_rows, out_shardings=shardings, donate_argnums=0)(params)


def adapter_params(section: ModelSection, declared: Declaration, seed: int, base: Params) -> Params:
    """What a role has beside `base`.

    Adapters: those of `model.lora.path`, or fresh ones, which leave the model's function unchanged. Rows of new tokens:
    the mean of the other rows. A scalar or custom head: the reward model's own, or random.
    """
    target = split_adapters(declared.target)[0]
    if not target:
        return {}
    params = _random(declared.model, 0, target, seed)
    if declared.model.new_tokens is not None:
        shardings = jax.tree.map(lambda leaf: leaf.sharding, target)
        rows = mean_rows(base, declared.model.new_tokens)
        params |= {part: jax.device_put(leaf, shardings[part]) for part, leaf in rows.items()}
    if section.lora is not None and section.lora.path is not None:
        params |= import_adapter(section.lora.path, declared.model.config, {"layers": target["layers"]})
    if section.path is not None and declared.model.output == SCALAR and has_scalar_head(declared.hf):
        head = {"value_head": target["value_head"]}
        params |= import_params(section.path, declared.model.config, head, partial=True)
    return params


def _random(model: Model, part: int, target: Params, seed: int) -> Params:
    shardings = jax.tree.map(lambda leaf: leaf.sharding, target)
    return jax.jit(lambda key: split_adapters(model.init(key))[part], out_shardings=shardings)(jax.random.key(seed))


def _quantizer(declared: Declaration) -> Callable[[str, jax.Array], Any]:
    """A function (dotted path, parameter) that quantises the kernels that are stored quantised.

    One parameter is quantised at a time, so that at most one is in memory at full precision.
    """
    axes, stored, kind = flatten(declared.model.axes()), flatten(declared.frozen), declared.quantize
    assert kind is not None
    return lambda path, leaf: quantize(leaf, axes[path], kind) if isinstance(stored[path], Quantized) else leaf
