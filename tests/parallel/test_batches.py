import jax
import numpy as np
import pytest
import tiny

from jaxtrain.config import MeshSection
from jaxtrain.parallel.batches import check_row_length, local_rows, local_shards, place_batch
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.parallel.sharding import row_shares


@pytest.mark.parametrize(
    "section",
    [
        MeshSection(),
        MeshSection(preset="fsdp_tensor", context=2, tensor=2),
        MeshSection(preset="fsdp_expert", expert=4),
    ],
)
def test_a_placed_batch_is_the_host_batch_split_by_rows(section):
    mesh = make_mesh(section)
    batch = tiny.packed_batch([[4, 4]] * 8, 8)
    signals = {"a": np.random.rand(8, 8, 3).astype(np.float32)}
    batch = batch._replace(bundle_ids=batch.segment_ids, signals=signals)
    assert local_rows(mesh, 8) == range(8)
    for placed in (place_batch(batch, mesh), place_batch(batch, mesh, 8)):
        for ours, theirs in zip(jax.tree.leaves(placed), jax.tree.leaves(batch), strict=True):
            np.testing.assert_array_equal(ours, theirs)
            assert ours.addressable_shards[0].data.shape[0] == 8 // row_shares(mesh)


def test_one_host_reads_all_virtual_shards():
    assert local_shards(make_mesh(MeshSection()), rows=16, shards=4) == range(4)


def test_rows_that_do_not_divide_over_context_are_an_error_with_a_way_out():
    mesh = make_mesh(MeshSection(context=8))
    check_row_length(96, mesh)
    with pytest.raises(ValueError, match=r"rows of 97 tokens .* mesh.context=8; the next data.row_length .* is 104"):
        check_row_length(97, mesh)
