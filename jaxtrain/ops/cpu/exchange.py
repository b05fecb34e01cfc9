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
    """`lax.ragged_all_to_all`; every device gathers what all have, and takes its own."""
    del recv_sizes
    operands, starts, sizes, targets = (
        lax.all_gather(x, axis_name) for x in (operand, input_offsets, send_sizes, output_offsets)
    )
    devices = len(operands)
    starts, sizes, targets = (
        x.reshape(devices, devices, -1)[:, lax.axis_index(axis_name)].reshape(-1) for x in (starts, sizes, targets)
    )
    row = jnp.arange(len(output))[:, None]
    within = (row >= targets) & (row < targets + sizes)  # [M, slices to this device]
    piece = jnp.argmax(within, 1)
    source = piece // (len(sizes) // devices)
    values = operands[source, starts[piece] + row[:, 0] - targets[piece]]
    taken = within.any(1).reshape(-1, *[1] * (output.ndim - 1))
    return jnp.where(taken, values, output)
