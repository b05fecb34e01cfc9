"""A small head to score, for the tests of `ops.token_scores`."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from jaxtrain.parallel.mesh import AXES

ROWS, LENGTH, WIDTH, VOCAB, PADDED = 8, 34, 16, 90, 96
CHUNK = 16


def problem(seed: int = 0, dtype: str = "float32") -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Weights of every size and sign on a third of the tokens; one row carries none, one all."""
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(ROWS, LENGTH, WIDTH)), dtype)
    head = jnp.zeros((PADDED, WIDTH)).at[:VOCAB].set(rng.normal(size=(VOCAB, WIDTH)))
    tokens = jnp.asarray(rng.integers(0, VOCAB, (ROWS, LENGTH)), jnp.int32)
    weights = rng.normal(size=(ROWS, LENGTH)) * (rng.random((ROWS, LENGTH)) < 1 / 3)
    weights[3], weights[5] = 0, 1
    return hidden, head, tokens, jnp.asarray(weights, jnp.float32)


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-5) -> None:
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance)


def make_mesh(data: int, fsdp: int, expert: int, tensor: int, context: int = 1) -> Mesh:
    sizes = (data, fsdp, expert, context, tensor)
    devices = np.array(jax.devices()[: math.prod(sizes)]).reshape(sizes)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))
