"""`Block`: one layer of a decoder, of the parts that its kind has."""

from collections.abc import Callable, Collection
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

from jaxtrain.nn.attention import Attention, AttentionInputs, KeysValues, SharedAttention, inputs_of
from jaxtrain.nn.cache import LayerState, RecurrentState
from jaxtrain.nn.config import FLOAT32, LayerKind, Lora, ModelConfig
from jaxtrain.nn.delta_net import GatedDeltaNet
from jaxtrain.nn.latent_attention import LatentAttention
from jaxtrain.nn.mlp import GatedMLP
from jaxtrain.nn.modules import module_class
from jaxtrain.nn.moe import SparseMLP
from jaxtrain.nn.norm import RMSNorm
from jaxtrain.nn.per_layer import PerLayerGate
from jaxtrain.nn.remat import Remat
from jaxtrain.ops.attend import Impl
from jaxtrain.parallel.mesh import CompilerOptions
from jaxtrain.parallel.sharding import CONTEXT, constrain_rows
from jaxtrain.types import Array, Routing


@dataclass(frozen=True)
class Execution:
    """Settings of a forward pass that do not change its result, except for rounding and `rope_length`."""

    dtype: np.dtype = FLOAT32
    remat: Remat = "none"
    attention: Impl = "auto"
    mesh: jax.sharding.Mesh | None = None
    _: KW_ONLY
    rope_length: int | None = None  # the length that length-dependent ropes use; None: that of each sequence
    # Unroll the loop over layers. On a CPU a tenth of the step is spent on copying saved values into stacked arrays and
    # out of them. Only without remat: see `hidden`.
    unroll: bool = False
    head_chunk: int = 512  # tokens of a chunk of the head: see `ops.token_scores.Scoring`
    compiler_options: CompilerOptions = ()  # of the training step, and of prefill and decode


_ATTENTION = {
    "attn": LayerKind(None, None),
    "global_attn": LayerKind(None, None, mixer="global"),
    "reusing_attn": LayerKind(None, None, reuses=True),
    "reusing_global_attn": LayerKind(None, None, mixer="global", reuses=True),
}
_MIXER_PARTS = (*_ATTENTION, "delta")
_MLP_PARTS = ("mlp", "dense_mlp", "wide_mlp")
PARTS = (
    *("input_norm", *_MIXER_PARTS, "attn_post_norm", "mlp_norm", *_MLP_PARTS, "dense_mlp_post_norm"),
    *("mlp_post_norm", "per_layer", "scale"),
)
"""The parts of a `Block`. A layer has those that are not in `LayerKind.absent`, as far as the config uses them."""


class LayerOutput(NamedTuple):
    """What a layer computes."""

    x: Array  # [B, T, D]
    state: LayerState  # the layer's state with these tokens in it
    routing: Routing | None  # the statistics of its router, if it has one
    reused: dict[str, KeysValues]  # for the layers after it: see `AttentionInputs.reused`


