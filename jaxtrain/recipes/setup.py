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
from converters.export_hf import TOKENIZER_FILES
from converters.families.registry import has_scalar_head
from converters.import_hf import import_params, read_config
from converters.rows import flatten, unflatten
from converters.tokenizer import add_tokens, load_tokenizer
from jaxtrain.config import ModelSection, RunConfig, SourceSection
from jaxtrain.data.pipeline import Encode, TrainStream, count_shards
from jaxtrain.lora import check_targets, join, mean_rows, merge_tokens, split_adapters
from jaxtrain.nn.config import Lora, ModelConfig, Modules, NewTokens, RouterLoss
from jaxtrain.nn.decoder import Execution
from jaxtrain.nn.heads import LANGUAGE, SCALAR
from jaxtrain.nn.model import Model
from jaxtrain.ops.quantize import Kind, Quantized, quantize, quantize_kernels
from jaxtrain.parallel.batches import local_shards
from jaxtrain.parallel.mesh import platform_of
from jaxtrain.parallel.sharding import ROWS, RULES, param_specs, row_shares
from jaxtrain.recipes.fallback import TorchModel, open_torch_model
from jaxtrain.types import Params

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

_UNROLLED = 8
"""Layers that a CPU walks without a loop; more would take long to compile."""


class Policy(NamedTuple):
    """A model that is trained, and where its parameters lie."""

    model: Model
    hf: dict[str, Any]  # config.json as it was read
    target: Params  # shapes, dtypes and shardings of all parameters, adapters included, none quantised
    quantize: Kind | None = None  # how the frozen kernels are held
    added: NewTokens | None = None  # tokens that the checkpoint lacks, whether they have parameters of their own or not

    @property
    def trained(self) -> Params:
        """The part of `target` that the optimizer sees."""
        return split_adapters(self.target)[0] if self.model.base_frozen else self.target

    @property
    def frozen(self) -> Params:
        if not self.model.base_frozen:
            return {}
        base = split_adapters(self.target)[1]
        return quantize_kernels(base, self.model.axes(), self.quantize) if self.quantize else base

    @property
    def trained_axes(self) -> Params:
        """Logical axes of the trained parameters."""
        return split_adapters(self.model.axes())[0] if self.model.base_frozen else self.model.axes()


def make_policy(config: RunConfig, mesh: jax.sharding.Mesh) -> Policy:
    """The model that `config.model` describes, laid out by `config.mesh.preset`; no parameter is made or read yet."""
    section = config.model
    if section.backend == "torchax":
        run = Execution(jnp.dtype(section.compute_dtype), mesh=mesh)
        if config.recipe != "sft" or config.eval.generate:
            raise ValueError("model.backend=torchax has no decoding: only recipe sft without eval.generate runs on it")
        other = open_torch_model(section, run)
        places = param_specs(other.axes(), other.abstract(), RULES[config.mesh.preset], mesh)
        return Policy(other, other.module.config.to_dict(), jax.tree.map(_placed, other.abstract(), places))
    origin = section.config if section.path is None else section.path
    assert origin is not None
    multiple = math.lcm(section.vocab_multiple, mesh.shape["tensor"])
    model_config, hf = read_config(origin, vocab_multiple=multiple)
    model_config = replace(model_config, modules=Modules(**section.modules.model_dump()))
    on_cpu = platform_of(mesh) == "cpu"
    unroll = on_cpu and section.remat == "none" and model_config.num_layers <= _UNROLLED
    run = Execution(jnp.dtype(section.compute_dtype), section.remat, section.attention, mesh, unroll=unroll)
    lora, added = _lora(section, model_config), _added(section)
    if added:
        model_config = replace(model_config, vocab_size=max(model_config.vocab_size, added.first + added.count))
    own = added if section.add_tokens and (lora or section.add_tokens.alone) else None
    router_loss = _router_loss(section, model_config)
    model = Model(
        *(model_config, lora, run, jnp.dtype(section.param_dtype), section.head),
        new_tokens=own,
        router_loss=router_loss,
    )
    shapes = model.abstract()
    if model.lora:
        check_targets(model.lora.targets, shapes)
    shardings = param_specs(model.axes(), shapes, RULES[config.mesh.preset], mesh)
    return Policy(model, hf, jax.tree.map(_placed, shapes, shardings), section.quantize, added)


def _router_loss(section: ModelSection, config: ModelConfig) -> RouterLoss:
    weights = RouterLoss(section.router_aux_loss_coef, section.router_z_loss_coef)
    if config.moe is None and weights != RouterLoss():
        raise ValueError(
            "model.router_aux_loss_coef and model.router_z_loss_coef are for mixtures of experts; "
            f"{config.family} has no router here"
        )
    return weights


