"""`Decoder`: one transformer for all families. Parameters are stacked over layers.

Training scans the layers (one compiled body, rematerialised by policy); decoding walks them with one cache buffer each.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxtrain.nn.attention import Attention, AttentionInputs
from jaxtrain.nn.cache import KVCache, LayerCache
from jaxtrain.nn.config import FLOAT32, LayerKind, Lora, ModelConfig, NewTokens
from jaxtrain.nn.heads import LANGUAGE, SCALAR, LanguageHead, ScalarHead, custom_head, put_new
from jaxtrain.nn.mlp import GatedMLP
from jaxtrain.nn.modules import module_class
from jaxtrain.nn.moe import SparseMLP
from jaxtrain.nn.norm import RMSNorm
from jaxtrain.nn.rope import rope_tables, segment_lengths
from jaxtrain.ops.attend import Impl
from jaxtrain.ops.blockwise import RESIDUALS
from jaxtrain.ops.project import project_on_table
from jaxtrain.parallel.sharding import constrain_rows
from jaxtrain.types import Array, Params, Routing

# What the backward pass finds saved; it computes the rest again.
REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
        jax.checkpoint_policies.save_only_these_names(RESIDUALS),
    ),
}


@dataclass(frozen=True)
class Execution:
    """How a forward pass runs, as opposed to what it computes."""

    dtype: np.dtype = FLOAT32
    remat: str = "none"
    attention: Impl = "auto"
    mesh: jax.sharding.Mesh | None = None
    _: KW_ONLY
    context: int | None = None  # the length that ropes which depend on it go by; None: each sequence's own
    # Layers one after the other in one long program instead of a loop. On a CPU the loop's copies of what the backward
    # pass needs into stacked arrays, and out of them, cost a tenth of the step. Only without remat: see `hidden`.
    unroll: bool = False


class Block(nnx.Module):
    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype, lora: Lora | None):
        norm_class = module_class(config, "norm", RMSNorm)

        def norm(used: bool) -> RMSNorm | None:
            return norm_class(config, (config.hidden_size,), ("norm",), dtype=dtype) if used else nnx.data(None)

        self.input_norm = norm(config.pre_norms)
        attention_class = module_class(config, "attention", Attention)
        self.attn: Attention = attention_class(config, rngs=rngs, dtype=dtype, lora=lora)
        self.attn_post_norm = norm(config.post_norms)
        self.mlp_norm = norm(config.pre_norms)
        mlp_class = module_class(config, "mlp", SparseMLP if config.moe else GatedMLP)
        self.mlp: SparseMLP | GatedMLP = mlp_class(config, rngs=rngs, dtype=dtype, lora=lora)
        self.mlp_post_norm = norm(config.post_norms)
        self.residual_scale = config.residual_scale

    def __call__(
        self,
        x: Array,
        inputs: AttentionInputs,
        kinds: tuple[LayerKind, ...],
        kind: Array | int,
        run: Execution,
        cache: LayerCache | None = None,
        dropout_key: Array | None = None,
    ) -> tuple[Array, LayerCache, Routing | None]:
        """x [B, T, D] -> [B, T, D]; the layer's cache, or without one the keys and values of these tokens; and what its
        router did, if it has one."""
        keys = [None] * 7 if dropout_key is None else list(jax.random.split(dropout_key, 7))
        out = _normed(self.input_norm, x)
        out, cache = self.attn(out, inputs, kinds, kind, cache, keys[:4], run.attention, run.mesh)
        x += _scaled(_normed(self.attn_post_norm, out), self.residual_scale)
        out, routing = _normed(self.mlp_norm, x), None
        if isinstance(self.mlp, SparseMLP):
            out, routing = self.mlp(out, inputs.segment_ids, run.mesh, keys[4])
        else:
            out = self.mlp(out, keys[4:])
        x += _scaled(_normed(self.mlp_post_norm, out), self.residual_scale)
        return constrain_rows(x, run.mesh), cache, routing


def _normed(norm: RMSNorm | None, x: Array) -> Array:
    return x if norm is None else norm(x)


def _scaled(x: Array, scale: float) -> Array:
    """The product is rounded to x's dtype, the factor is not."""
    return x if scale == 1 else (x.astype(jnp.float32) * scale).astype(x.dtype)


