"""What every recipe begins with: a mesh, a model on it, its parameters, its tokenizer."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from converters.adapters import import_adapter, read_lora
from converters.families.registry import has_scalar_head
from converters.import_hf import import_params, read_config
from converters.rows import flatten, unflatten
from converters.tokenizer import load_tokenizer
from jaxtrain.config import ModelSection, RunConfig, SourceSection
from jaxtrain.data.pipeline import Encode, TrainStream, count_shards
from jaxtrain.lora import check_targets, split_adapters
from jaxtrain.nn.config import Lora, ModelConfig
from jaxtrain.nn.decoder import Execution
from jaxtrain.nn.heads import LANGUAGE, SCALAR
from jaxtrain.nn.model import Model
from jaxtrain.ops.quantize import Kind, quantize, quantize_kernels
from jaxtrain.parallel.batches import local_shards
from jaxtrain.parallel.sharding import ROWS, RULES, param_specs, row_shares
from jaxtrain.types import Params

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Policy(NamedTuple):
    """A model that is trained, and where its parameters lie."""

    model: Model
    hf: dict[str, Any]  # config.json as it was read
    target: Params  # shapes, dtypes and shardings of all parameters, adapters included, none quantised
    quantize: Kind | None = None  # how the frozen kernels are held

    @property
    def trained(self) -> Params:
        """The part of `target` that the optimizer sees."""
        return split_adapters(self.target)[0] if self.model.lora else self.target

    @property
    def frozen(self) -> Params:
        if not self.model.lora:
            return {}
        base = split_adapters(self.target)[1]
        return quantize_kernels(base, self.model.axes(), self.quantize) if self.quantize else base

    @property
    def trained_axes(self) -> Params:
        """Logical axes of the trained parameters."""
        return split_adapters(self.model.axes())[0] if self.model.lora else self.model.axes()


def make_policy(config: RunConfig, mesh: jax.sharding.Mesh) -> Policy:
    """The model that `config.model` describes, laid out by `config.mesh.preset`; no parameter is made or read yet."""
    section = config.model
    origin = section.config if section.path is None else section.path
    assert origin is not None
    multiple = math.lcm(section.vocab_multiple, mesh.shape["tensor"])
    model_config, hf = read_config(origin, vocab_multiple=multiple)
    run = Execution(jnp.dtype(section.compute_dtype), section.remat, section.attention, mesh)
    model = Model(model_config, _lora(section, model_config), run, jnp.dtype(section.param_dtype), section.head)
    shapes = model.abstract()
    if model.lora:
        check_targets(model.lora.targets, shapes)
    shardings = param_specs(model.axes(), shapes, RULES[config.mesh.preset], mesh)
    return Policy(model, hf, jax.tree.map(_placed, shapes, shardings), section.quantize)


def base_params(section: ModelSection, policy: Policy, seed: int) -> Params:
    """Every parameter but adapters and new heads: read from the checkpoint, or random where there is none."""
    target = split_adapters(policy.target)[1]
    finish = _quantizer(policy) if policy.quantize else None
    if section.path is not None:
        # A head that the run does not use may be left over in the checkpoint.
        partial = policy.model.output != LANGUAGE or has_scalar_head(policy.hf)
        return import_params(section.path, policy.model.config, target, partial=partial, finish=finish)
    params = _random(policy.model, 1, target, seed)
    return unflatten({path: finish(path, leaf) for path, leaf in flatten(params).items()}) if finish else params


def adapter_params(section: ModelSection, policy: Policy, seed: int) -> Params:
    """Fresh adapters, which change nothing yet, or those of `model.lora.path`; a scalar or custom head: random, or the
    reward model's own."""
    target = split_adapters(policy.target)[0]
    if not target:
        return {}
    params = _random(policy.model, 0, target, seed)
    if section.lora is not None and section.lora.path is not None:
        params |= import_adapter(section.lora.path, policy.model.config, {"layers": target["layers"]})
    if section.path is not None and policy.model.output == SCALAR and has_scalar_head(policy.hf):
        head = {"value_head": target["value_head"]}
        params |= import_params(section.path, policy.model.config, head, partial=True)
    return params