def base_params(section: ModelSection, policy: Policy, seed: int) -> Params:
    """Every parameter but adapters and new heads: read from the checkpoint, or random where there is none."""
    target = split_adapters(policy.target)[1]
    if isinstance(policy.model, TorchModel):
        return policy.model.initial(target)
    finish = _quantizer(policy) if policy.quantize and policy.model.base_frozen else None
    if section.path is not None:
        # A head that the run does not use may be left over in the checkpoint.
        partial = policy.model.output != LANGUAGE or has_scalar_head(policy.hf)
        in_file, _ = read_config(policy.hf, policy.model.config.vocab_multiple)  # without the tokens that are new
        params = import_params(section.path, in_file, target, partial=partial, finish=finish)
    else:
        params = _random(policy.model, 1, target, seed)
        params = unflatten({path: finish(path, leaf) for path, leaf in flatten(params).items()}) if finish else params
    if policy.added is None:
        return params
    added, shardings = policy.added, jax.tree.map(lambda leaf: leaf.sharding, params)

    def with_new(params: Params) -> Params:
        return merge_tokens(join(params, mean_rows(params, added)), added)

    return jax.jit(with_new, out_shardings=shardings, donate_argnums=0)(params)


def adapter_params(section: ModelSection, policy: Policy, seed: int, base: Params) -> Params:
    """What is new beside `base`: adapters, fresh ones, which change nothing yet, or those of `model.lora.path`; rows of
    new tokens, at the mean of the others; a scalar or custom head, random or the reward model's own."""
    target = split_adapters(policy.target)[0]
    if not target:
        return {}
    params = _random(policy.model, 0, target, seed)
    if policy.model.new_tokens is not None:
        places = jax.tree.map(lambda leaf: leaf.sharding, target)
        begun = mean_rows(base, policy.model.new_tokens)
        params |= {part: jax.device_put(rows, places[part]) for part, rows in begun.items()}
    if section.lora is not None and section.lora.path is not None:
        params |= import_adapter(section.lora.path, policy.model.config, {"layers": target["layers"]})
    if section.path is not None and policy.model.output == SCALAR and has_scalar_head(policy.hf):
        head = {"value_head": target["value_head"]}
        params |= import_params(section.path, policy.model.config, head, partial=True)
    return params


def tokenizer_folder(section: ModelSection) -> str | None:
    """Where the tokenizer is. None: there is none, and all rows must be `input_ids`."""
    if section.tokenizer is None and section.path is not None:
        return section.path if any((Path(section.path) / name).exists() for name in TOKENIZER_FILES) else None
    return section.tokenizer


def make_tokenizer(section: ModelSection) -> Any:
    """The model's tokenizer, with `model.add_tokens` in it, and `model.chat_template` instead of its own template where
    that is given. None where there is no tokenizer."""
    folder = tokenizer_folder(section)
    if folder is None:
        for key in ("add_tokens", "chat_template"):
            if getattr(section, key) is not None:
                raise ValueError(f"model.{key} needs a tokenizer, and the model has none; name one by model.tokenizer")
        return None
    tokenizer = load_tokenizer(folder)
    if section.add_tokens is not None:
        add_tokens(tokenizer, section.add_tokens.tokens, section.add_tokens.special)
    if section.chat_template is not None:
        path = Path(section.chat_template)
        if not path.is_file():
            raise ValueError(f"model.chat_template: there is no file {path}")
        tokenizer.chat_template = path.read_text()
    return tokenizer


def stop_ids(section: ModelSection, policy: Policy, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: those of generation_config.json and config.json, and the tokenizer's."""
    generation = Path(section.path or section.tokenizer or "") / "generation_config.json"
    named = [json.loads(generation.read_text()).get("eos_token_id")] if generation.is_file() else []
    named += [policy.hf.get("eos_token_id"), tokenizer and tokenizer.eos_token_id]
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
    return lambda path, leaf: quantize(leaf, axes[path], kind) if isinstance(held[path], Quantized) else leaf


def _added(section: ModelSection) -> NewTokens | None:
    """The tokens of `model.add_tokens` that the tokenizer lacks."""
    asked, folder = section.add_tokens, tokenizer_folder(section)
    if asked is None or folder is None:
        return None
    ids = add_tokens(load_tokenizer(folder), asked.tokens, asked.special)
    if not ids and asked.alone:
        raise ValueError(f"model.add_tokens.alone: the tokenizer in {folder} knows all of these tokens already")
    return NewTokens(ids[0], len(ids)) if ids else None


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
