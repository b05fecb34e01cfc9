"""`Decoder`: one transformer for all families. Parameters are stacked over layers.

Training scans the layers (see `nn.stack`), rematerialised by policy. Decoding unrolls them, with a cache buffer for
each layer.
"""

from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Float, Integer

from jaxtrain.nn.attention import AttentionInputs, KeysValues
from jaxtrain.nn.block import PARTS, Block, Execution, LayerOutput, scaled
from jaxtrain.nn.cache import LayerState, ModelCache
from jaxtrain.nn.config import Lora, ModelConfig, NewTokens
from jaxtrain.nn.heads import LANGUAGE, SCALAR, LanguageHead, ScalarHead, custom_head, with_new_tokens
from jaxtrain.nn.modules import module_class
from jaxtrain.nn.norm import RMSNorm
from jaxtrain.nn.per_layer import PerLayerInputs
from jaxtrain.nn.remat import remat_policy
from jaxtrain.nn.rope import rope_tables, token_segment_lengths
from jaxtrain.nn.stack import LayerSpan, in_periods, joined_routing, longest_loop
from jaxtrain.ops.project import project_on_table
from jaxtrain.parallel.sharding import CONTEXT, ROWS, constrain_rows, context_shards
from jaxtrain.types import Array, Params, Routing


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
    first, *others = [(stack(layers, parts), parts) for layers, parts in parts_of.items() if layers]
    for stacked, parts in others:
        for part in parts:
            setattr(first[0], part, getattr(stacked, part))
    return first[0]


class LayerInput(NamedTuple):
    """What passes from layer to layer."""

    x: Array  # [B, T, D]
    reused: dict[str, KeysValues]  # see `AttentionInputs`; empty unless layers reuse those of others


