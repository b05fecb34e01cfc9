"""What stands on top of a decoder, by name: the language-model head, a scalar head, or a user's own projection.

lm                  the vocabulary: `lm_head.kernel` [D, Vp], or the embedding where the two are tied
scalar              one number a token, for rewards and values: `value_head.kernel` [D, 1]
package.module:fn   `fn(config, rngs=, dtype=)` returns a `CustomHead`: `custom_head.*`
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtrain.named import load_named
from jaxtrain.nn.config import ModelConfig, NewTokens
from jaxtrain.types import Array

LANGUAGE, SCALAR = "lm", "scalar"


class CustomHead(nnx.Module):
    """A projection of a user's own: logits of a token are `features(hidden) @ kernel`.

    In two parts, so that the chunked head can still walk the second one. Parameters carry logical axes
    (`out_sharding`) as all others do.
    """

    kernel: Any  # nnx.Param [E, Vp]: a width E that divides over the mesh, every column of the padded vocabulary

    def features(self, hidden: Array) -> Array:
        """[..., D] -> [..., E], in hidden's dtype."""
        return hidden


class LanguageHead(nnx.Module):
    """The projection onto the vocabulary. It is never applied here: `token_scores` walks it in chunks."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype, new: NewTokens | None = None):
        kernel = nnx.initializers.normal(config.init_std)(rngs.params(), (config.hidden_size, config.padded_vocab))
        real = jnp.arange(config.padded_vocab) < config.vocab_size
        self.kernel = nnx.Param(jnp.where(real, kernel, 0).astype(dtype), out_sharding=("embed", "vocab"))
        self.new = new
        self.new_columns = nnx.data(None)
        if new:
            columns = jnp.zeros((config.hidden_size, new.count), jnp.float32)
            self.new_columns = nnx.Param(columns, out_sharding=("embed", None))

    def table(self) -> Array:
        """[D, Vp], those of new tokens among the others."""
        kernel = self.kernel[...]
        return kernel if self.new_columns is None else put_new(kernel, self.new_columns[...], self.new, 1)


def put_new(table: Array, rows: Array, new: NewTokens | None, axis: int) -> Array:
    """`table` with the rows of new tokens at their ids along `axis`, in the table's dtype."""
    assert new is not None
    return jax.lax.dynamic_update_slice_in_dim(table, rows.astype(table.dtype), new.first, axis)


class ScalarHead(nnx.Module):
    """A number for every token: what a reward model or a critic says."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        kernel = nnx.initializers.normal(config.init_std)(rngs.params(), (config.hidden_size, 1), dtype)
        self.kernel = nnx.Param(kernel, out_sharding=("embed", None))

    def __call__(self, hidden: Array) -> Array:
        """[..., D] -> float32 [...]."""
        kernel = self.kernel[...][:, 0].astype(hidden.dtype)
        return jax.lax.dot_general(
            hidden, kernel, (((hidden.ndim - 1,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )


def custom_head(path: str, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> CustomHead:
    """The head that the function at `path` makes. Raises ValueError where it is none, or none that fits the model."""
    head = load_named(path, "model.head")(config, rngs=rngs, dtype=dtype)
    if not isinstance(head, CustomHead):
        raise ValueError(f"model.head={path} must return a jaxtrain.nn.heads.CustomHead, not {type(head).__name__}")
    shape = head.kernel.get_value().shape
    if len(shape) != 2 or shape[1] != config.padded_vocab:
        raise ValueError(f"model.head={path}: its kernel is {shape}; it must be [width, {config.padded_vocab}]")
    return head
