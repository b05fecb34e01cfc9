"""From logits to a token: temperature and filters, then one sample.

All settings are traced arrays with a value per slot, so that no request causes a compilation. What no slot asks for is
skipped at run time (`lax.cond`). `_truncate` defines what top-k, top-p and min-p keep: a prefix of the tokens in
descending order of probability. The end of the prefix is looked up among the most probable tokens if they contain it,
else found by bisection over the bit patterns of floats. The vocabulary is never sorted.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float, Integer

from jaxtrain.types import Array

_CANDIDATES = 64  # most probable tokens among which the end of the prefix is looked up first
_BLOCK = 128  # tokens of a vocabulary block: sampling picks a block, then a token in it


class SlotSettings(NamedTuple):
    """The sampling parameters of the `B` slots."""

    seed: Array  # [B] uint32
    sample: Array  # [B] int32, which of the request's samples
    temperature: Array  # [B] float32; 0 is greedy
    top_k: Array  # [B] int32; 0 keeps all
    top_p: Array  # [B] float32; 1 keeps all
    min_p: Array  # [B] float32; 0 keeps all
    stop_ids: Array  # [B, n] int32, padded with -1
    first_stop: Array  # [B] int32, the position from which on a stop id may be drawn
    want_logps: Array  # [B] bool
    want_alternatives: Array  # [B] bool
    repetition: Array  # [B] float32; 1 is none
    presence: Array  # [B] float32; 0 is none
    frequency: Array  # [B] float32; 0 is none
    bias_ids: Array  # [B, m] int32, padded with -1
    bias: Array  # [B, m] float32
    marked: Array  # [B] bool, whether the slot's row of marks is used


class TokenValues(NamedTuple):
    """Tokens and what is known of each: of a step [B], of a device call [B, k], or of one sample [n]."""

    tokens: Array  # [...] int32
    logps: Array  # [...] float32, under the distribution drawn from; 0 where greedy or not wanted
    raw_logps: Array  # [...] float32, under the plain softmax of the logits; 0 where not wanted
    supports: Array  # [..., c] int32, the tokens kept, padded with -1; c = 0 if not requested
    best: Array  # [..., a] int32, the most probable tokens under the plain softmax, in descending order; 0: not wanted
    best_logps: Array  # [..., a] float32, under the plain softmax


def draw(
    raw: Float[Array, "B V"],
    logits: Float[Array, "B V"],
    settings: SlotSettings,
    positions: Integer[Array, " B"],
    live: Bool[Array, " B"],
    constrained: Bool[Array, " B"],
    support: int = 0,
    alternatives: int = 0,
) -> tuple[TokenValues, Bool[Array, " B"]]:
    """Sample one token per slot from float32 logits; the tokens get these `positions` in their sequences.

    Returns the values of the tokens [B], and whether a slot's logits hold a NaN or no finite maximum.

    `raw` are the model's logits, `logits` those after penalties, biases and masks. Masked logits are -inf and occur
    only in rows that are `constrained` [B], and at stop ids that may not be drawn yet. Order: temperature, top-k, top-p
    of the rest, min-p.

    The randomness depends only on (seed, sample, position). With `support` > 0 a filtered or constrained row keeps at
    most that many of the tokens that its filters keep, the most probable ones, and returns their ids (another row keeps
    all, and its support is all -1); `top_k` must not exceed it. `alternatives` is the number of most probable tokens
    returned as `best`.
    """
    best = _argmax(logits)
    top = jnp.take_along_axis(logits, best[:, None], -1)[:, 0]
    non_finite = ~jnp.isfinite(top)
    greedy = settings.temperature <= 0
    zeros = jnp.zeros(len(best), jnp.float32)
    no_support = jnp.full((len(best), support), -1, jnp.int32)

    def sampled() -> tuple[Array, Array, Array]:
        token, logp, kept = _sample(logits, top, settings, positions, live & ~greedy, constrained, support)
        return jnp.where(greedy, best, token), jnp.where(greedy, 0, logp), kept

    token, logp, kept = lax.cond(jnp.any(live & ~greedy), sampled, lambda: (best, zeros, no_support))

    def scored() -> Array:
        maximum = raw.max(-1)
        total = jnp.exp(raw - maximum[:, None]).sum(-1)
        return jnp.take_along_axis(raw, token[:, None], -1)[:, 0] - maximum - jnp.log(total)

    def ranked() -> tuple[Array, Array]:
        values, ids = lax.top_k(raw, alternatives)
        return ids, values - jax.nn.logsumexp(raw, -1, keepdims=True)

    no_best = jnp.zeros((len(best), alternatives), jnp.int32), jnp.zeros((len(best), alternatives), jnp.float32)
    best_ids, best_logps = (
        lax.cond(jnp.any(live & settings.want_alternatives), ranked, lambda: no_best) if alternatives else no_best
    )
    raw_logp = lax.cond(jnp.any(live & settings.want_logps), scored, lambda: zeros)
    values = TokenValues(
        tokens=token, logps=logp, raw_logps=raw_logp, supports=kept, best=best_ids, best_logps=best_logps
    )
    return values, non_finite


def _argmax(logits: Array) -> Array:
    """The index [B] of the first maximum. By blocks, since XLA:CPU computes max 15 times faster than argmax."""
    blocks = _blocks(logits, -jnp.inf)
    block = jnp.argmax(blocks.max(-1), -1)
    inside = jnp.argmax(_block(blocks, block), -1)
    return (block * _BLOCK + inside).astype(jnp.int32)


def _sample(
    logits: Array, top: Array, settings: SlotSettings, positions: Array, live: Array, constrained: Array, support: int
) -> tuple[Array, Array, Array]:
    """Tokens [B], log-probabilities [B] and supports [B, support]."""
    temperature = jnp.where(settings.temperature > 0, settings.temperature, 1)
    scores = (logits - top[:, None]) / temperature[:, None]  # the best has 0
    filtered = live & (
        (settings.top_k > 0) | (settings.top_p < 1) | (settings.min_p > 0) | (constrained & (support > 0))
    )
    weights, kept = lax.cond(
        jnp.any(filtered),
        lambda: _truncate(scores, settings, filtered, support),
        lambda: (jnp.exp(scores), jnp.full((len(top), support), -1, jnp.int32)),
    )
    token = _pick(weights, _uniforms(settings, positions))
    chosen = jnp.take_along_axis(scores, token[:, None], -1)[:, 0]
    return token, chosen - jnp.log(weights.sum(-1)), kept


class _Last(NamedTuple):
    """The last token kept, in descending order of scores, ties in order of ids."""

    score: Array  # [B]
    id: Array  # [B] int32


class _Candidates(NamedTuple):
    """The first c tokens in that order."""

    ids: Array  # [B, c] int32
    scores: Array  # [B, c]
    kept: Array  # [B, c] bool, which of them the filters keep: a prefix
    complete: Array  # [B] bool, whether the filters keep no other tokens


def _truncate(scores: Array, settings: SlotSettings, filtered: Array, support: int) -> tuple[Array, Array]:
    """Weights [B, V] after the filters, for scores [B, V] whose maximum is 0, and the ids kept [B, support].

    Tokens are in descending order of scores, ties in order of ids. Each filter keeps a prefix: top-k exactly k tokens;
    top-p the smallest number whose share of what top-k kept reaches p; min-p those with at least min_p times the
    probability of the first. The first token is always kept. A `support` then bounds the length of the prefix.
    """
    count = min(support or _CANDIDATES, scores.shape[1])
    found = _candidates(scores, settings, count)
    last = _last_candidate(found)
    if not support:
        unclear = filtered & ~found.complete
        last = lax.cond(
            jnp.any(unclear),
            lambda: jax.tree.map(lambda a, b: jnp.where(unclear, a, b), _searched(scores, settings), last),
            lambda: last,
        )
    weights = jnp.where(_up_to(scores, last) | ~filtered[:, None], jnp.exp(scores), 0)
    ids = jnp.where(found.kept & filtered[:, None], found.ids, -1).astype(jnp.int32)
    return weights, ids[:, :support]


def _candidates(scores: Array, settings: SlotSettings, count: int) -> _Candidates:
    """The candidates of scores [B, V] whose maximum is 0; `lax.top_k` breaks ties by the lower id."""
    values, ids = lax.top_k(scores, count)
    rank = jnp.arange(count)
    weights = jnp.exp(values)
    ranked = rank < jnp.where(settings.top_k > 0, settings.top_k, count)[:, None]
    few = (settings.top_k > 0) & (settings.top_k <= count)
    # top-p is relative to the mass of what top-k kept.
    mass = jnp.where(few, jnp.where(ranked, weights, 0).sum(-1), jnp.exp(scores).sum(-1))
    before = jnp.cumsum(weights, -1) - weights
    nucleus = (before < (settings.top_p * mass)[:, None]) | (settings.top_p >= 1)[:, None]
    kept = ((ranked & nucleus & (weights >= settings.min_p[:, None])) | (rank == 0)) & (weights > 0)
    # The mass of a top-k larger than `count` cannot be computed from the candidates.
    known = (few | (settings.top_k == 0)) & (count < scores.shape[1])
    return _Candidates(ids, values, kept, (known & ~kept[:, -1]) | few | (count == scores.shape[1]))


def _last_candidate(found: _Candidates) -> _Last:
    index = jnp.maximum(found.kept.sum(-1) - 1, 0)[:, None]
    return _Last(*(jnp.take_along_axis(values, index, -1)[:, 0] for values in (found.scores, found.ids)))


def _up_to(scores: Array, last: _Last) -> Array:
    """[B, V]: whether a token is `last` or comes before it."""
    ties = (scores == last.score[:, None]) & (jnp.arange(scores.shape[1]) <= last.id[:, None])
    return (scores > last.score[:, None]) | ties


def _searched(scores: Array, settings: SlotSettings) -> _Last:
    """The last token that top-k, then top-p, then min-p keep, by bisection over scores and then over ids."""
    vocab = scores.shape[1]
    ones = jnp.ones_like(scores)
    everything = _Last(jnp.full(len(scores), -jnp.inf), jnp.full(len(scores), vocab - 1, jnp.int32))

    def reaching(values: Array, wanted: Array) -> _Last:
        """The first token at which the running sum of values [B, V] >= 0 reaches `wanted` [B]."""
        score = _largest(scores, lambda kept: jnp.where(kept, values, 0).sum(-1) >= wanted)
        above = jnp.where(scores > score[:, None], values, 0).sum(-1)
        ties = jnp.where(scores == score[:, None], values, 0)
        reached = above[:, None] + jnp.cumsum(ties, -1) >= wanted[:, None]
        # With rounding it may never be reached: then take all ties.
        return _Last(score, jnp.where(reached.any(-1), jnp.argmax(reached, -1), vocab - 1).astype(jnp.int32))

    def where(condition: Array, some: Callable[[], _Last], otherwise: _Last) -> _Last:
        found = lax.cond(jnp.any(condition), some, lambda: otherwise)
        return jax.tree.map(lambda a, b: jnp.where(condition, a, b), found, otherwise)

    wanted = jnp.clip(settings.top_k, 1, vocab).astype(jnp.float32)
    last = where(settings.top_k > 0, lambda: reaching(ones, wanted), everything)
    weights = jnp.where(_up_to(scores, last), jnp.exp(scores), 0)
    last = where(settings.top_p < 1, lambda: reaching(weights, settings.top_p * weights.sum(-1)), last)
    # min-p: the last token that is kept and likely enough has the lowest such score and, among ties, the highest id.
    likely = _up_to(scores, last) & (jnp.exp(scores) >= settings.min_p[:, None])
    lowest = jnp.where(likely, scores, jnp.inf).min(-1)
    highest = vocab - 1 - jnp.argmax((likely & (scores == lowest[:, None]))[:, ::-1], -1)
    return where(settings.min_p > 0, lambda: _Last(lowest, highest.astype(jnp.int32)), last)


def _largest(scores: Array, enough: Callable[[Array], Array]) -> Array:
    """The largest threshold t [B] for which `enough(scores >= t)`, for scores <= 0.

    Bisection over the bit patterns of -t, which have the order of the floats.
    """
    bits = lax.bitcast_convert_type(jnp.abs(scores), jnp.int32)  # small where the score is large

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds  # high is enough; low - 1 is not
        middle = low + (high - low) // 2
        found = enough(bits <= middle[:, None])
        return jnp.where(found, low, middle + 1), jnp.where(found, middle, high)

    start = (jnp.zeros(len(scores), jnp.int32), jnp.full(len(scores), jnp.finfo(jnp.float32).max).view(jnp.int32))
    _, bound = lax.fori_loop(0, 31, halve, start)
    return -lax.bitcast_convert_type(bound, jnp.float32)


def _uniforms(settings: SlotSettings, positions: Array) -> Array:
    """Two numbers in [0, 1) per row, [B, 2], that depend only on (seed, sample, position)."""

    def of_row(seed: Array, sample: Array, position: Array) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), sample), position)
        return jax.random.uniform(key, (2,))

    return jax.vmap(of_row)(settings.seed, settings.sample, positions)


def _pick(weights: Array, uniforms: Array) -> Array:
    """Token ids [B] sampled in proportion to weights [B, V]: a block by the first number, a token in it by the second.

    One pass over the vocabulary, without noise per token. Two numbers, since one has too few bits for a rare token.
    """
    blocks = _blocks(weights, 0)
    block = _invert(blocks.sum(-1), uniforms[:, 0])
    inside = _invert(_block(blocks, block), uniforms[:, 1])
    return (block * _BLOCK + inside).astype(jnp.int32)


def _blocks(x: Array, fill: float) -> Array:
    """[B, V] -> [B, blocks, _BLOCK], padded with `fill`."""
    short = -x.shape[1] % _BLOCK
    return jnp.pad(x, ((0, 0), (0, short)), constant_values=fill).reshape(len(x), -1, _BLOCK)


def _block(blocks: Array, index: Array) -> Array:
    """Block `index` [B] of each row [B, _BLOCK]."""
    return jnp.take_along_axis(blocks, index[:, None, None], 1)[:, 0]


def _invert(weights: Array, uniform: Array) -> Array:
    """The first index at which the running sum of weights [B, n] exceeds uniform [B] times their total."""
    running = jnp.cumsum(weights, -1)
    passed = running > uniform[:, None] * running[:, -1:]
    # With rounding it may never be exceeded: then take the last index with a positive weight.
    last = weights.shape[1] - 1 - jnp.argmax(weights[:, ::-1] > 0, -1)
    return jnp.where(passed.any(-1), jnp.argmax(passed, -1), last)
