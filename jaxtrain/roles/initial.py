"""The initial parameters of a role: read from its checkpoint, or random."""

from collections.abc import Callable
from typing import Any

import jax

from converters.adapters import import_adapter
from converters.families.registry import has_scalar_head
from converters.import_hf import import_params, read_config
from converters.weight_rows import flatten, unflatten
from jaxtrain.config import ModelSection
from jaxtrain.lora import join, mean_rows, merge_tokens, split_adapters
from jaxtrain.nn.heads import LANGUAGE, SCALAR
from jaxtrain.nn.model import Model
from jaxtrain.ops.quantize import Quantized, quantize
from jaxtrain.roles.declare import Declaration
from jaxtrain.roles.torch_model import TorchModel
from jaxtrain.types import Params


def initial_params(section: ModelSection, declared: Declaration, seed: int) -> tuple[Params, Params]:
    """(adapters, new heads and what is trained in full beside them; base): two disjoint trees that together are all of
    `declared.target`."""
    full, frozen = declared.model.split(base_params(section, declared, seed))
    added = adapter_params(section, declared, seed, frozen)
    return added if _adapter_folder(section) else join(added, full), frozen


def full_params(section: ModelSection, declared: Declaration, seed: int) -> Params:
    """The base's values of the parameters that are trained in full beside adapters."""
    target = split_adapters(declared.model.split(declared.target)[0])[1]
    return base_params(section, declared, seed, target) if target else {}


def base_params(section: ModelSection, declared: Declaration, seed: int, target: Params | None = None) -> Params:
    """All parameters except adapters and new heads: read from the checkpoint, or random if there is none.

    `target` is the part of `declared.target` that is needed; default: all of it.
    """
    part = target is not None
    target = split_adapters(declared.target)[1] if target is None else target
    if isinstance(declared.model, TorchModel):
        return declared.model.initial(target)
    finish = _quantizer(declared) if declared.quantize and declared.model.base_frozen else None
    if section.path is not None:
        # The checkpoint may hold a head that the run does not use.
        partial = part or declared.model.output != LANGUAGE or has_scalar_head(declared.hf)
        in_file, _ = read_config(declared.hf, declared.model.config.vocab_multiple)  # without the new tokens
        params = import_params(section.path, in_file, target, partial=partial, finish=finish)
    else:
        params = _random(declared.model, target, seed)
        params = unflatten({path: finish(path, leaf) for path, leaf in flatten(params).items()}) if finish else params
    if declared.added is None or "embed" not in params:
        return params
    added, shardings = declared.added, jax.tree.map(lambda leaf: leaf.sharding, params)

    def with_new_rows(params: Params) -> Params:
        return merge_tokens(join(params, mean_rows(params, added)), added)

    return jax.jit(with_new_rows, out_shardings=shardings, donate_argnums=0)(params)


def adapter_params(section: ModelSection, declared: Declaration, seed: int, base: Params) -> Params:
    """The parameters of a role that are not in the base's checkpoint; `base` holds the frozen ones.

    Adapters: those of `model.lora.path`, with the modules that it trained in full, or new ones, which do not change the
    model's outputs. Rows of new tokens: the mean of the other rows. A scalar or custom head: that of the reward model's
    checkpoint, or random.
    """
    target = split_adapters(declared.target)[0]
    if not target:
        return {}
    params = _random(declared.model, target, seed)
    if declared.model.new_tokens is not None:
        shardings = jax.tree.map(lambda leaf: leaf.sharding, target)
        rows = mean_rows(base, declared.model.new_tokens)
        params |= {part: jax.device_put(leaf, shardings[part]) for part, leaf in rows.items()}
    if folder := _adapter_folder(section):
        full = split_adapters(declared.model.split(declared.target)[0])[1]
        adapters = import_adapter(folder, declared.model.config, join({"layers": target["layers"]}, full))
        params = join({name: node for name, node in params.items() if name != "layers"}, adapters)
    if section.path is not None and declared.model.output == SCALAR and has_scalar_head(declared.hf):
        head = {"value_head": target["value_head"]}
        params |= import_params(section.path, declared.model.config, head, partial=True)
    return params


def _adapter_folder(section: ModelSection) -> str | None:
    return section.lora.path if section.lora else None


def _random(model: Model, target: Params, seed: int) -> Params:
    """The leaves of `target` among the model's random parameters."""
    shardings = flatten(jax.tree.map(lambda leaf: leaf.sharding, target))

    def leaves(key: jax.Array) -> dict[str, Any]:
        drawn = flatten(model.init(key))
        return {path: drawn[path] for path in shardings}

    return unflatten(jax.jit(leaves, out_shardings=shardings)(jax.random.key(seed)))


def _quantizer(declared: Declaration) -> Callable[[str, jax.Array], Any]:
    """A function of (dotted path, parameter) that quantises the parameter if its target is quantised.

    It is called once per parameter while reading, so that at most one is in memory at full precision.
    """
    axes, stored, kind = flatten(declared.model.axes()), flatten(declared.frozen), declared.quantize
    assert kind is not None
    return lambda path, leaf: quantize(leaf, axes[path], kind) if isinstance(stored.get(path), Quantized) else leaf
