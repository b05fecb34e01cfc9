"""Declares a role's model: its parameters with their shapes, dtypes and shardings.

No weights are read or computed here: a declaration is the target of a restore, and the abstract input of a compiler.
"""

import math
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from converters.adapters import read_lora
from converters.import_hf import read_config
from converters.tokenizer import add_tokens, load_tokenizer
from jaxtrain.config import ModelSection
from jaxtrain.lora import check_targets
from jaxtrain.nn.block import Execution
from jaxtrain.nn.config import Lora, ModelConfig, Modules, NewTokens, RouterLoss
from jaxtrain.nn.model import Model
from jaxtrain.nn.remat import DENSE_ONLY, GATE, RECOMPUTE, Remat
from jaxtrain.ops.attend import Impl
from jaxtrain.ops.blockwise import SplashBlocks
from jaxtrain.ops.gpu.described import described
from jaxtrain.ops.gpu.parity import HeadShapes, agrees_with_xla
from jaxtrain.ops.quantize import QuantizedFormat, quantize_kernels
from jaxtrain.parallel.mesh import check_compiler_options, default_head_chunk, platform_of
from jaxtrain.parallel.sharding import RULES, context_shards, param_specs, with_shardings
from jaxtrain.roles.full_modules import with_full_modules
from jaxtrain.roles.tokenizer import tokenizer_folder
from jaxtrain.roles.torch_model import open_torch_model
from jaxtrain.types import Params

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

_MAX_UNROLLED_LAYERS = 8
"""On a CPU, a model of at most this many layers is compiled without a loop; more layers would compile slowly."""


class Declaration(NamedTuple):
    """A model, and the shape, dtype and sharding of each of its parameters."""

    model: Model
    hf: dict[str, Any]  # the content of config.json
    target: Params  # shape, dtype and sharding of every parameter, including adapters, before quantisation
    quantize: QuantizedFormat | None = None  # the format of the frozen kernels
    added: NewTokens | None = None  # tokens that the checkpoint lacks, whether or not they have separate parameters

    @property
    def mesh(self) -> jax.sharding.Mesh:
        mesh = self.model.run.mesh
        assert mesh is not None
        return mesh

    @property
    def trained(self) -> Params:
        """The part of `target` that the optimizer updates."""
        return self.model.split(self.target)[0] if self.model.base_frozen else self.target

    @property
    def frozen(self) -> Params:
        """The part of `target` that is not trained, quantised if the section asks for it."""
        if not self.model.base_frozen:
            return {}
        base = self.model.split(self.target)[1]
        return quantize_kernels(base, self.model.axes(), self.quantize) if self.quantize else base

    @property
    def trained_axes(self) -> Params:
        """Logical axes of the trained parameters."""
        return self.model.split(self.model.axes())[0] if self.model.base_frozen else self.model.axes()


def declare(section: ModelSection, mesh: jax.sharding.Mesh, preset: str) -> Declaration:
    """Declare the model that `section` describes, sharded over `mesh` by the rules of `mesh.preset`.

    Raises ValueError, which names the key, if the section does not fit the checkpoint or the mesh.
    """
    if section.backend == "torchax" and context_shards(mesh) > 1:
        raise ValueError(f"model.backend=torchax attends to whole rows: set mesh.context={context_shards(mesh)} to 1")
    if section.backend == "torchax":
        run = _execution(section, mesh)
        torch_model = open_torch_model(section, run)
        shardings = param_specs(torch_model.axes(), torch_model.abstract(), RULES[preset], mesh)
        target = with_shardings(torch_model.abstract(), shardings)
        return Declaration(torch_model, torch_model.module.config.to_dict(), target)
    origin = section.config if section.path is None else section.path
    assert origin is not None
    multiple = math.lcm(section.vocab_multiple, mesh.shape["tensor"])
    config, hf = read_config(origin, vocab_multiple=multiple)
    if config.delta and context_shards(mesh) > 1:
        raise ValueError(
            f"mesh.context={context_shards(mesh)} splits the tokens of a row, over which a model of family "
            f"{config.family} passes recurrent states: set it to 1"
        )
    config = replace(config, modules=Modules(**section.modules.model_dump()))
    unroll = platform_of(mesh) == "cpu" and section.remat == "none" and config.num_layers <= _MAX_UNROLLED_LAYERS
    run = replace(
        _execution(section, mesh),
        remat=_remat(section, config),
        attention=_attention(section, config, mesh),
        unroll=unroll,
    )
    lora, added = _lora(section, config), _added_tokens(section)
    if added:
        if config.per_layer_width is not None:
            raise ValueError(
                f"model.add_tokens: layers of family {config.family} have embeddings of their own, in which a new "
                "token would have no row; use tokens that the tokenizer has"
            )
        config = replace(config, vocab_size=max(config.vocab_size, added.first + added.count))
    model = Model(
        config=config,
        lora=lora,
        run=run,
        param_dtype=jnp.dtype(section.param_dtype),
        output=section.head,
        router_loss=_router_loss(section, config),
        new_tokens=added if section.add_tokens and (lora or section.add_tokens.alone) else None,
    )
    if model.lora:
        check_targets(model.lora.targets, model.abstract())
        model = with_full_modules(section, model)
    shapes = model.abstract()
    shardings = param_specs(model.axes(), shapes, RULES[preset], mesh)
    return Declaration(model, hf, with_shardings(shapes, shardings), section.quantize, added)


