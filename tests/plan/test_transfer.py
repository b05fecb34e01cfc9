"""What is sent to engines with devices of their own, by hand."""

import math
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest

from jaxtrain.plan.prices import CHIPS, DCN
from jaxtrain.plan.target import parse_target
from jaxtrain.plan.transfer import weight_transfer

LINK = CHIPS["TPU v5"].link
MATRIX, BIAS = 64 * 32 * 2, 32 * 2  # bytes


class Device(NamedTuple):
    id: int
    slice_index: int


def programs(trainers: int, own: int, slices: int = 1):
    """An update on the first devices, and on the next ones an engine with a matrix that is split over them."""
    devices = [Device(n, n * slices // (trainers + own)) for n in range(trainers + own)]
    update, decode = (
        SimpleNamespace(devices=SimpleNamespace(flat=part), size=len(part), shape={"fsdp": len(part)})
        for part in (devices[:trainers], devices[trainers:])
    )
    split = SimpleNamespace(shard_shape=lambda shape: (shape[0] // own, *shape[1:]))
    whole = SimpleNamespace(shard_shape=lambda shape: shape)
    params = [
        SimpleNamespace(shape=shape, sharding=sharding, dtype=np.dtype("float16"), size=math.prod(shape))
        for shape, sharding in (((64, 32), split), ((32,), whole))
    ]
    inputs = {"engine's parameters": params}
    return {"update": SimpleNamespace(mesh=update), "decode": SimpleNamespace(mesh=decode, inputs=inputs)}


def test_an_engine_receives_its_shards():
    made = weight_transfer(programs(6, 2), 1, parse_target("v5p:2x2x2"))
    assert made.bytes == MATRIX + BIAS
    assert made.seconds == pytest.approx((MATRIX / 2 + BIAS) / (3 * LINK))


def test_the_trainer_sends_a_copy_to_every_engine():
    made = weight_transfer(programs(2, 2), 4, parse_target("v5p:2x2x2"))
    assert made.bytes == 4 * (MATRIX + BIAS)
    assert made.seconds == pytest.approx(4 * (MATRIX + BIAS) / 2 / (3 * LINK))


def test_between_slices_weights_take_the_network():
    made = weight_transfer(programs(4, 4, slices=2), 1, parse_target("v5p:2x2x1", 2))
    assert made.seconds == pytest.approx((MATRIX / 4 + BIAS) / DCN)


def test_no_time_is_predicted_for_cpus():
    assert weight_transfer(programs(6, 2), 1, parse_target("cpu:8")).seconds is None


def test_engines_on_the_trainers_devices_receive_nothing():
    colocated = programs(6, 2)
    colocated["decode"].mesh = colocated["update"].mesh
    assert weight_transfer(colocated, 1, parse_target("cpu:8")) is None
