"""`Decoder`: one transformer for all families. Parameters are stacked over layers.

Training scans the layers (see `nn.stack`), rematerialised by policy. Decoding unrolls them, with a cache buffer for
each layer.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Float, Integer

from jaxtrain.nn.attention import Attention, AttentionInputs
from jaxtrain.nn.cache import LayerCache, LayerState, ModelCache, RecurrentState
from jaxtrain.nn.config import FLOAT32, LayerKind, Lora, ModelConfig, NewTokens
from jaxtrain.nn.delta_net import GatedDeltaNet
from jaxtrain.nn.heads import LANGUAGE, SCALAR, LanguageHead, ScalarHead, custom_head, with_new_tokens
from jaxtrain.nn.latent_attention import LatentAttention
from jaxtrain.nn.mlp import GatedMLP
from jaxtrain.nn.modules import module_class
from jaxtrain.nn.moe import SparseMLP
from jaxtrain.nn.norm import RMSNorm
from jaxtrain.nn.remat import Remat, remat_policy
from jaxtrain.nn.rope import rope_tables, token_segment_lengths
from jaxtrain.nn.stack import LayerSpan, in_periods, joined_routing, longest_loop
from jaxtrain.ops.attend import Impl
from jaxtrain.ops.project import project_on_table
from jaxtrain.parallel.mesh import CompilerOptions
from jaxtrain.parallel.sharding import CONTEXT, ROWS, constrain_rows, context_shards
from jaxtrain.types import Array, Params, Routing


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


PARTS = ("input_norm", "attn", "delta", "attn_post_norm", "mlp_norm", "mlp", "dense_mlp", "mlp_post_norm")
"""The parts of a `Block`. A layer has those that are not in `LayerKind.absent`, as far as the config uses them."""


class Block(nnx.Module):
    """A layer: attention or a gated delta net, and a feed-forward layer, dense or a mixture of experts.

    Only `parts` are made: those that a layer does not have, or that have a stack of their own, are None.
    """

    def __init__(
        self, config: ModelConfig, *, parts: Collection[str], rngs: nnx.Rngs, dtype: jnp.dtype, lora: Lora | None
    ):
        norm_class = module_class(config, "norm", RMSNorm)

        def norm(name: str, used: bool) -> Any:
            made = used and name in parts
            return norm_class(config, (config.hidden_size,), ("norm",), dtype=dtype) if made else nnx.data(None)

        def module(name: str, make: Any, **options: Any) -> Any:
            return make(config, rngs=rngs, dtype=dtype, lora=lora, **options) if name in parts else nnx.data(None)

        attention = LatentAttention if config.latent else Attention
        self.input_norm = norm("input_norm", config.pre_norms)
        self.attn: Attention | LatentAttention | None = module("attn", module_class(config, "attention", attention))
        self.delta: GatedDeltaNet | None = module("delta", GatedDeltaNet)
        self.attn_post_norm = norm("attn_post_norm", config.post_norms)
        self.mlp_norm = norm("mlp_norm", config.pre_norms)
        mlp_class = module_class(config, "mlp", SparseMLP if config.moe else GatedMLP)
        self.mlp: SparseMLP | GatedMLP | None = module("mlp", mlp_class)
        self.dense_mlp: GatedMLP | None = module("dense_mlp", GatedMLP, at="dense_mlp")
        self.mlp_post_norm = norm("mlp_post_norm", config.post_norms)
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
    ) -> tuple[Float[Array, "B T D"], LayerState, Routing | None]:
        """The output; the layer's state with these tokens in it; and the statistics of its router, if it has one."""
        keys: list[Array | None] = [None] * 7
        if dropout_key is not None:
            keys = list(jax.random.split(dropout_key, 7))
        out = _normed(self.input_norm, x)
        if self.delta is None:
            assert self.attn is not None and (cache is None or isinstance(cache, LayerCache))
            with jax.named_scope("attention"):
                out, cache = self.attn(out, inputs, kinds, kind, cache, keys[:4], run.attention, run.mesh)
        else:
            assert cache is None or isinstance(cache, RecurrentState)
            with jax.named_scope("delta"):
                out, cache = self.delta(out, inputs, cache, keys[0])
        x += _scaled(_normed(self.attn_post_norm, out), self.residual_scale)
        out, routing = _normed(self.mlp_norm, x), None
        with jax.named_scope("mlp"):
            if isinstance(self.mlp, SparseMLP):
                out, routing = self.mlp(out, inputs.segment_ids, run.mesh, keys[4])
            else:
                mlp = self.mlp if self.dense_mlp is None else self.dense_mlp
                assert mlp is not None
                out = mlp(out, keys[4:])
        x += _scaled(_normed(self.mlp_post_norm, out), self.residual_scale)
        return constrain_rows(x, run.mesh, CONTEXT), cache, routing