class Embedding(nnx.Module):
    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype, new: NewTokens | None = None):
        weight = nnx.initializers.normal(config.init_std)(rngs.params(), (config.padded_vocab, config.hidden_size))
        real = jnp.arange(config.padded_vocab)[:, None] < config.vocab_size
        self.weight = nnx.Param(jnp.where(real, weight, 0).astype(dtype), out_sharding=("vocab", "embed"))
        self.scale = config.embedding_scale
        self.new = new
        self.new_rows = nnx.data(None)
        if new:
            rows = jnp.zeros((new.count, config.hidden_size), jnp.float32)
            self.new_rows = nnx.Param(rows, out_sharding=(None, "embed"))

    def __call__(self, tokens: Array, dtype: jnp.dtype) -> Array:
        # Looked up before it is cast, so that the gradient of a frequent token is summed in the weight's own dtype.
        looked_up = self.weight[...][tokens]
        if self.new_rows is not None and self.new is not None:
            row = tokens - self.new.first
            is_new = (row >= 0) & (row < self.new.count)
            of_new = self.new_rows[...][jnp.where(is_new, row, 0)].astype(looked_up.dtype)
            looked_up = jnp.where(is_new[..., None], of_new, looked_up)
        return looked_up.astype(dtype) * jnp.asarray(self.scale, dtype)

    def table(self) -> Array:
        """[Vp, D], those of new tokens among the others."""
        weight = self.weight[...]
        return weight if self.new_rows is None else put_new(weight, self.new_rows[...], self.new, 0)


