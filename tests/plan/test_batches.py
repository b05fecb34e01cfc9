"""Planned batches have the arrays of the data: shapes here, the real ones in tests/plan/test_programs.py."""

import jax
import numpy as np
import pytest
import tiny

from jaxtrain.config import MeshSection, RunConfig
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.plan.batches import abstract_batch, bundle_size, data_batch, with_signal
from jaxtrain.plan.programs import run_roles

BASE = {
    "model": {"config": tiny.HF_CONFIG},
    "data": {"train": {"path": "data.jsonl"}, "max_length": 64},
    "train": {"steps": 1, "batch_size": 16},
}


@pytest.mark.parametrize(
    ("recipe", "objective", "size", "signals"),
    [
        ("sft", {}, 1, {}),
        ("preference", {"name": "DPO"}, 2, {"sign": np.int32}),
        ("preference", {"name": "KTO"}, 2, {"label": np.float32}),
        ("reward", {"name": "BradleyTerry"}, 2, {"sign": np.int32}),
        ("reward", {"name": "PointwiseReward"}, 1, {"label": np.float32}),
    ],
)
def test_a_row_has_room_for_what_is_read_together(recipe, objective, size, signals):
    config = RunConfig.model_validate({"recipe": recipe, **BASE, "objective": objective})
    role = run_roles(config, jax.devices()).role("policy", config.model)
    batch = data_batch(config, role)
    assert bundle_size(config) == size
    assert batch.tokens.shape == (16, 64 * size)
    assert (batch.prefix_ids is not None) == (size == 2)
    assert {name: leaf.dtype for name, leaf in batch.signals.items()} == signals


def test_rows_are_split_over_the_devices():
    mesh = make_mesh(MeshSection(preset="fsdp_tensor", tensor=2), jax.devices())
    batch = abstract_batch(mesh, 8, 32, {"supports": (5,)}, left_out=True)
    batch = with_signal(batch, "ref_logps", batch.loss_weights)
    shards = {name: leaf.sharding.shard_shape(leaf.shape) for name, leaf in batch.arrays().items()}
    assert shards["tokens"] == shards["signals.ref_logps"] == (2, 32)
    assert shards["signals.supports"] == (2, 32, 5)
    assert shards["left_out"] == (2, 3)
