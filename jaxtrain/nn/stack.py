"""Stacks of layers: where the parameters of each layer are, and the loop over layers that differ in kind.

The parameters of each part of a layer (its attention, its feed-forward layer, a norm) are stacked over the layers that
have the part. If all layers have the same parts, that is one stack, and the loop runs over single layers. Otherwise the
kinds of layers repeat with a period, as in three recurrent layers and one with attention, and the loop runs over
periods; layers before and after it that fit no period are applied one by one.
"""

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtrain.types import Array, Params, Routing


class Loop(NamedTuple):
    """The layers of a loop: `repeats` times `period` layers, from layer `first` on."""

    first: int
    period: int
    repeats: int

    @property
    def stop(self) -> int:
        return self.first + self.period * self.repeats


def longest_loop(kinds: Sequence[Hashable]) -> Loop:
    """The loop over layers of these kinds with which the fewest layers are compiled.

    Each layer of a period is compiled once, and so is each layer outside of the loop.
    """
    count = len(kinds)
    best, fewest = Loop(0, 1, 1), count
    for first in range(count):
        for period in range(1, count - first + 1):
            repeats = 1
            while kinds[first : first + period] == kinds[first + repeats * period : first + (repeats + 1) * period]:
                repeats += 1
            compiled = count - period * (repeats - 1)
            if compiled < fewest:
                best, fewest = Loop(first, period, repeats), compiled
    return best


class LayerSpan(NamedTuple):
    """Adjacent layers, each as the names of its parts."""

    first: int
    layers: tuple[tuple[str, ...], ...]

    def select(self, stacked: Params, layers_of: dict[str, tuple[int, ...]]) -> Params:
        """The rows of these layers in every stack. Stacks without such a row are left out."""
        stop, selected = self.first + len(self.layers), {}
        for part, node in stacked.items():
            places = [row for row, layer in enumerate(layers_of[part]) if self.first <= layer < stop]
            if len(places) == len(layers_of[part]):
                selected[part] = node
            elif places:
                rows = slice(places[0], places[-1] + 1)
                selected[part] = jax.tree.map(lambda leaf, rows=rows: leaf[rows], node)
        return selected

    def unstacked(self, stacked: Params) -> list[Params]:
        """The parameters of each of these layers; `stacked` has the rows of these layers only."""
        rows = {part: iter(_rows(node)) for part, node in stacked.items()}
        return [{part: next(rows[part]) for part in parts if part in rows} for parts in self.layers]


def _rows(node: Any) -> list[Any]:
    """The trees of the rows of a stacked tree."""
    leaves, structure = jax.tree.flatten(node)
    # The gradient of `split` is a concatenation; those of slices would be padded and summed.
    columns = [[row[0] for row in jax.lax.split(leaf, (1,) * len(leaf), 0)] for leaf in leaves]
    return [structure.unflatten(row) for row in zip(*columns, strict=True)]


def in_periods(stacked: Any, repeats: int) -> Any:
    """Stacks [repeats * n, ...] as [repeats, n, ...]."""

    def split(leaf: Array) -> Array:
        return leaf.reshape(repeats, -1, *leaf.shape[1:])

    return jax.tree.map(split, stacked)


def joined_routing(*routings: Sequence[Routing | None]) -> Routing | None:
    """The statistics of all layers, in order: of those before, within and after the loop."""
    before, within, after = ([each for each in routing if each is not None] for routing in routings)
    if within and not before and not after and len(within) == 1:
        return within[0]

    def join(*leaves: Array) -> Array:
        first, loop, last = (
            leaves[: len(before)],
            leaves[len(before) : len(leaves) - len(after)],
            leaves[len(leaves) - len(after) :],
        )
        middle = [jnp.stack(loop, 1).reshape(-1, *loop[0].shape[1:])] if loop else []
        return jnp.concatenate([*(leaf[None] for leaf in first), *middle, *(leaf[None] for leaf in last)])

    every = (*before, *within, *after)
    return jax.tree.map(join, *every) if every else None