class Decoder(nnx.Module):
    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype,
        lora: Lora | None = None,
        output: str = LANGUAGE,
        new: NewTokens | None = None,
    ):
        self.config = config
        self.embed = Embedding(config, rngs=rngs, dtype=dtype, new=new)

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: "layers"})
        def blocks(rngs: nnx.Rngs) -> Block:
            return Block(config, rngs=rngs, dtype=dtype, lora=lora)

        self.layers = blocks(rngs)
        norm_class = module_class(config, "norm", RMSNorm)
        self.norm: RMSNorm = norm_class(config, (config.hidden_size,), ("norm",), dtype=dtype)
        self.lm_head = self.value_head = self.custom_head = nnx.data(None)
        if output == SCALAR:
            self.value_head = ScalarHead(config, rngs=rngs, dtype=dtype)
        elif output != LANGUAGE:
            self.custom_head = custom_head(output, config, rngs=rngs, dtype=dtype)
        elif not config.tied:
            self.lm_head = LanguageHead(config, rngs=rngs, dtype=dtype, new=new)
        # Layers that differ only in kind stay stacked: `kind_of` [L] is scanned along with their parameters.
        self.kinds = tuple(dict.fromkeys(config.pattern))
        self.kind_of = tuple(self.kinds.index(kind) for kind in config.pattern)

    def hidden(
        self, tokens: Array, positions: Array, segment_ids: Array, run: Execution, dropout_key: Array | None = None
    ) -> tuple[Array, Routing | None]:
        """Final hidden states [B, T, D] of packed tokens [B, T], as the head takes them (after the last norm), and what
        the routers of a mixture of experts did."""
        inputs = self._inputs(positions, segment_ids, segment_lengths(positions, segment_ids), run)
        x = constrain_rows(self.embed(tokens, run.dtype), run.mesh)
        graphdef, stacked = nnx.split(self.layers)

        def body(x: Array, layer: tuple) -> tuple[Array, Routing | None]:
            params, kind, index = layer
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, index)
            x, _, routing = nnx.merge(graphdef, params)(x, inputs, self.kinds, kind, run, dropout_key=key)
            return x, routing

        if run.remat != "none":
            # Inside a loop nothing can be merged away across iterations, so the barrier against it is not needed.
            assert not run.unroll, run.remat
            body = jax.checkpoint(body, policy=REMAT_POLICIES[run.remat], prevent_cse=False)
        layers = (stacked, jnp.asarray(self.kind_of), jnp.arange(self.config.num_layers))
        x, routing = jax.lax.scan(body, x, layers, unroll=run.unroll)
        return self._features(x), routing

    def prefill(
        self, layers: tuple[Params, ...], tokens: Array, positions: Array, segment_ids: Array, run: Execution
    ) -> tuple[LayerCache, ...]:
        """Keys and values of every layer for packed rows [B, T]; `layers` are those of `unstack`."""
        x = constrain_rows(self.embed(tokens, run.dtype), run.mesh)
        inputs = self._inputs(positions, segment_ids, segment_lengths(positions, segment_ids), run)
        return self._walk(layers, x, inputs, run, (None,) * len(layers))[1]

    def extend(
        self,
        layers: tuple[Params, ...],
        tokens: Array,
        positions: Array,
        segment_ids: Array,
        cache: KVCache,
        run: Execution,
    ) -> tuple[Array, KVCache]:
        """Hidden states [B, T, D] of tokens that continue what `cache` holds, and the cache with them in it.

        A row's tokens stand in order; segment 1, and 0 for padding, which is not written.
        """
        ends = jnp.where(segment_ids != 0, positions + 1, 0).max(1)
        length = jnp.maximum(cache.length, ends)
        inputs = self._inputs(positions, segment_ids, length[:, None], run)
        inputs = inputs._replace(cached=cache.length, length=length)
        x, written = self._walk(layers, self.embed(tokens, run.dtype), inputs, run, cache.layers)
        return self._features(x), KVCache(written, length)

    def _inputs(self, positions: Array, segment_ids: Array, lengths: Array, run: Execution) -> AttentionInputs:
        lengths = lengths if run.context is None else jnp.asarray(run.context)
        return AttentionInputs(
            positions, segment_ids, rope_tables(self.kinds, self.config.head_dim, positions, lengths)
        )

    def _walk(
        self,
        layers: tuple[Params, ...],
        x: Array,
        inputs: AttentionInputs,
        run: Execution,
        caches: tuple[LayerCache | None, ...],
    ) -> tuple[Array, tuple[LayerCache, ...]]:
        """The layers one by one, each with its own cache."""
        graphdef = nnx.graphdef(self.layers)
        written = []
        for params, kind, cache in zip(layers, self.kind_of, caches, strict=True):
            x, cache, _ = nnx.merge(graphdef, params)(x, inputs, self.kinds, kind, run, cache)
            written.append(cache)
        return x, tuple(written)

    def _features(self, x: Array) -> Array:
        # The scale of the logits goes into the hidden states: whoever multiplies by the head need not know of it.
        x = _scaled(self.norm(x), self.config.logit_scale)
        return x if self.custom_head is None else self.custom_head.features(x)

    def head(self) -> Array:
        """The head's kernel: [Vp, D] (the embedding) if tied, else [D, Vp]."""
        assert self.value_head is None, "a scalar head has no vocabulary"
        if self.custom_head is not None:
            return self.custom_head.kernel[...]
        return self.embed.table() if self.lm_head is None else self.lm_head.table()

    def logits(self, hidden: Array) -> Array:
        """float32 logits [..., V] of hidden states [..., D]: for decoding and tests, where few tokens are asked for."""
        kernel = self.head().astype(hidden.dtype)
        if self.lm_head is self.custom_head is None:
            logits = project_on_table(hidden, kernel)
        else:
            logits = jnp.tensordot(hidden, kernel, 1, preferred_element_type=jnp.float32)
        if self.config.logit_softcap is not None:
            logits = self.config.logit_softcap * jnp.tanh(logits / self.config.logit_softcap)
        return logits[..., : self.config.vocab_size]

    def values(self, hidden: Array) -> Array:
        """float32 [...]: what the scalar head says of hidden states [..., D]."""
        assert self.value_head is not None, "this model has no scalar head"
        return self.value_head(hidden)