def tokenizer_folder(section: ModelSection) -> str:
    folder = section.tokenizer or section.path
    assert folder is not None
    return folder


def make_tokenizer(section: ModelSection) -> Any:
    """The model's tokenizer, with `model.chat_template` instead of its own template where that is given."""
    tokenizer = load_tokenizer(tokenizer_folder(section))
    if section.chat_template is not None:
        path = Path(section.chat_template)
        if not path.is_file():
            raise ValueError(f"model.chat_template: there is no file {path}")
        tokenizer.chat_template = path.read_text()
    return tokenizer


def stop_ids(section: ModelSection, policy: Policy, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: those of generation_config.json and config.json, and the tokenizer's."""
    generation = Path(tokenizer_folder(section)) / "generation_config.json"
    named = [json.loads(generation.read_text()).get("eos_token_id")] if generation.is_file() else []
    named += [policy.hf.get("eos_token_id"), tokenizer.eos_token_id]
    return sorted({token for ids in named if ids is not None for token in (ids if isinstance(ids, list) else [ids])})


def as_list(sources: SourceSection | list[SourceSection]) -> list[SourceSection]:
    return sources if isinstance(sources, list) else [sources]


def check_batch(config: RunConfig, mesh: jax.sharding.Mesh) -> None:
    """Raise ValueError where the rows of a microbatch cannot be dealt to the devices."""
    shares = row_shares(mesh)
    rows, pieces = config.train.batch_size, config.train.microbatches
    if rows % (shares * pieces):
        axes = " x ".join(f"mesh.{axis}" for axis in ROWS)
        nearest = max(round(rows / (shares * pieces)), 1) * shares * pieces
        raise ValueError(
            f"train.batch_size={rows} rows cannot be dealt to {axes} = {shares} devices in "
            f"train.microbatches={pieces}; the nearest batch_size that can is {nearest}"
        )


def open_stream(config: RunConfig, encode: Encode, mesh: jax.sharding.Mesh) -> TrainStream:
    """This host's part of the training data."""
    rows = config.train.batch_size
    shards = count_shards(config.data, rows)
    return TrainStream(
        as_list(config.data.train),
        config.data,
        encode,
        rows=rows,
        seed=config.run.seed,
        shards=local_shards(mesh, rows, shards),
        num_shards=shards,
    )


def _random(model: Model, part: int, target: Params, seed: int) -> Params:
    shardings = jax.tree.map(lambda leaf: leaf.sharding, target)
    return jax.jit(lambda key: split_adapters(model.init(key))[part], out_shardings=shardings)(jax.random.key(seed))


def _quantizer(policy: Policy) -> Callable[[str, jax.Array], Any]:
    """Quantises, by its dotted path, a parameter that is to be; so no more than one is ever there in full."""
    axes, held, kind = flatten(policy.model.axes()), flatten(policy.frozen), policy.quantize
    assert kind is not None
    plain = jax.ShapeDtypeStruct
    return lambda path, leaf: leaf if isinstance(held[path], plain) else quantize(leaf, axes[path], kind)


def _lora(section: ModelSection, config: ModelConfig) -> Lora | None:
    asked = section.lora
    if asked is None:
        return None
    dtype = jnp.dtype(asked.dtype)
    if asked.path is None:
        targets = LORA_TARGETS if asked.targets is None else tuple(asked.targets)
        return Lora(asked.rank or 16, asked.alpha or 32.0, asked.dropout, targets, bool(asked.rslora), dtype)
    found = replace(read_lora(asked.path, config), dropout=asked.dropout, dtype=dtype)
    for key, value in (("rank", found.rank), ("alpha", found.alpha), ("rslora", found.rslora)):
        wanted = getattr(asked, key)
        if wanted not in (None, value):
            raise ValueError(f"model.lora.{key}={wanted}, but the adapter in {asked.path} has {value}; leave it out")
    named = replace(found, targets=tuple(asked.targets or found.targets))
    if any(not named.covers(path) for path in found.targets):
        raise ValueError(
            f"model.lora.targets={asked.targets}, but the adapter in {asked.path} is on {', '.join(found.targets)}; "
            "leave it out"
        )
    return named


def _placed(shape: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)