def _execution(section: ModelSection, mesh: jax.sharding.Mesh) -> Execution:
    """What every model has, whatever its layers are."""
    options = tuple(section.compiler_options.items())
    check_compiler_options(mesh, options)
    return Execution(
        jnp.dtype(section.compute_dtype),
        mesh=mesh,
        head_chunk=section.head_chunk or default_head_chunk(mesh),
        compiler_options=options,
    )


def _attention(section: ModelSection, config: ModelConfig, mesh: jax.sharding.Mesh) -> Impl:
    """`auto` on a GPU is cuDNN's attention if it takes the model's layers and equals XLA's on this GPU. It is taken to
    do so on GPUs that are not there, which a program is only compiled for. On TPU it is splash attention.

    cuDNN's has no offset of the queries, which the parts of a row need.
    """
    if section.attention == "splash" or (section.attention == "auto" and platform_of(mesh) == "tpu"):
        return SplashBlocks(**section.splash.model_dump())
    sixteen_bit = section.compute_dtype != "float32"
    decided = section.attention != "auto" or platform_of(mesh) != "gpu" or context_shards(mesh) > 1
    if decided or not sixteen_bit:
        return section.attention
    if described.get():
        return "xla" if config.attention_softcap is not None else "cudnn"
    tensor = mesh.shape["tensor"]
    layers = [
        HeadShapes(
            heads=config.num_heads // tensor,
            kv_heads=max(config.heads_of(kind)[0] // tensor, 1),
            width=config.heads_of(kind)[1],
            window=kind.window,
            softcap=config.attention_softcap,
            sinks=config.sinks,
            dtype=jnp.dtype(section.compute_dtype),
        )
        for kind in config.attention_kinds
    ]
    return "cudnn" if all(agrees_with_xla(shapes) for shapes in layers) else "xla"


def _remat(section: ModelSection, config: ModelConfig) -> Remat:
    """Raises ValueError for the name of an activation that the model does not have."""
    if isinstance(section.remat, str):
        return section.remat
    places = section.remat.model_dump()
    dense = any(kind.dense or kind.beside for kind in config.pattern)
    all_sparse = config.moe and not config.moe.shared_size and not dense
    for name in DENSE_ONLY if all_sparse else () if config.mlp_gate else (GATE,):
        if places.pop(name) != RECOMPUTE:
            has = "a mixture of experts" if all_sparse else "feed-forward layers without a gate"
            raise ValueError(
                f"model.remat.{name} names an activation of a {'dense' if all_sparse else 'gated'} feed-forward layer; "
                f"this model of family {config.family} has {has}: leave it out"
            )
    return tuple(places.items())


def _router_loss(section: ModelSection, config: ModelConfig) -> RouterLoss:
    weights = RouterLoss(section.router_aux_loss_coef, section.router_z_loss_coef)
    if config.moe is None and weights != RouterLoss():
        raise ValueError(
            "model.router_aux_loss_coef and model.router_z_loss_coef need a mixture of experts; this model of family "
            f"{config.family} has no router"
        )
    return weights


def _added_tokens(section: ModelSection) -> NewTokens | None:
    """The tokens of `model.add_tokens` that the tokenizer lacks."""
    requested, folder = section.add_tokens, tokenizer_folder(section)
    if requested is None or folder is None:
        return None
    ids = add_tokens(load_tokenizer(folder), requested.tokens, requested.special)
    if not ids and requested.alone:
        raise ValueError(f"model.add_tokens.alone: the tokenizer in {folder} already has all of these tokens")
    return NewTokens(ids[0], len(ids)) if ids else None


def _lora(section: ModelSection, config: ModelConfig) -> Lora | None:
    requested = section.lora
    if requested is None:
        return None
    dtype = jnp.dtype(requested.dtype)
    if requested.path is None:
        targets = tuple(name for name in LORA_TARGETS if config.mlp_gate or name != "gate_proj")
        targets = targets if requested.targets is None else tuple(requested.targets)
        return Lora(
            rank=requested.rank or 16,
            alpha=requested.alpha or 32.0,
            dropout=requested.dropout,
            targets=targets,
            rslora=bool(requested.rslora),
            dtype=dtype,
        )
    found = replace(read_lora(requested.path, config), dropout=requested.dropout, dtype=dtype)
    for key, value in (("rank", found.rank), ("alpha", found.alpha), ("rslora", found.rslora)):
        wanted = getattr(requested, key)
        if wanted not in (None, value):
            raise ValueError(
                f"model.lora.{key}={wanted}, but the adapter in {requested.path} has {value}; leave it out"
            )
    named = replace(found, targets=tuple(requested.targets or found.targets))
    if any(not named.covers(path) for path in found.targets):
        raise ValueError(
            f"model.lora.targets={requested.targets}, but the adapter in {requested.path} is on "
            f"{', '.join(found.targets)}; leave it out"
        )
    return named
