"""The exchange of rows between devices that each own some of the groups (experts) that the rows belong to.

Rows are sorted by group, into slots, and travel in blocks of 8 rows: a block is a tile of a TPU's memory, so that no
layout changes on the way. Where groups are small, the padding to blocks would cost more, and rows travel one by one.
The owner receives them sorted by group and then by source, at most a buffer at a time: a
round that is full leaves the rest to the next, and no row is dropped.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Integer

from jaxtrain.ops.cpu import exchange as cpu
from jaxtrain.ops.varying import varying_as
from jaxtrain.types import Array

_TILE = 8  # rows of a tile of a TPU's memory
_BUFFER = 512  # the rows of a received buffer are a multiple: of those of a block of `ops.tpu.ragged`

Function = Callable[[Any, Any, Array], Array]
"""(parameters, rows sorted by group: a tree of [M, ...], sizes [G] of the groups) -> [M, D]."""


class Slots(NamedTuple):
    """Pairs of a token and a group, sorted by group. Every group begins at a multiple of the block."""

    pairs: Array  # [S] the pair of each slot; of padding, any pair
    real: Array  # [S] whether the slot is not padding
    places: Array  # [pairs] the slot of each pair
    sizes: Array  # [G] slots of each group, with padding


class Route(NamedTuple):
    """How many rows every device has for every group."""

    blocks: Array  # [devices, G]
    rounds: Array  # [] rounds until all devices have received all rows


class _Moves(NamedTuple):
    """The arguments of one `ragged_all_to_all`, in blocks."""

    starts: Array
    sizes: Array
    to: Array
    received: Array


def block_rows(pairs: int, groups: int) -> int:
    """The rows of a block: with more than one, padding is at most an eighth."""
    return _TILE if pairs >= groups * _TILE * _TILE else 1


def sort_into_slots(group: Integer[Array, " pairs"], groups: int, block: int) -> Slots:
    """`group` is the group of each pair, 0 to `groups - 1`."""
    count = len(group)
    order = jnp.argsort(group, stable=True)
    ends = jnp.searchsorted(group[order], jnp.arange(groups), side="right").astype(jnp.int32)
    sizes = jnp.diff(ends, prepend=0)
    if block == 1:
        return Slots(order, jnp.ones(count, bool), jnp.argsort(order), sizes)
    padded = -(-sizes // block) * block
    padding = jnp.cumsum(padded) - padded - (ends - sizes)  # [G] slots of padding before each group
    slot = jnp.arange(_padded_count(count, groups, block))
    group_of_slot = jnp.searchsorted(jnp.cumsum(padded), slot, side="right")
    place = slot - padding.at[group_of_slot].get(mode="clip")
    real = (place < ends.at[group_of_slot].get(mode="clip")) & (group_of_slot < groups)
    return Slots(order.at[place].get(mode="clip"), real, jnp.argsort(order) + padding[group], padded)


def plan_route(slots: Slots, block: int, axis: str, everyone: tuple[str, ...]) -> Route:
    """The route of the slots of each device along the mesh axis `axis`, for a `shard_map` over the axes `everyone`."""
    blocks = lax.all_gather(slots.sizes // block, axis)
    devices = len(blocks)
    received = blocks.reshape(devices, devices, -1).sum((0, 2)).max()
    # All devices of the mesh take the same number of rounds.
    rounds = lax.pmax(-(-received // (_capacity(len(slots.pairs)) // block)), everyone)
    return Route(blocks, rounds)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def at_owners(function: Function, axis: str, block: int, params: Any, rows: Any, route: Route) -> Float[Array, "S D"]:
    """The rows of `function(params, rows, sizes)`, computed by the devices along `axis` that own their groups.

    `rows` is a tree of arrays [S, ...] in slots, the first of them as wide as the output; device d owns the groups
    `d * G / devices` and following. Differentiable once in reverse mode by `params` and `rows`; the backward pass sends
    the rows again. A buffer has one and a half times the slots of a device.

    Rows of no group may hold any bits where `function` gets them, and slots of padding where it returns: neither may
    reach another row, a sum over rows, or the gradient of a parameter.
    """

    def one_round(index: Array, y: Array) -> Array:
        there, back, sizes = _moves(route, axis, _capacity(len(y)) // block, index)
        out = function(params, _sent(rows, there, axis, block), sizes * block)
        return _moved(out, y, back, axis, block)

    return lax.fori_loop(0, route.rounds, one_round, _unwritten(jax.tree.leaves(rows)[0]))


def _forward(function: Function, axis: str, block: int, params: Any, rows: Any, route: Route) -> tuple[Array, tuple]:
    return at_owners(function, axis, block, params, rows, route), (params, rows, route)


def _backward(
    function: Function, axis: str, block: int, saved: tuple[Any, Any, Route], g: Array
) -> tuple[Any, Any, None]:
    params, rows, route = saved

    def one_round(index: Array, sums: tuple[Any, Any]) -> tuple[Any, Any]:
        there, back, sizes = _moves(route, axis, _capacity(len(g)) // block, index)
        received = _sent(rows, there, axis, block)
        _, backward = jax.vjp(lambda params, rows: function(params, rows, sizes * block), params, received)
        d_params, d_rows = backward(_sent(g, there, axis, block))
        returned = jax.tree.map(lambda d, all_rounds: _moved(d, all_rounds, back, axis, block), d_rows, sums[1])
        return jax.tree.map(jnp.add, sums[0], d_params), returned

    initial = jax.tree.map(jnp.zeros_like, params), jax.tree.map(_unwritten, rows)
    return *lax.fori_loop(0, route.rounds, one_round, initial), None


at_owners.defvjp(_forward, _backward)


def _moves(route: Route, axis: str, capacity: int, index: Array) -> tuple[_Moves, _Moves, Array]:
    """The moves of one round to the owners and back, and the blocks of each of this device's groups in the buffer."""
    devices, groups = route.blocks.shape
    own = groups // devices
    me = lax.axis_index(axis)
    # The blocks of an owner in their order there: by group, then by source.
    of_owner = route.blocks.T.reshape(devices, own * devices)
    ends = jnp.cumsum(of_owner, 1)
    starts = ends - of_owner
    first = index * capacity
    low, high = (jnp.clip(x, first, first + capacity) for x in (starts, ends))
    sizes = (high - low).reshape(groups, devices)

    def of_moved(x: Array) -> Array:
        return jnp.where(sizes > 0, x.reshape(groups, devices), 0)

    at_owner = of_moved(low - first)
    at_source = of_moved((jnp.cumsum(route.blocks, 1) - route.blocks).T.reshape(low.shape) + low - starts)
    received, received_at, returned_to = (
        lax.dynamic_slice_in_dim(x, me * own, own).T.reshape(-1) for x in (sizes, at_owner, at_source)
    )
    there = _Moves(at_source[:, me], sizes[:, me], at_owner[:, me], received)
    back = _Moves(received_at, received, returned_to, sizes[:, me])
    return there, back, received.reshape(devices, own).sum(0)


