"""From logits to a token: the distribution that a request asks for, and one draw from it.

Every knob is a traced value, one a slot, so that no request ever compiles anything. What no slot asks for is skipped
at run time (`lax.cond`). What top-k, top-p and min-p keep is defined once, in `_truncate`: the first few tokens in one
order, whose last is read off the most probable ones where these hold all that is kept, else found by bisection over the
order of floats. The vocabulary is never sorted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxtrain.types import Array

_CANDIDATES = 64  # most probable tokens among which the last one kept is looked for first
_BLOCK = 128  # of the vocabulary: a draw picks a block, then a token in it


class Knobs(NamedTuple):
    """What the requests in the slots ask for. `B` slots."""

    seed: Array  # [B] uint32
    sample: Array  # [B] int32, which of the request's samples
    temperature: Array  # [B] float32; 0 is greedy
    top_k: Array  # [B] int32; 0 keeps all
    top_p: Array  # [B] float32; 1 keeps all
    min_p: Array  # [B] float32; 0 keeps all
    stop_ids: Array  # [B, n] int32, filled up with -1
    want_logps: Array  # [B] bool
    want_best: Array  # [B] bool, whether alternatives are asked for
    repetition: Array  # [B] float32; 1 is none
    presence: Array  # [B] float32; 0 is none
    frequency: Array  # [B] float32; 0 is none
    bias_ids: Array  # [B, m] int32, filled up with -1
    bias: Array  # [B, m] float32
    marked: Array  # [B] bool, whether the slot's row of marks means anything


class Drawn(NamedTuple):
    token: Array  # [B] int32
    logp: Array  # [B] float32, under the distribution drawn from; 0 where greedy or not wanted
    raw_logp: Array  # [B] float32, under the plain softmax of the logits; 0 where not wanted
    broken: Array  # [B] bool, the logits hold a NaN or no finite maximum
    support: Array  # [B, c] int32, the tokens kept, filled up with -1; c = 0 where not asked for
    best: Array  # [B, a] int32, the most probable tokens under the plain softmax, most probable first; 0 if not wanted
    best_logps: Array  # [B, a] float32, under it


def draw(
    raw: Array,
    logits: Array,
    knobs: Knobs,
    positions: Array,
    live: Array,
    constrained: Array,
    support: int = 0,
    alternatives: int = 0,
) -> Drawn:
    """One token per slot from logits [B, V] float32, for the places `positions` [B] in their sequences.

    `raw` are the model's own logits, `logits` those after penalties, biases and masks; a masked one is -inf, in rows
    that are `constrained` [B]. Order: temperature, top-k, top-p of what is left, min-p.

    The randomness is a function of (seed, sample, position) alone. With `support` > 0 a filtered or constrained row
    keeps at most that many tokens, the most probable of what its filters keep, and returns their ids (another row keeps
    all, and its support is -1 throughout); `top_k` must not exceed it. `alternatives` is how many of the most probable
    tokens are returned as `best`.
    """
    best = _argmax(logits)
    top = jnp.take_along_axis(logits, best[:, None], -1)[:, 0]
    broken = ~jnp.isfinite(top)
    greedy = knobs.temperature <= 0
    nothing = jnp.zeros(len(best), jnp.float32)
    no_support = jnp.full((len(best), support), -1, jnp.int32)

    def sampled() -> tuple[Array, Array, Array]:
        token, logp, kept = _sample(logits, top, knobs, positions, live & ~greedy, constrained, support)
        return jnp.where(greedy, best, token), jnp.where(greedy, 0, logp), kept

    token, logp, kept = lax.cond(jnp.any(live & ~greedy), sampled, lambda: (best, nothing, no_support))

    def scored() -> Array:
        most = raw.max(-1)
        total = jnp.exp(raw - most[:, None]).sum(-1)
        return jnp.take_along_axis(raw, token[:, None], -1)[:, 0] - most - jnp.log(total)

    def ranked() -> tuple[Array, Array]:
        values, ids = lax.top_k(raw, alternatives)
        return ids, values - jax.nn.logsumexp(raw, -1, keepdims=True)

    no_best = jnp.zeros((len(best), alternatives), jnp.int32), jnp.zeros((len(best), alternatives), jnp.float32)
    ids_and_logps = lax.cond(jnp.any(live & knobs.want_best), ranked, lambda: no_best) if alternatives else no_best
    raw_logp = lax.cond(jnp.any(live & knobs.want_logps), scored, lambda: nothing)
    return Drawn(token, logp, raw_logp, broken, kept, *ids_and_logps)


def _argmax(logits: Array) -> Array:
    """The first of the largest logits [B]: in blocks, since XLA:CPU finds a maximum 15 times faster than its place."""
    blocks = _blocks(logits, -jnp.inf)
    block = jnp.argmax(blocks.max(-1), -1)
    inside = jnp.argmax(_block(blocks, block), -1)
    return (block * _BLOCK + inside).astype(jnp.int32)


def _sample(
    logits: Array, top: Array, knobs: Knobs, positions: Array, live: Array, constrained: Array, support: int
) -> tuple[Array, Array, Array]:
    """Tokens [B], log-probabilities [B] and supports [B, support]."""
    temperature = jnp.where(knobs.temperature > 0, knobs.temperature, 1)
    scores = (logits - top[:, None]) / temperature[:, None]  # the best has 0
    filtered = live & ((knobs.top_k > 0) | (knobs.top_p < 1) | (knobs.min_p > 0) | (constrained & (support > 0)))
    weights, kept = lax.cond(
        jnp.any(filtered),
        lambda: _truncate(scores, knobs, filtered, support),
        lambda: (jnp.exp(scores), jnp.full((len(top), support), -1, jnp.int32)),
    )
    token = _pick(weights, _uniforms(knobs, positions))
    chosen = jnp.take_along_axis(scores, token[:, None], -1)[:, 0]
    return token, chosen - jnp.log(weights.sum(-1)), kept


class _Last(NamedTuple):
    """The last token kept, in the order of descending scores, tokens of one score in the order of their ids."""

    score: Array  # [B]
    id: Array  # [B] int32


class _Candidates(NamedTuple):
    """The c first tokens in that order."""

    ids: Array  # [B, c] int32
    scores: Array  # [B, c]
    kept: Array  # [B, c] bool, what the filters keep of them: the first few
    complete: Array  # [B] bool, whether the filters keep no other token


def _truncate(scores: Array, knobs: Knobs, filtered: Array, support: int) -> tuple[Array, Array]:
    """Weights [B, V] after the filters, for scores [B, V] whose best is 0, and the ids kept [B, support].

    Tokens stand in the order of descending scores, those of one score in the order of their ids. Each filter keeps the
    first few: top-k exactly k tokens; top-p the fewest whose share of what top-k left reaches p; min-p those with at
    least min_p times the probability of the first. The first token is always kept. A `support` then ends the list.
    """
    count = min(support or _CANDIDATES, scores.shape[1])
    found = _candidates(scores, knobs, count)
    last = _last_candidate(found)
    if not support:
        unclear = filtered & ~found.complete
        last = lax.cond(
            jnp.any(unclear),
            lambda: jax.tree.map(lambda a, b: jnp.where(unclear, a, b), _searched(scores, knobs), last),
            lambda: last,
        )
    weights = jnp.where(_up_to(scores, last) | ~filtered[:, None], jnp.exp(scores), 0)
    ids = jnp.where(found.kept & filtered[:, None], found.ids, -1).astype(jnp.int32)
    return weights, ids[:, :support]


def _candidates(scores: Array, knobs: Knobs, count: int) -> _Candidates:
    """Of scores [B, V] whose best is 0; `lax.top_k` breaks ties by the lower id."""
    values, ids = lax.top_k(scores, count)
    rank = jnp.arange(count)
    weights = jnp.exp(values)
    ranked = rank < jnp.where(knobs.top_k > 0, knobs.top_k, count)[:, None]
    few = (knobs.top_k > 0) & (knobs.top_k <= count)
    # The mass that top-p is a share of: what top-k left.
    mass = jnp.where(few, jnp.where(ranked, weights, 0).sum(-1), jnp.exp(scores).sum(-1))
    before = jnp.cumsum(weights, -1) - weights
    nucleus = (before < (knobs.top_p * mass)[:, None]) | (knobs.top_p >= 1)[:, None]
    kept = ((ranked & nucleus & (weights >= knobs.min_p[:, None])) | (rank == 0)) & (weights > 0)
    # A larger top-k has a mass of its own, which these candidates do not show.
    known = (few | (knobs.top_k == 0)) & (count < scores.shape[1])
    return _Candidates(ids, values, kept, (known & ~kept[:, -1]) | few | (count == scores.shape[1]))


def _last_candidate(found: _Candidates) -> _Last:
    index = jnp.maximum(found.kept.sum(-1) - 1, 0)[:, None]
    return _Last(*(jnp.take_along_axis(values, index, -1)[:, 0] for values in (found.scores, found.ids)))


def _up_to(scores: Array, last: _Last) -> Array:
    """[B, V]: whether a token stands before `last` or is it."""
    ties = (scores == last.score[:, None]) & (jnp.arange(scores.shape[1]) <= last.id[:, None])
    return (scores > last.score[:, None]) | ties


def _searched(scores: Array, knobs: Knobs) -> _Last:
    """The last token that top-k, then top-p, then min-p keep, by bisection over scores and then over ids."""
    vocab = scores.shape[1]
    ones = jnp.ones_like(scores)
    whole = _Last(jnp.full(len(scores), -jnp.inf), jnp.full(len(scores), vocab - 1, jnp.int32))

    def reaching(values: Array, wanted: Array) -> _Last:
        """The first token up to which values [B, V] >= 0 sum up to `wanted` [B]."""
        score = _largest(scores, lambda kept: jnp.where(kept, values, 0).sum(-1) >= wanted)
        above = jnp.where(scores > score[:, None], values, 0).sum(-1)
        ties = jnp.where(scores == score[:, None], values, 0)
        reached = above[:, None] + jnp.cumsum(ties, -1) >= wanted[:, None]
        # Rounding may leave nothing reached: then all of that score.
        return _Last(score, jnp.where(reached.any(-1), jnp.argmax(reached, -1), vocab - 1).astype(jnp.int32))

    def where(condition: Array, some: Callable[[], _Last], otherwise: _Last) -> _Last:
        found = lax.cond(jnp.any(condition), some, lambda: otherwise)
        return jax.tree.map(lambda a, b: jnp.where(condition, a, b), found, otherwise)

    wanted = jnp.clip(knobs.top_k, 1, vocab).astype(jnp.float32)
    last = where(knobs.top_k > 0, lambda: reaching(ones, wanted), whole)
    weights = jnp.where(_up_to(scores, last), jnp.exp(scores), 0)
    last = where(knobs.top_p < 1, lambda: reaching(weights, knobs.top_p * weights.sum(-1)), last)
    # The last of what is left and is likely enough: of the least such score, the highest id.
    likely = _up_to(scores, last) & (jnp.exp(scores) >= knobs.min_p[:, None])
    least = jnp.where(likely, scores, jnp.inf).min(-1)
    highest = vocab - 1 - jnp.argmax((likely & (scores == least[:, None]))[:, ::-1], -1)
    return where(knobs.min_p > 0, lambda: _Last(least, highest.astype(jnp.int32)), last)


def _largest(scores: Array, enough: Callable[[Array], Array]) -> Array:
    """The largest threshold t [B] for which `enough(scores >= t)`, for scores <= 0.

    Bisection over the bit patterns of -t, which are ordered as the floats are.
    """
    bits = lax.bitcast_convert_type(jnp.abs(scores), jnp.int32)  # small where the score is large

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds  # high is enough; low - 1 is not
        middle = low + (high - low) // 2
        found = enough(bits <= middle[:, None])
        return jnp.where(found, low, middle + 1), jnp.where(found, middle, high)

    start = (jnp.zeros(len(scores), jnp.int32), jnp.full(len(scores), jnp.finfo(jnp.float32).max).view(jnp.int32))
    _, bound = lax.fori_loop(0, 31, halve, start)
    return -lax.bitcast_convert_type(bound, jnp.float32)


def _uniforms(knobs: Knobs, positions: Array) -> Array:
    """Two numbers in [0, 1) per row, [B, 2], that depend on (seed, sample, position) and on nothing else."""

    def of_row(seed: Array, sample: Array, position: Array) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), sample), position)
        return jax.random.uniform(key, (2,))

    return jax.vmap(of_row)(knobs.seed, knobs.sample, positions)


def _pick(weights: Array, uniforms: Array) -> Array:
    """Token ids [B] drawn in proportion to weights [B, V]: a block by the first number, a token in it by the second.

    One pass over the vocabulary and no noise per token. Two numbers, since one has too few bits for a rare token.
    """
    blocks = _blocks(weights, 0)
    block = _invert(blocks.sum(-1), uniforms[:, 0])
    inside = _invert(_block(blocks, block), uniforms[:, 1])
    return (block * _BLOCK + inside).astype(jnp.int32)


def _blocks(x: Array, fill: float) -> Array:
    """[B, V] -> [B, blocks, _BLOCK], filled up with `fill`."""
    short = -x.shape[1] % _BLOCK
    return jnp.pad(x, ((0, 0), (0, short)), constant_values=fill).reshape(len(x), -1, _BLOCK)


def _block(blocks: Array, index: Array) -> Array:
    """Block `index` [B] of each row [B, _BLOCK]."""
    return jnp.take_along_axis(blocks, index[:, None, None], 1)[:, 0]


def _invert(weights: Array, uniform: Array) -> Array:
    """The first index at which the running sum of weights [B, n] passes uniform [B] times their total."""
    running = jnp.cumsum(weights, -1)
    passed = running > uniform[:, None] * running[:, -1:]
    # Rounding may leave nothing passed: then the last that can be drawn at all.
    last = weights.shape[1] - 1 - jnp.argmax(weights[:, ::-1] > 0, -1)
    return jnp.where(passed.any(-1), jnp.argmax(passed, -1), last)
