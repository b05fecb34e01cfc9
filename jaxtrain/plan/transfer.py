"""The transfer of weights from the devices that train to engines on others (`rl.placement.kind: disjoint`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax

from jaxtrain.parallel.sharding import device_bytes
from jaxtrain.plan.prices import DCN
from jaxtrain.plan.programs import Program
from jaxtrain.plan.target import Target


class WeightTransfer(NamedTuple):
    """What every step sends before its rollout."""

    bytes: int  # of all copies
    engines: int  # each of which gets a copy
    seconds: float | None  # None for a CPU


def weight_transfer(programs: Mapping[str, Program], engines: int, target: Target) -> WeightTransfer | None:
    """The transfer to `engines` like that of the program "decode"; None if no engine has devices of its own.

    Its time is that of the busiest device at the speed of all its links: of an engine, which receives its share of the
    weights, or of the trainer, all of which send equal shares of all copies. Between slices it is that of the network.
    """
    decode, update = programs.get("decode"), programs["update"]
    if decode is None or set(decode.mesh.devices.flat) & set(update.mesh.devices.flat):
        return None
    params = decode.inputs["engine's parameters"]
    copies = engines * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    if target.chip is None:
        return WeightTransfer(copies, engines, None)
    busiest = max(device_bytes(params), copies / update.mesh.size)
    between = len({getattr(d, "slice_index", 0) for d in (*decode.mesh.devices.flat, *update.mesh.devices.flat)}) > 1
    speed = DCN if between else target.network(update.mesh).links
    return WeightTransfer(copies, engines, busiest / speed)
