"""Constraints on the logits of a request: penalties, biases, allowed ids, a trie of allowed sequences."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxtrain.sample.filters import SlotSettings
from jaxtrain.sample.trie import Trie
from jaxtrain.types import Array

# The mark of a token in a slot, uint16. Bit 0: it is in the prompt. Bit 1: it must not be generated. The other bits
# count how often it was generated.
IN_PROMPT, FORBIDDEN, GENERATED = 1, 2, 4
MAX_GENERATED = (2**16 - 1) // GENERATED


class Tries(NamedTuple):
    """Several tries, concatenated. Node 0 is reserved for slots without a trie."""

    first: Array  # [nodes + 1] int32
    tokens: Array  # [edges] int32
    targets: Array  # [edges] int32
    reach: Array  # [fanout] int32, 0 .. fanout - 1; fanout is the maximum number of edges of a node


def join_tries(tries: Sequence[Trie]) -> tuple[Tries, list[int]]:
    """The concatenated tries and their roots. Padded to powers of two, so that adding a trie rarely changes a shape."""
    first, tokens, targets, roots = [0], [], [], []
    fanout = 1
    for trie in tries:
        root = len(first)
        roots.append(root)
        targets += (trie.targets + root).tolist()
        first += (trie.first[:-1] + len(tokens)).tolist()
        tokens += trie.tokens.tolist()
        fanout = max(fanout, trie.fanout)
    ends = np.full(_power(len(first) + 1), len(tokens), np.int32)
    ends[: len(first)] = first
    short = _power(len(tokens)) - len(tokens)
    edges = [np.pad(np.array(each, np.int32), (0, short)) for each in (tokens, targets)]
    return Tries(ends, edges[0], edges[1], np.arange(_power(fanout), dtype=np.int32)), roots


def constrain(logits: Array, settings: SlotSettings, marks: Array, tries: Tries, node: Array, live: Array) -> Array:
    """Logits [B, V] after penalties, biases and masks, in this order; masked ones are -inf.

    `marks` [B, V] uint16 are as above, `node` [B] int32 is each slot's current node in `tries`. The repetition penalty
    is that of transformers (positive logits are divided, negative ones multiplied; prompt and new tokens). Presence and
    frequency penalties are those of OpenAI (subtracted once, or once per occurrence; new tokens only).
    """
    marked = live & settings.marked

    def apply_marks(logits: Array) -> Array:
        count = marks // GENERATED
        seen = ((marks & IN_PROMPT) != 0) | (count > 0)
        repetition = jnp.where(marked, settings.repetition, 1)[:, None]
        logits = jnp.where(seen, jnp.where(logits > 0, logits / repetition, logits * repetition), logits)
        logits -= jnp.where(marked, settings.presence, 0)[:, None] * (count > 0)
        logits -= jnp.where(marked, settings.frequency, 0)[:, None] * count
        return jnp.where(((marks & FORBIDDEN) != 0) & marked[:, None], -jnp.inf, logits)

    def apply_bias(logits: Array) -> Array:
        columns = jnp.where(settings.bias_ids < 0, logits.shape[1], settings.bias_ids)
        return jnp.asarray(logits).at[jnp.arange(len(logits))[:, None], columns].add(settings.bias, mode="drop")

    def apply_tries(logits: Array) -> Array:
        children, _ = _edges(tries, node)
        columns = jnp.where(children < 0, logits.shape[1], children)
        free = jnp.zeros(logits.shape, bool).at[jnp.arange(len(logits))[:, None], columns].set(True, mode="drop")
        return jnp.where(free | (node == 0)[:, None], logits, -jnp.inf)

    for wanted, change in (
        (marked, apply_marks),
        (live[:, None] & (settings.bias_ids >= 0), apply_bias),
        (live & (node > 0), apply_tries),
    ):
        logits = lax.cond(jnp.any(wanted), change, lambda same: same, logits)
    return logits


def forbid_stops(logits: Array, settings: SlotSettings, early: Array) -> Array:
    """Logits [B, V] with -inf at the stop ids of slots that are `early` [B]: they have fewer than `min_tokens`."""

    def forbid(logits: Array) -> Array:
        columns = jnp.where((settings.stop_ids < 0) | ~early[:, None], logits.shape[1], settings.stop_ids)
        return jnp.asarray(logits).at[jnp.arange(len(logits))[:, None], columns].set(-jnp.inf, mode="drop")

    return lax.cond(jnp.any(early), forbid, lambda same: same, logits)


def increment_counts(marks: Array) -> Array:
    """The marks with their counts incremented; counts saturate."""
    return jnp.where(marks < 2**16 - GENERATED, marks + GENERATED, marks)


def advance(tries: Tries, node: Array, token: Array) -> tuple[Array, Array]:
    """The node [B] after `token` [B], and whether a sequence ends there [B]. Slots without a trie stay at node 0."""
    children, targets = _edges(tries, node)
    after = jnp.where(children == token[:, None], targets, 0).max(-1)
    after = jnp.where(node > 0, after, 0)
    return after, (node > 0) & (tries.first[after + 1] == tries.first[after])


def _edges(tries: Tries, node: Array) -> tuple[Array, Array]:
    """Tokens and targets [B, fanout] of each node's edges, padded with -1."""
    index = tries.first[node][:, None] + tries.reach
    there = index < tries.first[node + 1][:, None]
    index = jnp.where(there, index, 0)
    return jnp.where(there, tries.tokens[index], -1), jnp.where(there, tries.targets[index], -1)


def _power(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()
