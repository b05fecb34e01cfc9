"""Log-probabilities of the tokens of a prompt."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Integer

from jaxtrain.nn.model import Model
from jaxtrain.sample.requests import Alternatives
from jaxtrain.types import Array, Params

_CHUNK = 32  # tokens whose logits are computed at a time; prompt lengths are padded to a multiple


class PromptScores(NamedTuple):
    """Of the n - 1 tokens of a prompt after the first, under the model's plain softmax."""

    logps: np.ndarray  # [n - 1] float32
    alternatives: Alternatives  # [n - 1, a]


def score_prompt(model: Model, params: Params, prompt: np.ndarray, size: tuple[int, int], count: int) -> PromptScores:
    """The scores of a prompt [n], with `count` alternatives. `size` are the rows and columns that are computed; the
    prompt is the first of the rows."""
    rows, columns = size
    tokens = np.zeros((rows, columns + -columns % _CHUNK), np.int32)
    tokens[0, : len(prompt)] = prompt
    logps, ids, best = jax.device_get(_score(model, count, params, tokens, np.int32(len(prompt))))
    last = len(prompt) - 1
    return PromptScores(logps[:last], Alternatives(ids=ids[:last], logps=best[:last]))


@partial(jax.jit, static_argnums=(0, 1))
def _score(
    model: Model, count: int, params: Params, tokens: Integer[Array, "R P"], length: Integer[Array, ""]
) -> tuple[Array, Array, Array]:
    """Log-probabilities [P] of the next tokens of the first row, and ids and log-probabilities [P, count] of the most
    probable ones."""
    rows, columns = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(columns), tokens.shape)
    segments = (positions < length).astype(jnp.int32)
    hidden, _ = model.extend(params, tokens, positions, segments, model.empty_cache(rows, columns))
    targets = jnp.roll(tokens[0], -1)

    def of_chunk(chunk: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        logps = jax.nn.log_softmax(model.logits(params, chunk[0]), axis=-1)
        best, ids = lax.top_k(logps, count)
        return jnp.take_along_axis(logps, chunk[1][:, None], -1)[:, 0], ids, best

    chunks = (hidden[0].reshape(-1, _CHUNK, hidden.shape[-1]), targets.reshape(-1, _CHUNK))
    logps, ids, best = lax.map(of_chunk, chunks)
    return logps.reshape(columns), ids.reshape(columns, count), best.reshape(columns, count)
