"""The engine's device programs: prefill, insert, fork, decode, resize and the updates of marks. Each compiles once per
shape.

The cache holds all but a row's last token, which is the input of the first decode step. So a
prefill needs neither head nor sampling, and every token is sampled in one place.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jaxtyping import Integer

from jaxtrain.nn.cache import LayerState, ModelCache
from jaxtrain.nn.model import Model
from jaxtrain.parallel.mesh import CompilerOptions
from jaxtrain.parallel.sharding import constrain_rows, replicated
from jaxtrain.sample.constraints import Tries, advance, constrain, forbid_stops, increment_counts
from jaxtrain.sample.filters import SlotSettings, TokenValues, draw
from jaxtrain.sample.requests import EngineLimits
from jaxtrain.types import Array, Params

Layers = tuple[LayerState, ...]

# The status of a slot. STOPPED: a stop id; ENDED: the end of a sequence of its trie; FULL: no tokens remaining.
RUNNING, STOPPED, ENDED, FULL, NON_FINITE = range(5)


Memory = tuple[Layers, Array]
"""What the B slots hold on the device between calls: the cache, and the marks [B, V] uint16 of `constraints`."""


class SlotState(NamedTuple):
    """The state of each of the B slots."""

    token: Array  # [B] int32, the last token, which is not in the cache yet
    position: Array  # [B] int32, its position, which is also the number of tokens in the cache
    remaining: Array  # [B] int32, tokens that it may still generate
    live: Array  # [B] bool
    node: Array  # [B] int32, in the tries; 0: no trie


class Generated(NamedTuple):
    """The result of up to k steps."""

    values: TokenValues  # [B, k], of which a slot's are its first `counts` columns
    counts: Array  # [B] int32
    status: Array  # [B] int32, RUNNING or the reason for the end
    node: Array  # [B] int32, the slot's new node in the tries

    def values_of(self, slot: int) -> TokenValues:
        """A copy of the values [counts[slot]] of one slot, on the host."""
        return jax.tree.map(lambda column: np.array(column[slot, : self.counts[slot]]), self.values)


def _prefill(model: Model, params: Params, tokens: Integer[Array, "R P"], lengths: Integer[Array, " R"]) -> Layers:
    """The state of every layer after right-padded prompts of `lengths` tokens."""
    columns = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    segments = (columns < lengths[:, None]).astype(jnp.int32)
    return _placed(model, model.prefill(params, tokens, columns, segments))


prefill = jax.jit(_prefill, static_argnums=0)


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def insert(
    model: Model,
    cache: Layers,
    fresh: Layers,
    rows: Integer[Array, " n"],
    slots: Integer[Array, " n"],
    lengths: Integer[Array, " n"],
    count: Integer[Array, ""],
) -> Layers:
    """For each i < `count` put row `rows[i]` of a prefill, `lengths[i]` tokens long, into slot `slots[i]`."""

    def put(i: Array, cache: Layers) -> Layers:
        filled = []
        for layer, new in zip(cache, fresh, strict=True):
            one = _row(new, rows[i]).kept(layer.columns, lengths[i])
            filled.append(_put_row(layer, one, slots[i]))
        return tuple(filled)

    return _placed(model, lax.fori_loop(0, count, put, cache))


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def fork(
    model: Model, cache: Layers, sources: Integer[Array, " n"], slots: Integer[Array, " n"], count: Integer[Array, ""]
) -> Layers:
    """For each i < `count` copy slot `sources[i]` to slot `slots[i]`."""

    def put(i: Array, cache: Layers) -> Layers:
        return tuple(_put_row(layer, _row(layer, sources[i]), slots[i]) for layer in cache)

    return _placed(model, lax.fori_loop(0, count, put, cache))


@partial(jax.jit, static_argnums=(0, 2, 3))
def resize(model: Model, layer: LayerState, rows: int, columns: int) -> LayerState:
    """The layer's state with `rows` rows and `columns` columns: cut off, or padded with zeros."""
    return _placed(model, (layer.resized(rows, columns),))[0]


@partial(jax.jit, static_argnums=(0, 2))
def resize_marks(model: Model, marks: Integer[Array, "B V"], rows: int) -> Integer[Array, "{rows} V"]:
    """`marks` with this many rows: cut off, or padded with zeros."""
    grown = jnp.pad(marks, ((0, max(rows - len(marks), 0)), (0, 0)))
    return constrain_rows(grown[:rows], model.run.mesh)


@partial(jax.jit, donate_argnums=0)
def move_marks(
    marks: Integer[Array, "B V"], sources: Integer[Array, " n"], slots: Integer[Array, " n"], count: Integer[Array, ""]
) -> Integer[Array, "B V"]:
    """For each i < `count` copy the marks of slot `sources[i]` to slot `slots[i]`."""

    def put(i: Array, marks: Array) -> Array:
        return lax.dynamic_update_slice_in_dim(marks, lax.dynamic_slice_in_dim(marks, sources[i], 1), slots[i], 0)

    return lax.fori_loop(0, count, put, marks)


@partial(jax.jit, donate_argnums=0)
def mark(marks: Integer[Array, "B V"], row: Integer[Array, " V"], slot: Integer[Array, ""]) -> Integer[Array, "B V"]:
    """`marks` with `row` for `slot`."""
    return lax.dynamic_update_slice_in_dim(marks, row[None], slot, 0)


