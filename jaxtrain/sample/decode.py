"""The engine's device programs: prefill, insert, fork, decode, resize and what marks need. Each compiles once per
shape.

The cache holds the keys and values of all but a row's last token; that one is fed to the first decode step. So a
prefill needs neither head nor sampling, and every token is drawn in one place.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding

from jaxtrain.nn.cache import KVCache, LayerCache, cache_spec, order_on
from jaxtrain.nn.model import Model
from jaxtrain.parallel.sharding import ROWS, constrain_rows, replicated
from jaxtrain.sample.constraints import Tries, advance, constrain, once_more
from jaxtrain.sample.filters import Knobs, draw
from jaxtrain.types import Array, Params

Layers = tuple[LayerCache, ...]

RUNNING, STOPPED, ENDED, FULL, BROKEN = range(5)  # why a slot is (no longer) live; ENDED: its trie has no more


class Slots(NamedTuple):
    """Where each of the B slots stands."""

    token: Array  # [B] int32, the last token, which the cache does not hold yet
    position: Array  # [B] int32, where that token stands; as many tokens are in the cache
    left: Array  # [B] int32, tokens that it may still generate
    live: Array  # [B] bool
    node: Array  # [B] int32, in the tries; 0: free


class Generated(NamedTuple):
    """What up to k steps made. A slot's values are its first `count` columns."""

    tokens: Array  # [B, k] int32
    logps: Array  # [B, k] float32
    raw_logps: Array  # [B, k] float32
    supports: Array  # [B, k, c] int32
    best: Array  # [B, k, a] int32
    best_logps: Array  # [B, k, a] float32
    count: Array  # [B] int32
    state: Array  # [B] int32, RUNNING or why no longer
    node: Array  # [B] int32, where in the tries the slot stands now


@partial(jax.jit, static_argnums=0)
def prefill(model: Model, params: Params, tokens: Array, lengths: Array) -> Layers:
    """Keys and values of every layer for right-padded prompts [R, P] of `lengths` [R] tokens."""
    columns = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    segments = (columns < lengths[:, None]).astype(jnp.int32)
    return _placed(model, model.prefill(params, tokens, columns, segments))


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def insert(
    model: Model, cache: Layers, fresh: Layers, rows: Array, slots: Array, lengths: Array, count: Array
) -> Layers:
    """For each i < `count` put row `rows[i]` of a prefill, `lengths[i]` tokens long, into slot `slots[i]`."""

    def put(i: Array, cache: Layers) -> Layers:
        filled = []
        for layer, new in zip(cache, fresh, strict=True):
            one = _row(new, rows[i])
            if layer.columns < new.columns:  # a ring, or a buffer shorter than the padding
                one = one.take(jnp.maximum(layer.positions(lengths[i][None]), 0)[0])
            filled.append(_put_row(layer, one, slots[i]))
        return tuple(filled)

    return _placed(model, lax.fori_loop(0, count, put, cache))


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def fork(model: Model, cache: Layers, sources: Array, slots: Array, count: Array) -> Layers:
    """For each i < `count` copy slot `sources[i]` to slot `slots[i]`."""

    def put(i: Array, cache: Layers) -> Layers:
        return tuple(_put_row(layer, _row(layer, sources[i]), slots[i]) for layer in cache)

    return _placed(model, lax.fori_loop(0, count, put, cache))


@partial(jax.jit, static_argnums=(0, 2, 3))
def resize(model: Model, layer: LayerCache, rows: int, columns: int) -> LayerCache:
    """The layer's buffer with so many rows and columns; those beyond are cut or zero."""
    return _placed(model, (layer.resized(rows, columns),))[0]


@partial(jax.jit, static_argnums=(0, 2))
def resize_marks(model: Model, marks: Array, rows: int) -> Array:
    """`marks` [B, V] of so many rows."""
    grown = jnp.pad(marks, ((0, max(rows - len(marks), 0)), (0, 0)))
    return constrain_rows(grown[:rows], model.run.mesh)


@partial(jax.jit, donate_argnums=0)
def move_marks(marks: Array, sources: Array, slots: Array, count: Array) -> Array:
    """For each i < `count` copy the marks of slot `sources[i]` to slot `slots[i]`."""

    def put(i: Array, marks: Array) -> Array:
        return lax.dynamic_update_slice_in_dim(marks, lax.dynamic_slice_in_dim(marks, sources[i], 1), slots[i], 0)

    return lax.fori_loop(0, count, put, marks)


@partial(jax.jit, donate_argnums=0)
def mark(marks: Array, row: Array, slot: Array) -> Array:
    """`marks` [B, V] with `row` [V] for `slot`."""
    return lax.dynamic_update_slice_in_dim(marks, row[None], slot, 0)


@partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=(5, 6))
def decode(
    model: Model,
    most: int,
    support: int,
    alternatives: int,
    params: Params,
    cache: Layers,
    marks: Array,
    knobs: Knobs,
    tries: Tries,
    slots: Slots,
    steps: Array,
    quorum: Array,
) -> tuple[Layers, Array, Generated]:
    """Up to `steps` <= `most` tokens for every live slot; ends earlier where fewer than `quorum` slots are live.

    `marks` [B, V] uint16 are those of `constraints`.
    """
    rows = jnp.arange(len(slots.token))

    def unfinished(carry: tuple) -> Array:
        step, _, _, slots, _ = carry
        return (step < steps) & (slots.live.sum() >= quorum)

    def body(carry: tuple) -> tuple:
        step, cache, marks, slots, made = carry
        segments = slots.live[:, None].astype(jnp.int32)
        hidden, extended = model.extend(
            params, slots.token[:, None], slots.position[:, None], segments, KVCache(cache, slots.position)
        )
        raw = constrain_rows(model.logits(params, hidden[:, 0]), model.run.mesh)
        logits = constrain(raw, knobs, marks, tries, slots.node, slots.live)
        constrained = knobs.marked | (slots.node > 0)
        drawn = draw(raw, logits, knobs, slots.position + 1, slots.live, constrained, support, alternatives)

        good = slots.live & ~drawn.broken
        node, ended = advance(tries, slots.node, drawn.token)
        left = slots.left - good
        state = jnp.where(left == 0, FULL, RUNNING)
        state = jnp.where(ended, ENDED, state)
        state = jnp.where((drawn.token[:, None] == knobs.stop_ids).any(-1), STOPPED, state)
        state = jnp.where(drawn.broken, BROKEN, state)
        state = jnp.where(slots.live, state, made.state)
        values = (drawn.token, drawn.logp, drawn.raw_logp, drawn.support, drawn.best, drawn.best_logps)
        made = Generated(
            *(
                lax.dynamic_update_slice_in_dim(old, new[:, None], step, 1)
                for old, new in zip(made, values, strict=False)
            ),
            count=made.count + good,
            state=state,
            node=node,
        )
        told = jnp.where(good & knobs.marked, drawn.token, marks.shape[1])
        marks = marks.at[rows, told].set(once_more(marks[rows, drawn.token]), mode="drop")
        live = slots.live & (state == RUNNING)
        slots = Slots(jnp.where(good, drawn.token, slots.token), slots.position + good, left, live, node)
        return step + 1, _placed(model, extended.layers), marks, slots, made

    made = Generated(
        tokens=jnp.zeros((len(rows), most), jnp.int32),
        logps=jnp.zeros((len(rows), most), jnp.float32),
        raw_logps=jnp.zeros((len(rows), most), jnp.float32),
        supports=jnp.zeros((len(rows), most, support), jnp.int32),
        best=jnp.zeros((len(rows), most, alternatives), jnp.int32),
        best_logps=jnp.zeros((len(rows), most, alternatives), jnp.float32),
        count=jnp.zeros(len(rows), jnp.int32),
        state=jnp.full(len(rows), RUNNING, jnp.int32),
        node=slots.node,
    )
    start = (jnp.zeros((), jnp.int32), cache, marks, slots, made)
    _, cache, marks, _, made = lax.while_loop(unfinished, body, start)
    mesh = model.run.mesh
    # Every host reads all of it.
    return cache, marks, made if mesh is None else lax.with_sharding_constraint(made, replicated(mesh))


def cache_sharding(model: Model) -> LayerCache | None:
    """Where a layer's buffers lie: slots over "data" and "fsdp", heads over "tensor" if they divide, else on all."""
    mesh = model.run.mesh
    if mesh is None:
        return None
    heads = None if model.config.num_kv_heads % mesh.shape["tensor"] else "tensor"
    return jax.tree.map(partial(NamedSharding, mesh), cache_spec(order_on(mesh), ROWS, heads))


def _placed(model: Model, layers: Layers) -> Layers:
    sharding = cache_sharding(model)
    if sharding is None:
        return layers
    return tuple(lax.with_sharding_constraint(layer, sharding) for layer in layers)


def _row(layer: LayerCache, row: Array) -> LayerCache:
    return jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, row, 1), layer)


def _put_row(layer: LayerCache, row: LayerCache, slot: Array) -> LayerCache:
    return jax.tree.map(lambda leaf, new: lax.dynamic_update_slice_in_dim(leaf, new, slot, 0), layer, row)
