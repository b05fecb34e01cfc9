"""Bytes on one device are those of the shards that it holds."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxtrain.config import MeshSection
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.parallel.sharding import bytes_text, device_bytes


def test_a_device_holds_its_shard_and_all_of_what_is_replicated():
    mesh = make_mesh(MeshSection(preset="fsdp_tensor", tensor=2), jax.devices())
    split, whole = (NamedSharding(mesh, spec) for spec in (PartitionSpec("fsdp", "tensor"), PartitionSpec()))
    tree = {
        "matrix": jax.ShapeDtypeStruct((64, 32), np.float32, sharding=split),
        "norm": jax.ShapeDtypeStruct((32,), np.float32, sharding=whole),
    }
    placed = jax.tree.map(lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding), tree)
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(placed))
    assert device_bytes(tree) == held == 64 * 32 * 4 // 8 + 32 * 4


@pytest.mark.parametrize(("size", "text"), [(2.5e9, "2.50 GB"), (3_400_000, "3.4 MB"), (-2e9, "-2.00 GB")])
def test_sizes_are_shown_in_decimal_units(size, text):
    assert bytes_text(size) == text
