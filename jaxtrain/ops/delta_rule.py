"""The gated delta rule (Yang et al., Gated Delta Networks, https://arxiv.org/abs/2412.06464), over packed rows.

Each head has a state S [I, J] in float32, a linear map from keys to values. A token decays it by `exp(decay)`, and then
moves the value that S holds for its key towards its own value by a share `beta`:

    S <- exp(decay) S;  S <- S + k (beta (v - S^T k))^T;  output = S^T q

A row is processed in chunks of `CHUNK` tokens, whose updates are formed by matrix products (the WY form of Yang et al.,
https://arxiv.org/abs/2406.06484); a scan passes the state from chunk to chunk. S is 0 at each start of a document.
Between tokens of different documents all factors are exact zeros, and decays are summed within documents: the output of
a document does not depend on the others in its row, to the last bit. The reference for a row with one document is
transformers' `torch_chunk_gated_delta_rule`.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float

from jaxtrain.types import Array

CHUNK = 64
"""Tokens of a chunk. A power of two. Each chunk keeps a state for the backward pass: I x J x 4 / CHUNK bytes per token
and head."""


def gated_delta_rule(
    q: Float[Array, "B T K I"],
    k: Float[Array, "B T K I"],
    v: Float[Array, "B T K G J"],
    decay: Float[Array, "B T K G"],
    beta: Float[Array, "B T K G"],
    starts: Bool[Array, "B T"],
    state: Float[Array, "B K G I J"],
) -> tuple[Float[Array, "B T K G J"], Float[Array, "B K G I J"]]:
    """The outputs of all tokens, in float32, and the state after the last one.

    G heads of values share each of K heads of queries and keys. `decay` is at most 0. A token with `decay` and `beta` 0
    leaves the state unchanged, which is how padding is left out. `starts`: the first tokens of documents, before which
    the state is 0. Only the inputs are kept for the backward pass.
    """
    precision = lax.Precision.HIGHEST if v.dtype == jnp.float32 else None
    if q.shape[1] == 1:
        return _one_token(q, k, v, decay, beta, starts, state)

    return jax.checkpoint(partial(_chunked, precision=precision))(q, k, v, decay, beta, starts, state)


def _one_token(
    q: Array, k: Array, v: Array, decay: Array, beta: Array, starts: Array, state: Array
) -> tuple[Array, Array]:
    q, k, v = (each[:, 0].astype(jnp.float32) for each in (q, k, v))
    kept = jnp.where(starts[:, 0, None, None], 0, jnp.exp(decay[:, 0]))
    state = state * kept[..., None, None]
    # Sums of products, since a matrix product would read the state in less than float32 on an accelerator.
    held = jnp.sum(state * k[:, :, None, :, None], -2)
    change = beta[:, 0, ..., None] * (v - held)
    state = state + k[:, :, None, :, None] * change[..., None, :]
    return jnp.sum(state * q[:, :, None, :, None], -2)[:, None], state


def _chunked(
    q: Array,
    k: Array,
    v: Array,
    decay: Array,
    beta: Array,
    starts: Array,
    state: Array,
    *,
    precision: lax.Precision | None,
) -> tuple[Array, Array]:
    length = q.shape[1]
    size = min(CHUNK, 1 << (length - 1).bit_length())
    documents = jnp.cumsum(starts, 1)  # 0: that of the state

    def chunks(x: Array, *, last: bool = False) -> Array:
        """[B, T, ...] as [chunks, B, size, ...]: the padding continues the last document, and has beta 0."""
        x = jnp.pad(x, [(0, 0), (0, -length % size), *[(0, 0)] * (x.ndim - 2)], mode="edge" if last else "constant")
        return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)

    def product(equation: str, *operands: Array) -> Array:
        return jnp.einsum(equation, *operands, precision=precision, preferred_element_type=jnp.float32)

    q, k, v, decay, beta = (chunks(each.astype(jnp.float32)) for each in (q, k, v, decay, beta))
    documents = chunks(documents, last=True)
    before = jnp.concatenate([jnp.zeros_like(documents[:1, :, 0]), documents[:-1, :, -1]])  # of the state, [chunks, B]

    # What does not depend on the state, for all chunks at once. Axes: n chunks, b rows, t s tokens, h heads, g groups.
    same = documents[..., :, None] == documents[..., None, :]
    tril = jnp.tril(jnp.ones((size, size), bool))
    causal = (same & tril)[:, :, None, None]
    beta, decay = jnp.moveaxis(beta, 2, -1), jnp.moveaxis(decay, 2, -1)
    # The sum of decays after s up to t. Differences of sums since the start would lose the digits of small ones.
    sums = _matmul(jnp.where(tril, decay[..., None, :], 0), jnp.tril(jnp.ones((size, size), jnp.float32), -1))
    between = _exp_where(causal, sums)
    reads_state = (documents == before[..., None])[:, :, None, None]
    from_start = _exp_where(reads_state, sums[..., 0] + decay[..., :1])
    to_end = between[..., -1, :]
    overlap = product("nbthi,nbshi->nbhts", k, k)[:, :, :, None] * between * beta[..., None]
    inverse = unit_lower_inverse(jnp.where(tril & ~jnp.eye(size, dtype=bool), overlap, 0))
    weights = inverse * beta[..., None, :]
    values = product("nbhgts,nbshgj->nbhgtj", weights, v)
    reads = product("nbhgts,nbshi->nbhgti", weights * from_start[..., None, :], k)
    scores = product("nbthi,nbshi->nbhts", q, k)[:, :, :, None] * between

    def step(state: Array, chunk: tuple[Array, ...]) -> tuple[Array, Array]:
        q, k, values, reads, scores, from_start, to_end, kept = chunk
        changes = values - product("bhgti,bhgij->bhgtj", reads, state)
        out = product("bhgts,bhgsj->bhgtj", scores, changes)
        out += from_start[..., None] * product("bthi,bhgij->bhgtj", q, state)
        state = state * kept[..., None, None] + product("bthi,bhgtj->bhgij", k, changes * to_end[..., None])
        return state, out

    kept = from_start[..., -1]  # 0 if the last token is of a later document than the state
    state, out = lax.scan(step, state, (q, k, values, reads, scores, from_start, to_end, kept))
    out = out.transpose(1, 0, 4, 2, 3, 5)  # [B, chunks, size, K, G, J]
    return out.reshape(out.shape[0], -1, *out.shape[3:])[:, :length], state


def _exp_where(used: Array, x: Array) -> Array:
    """exp(x), and 0 where it is not used, in which case x may be large."""
    return jnp.where(used, jnp.exp(jnp.where(used, x, 0)), 0)


@jax.custom_vjp
def unit_lower_inverse(lower: Float[Array, "*batch C C"]) -> Float[Array, "*batch C C"]:
    """The inverse of I + `lower`, which is zero on and above its diagonal. C is a power of two.

    Blocks of the diagonal are inverted with twice the size at each step, from those of half the size: as accurate as
    forward substitution, which has C steps. Always in float32: an error in a row is multiplied in those below.
    """
    size = lower.shape[-1]
    place = jnp.arange(size)
    inverse = jnp.broadcast_to(jnp.eye(size, dtype=lower.dtype), lower.shape)
    for power in range(size.bit_length() - 1):
        row, column = place[:, None] >> power, place[None] >> power
        corner = (row == column + 1) & (row % 2 == 1)  # the lower left blocks of size 2^power
        inverse = inverse - _matmul(_matmul(inverse, jnp.where(corner, lower, 0)), inverse)
    return inverse


def _matmul(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def _inverse_fwd(lower: Array) -> tuple[Array, Array]:
    inverse = unit_lower_inverse(lower)
    return inverse, inverse


def _inverse_bwd(inverse: Array, g: Array) -> tuple[Array]:
    transposed = jnp.swapaxes(inverse, -1, -2)
    return (-jnp.tril(_matmul(_matmul(transposed, g), transposed), -1),)


unit_lower_inverse.defvjp(_inverse_fwd, _inverse_bwd)