def _decode(
    model: Model,
    limits: EngineLimits,
    params: Params,
    memory: Memory,
    settings: SlotSettings,
    tries: Tries,
    slots: SlotState,
    ends: tuple[Integer[Array, ""], Integer[Array, ""]],
) -> tuple[Memory, Generated]:
    """Up to `limits.steps` tokens for every live slot. `memory` is donated.

    `ends` are (steps, quorum): the call ends after `steps` tokens, or when fewer than `quorum` slots are live.
    """
    steps, quorum = ends
    rows = jnp.arange(len(slots.token))

    def unfinished(carry: tuple) -> Array:
        step, _, slots, _ = carry
        return (step < steps) & (slots.live.sum() >= quorum)

    def body(carry: tuple) -> tuple:
        step, (cache, marks), slots, generated = carry
        segments = slots.live[:, None].astype(jnp.int32)
        hidden, extended = model.extend(
            params, slots.token[:, None], slots.position[:, None], segments, ModelCache(cache, slots.position)
        )
        raw = constrain_rows(model.logits(params, hidden[:, 0]), model.run.mesh)
        logits = constrain(raw, settings, marks, tries, slots.node, slots.live)
        early = slots.live & (slots.position + 1 < settings.first_stop)
        logits = forbid_stops(logits, settings, early)
        constrained = settings.marked | (slots.node > 0)
        drawn, non_finite = draw(
            raw, logits, settings, slots.position + 1, slots.live, constrained, limits.support, limits.alternatives
        )

        valid = slots.live & ~non_finite
        node, ended = advance(tries, slots.node, drawn.tokens)
        remaining = slots.remaining - valid
        status = jnp.where(remaining == 0, FULL, RUNNING)
        status = jnp.where(ended, ENDED, status)
        status = jnp.where((drawn.tokens[:, None] == settings.stop_ids).any(-1), STOPPED, status)
        status = jnp.where(non_finite, NON_FINITE, status)
        status = jnp.where(slots.live, status, generated.status)
        generated = Generated(
            values=jax.tree.map(
                lambda old, new: lax.dynamic_update_slice_in_dim(old, new[:, None], step, 1),
                generated.values,
                drawn,
            ),
            counts=generated.counts + valid,
            status=status,
            node=node,
        )
        counted = jnp.where(valid & settings.marked, drawn.tokens, marks.shape[1])
        marks = marks.at[rows, counted].set(increment_counts(marks[rows, drawn.tokens]), mode="drop")
        live = slots.live & (status == RUNNING)
        slots = SlotState(jnp.where(valid, drawn.tokens, slots.token), slots.position + valid, remaining, live, node)
        return step + 1, (_placed(model, extended.layers), marks), slots, generated

    places = (len(rows), limits.steps)
    generated = Generated(
        values=TokenValues(
            tokens=jnp.zeros(places, jnp.int32),
            logps=jnp.zeros(places, jnp.float32),
            raw_logps=jnp.zeros(places, jnp.float32),
            supports=jnp.zeros((*places, limits.support), jnp.int32),
            best=jnp.zeros((*places, limits.alternatives), jnp.int32),
            best_logps=jnp.zeros((*places, limits.alternatives), jnp.float32),
        ),
        counts=jnp.zeros(len(rows), jnp.int32),
        status=jnp.full(len(rows), RUNNING, jnp.int32),
        node=slots.node,
    )
    start = (jnp.zeros((), jnp.int32), memory, slots, generated)
    _, memory, _, generated = lax.while_loop(unfinished, body, start)
    mesh = model.run.mesh
    # Replicated, since every host reads all of it.
    return memory, generated if mesh is None else lax.with_sharding_constraint(generated, replicated(mesh))


decode = jax.jit(_decode, static_argnums=(0, 1), donate_argnums=3)


def with_options(options: CompilerOptions) -> tuple[jax.stages.Wrapped, jax.stages.Wrapped]:
    """`prefill` and `decode`, compiled with these options of XLA."""
    if not options:
        return prefill, decode
    given = dict(options)
    return (
        jax.jit(_prefill, static_argnums=0, compiler_options=given),
        jax.jit(_decode, static_argnums=(0, 1), donate_argnums=3, compiler_options=given),
    )


def cache_shardings(model: Model, layers: Layers) -> Layers | None:
    """The shardings of the layers' buffers: slots over "data" and "fsdp", heads over "tensor" if they are divisible."""
    mesh = model.run.mesh
    if mesh is None:
        return None
    return tuple(jax.tree.map(partial(NamedSharding, mesh), layer.specs(mesh)) for layer in layers)


def _placed(model: Model, layers: Layers) -> Layers:
    shardings = cache_shardings(model, layers)
    return layers if shardings is None else lax.with_sharding_constraint(layers, shardings)


def _row(layer: LayerState, row: Array) -> LayerState:
    return jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, row, 1), layer)


def _put_row(layer: LayerState, row: LayerState, slot: Array) -> LayerState:
    return jax.tree.map(lambda leaf, new: lax.dynamic_update_slice_in_dim(leaf, new, slot, 0), layer, row)