def _normed(norm: Callable[[Array], Array] | None, x: Array) -> Array:
    return x if norm is None else norm(x)


def _scaled(x: Array, scale: float) -> Array:
    """x * scale in x's dtype, without rounding the factor first."""
    return x if scale == 1 else (x.astype(jnp.float32) * scale).astype(x.dtype)


class Embedding(nnx.Module):
    """The token embedding, with separate rows for new tokens."""

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

    def __call__(self, tokens: Integer[Array, "B T"], dtype: jnp.dtype) -> Float[Array, "B T D"]:
        # Cast after the lookup, so that the gradient of a frequent token is summed in the dtype of the weights.
        looked_up = self.weight[...][tokens]
        if self.new_rows is not None and self.new is not None:
            row = tokens - self.new.first
            is_new = (row >= 0) & (row < self.new.count)
            of_new = self.new_rows[...][jnp.where(is_new, row, 0)].astype(looked_up.dtype)
            looked_up = jnp.where(is_new[..., None], of_new, looked_up)
        return looked_up.astype(dtype) * jnp.asarray(self.scale, dtype)

    def table(self) -> Float[Array, "Vp D"]:
        """The embedding with the rows of new tokens at their ids."""
        weight = self.weight[...]
        return weight if self.new_rows is None else with_new_tokens(weight, self.new_rows[...], self.new, 0)


def _stacked_layers(config: ModelConfig, rngs: nnx.Rngs, dtype: jnp.dtype, lora: Lora | None) -> Block:
    """All layers as one `Block`, every part of which is stacked over the layers that have it."""

    def stack(layers: tuple[int, ...], parts: Collection[str]) -> Block:
        @nnx.split_rngs(splits=len(layers))
        @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: "layers"})
        def blocks(rngs: nnx.Rngs) -> Block:
            return Block(config, parts=parts, rngs=rngs, dtype=dtype, lora=lora)

        return blocks(rngs)

    parts_of: dict[tuple[int, ...], list[str]] = {}
    for part in PARTS:
        parts_of.setdefault(config.layers_of(part), []).append(part)
    whole, *others = [(stack(layers, parts), parts) for layers, parts in parts_of.items() if layers]
    for stacked, parts in others:
        for part in parts:
            setattr(whole[0], part, getattr(stacked, part))
    return whole[0]


