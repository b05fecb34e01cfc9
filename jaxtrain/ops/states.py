"""The hidden states that predict tokens."""

import jax.numpy as jnp
from jaxtyping import Float

from jaxtrain.types import Array, Batch


def predicting_states(hidden: Float[Array, "B T D"], batch: Batch) -> Float[Array, "B T D"]:
    """The states that predict the next token of the row.

    Between a segment and the second one that continues it is the first one. Its last state, which predicts nothing, is
    replaced by the last state of the segment that both continue.
    """
    assert batch.prefix_ids is not None
    place = jnp.arange(batch.tokens.shape[1])
    here, positions = batch.segment_ids, batch.positions
    following, prefix, start = (
        jnp.pad(x[:, 1:], ((0, 0), (0, 1))) for x in (batch.segment_ids, batch.prefix_ids, batch.positions)
    )
    second = (prefix > 0) & (following == prefix + 2) & (following != here)
    source = jnp.where(second, place - 1 - (positions - start), place)
    return jnp.take_along_axis(hidden, source[..., None], 1)
