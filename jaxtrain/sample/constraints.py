"""What a request forbids or favours: penalties, biases, allowed ids, a trie of allowed sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxtrain.sample.filters import Knobs
from jaxtrain.types import Array

# A mark, uint16, of two bits and a count: the token is in the prompt; it may never be generated; it was generated, so
# many times.
IN_PROMPT, FORBIDDEN, GENERATED = 1, 2, 4


class Trie:
    """The sequences of ids a sample may be, such as the semantic ids of a catalogue; it ends where a sequence does.

        trie = Trie([[11, 2, 5], [11, 2, 7], [12, 1]])
        Request(prompt, SamplingParams(trie=trie))

    Raises ValueError for no sequence, an empty one, and one that begins another, since such a sample would not know
    whether to end (add an end token to each then).
    """

    def __init__(self, sequences: Sequence[Sequence[int]]):
        children: list[dict[int, int]] = [{}]
        ends: set[int] = set()
        for number, sequence in enumerate(sequences):
            node = 0
            for token in sequence:
                if node in ends:
                    raise ValueError(f"trie: a shorter sequence begins sequence {number}, {list(sequence)}")
                if token not in children[node]:
                    children[node][int(token)] = len(children)
                    children.append({})
                node = children[node][int(token)]
            if not len(sequence) or children[node]:
                raise ValueError(f"trie: sequence {number}, {list(sequence)}, is empty or begins a longer one")
            ends.add(node)
        if not ends:
            raise ValueError("trie: there is no sequence in it")
        self.first = np.cumsum([0, *map(len, children)]).astype(np.int32)  # [nodes + 1], where a node's edges begin
        self.tokens = np.array([token for edges in children for token in edges], np.int32)  # [edges]
        self.targets = np.array([target for edges in children for target in edges.values()], np.int32)  # [edges]
        self.fanout = max(map(len, children))
        self.depth = max(map(len, sequences))


class Tries(NamedTuple):
    """Several tries end to end. Node 0 is nobody's: a slot there is free."""

    first: Array  # [nodes + 1] int32
    tokens: Array  # [edges] int32
    targets: Array  # [edges] int32
    reach: Array  # [fanout] int32, 0 .. fanout - 1; its length is the most edges of a node


def join_tries(tries: Sequence[Trie]) -> tuple[Tries, list[int]]:
    """The tries end to end, filled up to powers of two so that another one seldom changes a shape, and their roots."""
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


def constrain(logits: Array, knobs: Knobs, marks: Array, tries: Tries, node: Array, live: Array) -> Array:
    """Logits [B, V] after penalties, biases and masks, in this order; masked ones are -inf.

    `marks` [B, V] uint16 are as above, `node` [B] int32 is where in `tries` a slot stands. The repetition penalty is
    transformers' (a positive logit is divided, a negative one multiplied; prompt and new tokens), presence and
    frequency penalties are OpenAI's (subtracted, once and as often as the token came; new tokens only).
    """
    marked = live & knobs.marked

    def of_marks(logits: Array) -> Array:
        count = marks // GENERATED
        seen = ((marks & IN_PROMPT) != 0) | (count > 0)
        repetition = jnp.where(marked, knobs.repetition, 1)[:, None]
        logits = jnp.where(seen, jnp.where(logits > 0, logits / repetition, logits * repetition), logits)
        logits -= jnp.where(marked, knobs.presence, 0)[:, None] * (count > 0)
        logits -= jnp.where(marked, knobs.frequency, 0)[:, None] * count
        return jnp.where(((marks & FORBIDDEN) != 0) & marked[:, None], -jnp.inf, logits)

    def biased(logits: Array) -> Array:
        columns = jnp.where(knobs.bias_ids < 0, logits.shape[1], knobs.bias_ids)
        return logits.at[jnp.arange(len(logits))[:, None], columns].add(knobs.bias, mode="drop")

    def of_tries(logits: Array) -> Array:
        children, _ = _edges(tries, node)
        columns = jnp.where(children < 0, logits.shape[1], children)
        free = jnp.zeros(logits.shape, bool).at[jnp.arange(len(logits))[:, None], columns].set(True, mode="drop")
        return jnp.where(free | (node == 0)[:, None], logits, -jnp.inf)

    for wanted, change in (
        (marked, of_marks),
        (live[:, None] & (knobs.bias_ids >= 0), biased),
        (live & (node > 0), of_tries),
    ):
        logits = lax.cond(jnp.any(wanted), change, lambda same: same, logits)
    return logits


def once_more(marks: Array) -> Array:
    """The marks of tokens that were generated once more. A count that fits no longer stays."""
    return jnp.where(marks < 2**16 - GENERATED, marks + GENERATED, marks)


def advance(tries: Tries, node: Array, token: Array) -> tuple[Array, Array]:
    """The node [B] after `token` [B], and whether a sequence ends there [B]. A free slot stays free."""
    children, targets = _edges(tries, node)
    after = jnp.where(children == token[:, None], targets, 0).max(-1)
    after = jnp.where(node > 0, after, 0)
    return after, (node > 0) & (tries.first[after + 1] == tries.first[after])


def _edges(tries: Tries, node: Array) -> tuple[Array, Array]:
    """Tokens and targets [B, fanout] of each node's edges, filled up with -1."""
    index = tries.first[node][:, None] + tries.reach
    there = index < tries.first[node + 1][:, None]
    index = jnp.where(there, index, 0)
    return jnp.where(there, tries.tokens[index], -1), jnp.where(there, tries.targets[index], -1)


def _power(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()