class Decoder(nnx.Module):
    """Embedding, layers, final norm and head."""

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

        self.layers = _stacked_layers(config, rngs, dtype, lora)
        norm_class = module_class(config, "norm", RMSNorm)
        self.norm: RMSNorm = norm_class(config, (config.hidden_size,), ("norm",), dtype=dtype)
        self.lm_head = self.value_head = self.custom_head = nnx.data(None)
        if output == SCALAR:
            self.value_head = ScalarHead(config, rngs=rngs, dtype=dtype)
        elif output != LANGUAGE:
            self.custom_head = custom_head(output, config, rngs=rngs, dtype=dtype)
        elif not config.tied:
            self.lm_head = LanguageHead(config, rngs=rngs, dtype=dtype, new=new)
        # Layers with other windows and ropes have the same stack: `kind_of` [L] is scanned with their parameters.
        self.kinds = config.attention_kinds
        kinds = [replace(kind, dense=False) for kind in config.pattern]
        self.kind_of = tuple(self.kinds.index(kind) if kind in self.kinds else 0 for kind in kinds)
        self.parts = tuple(tuple(part for part in PARTS if part not in kind.absent) for kind in config.pattern)

    def hidden(
        self,
        tokens: Integer[Array, "B T"],
        positions: Integer[Array, "B T"],
        segment_ids: Integer[Array, "B T"],
        run: Execution,
        dropout_key: Array | None = None,
        prefix_ids: Integer[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Routing | None]:
        """Final hidden states of packed tokens, after the last norm, and the statistics of a mixture's routers."""
        lengths = token_segment_lengths(positions, segment_ids)
        positions, lengths = (constrain_rows(each, run.mesh, CONTEXT) for each in (positions, lengths))
        inputs = self._inputs(positions, segment_ids, lengths, run)._replace(prefix_ids=prefix_ids)
        x, routing = self._apply_stacked(self._embedded(tokens, run), inputs, run, dropout_key)
        return self._features(x), routing

    def _apply_stacked(
        self, x: Array, inputs: AttentionInputs, run: Execution, dropout_key: Array | None
    ) -> tuple[Array, Routing | None]:
        """Apply all layers, in a loop as far as their kinds repeat."""
        loop = longest_loop(self.parts)
        stacked = nnx.to_pure_dict(nnx.state(self.layers))
        rows = {part: self.config.layers_of(part) for part in PARTS}

        def layer(number: int) -> Callable[..., tuple[Array, Routing | None]]:
            """A layer with the parts of layer `number`."""
            graphdef = self.graphdef(number)

            def apply(x: Array, params: Params, kind: Array | int, index: Array | int) -> tuple[Array, Routing | None]:
                key = None if dropout_key is None else jax.random.fold_in(dropout_key, index)
                x, _, routing = nnx.merge(graphdef, params)(x, inputs, self.kinds, kind, run, dropout_key=key)
                return x, routing

            if run.remat == "none":
                return apply
            assert not run.unroll, run.remat
            # XLA merges nothing across the iterations of a loop, so a loop over single layers needs no barrier between
            # forward and backward pass. With several layers, it also keeps their activations from being in
            # memory at the same time.
            alone = loop.period == 1 and loop.first <= number < loop.stop
            return jax.checkpoint(apply, policy=remat_policy(run.remat), prevent_cse=not alone)

        def one_by_one(x: Array, first: int, stop: int) -> tuple[Array, list[Routing | None]]:
            span, found = LayerSpan(first, self.parts[first:stop]), []
            for number, params in enumerate(span.unstacked(span.select(stacked, rows)), first):
                x, routing = layer(number)(x, params, self.kind_of[number], number)
                found.append(routing)
            return x, found

        period = LayerSpan(loop.first, self.parts[loop.first : loop.first + loop.period])
        applied = [layer(loop.first + place) for place in range(loop.period)]

        def body(x: Array, step: tuple) -> tuple[Array, list[Routing | None]]:
            params, kinds, indices = step
            if loop.period == 1:
                params, kinds, indices = [params], [kinds], [indices]
            else:
                params = period.unstacked(params)
            found = []
            for place, apply in enumerate(applied):
                x, routing = apply(x, params[place], kinds[place], indices[place])
                found.append(routing)
            return x, found

        x, before = one_by_one(x, 0, loop.first)
        looped = LayerSpan(loop.first, self.parts[loop.first : loop.stop]).select(stacked, rows)
        steps = (looped, jnp.asarray(self.kind_of[loop.first : loop.stop]), jnp.arange(loop.first, loop.stop))
        x, within = jax.lax.scan(
            body, x, steps if loop.period == 1 else in_periods(steps, loop.repeats), unroll=run.unroll
        )
        x, after = one_by_one(x, loop.stop, self.config.num_layers)
        return x, joined_routing(before, within, after)

    def graphdef(self, number: int) -> Any:
        """The graph of a layer: that of the stacks, without the parts that the layer does not have."""
        absent = [part for part in PARTS if part not in self.parts[number]]
        block = nnx.merge(*nnx.split(self.layers))
        for part in absent:
            setattr(block, part, nnx.data(None))
        return nnx.graphdef(block)

    def blocks(self) -> Iterator[Block]:
        """Every layer, with its parameters."""
        stacked = nnx.to_pure_dict(nnx.state(self.layers))
        for number, params in enumerate(LayerSpan(0, self.parts).unstacked(stacked)):
            yield nnx.merge(self.graphdef(number), params)

    def _embedded(self, tokens: Array, run: Execution) -> Array:
        """The embedding of packed tokens, sharded as the residual stream is."""
        x = self.embed(tokens, run.dtype)
        if run.mesh is not None and context_shards(run.mesh) > 1:
            # The lookup shards D over `FSDP`. The compiler can exchange one of these axes at a time for that of rows or
            # tokens; for both at once it would gather everything.
            rows = tuple(axis for axis in ROWS if axis != "fsdp")
            between = NamedSharding(run.mesh, PartitionSpec(rows, CONTEXT, "fsdp"))
            x = jax.lax.with_sharding_constraint(x, between)
        return constrain_rows(x, run.mesh, CONTEXT)

    def prefill(
        self,
        layers: tuple[Params, ...],
        tokens: Integer[Array, "B T"],
        positions: Integer[Array, "B T"],
        segment_ids: Integer[Array, "B T"],
        run: Execution,
    ) -> tuple[LayerState, ...]:
        """The state of every layer after packed rows; `layers` as `unstack` returns them."""
        x = constrain_rows(self.embed(tokens, run.dtype), run.mesh)
        inputs = self._inputs(positions, segment_ids, token_segment_lengths(positions, segment_ids), run)
        return self._apply_layers(layers, x, inputs, run, (None,) * len(layers))[1]

    def extend(
        self,
        layers: tuple[Params, ...],
        tokens: Integer[Array, "B T"],
        positions: Integer[Array, "B T"],
        segment_ids: Integer[Array, "B T"],
        cache: ModelCache,
        run: Execution,
    ) -> tuple[Float[Array, "B T D"], ModelCache]:
        """Hidden states of tokens that continue the rows of `cache`, and the cache with these tokens in it.

        The tokens of a row are in order. Their segment is 1; that of padding, which is not written, is 0.
        """
        ends = jnp.where(segment_ids != 0, positions + 1, 0).max(1)
        length = jnp.maximum(cache.length, ends)
        inputs = self._inputs(positions, segment_ids, length[:, None], run)
        inputs = inputs._replace(cached=cache.length, length=length)
        x, written = self._apply_layers(layers, self.embed(tokens, run.dtype), inputs, run, cache.layers)
        return self._features(x), ModelCache(written, length)

    def _inputs(self, positions: Array, segment_ids: Array, lengths: Array, run: Execution) -> AttentionInputs:
        lengths = lengths if run.rope_length is None else jnp.asarray(run.rope_length)
        return AttentionInputs(
            positions, segment_ids, rope_tables(self.kinds, self.config.rope_dim, positions, lengths)
        )

    def _apply_layers(
        self,
        layers: tuple[Params, ...],
        x: Array,
        inputs: AttentionInputs,
        run: Execution,
        caches: tuple[LayerState | None, ...],
    ) -> tuple[Array, tuple[LayerState, ...]]:
        """Apply the layers one by one, each with its own cache."""
        written = []
        for number, (params, kind, cache) in enumerate(zip(layers, self.kind_of, caches, strict=True)):
            x, cache, _ = nnx.merge(self.graphdef(number), params)(x, inputs, self.kinds, kind, run, cache)
            written.append(cache)
        return x, tuple(written)

    def _features(self, x: Array) -> Array:
        # The logit scale is applied to the hidden states, so that every use of the head has it.
        x = _scaled(self.norm(x), self.config.logit_scale)
        return x if self.custom_head is None else self.custom_head.features(x)

    def head(self) -> Float[Array, "rows columns"]:
        """The head's kernel: [Vp, D] (the embedding) if tied, else [D, Vp]."""
        assert self.value_head is None, "a scalar head has no vocabulary"
        if self.custom_head is not None:
            return self.custom_head.kernel[...]
        return self.embed.table() if self.lm_head is None else self.lm_head.table()

    def logits(self, hidden: Float[Array, "*tokens D"], mesh: jax.sharding.Mesh | None) -> Float[Array, "*tokens V"]:
        """Logits in float32, for decoding and tests, where the tokens are few."""
        kernel = self.head().astype(hidden.dtype)
        if self.lm_head is self.custom_head is None:
            logits = project_on_table(hidden, kernel)
        else:
            logits = jnp.tensordot(hidden, kernel, 1, preferred_element_type=jnp.float32)
        if mesh is not None and mesh.shape["tensor"] > 1:
            # As the head is sharded: where the logits are needed whole, the compiler may otherwise gather the head.
            spec = (*[PartitionSpec.UNCONSTRAINED] * (logits.ndim - 1), "tensor")
            logits = jax.lax.with_sharding_constraint(logits, NamedSharding(mesh, PartitionSpec(*spec)))
        if self.config.logit_softcap is not None:
            logits = self.config.logit_softcap * jnp.tanh(logits / self.config.logit_softcap)
        return logits[..., : self.config.vocab_size]

    def values(self, hidden: Float[Array, "*tokens D"]) -> Float[Array, "*tokens"]:
        """The outputs of the scalar head, float32."""
        assert self.value_head is not None, "this model has no scalar head"
        return self.value_head(hidden)
