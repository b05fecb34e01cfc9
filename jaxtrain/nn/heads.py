"""The heads of a decoder, by name: the language-model head, a scalar head, or a user-defined projection.

lm                  logits over the vocabulary: `lm_head.kernel` [D, Vp], or the embedding if the two are tied
scalar              one number per token, for rewards and values: `value_head.kernel` [D, 1]
package.module:fn   `fn(config, rngs=, dtype=)` returns a `CustomHead`: `custom_head.*`
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from jaxtrain.named import load_named
from jaxtrain.nn.config import ModelConfig, NewTokens
from jaxtrain.types import Array

LANGUAGE, SCALAR = "lm", "scalar"


class CustomHead(nnx.Module):
    """A user-defined projection: the logits of a token are `features(hidden) @ kernel`.

    The two parts are separate so that `token_scores` can process the projection in chunks. Parameters carry logical
    axes (`out_sharding`), as all parameters do.
    """

    kernel: Any  # nnx.Param [E, Vp]: a width E that divides over the mesh, every column of the padded vocabulary

    def features(self, hidden: Float[Array, "*tokens D"]) -> Float[Array, "*tokens E"]:
        """The inputs of the projection, in hidden's dtype."""
        return hidden


class LanguageHead(nnx.Module):
    """The projection onto the vocabulary, which `token_scores` applies in chunks."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype, new: NewTokens | None = None):
        kernel = nnx.initializers.normal(config.init_std)(rngs.params(), (config.hidden_size, config.padded_vocab))
        real = jnp.arange(config.padded_vocab) < config.vocab_size
        self.kernel = nnx.Param(jnp.where(real, kernel, 0).astype(dtype), out_sharding=("embed", "vocab"))
        self.new = new
        self.new_columns = nnx.data(None)
        if new:
            columns = jnp.zeros((config.hidden_size, new.count), jnp.float32)
            self.new_columns = nnx.Param(columns, out_sharding=("embed", None))

    def table(self) -> Float[Array, "D Vp"]:
        """The kernel with the columns of new tokens at their ids."""
        kernel = self.kernel[...]
        return kernel if self.new_columns is None else with_new_tokens(kernel, self.new_columns[...], self.new, 1)


def with_new_tokens(
    table: Float[Array, "rows columns"], rows: Float[Array, "_ _"], new: NewTokens | None, axis: int
) -> Float[Array, "rows columns"]:
    """`table` with the rows of new tokens at their ids along `axis`, in the table's dtype."""
    assert new is not None
    return jax.lax.dynamic_update_slice_in_dim(table, rows.astype(table.dtype), new.first, axis)


class ScalarHead(nnx.Module):
    """The head of a reward model or a critic: one number per token."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        kernel = nnx.initializers.normal(config.init_std)(rngs.params(), (config.hidden_size, 1), dtype)
        self.kernel = nnx.Param(kernel, out_sharding=("embed", None))

    def __call__(self, hidden: Float[Array, "*tokens D"]) -> Float[Array, "*tokens"]:
        """One float32 number per token."""
        kernel = self.kernel[...][:, 0].astype(hidden.dtype)
        return jax.lax.dot_general(
            hidden, kernel, (((hidden.ndim - 1,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )


def custom_head(path: str, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> CustomHead:
    """The head that the function at `path` returns.

    Raises ValueError if it is not a `CustomHead` or its kernel has the wrong shape.
    """
    head = load_named(path, "model.head")(config, rngs=rngs, dtype=dtype)
    if not isinstance(head, CustomHead):
        raise ValueError(f"model.head={path} must return a jaxtrain.nn.heads.CustomHead, not {type(head).__name__}")
    shape = head.kernel.get_value().shape
    if len(shape) != 2 or shape[1] != config.padded_vocab:
        raise ValueError(f"model.head={path}: its kernel is {shape}; it must be [width, {config.padded_vocab}]")
    return head