def _sent(rows: Any, moves: _Moves, axis: str, block: int) -> Any:
    """Each array of `rows` [S, ...] at the owners, in a buffer."""

    def sent(x: Array) -> Array:
        return _moved(x, _unwritten(x, _capacity(len(x))), moves, axis, block)

    return jax.tree.map(sent, rows)


def _unwritten(x: Array, rows: int | None = None) -> Array:
    """A buffer like `x`, or with another number of rows.

    On TPU it is memory as it is, since zeros would take as long to write as the rows themselves.
    """
    shape = len(x) if rows is None else rows, *x.shape[1:]
    empty, zeros = partial(lax.empty, shape, x.dtype), partial(jnp.zeros, shape, x.dtype)
    return varying_as(lax.platform_dependent(tpu=empty, default=zeros), x)


def _moved(x: Array, into: Array, moves: _Moves, axis: str, block: int) -> Array:
    x, blocks = (y.reshape(-1, block, *y.shape[1:]) for y in (x, into))
    out = lax.platform_dependent(
        x,
        blocks,
        *moves,
        cpu=partial(cpu.ragged_all_to_all, axis_name=axis),
        default=partial(lax.ragged_all_to_all, axis_name=axis),
    )
    return out.reshape(into.shape)


def _padded_count(count: int, groups: int, block: int) -> int:
    """A bound of the number of slots: every group that has a pair may end with padding."""
    return -(-(count + min(groups, count) * (block - 1)) // block) * block


def _capacity(slots: int) -> int:
    """Rows of the buffer of received rows: most rounds are the only one while no device gets 1.5 times its share."""
    return -(-3 * slots // 2 // _BUFFER) * _BUFFER
