"""GOLD's hybrid distance between a student and a teacher with different vocabularies, computed in chunks of tokens.

A token that both vocabularies write alike is matched, and its two probabilities are compared directly; the others are
compared by rank. Each chunk has the logits of both models and sorts those of the unmatched tokens; the backward pass
computes them again, so that [B, T, V] is never in memory.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from jaxtrain.ops.head_chunks import Head
from jaxtrain.types import Array

_LEAST = 1e-8  # probabilities below it count as it, as in TRL


class MatchedIds(NamedTuple):
    """The tokens that two vocabularies write alike, and the others: ids, int32."""

    student: Array  # [M]
    teacher: Array  # [M] of the same tokens
    student_rest: Array  # the student's other ids
    teacher_rest: Array  # the teacher's other ids


class MatchedHead(NamedTuple):
    """The head of a teacher, and which of its tokens the student's vocabulary has too."""

    head: Head
    ids: MatchedIds

    @property
    def share(self) -> float:
        """The share of the teacher's vocabulary that is matched."""
        return self.ids.teacher.shape[0] / self.head.vocab_size


def match_vocabularies(
    student: Mapping[str, int], teacher: Mapping[str, int], student_size: int, teacher_size: int
) -> MatchedIds:
    """Of vocabularies (text -> id). The sizes are those of the models: ids beyond them are left out, and ids that a
    tokenizer lacks are not matched."""
    both = sorted((student[token], teacher[token]) for token in teacher.keys() & student.keys())
    within = [pair for pair in both if pair[0] < student_size and pair[1] < teacher_size]
    mine, theirs = np.array(within, np.int32).reshape(-1, 2).T
    rests = (np.setdiff1d(np.arange(size), ids) for size, ids in ((student_size, mine), (teacher_size, theirs)))
    return MatchedIds(mine, theirs, *(rest.astype(np.int32) for rest in rests))


class GroupStarts(NamedTuple):
    """At the first token of each group of tokens that write one text."""

    first: Bool[Array, "B T"]  # where it is
    further: Float[Array, "B T"]  # the log-probability of the student's further tokens of the group
    teacher_hidden: Float[Array, "B T E"]  # the teacher's state that predicts its first token of the group
    teacher_further: Float[Array, "B T"]  # the log-probability of the teacher's further tokens


class Hybrid(NamedTuple):
    """Of each group, float32 [B, T] at its first token and 0 elsewhere."""

    matched: Array  # the divergence over the matched tokens
    unmatched: Array  # the sum over the ranks of the differences of the unmatched tokens' probabilities


def hybrid_distances(
    hidden: Float[Array, "B T D"], head: Head, groups: GroupStarts, teacher: MatchedHead, *, beta: float, chunk: int
) -> Hybrid:
    """The two parts of the distance, from the student's states. Only the teacher's arrays have no gradient.

    `beta` is that of the generalised JSD; 0 is KL(teacher || student) and 1 KL(student || teacher). `chunk`: places of
    a row that are computed together, of all rows.
    """
    length = hidden.shape[1]
    before = jnp.pad(hidden[:, :-1], ((0, 0), (1, 0), (0, 0)))  # the states that predict
    chunk = min(chunk, length)
    chunks = -(-length // chunk)

    def cut(x: Array) -> Array:
        """[B, T, ...] -> [chunks, B, chunk, ...]"""
        padded = jnp.pad(x, [(0, 0), (0, chunks * chunk - length), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(padded.reshape(len(x), chunks, chunk, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def of_chunk(heads: tuple[Head, MatchedHead], before: Array, groups: GroupStarts) -> Hybrid:
        student, other = heads
        mine = _log_probs(before, student) + groups.further[..., None]
        theirs = jax.lax.stop_gradient(
            _log_probs(groups.teacher_hidden, other.head) + groups.teacher_further[..., None]
        )
        ids = other.ids
        matched = _divergence(mine[..., ids.student], theirs[..., ids.teacher], beta)
        unmatched = _by_rank(jnp.exp(mine[..., ids.student_rest]), jnp.exp(theirs[..., ids.teacher_rest]))
        return Hybrid(*(jnp.where(groups.first, part, 0) for part in (matched, unmatched)))

    def step(carry: None, inputs: Any) -> tuple[None, Hybrid]:
        return carry, of_chunk((head, teacher), *inputs)

    _, parts = jax.lax.scan(step, None, (cut(before), jax.tree.map(cut, groups)))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(len(hidden), -1)[:, :length], parts)


def _log_probs(hidden: Float[Array, "... D"], head: Head) -> Float[Array, "... V"]:
    weight = head.weight.astype(hidden.dtype)
    axis = 1 - head.vocab_axis
    contract = (((hidden.ndim - 1,), (axis,)), ((), ()))
    logits = jax.lax.dot_general(hidden, weight, contract, preferred_element_type=jnp.float32)
    if head.softcap is not None:
        logits = head.softcap * jnp.tanh(logits / head.softcap)
    return jax.nn.log_softmax(logits[..., : head.vocab_size])


def _divergence(p: Float[Array, "... M"], q: Float[Array, "... M"], beta: float) -> Float[Array, "..."]:
    """From the logarithms of the student's and the teacher's probabilities."""
    log_p, log_q = (jnp.maximum(each, np.log(_LEAST)) for each in (p, q))
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    if beta in (0, 1):
        return (q * (log_q - log_p) if beta == 0 else p * (log_p - log_q)).sum(-1)
    log_m = jnp.log((1 - beta) * p + beta * q)
    return (beta * q * (log_q - log_m) + (1 - beta) * p * (log_p - log_m)).sum(-1)


def _by_rank(p: Float[Array, "... A"], q: Float[Array, "... B"]) -> Float[Array, "..."]:
    """The sum of |p_(i) - q_(i)| over the ranks; 0 where either has no tokens, as in TRL."""
    if not p.shape[-1] or not q.shape[-1]:
        return jnp.zeros(p.shape[:-1])
    width = max(p.shape[-1], q.shape[-1])
    p, q = (
        jnp.pad(jnp.sort(x, axis=-1, descending=True), [*[(0, 0)] * (x.ndim - 1), (0, width - x.shape[-1])])
        for x in (p, q)
    )
    return jnp.abs(p - q).sum(-1)
