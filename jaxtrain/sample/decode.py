"""Greedy decoding with a cache: what evaluation needs. Slots, filters and streaming are an engine's business."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.nn.model import Model
from jaxtrain.types import Array, Params

_BUCKET = 64  # prompts are padded to a multiple of this, so that few shapes are ever compiled


def greedy(
    model: Model,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    rows: int = 32,
) -> list[list[int]]:
    """The most probable continuation of each prompt, without the stop token that ended it.

    `rows` prompts are decoded at a time. Raises ValueError for an empty prompt.
    """
    for index, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {index} is empty")
    width = -(-max(map(len, prompts), default=1) // _BUCKET) * _BUCKET
    stops = jnp.asarray(list(stop_ids), jnp.int32)
    answers: list[list[int]] = []
    for start in range(0, len(prompts), rows):
        chunk = prompts[start : start + rows]
        tokens = np.zeros((rows, width), np.int32)
        lengths = np.ones(rows, np.int32)
        for row, prompt in enumerate(chunk):
            tokens[row, : len(prompt)] = prompt
            lengths[row] = len(prompt)
        out, counts = _greedy_rows(model, max_new_tokens, params, tokens, lengths, stops)
        out, counts = np.asarray(out), np.asarray(counts)
        answers += [out[row, : counts[row]].tolist() for row in range(len(chunk))]
    return answers


@partial(jax.jit, static_argnums=(0, 1))
def _greedy_rows(
    model: Model, max_new_tokens: int, params: Params, tokens: Array, lengths: Array, stops: Array
) -> tuple[Array, Array]:
    """Tokens [B, T] right-padded, lengths [B] -> new tokens [B, max_new_tokens] and how many of them count [B]."""
    rows, width = tokens.shape
    columns = jnp.broadcast_to(jnp.arange(width), tokens.shape)
    cache = model.empty_cache(rows, width + max_new_tokens)
    prompt_segments = (columns < lengths[:, None]).astype(jnp.int32)
    hidden, cache = model.extend(params, tokens, columns, prompt_segments, cache)
    last = hidden[jnp.arange(rows), lengths - 1]

    def unfinished(carry: tuple) -> Array:
        _, _, _, _, done, count = carry
        return (count < max_new_tokens) & ~jnp.all(done)

    def decode(carry: tuple) -> tuple:
        last, cache, out, counts, done, count = carry
        token = jnp.argmax(model.logits(params, last), -1).astype(jnp.int32)
        done |= jnp.any(token[:, None] == stops, -1)
        out = out.at[:, count].set(token)
        counts = jnp.where(done, counts, count + 1)
        # The cache's column is the position; a finished row goes on over columns that nobody reads.
        position = (lengths + count)[:, None]
        hidden, cache = model.extend(params, token[:, None], position, jnp.ones_like(position), cache)
        return hidden[:, 0], cache, out, counts, done, count + 1

    out = jnp.zeros((rows, max_new_tokens), jnp.int32)
    counts = jnp.zeros(rows, jnp.int32)
    carry = (last, cache, out, counts, jnp.zeros(rows, bool), jnp.zeros((), jnp.int32))
    _, _, out, counts, _, _ = jax.lax.while_loop(unfinished, decode, carry)
    return out, counts
