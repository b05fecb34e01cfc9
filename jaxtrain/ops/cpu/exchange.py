"""The collective of `ops.exchange`, which XLA's CPU backend does not have."""

import jax.numpy as jnp
from jax import Array, lax


def ragged_all_to_all(
    operand: Array,
    output: Array,
    input_offsets: Array,
    send_sizes: Array,
    output_offsets: Array,
    recv_sizes: Array,
    *,
    axis_name: str,
) -> Array:
    """`lax.ragged_all_to_all`; every device sees what all have, one after the other, and takes its own."""
    del recv_sizes
    devices, me = lax.axis_size(axis_name), lax.axis_index(axis_name)
    row = jnp.arange(len(output))
    for shift in range(devices):
        to = [(source, (source + shift) % devices) for source in range(devices)]
        x, *slices = (lax.ppermute(y, axis_name, to) for y in (operand, input_offsets, send_sizes, output_offsets))
        starts, sizes, targets = (y.reshape(devices, -1)[me] for y in slices)
        within = (row[:, None] >= targets) & (row[:, None] < targets + sizes)  # [M, slices to this device]
        piece = jnp.argmax(within, 1)
        values = x[starts[piece] + row - targets[piece]]
        output = jnp.where(within.any(1).reshape(-1, *[1] * (output.ndim - 1)), values, output)
    return output