class LayerPlace(NamedTuple):
    """Which layer it is, in a loop that traces one for several."""

    number: Array | int
    kind: Array | int  # its number in `Decoder.kinds`
    of_layer: Array | None  # see `AttentionInputs`


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

        self.per_layer: PerLayerInputs | None = nnx.data(None)
        if config.per_layer_width is not None:
            self.per_layer = PerLayerInputs(config, rngs=rngs, dtype=dtype)
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
        kinds = [kind.mixing() for kind in config.pattern]
        self.kind_of = tuple(self.kinds.index(kind) if kind in self.kinds else 0 for kind in kinds)
        self.shares = any(kind.reuses for kind in config.pattern)
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
        x = self._embedded(tokens, run)
        x, routing = self._apply_stacked(x, self._of_layers(x, tokens, run), inputs, run, dropout_key)
        return self._features(x), routing

    def _of_layers(self, x: Array, tokens: Array, run: Execution) -> Array | None:
        """The inputs of all layers beside the residual stream, [L, B, T, P], if they have any."""
        if self.per_layer is None:
            return None
        made = self.per_layer(x, tokens)
        if run.mesh is None:
            return made
        spec = PartitionSpec(None, ROWS, CONTEXT)
        return jax.lax.with_sharding_constraint(made, NamedSharding(run.mesh, spec))

    def _apply_stacked(
        self, x: Array, of_layers: Array | None, inputs: AttentionInputs, run: Execution, dropout_key: Array | None
    ) -> tuple[Array, Routing | None]:
        """Apply all layers, in a loop as far as their kinds repeat."""
        loop = longest_loop(self.parts)
        stacked = nnx.to_pure_dict(nnx.state(self.layers))
        rows = {part: self.config.layers_of(part) for part in PARTS}

        def layer(number: int) -> Callable[..., LayerOutput]:
            """A layer with the parts of layer `number`."""
            graphdef = self.graphdef(number)

            def apply(stream: LayerInput, params: Params, place: LayerPlace) -> LayerOutput:
                key = None if dropout_key is None else jax.random.fold_in(dropout_key, place.number)
                own = inputs._replace(of_layer=place.of_layer, reused=stream.reused)
                block = nnx.merge(graphdef, params)
                # The state is for a cache; it would be a residual of the checkpoint.
                return block(stream.x, own, self.kinds, place.kind, run, dropout_key=key)._replace(state=None)

            if run.remat == "none":
                return apply
            assert not run.unroll, run.remat
            # XLA merges nothing across the iterations of a loop, so a loop over single layers needs no barrier between
            # forward and backward pass. With several layers, it also keeps their activations from being in
            # memory at the same time.
            alone = loop.period == 1 and loop.first <= number < loop.stop
            return jax.checkpoint(apply, policy=remat_policy(run.remat), prevent_cse=not alone)

        def one_by_one(stream: LayerInput, first: int, stop: int) -> tuple[LayerInput, list[Routing | None]]:
            span, found = LayerSpan(first, self.parts[first:stop]), []
            for number, params in enumerate(span.unstacked(span.select(stacked, rows)), first):
                place = LayerPlace(number, self.kind_of[number], None if of_layers is None else of_layers[number])
                out = layer(number)(stream, params, place)
                stream = LayerInput(out.x, out.reused if self.shares else {})
                found.append(out.routing)
            return stream, found

        period = LayerSpan(loop.first, self.parts[loop.first : loop.first + loop.period])
        applied = [layer(loop.first + place) for place in range(loop.period)]
        # What layers reuse passes along the loop while it changes. If no layer of the loop changes it, it is a constant
        # of the loop, which the backward pass need not keep for every iteration.
        changes = not all(self.config.pattern[number].reuses for number in range(loop.first, loop.stop))

        def body(
            stream: LayerInput, step: tuple, constant: dict[str, KeysValues]
        ) -> tuple[LayerInput, list[Routing | None]]:
            params, places = step
            if loop.period == 1:
                params, places = [params], [places]
            else:
                params = period.unstacked(params)
                places = [jax.tree.map(lambda leaf, each=each: leaf[each], places) for each in range(loop.period)]
            found, passed = [], stream.reused
            for each, apply in enumerate(applied):
                out = apply(LayerInput(stream.x, {**constant, **passed}), params[each], places[each])
                passed = {mixer: out.reused[mixer] for mixer in passed}
                stream = LayerInput(out.x, passed)
                found.append(out.routing)
            return stream, found

        stream, before = one_by_one(LayerInput(x, self._nothing_to_reuse(x)), 0, loop.first)
        constant, passed = ({}, stream.reused) if changes else (stream.reused, {})
        looped = LayerSpan(loop.first, self.parts[loop.first : loop.stop]).select(stacked, rows)
        within_loop = slice(loop.first, loop.stop)
        places = LayerPlace(
            jnp.arange(loop.first, loop.stop),
            jnp.asarray(self.kind_of[within_loop]),
            None if of_layers is None else of_layers[within_loop],
        )
        steps = (looped, places)
        stream, within = jax.lax.scan(
            partial(body, constant=constant),
            LayerInput(stream.x, passed),
            steps if loop.period == 1 else in_periods(steps, loop.repeats),
            unroll=run.unroll,
        )
        stream, after = one_by_one(LayerInput(stream.x, stream.reused | constant), loop.stop, self.config.num_layers)
        return stream.x, joined_routing(before, within, after)

    def _nothing_to_reuse(self, x: Array) -> dict[str, KeysValues]:
        """Zeros in the place of the keys and values of earlier layers, in a model in which layers reuse them."""
        found: dict[str, KeysValues] = {}
        for kind in self.kinds if self.shares else ():
            zeros = jnp.zeros((*x.shape[:2], *self.config.heads_of(kind)), x.dtype)
            found[kind.mixer] = KeysValues(zeros, zeros, None, None)
        return found

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
        return self._apply_layers(layers, x, tokens, inputs, run, (None,) * len(layers))[1]

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
        x, written = self._apply_layers(layers, self.embed(tokens, run.dtype), tokens, inputs, run, cache.layers)
        return self._features(x), ModelCache(written, length)

    def _inputs(self, positions: Array, segment_ids: Array, lengths: Array, run: Execution) -> AttentionInputs:
        lengths = lengths if run.rope_length is None else jnp.asarray(run.rope_length)
        widths = {kind: self.config.rope_dim(kind) for kind in self.kinds}
        return AttentionInputs(positions, segment_ids, rope_tables(widths, positions, lengths))

    def _apply_layers(
        self,
        layers: tuple[Params, ...],
        x: Array,
        tokens: Array,
        inputs: AttentionInputs,
        run: Execution,
        caches: tuple[LayerState | None, ...],
    ) -> tuple[Array, tuple[LayerState, ...]]:
        """Apply the layers to the embedding `x` of `tokens` one by one, each with its own cache."""
        written, reused = [], {}
        of_layers = None if self.per_layer is None else self.per_layer(x, tokens)
        for number, (params, kind, cache) in enumerate(zip(layers, self.kind_of, caches, strict=True)):
            own = inputs._replace(of_layer=None if of_layers is None else of_layers[number], reused=reused)
            out = nnx.merge(self.graphdef(number), params)(x, own, self.kinds, kind, run, cache)
            x, reused = out.x, out.reused
            written.append(out.state)
        return x, tuple(written)

    def _features(self, x: Array) -> Array:
        # The logit scale is applied to the hidden states, so that every use of the head has it.
        x = scaled(self.norm(x), self.config.logit_scale)
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
            # As the head is sharded: where the logits are needed first, the compiler may otherwise gather the head.
            spec = (*[PartitionSpec.UNCONSTRAINED] * (logits.ndim - 1), "tensor")
            logits = jax.lax.with_sharding_constraint(logits, NamedSharding(mesh, PartitionSpec(*spec)))
        if self.config.logit_softcap is not None:
            logits = self.config.logit_softcap * jnp.tanh(logits / self.config.logit_softcap)
        return logits[..., : self.config.vocab_size]

    def values(self, hidden: Float[Array, "*tokens D"]) -> Float[Array, "*tokens"]:
        """The outputs of the scalar head, float32."""
        assert self.value_head is not None, "this model has no scalar head"
        return self.value_head(hidden)