class Block(nnx.Module):
    """A layer: attention or a gated delta net, and a feed-forward layer, dense or a mixture of experts or both.

    Only `parts` are made: those that a layer does not have, or that have a stack of their own, are None.
    """

    def __init__(
        self, config: ModelConfig, *, parts: Collection[str], rngs: nnx.Rngs, dtype: jnp.dtype, lora: Lora | None
    ):
        norm_class = module_class(config, "norm", RMSNorm)

        def norm(name: str, used: bool) -> Any:
            made = used and name in parts
            return norm_class(config, (config.hidden_size,), ("norm",), dtype=dtype) if made else nnx.data(None)

        def module(name: str, make: Any, sizes: ModelConfig = config, **options: Any) -> Any:
            return make(sizes, rngs=rngs, dtype=dtype, lora=lora, **options) if name in parts else nnx.data(None)

        shared = any(kind.reuses for kind in config.pattern)
        default = LatentAttention if config.latent else SharedAttention if shared else Attention
        attention = module_class(config, "attention", default)
        beside = any(kind.beside for kind in config.pattern)
        self.input_norm = norm("input_norm", config.pre_norms)
        self.attn: Attention | LatentAttention | None = module("attn", attention)
        kinds = {name: kind for name, kind in _ATTENTION.items() if name != "attn"}
        made = {name: module(name, default, kind=kind) for name, kind in kinds.items()}
        self.global_attn: Attention | None = made["global_attn"]
        self.reusing_attn: Attention | None = made["reusing_attn"]
        self.reusing_global_attn: Attention | None = made["reusing_global_attn"]
        self.delta: GatedDeltaNet | None = module("delta", GatedDeltaNet)
        self.attn_post_norm = norm("attn_post_norm", config.post_norms)
        self.mlp_norm = norm("mlp_norm", config.pre_norms)
        mlp_class = module_class(config, "mlp", SparseMLP if config.moe else GatedMLP)
        self.mlp: SparseMLP | GatedMLP | None = module("mlp", mlp_class)
        self.dense_mlp: GatedMLP | None = module("dense_mlp", GatedMLP, at="dense_mlp")
        wide = replace(config, intermediate_size=2 * config.intermediate_size)
        self.wide_mlp: GatedMLP | None = module("wide_mlp", GatedMLP, wide, at="wide_mlp")
        self.dense_mlp_post_norm = norm("dense_mlp_post_norm", beside)
        self.mlp_post_norm = norm("mlp_post_norm", config.post_norms)
        self.per_layer: PerLayerGate | None = nnx.data(None)
        if config.per_layer_width is not None:
            self.per_layer = module("per_layer", PerLayerGate)
        self.scale = nnx.data(None)
        if config.layer_scale and "scale" in parts:
            self.scale = nnx.Param(jnp.ones((1,), dtype), out_sharding=("norm",))
        self.residual_scale = config.residual_scale

    @jax.named_scope("layer")
    def __call__(
        self,
        x: Float[Array, "B T D"],
        inputs: AttentionInputs,
        kinds: tuple[LayerKind, ...],
        kind: Array | int,
        run: Execution,
        cache: LayerState | None = None,
        dropout_key: Array | None = None,
    ) -> LayerOutput:
        """`kinds[kind]` is that of this layer, as `AttentionInputs` and the attention use it."""
        keys: list[Array | None] = [None] * 7
        if dropout_key is not None:
            keys = list(jax.random.split(dropout_key, 7))
        out = _normed(self.input_norm, x)
        part = next(name for name in _MIXER_PARTS if getattr(self, name) is not None)
        reused = inputs.reused or {}
        if part == "delta":
            assert self.delta is not None and (cache is None or isinstance(cache, RecurrentState))
            with jax.named_scope("delta"):
                out, state = self.delta(out, inputs, cache, keys[0])
        else:
            attention = getattr(self, part)
            number, own, of_kind = inputs_of(kind, kinds, inputs, part)
            with jax.named_scope("attention"):
                out, state, *seen = attention(out, of_kind, own, number, cache, keys[:4], run.attention, run.mesh)
            if seen:
                reused = {**reused, _ATTENTION[part].mixer: seen[0]}
        x += scaled(_normed(self.attn_post_norm, out), self.residual_scale)
        with jax.named_scope("mlp"):
            out, routing = self._feed_forward(x, inputs, run, keys[4:])
        x += scaled(_normed(self.mlp_post_norm, out), self.residual_scale)
        if self.per_layer is not None:
            assert inputs.of_layer is not None
            key = None if keys[6] is None else jax.random.fold_in(keys[6], 1)
            x += self.per_layer(x, inputs.of_layer, key)
        if self.scale is not None:
            x *= jax.lax.stop_gradient(self.scale[...].astype(x.dtype))
        return LayerOutput(constrain_rows(x, run.mesh, CONTEXT), state, routing, reused)

    def _feed_forward(
        self, x: Array, inputs: AttentionInputs, run: Execution, keys: list[Array | None]
    ) -> tuple[Array, Routing | None]:
        """Of the residual stream: norm, and feed-forward layer or mixture or both."""
        out = _normed(self.mlp_norm, x)
        dense = next((each for each in (self.dense_mlp, self.wide_mlp) if each is not None), None)
        if not isinstance(self.mlp, SparseMLP):
            dense = dense or self.mlp
            assert dense is not None
            return dense(out, keys), None
        if dense is None:
            return self.mlp(out, inputs.segment_ids, run.mesh, keys[0])
        mixed, routing = self.mlp(x, inputs.segment_ids, run.mesh, keys[0])
        keys = [None if key is None else jax.random.fold_in(key, 1) for key in keys]
        return _normed(self.dense_mlp_post_norm, dense(out, keys)) + mixed, routing


def _normed(norm: Callable[[Array], Array] | None, x: Array) -> Array:
    return x if norm is None else norm(x)


def scaled(x: Array, scale: float) -> Array:
    """x * scale in x's dtype, without rounding the factor first."""
    return x if scale == 1 else (x.astype(jnp.float32) * scale).astype(x.dtype)
