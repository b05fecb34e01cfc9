"""The step of distillation from a teacher with another tokenizer, whose probabilities are signals."""

import jax
import numpy as np
import pytest
import tiny
from updates import assert_same, group_places, update

from jaxtrain.config import MeshSection
from jaxtrain.objectives.uld import ULD
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.types import Batch

LENGTHS = [[9, 11, 3], [14, 9], [23], [5, 5, 5], [1, 20], [16, 8], [2, 2, 2, 2], [24]]
K = 5
OBJECTIVE = ULD(ce_weight=0.4, top_k=K)


def aligned_batch() -> Batch:
    """Random groups of weighted tokens, and a teacher's probabilities at their first ones."""
    batch, rng = tiny.packed_batch(LENGTHS, 24), np.random.default_rng(4)
    places = group_places(batch, rng)
    probs = -np.sort(-rng.dirichlet(np.ones(K + 1), places.shape)).astype(np.float32)
    return batch._replace(signals={"group_place": places, "teacher_probs": probs * (places == 1)[..., None]})


@pytest.fixture(scope="module")
def whole():
    found = update(OBJECTIVE, aligned_batch())
    assert found[1].means["uld"].value > 0.1 and found[1].grad_norm > 0.1
    return found


def test_microbatches_equal_one_batch(whole):
    assert_same(whole, update(OBJECTIVE, aligned_batch(), microbatches=4))


def test_packed_equals_unpacked(whole):
    packed, rows = aligned_batch(), []
    for row in range(len(packed.tokens)):
        for number in range(1, packed.segment_ids[row].max() + 1):
            span = packed.segment_ids[row] == number

            def alone(column, row=row, span=span):
                return np.pad(column[row][span], [(0, 24 - span.sum())] + [(0, 0)] * (column.ndim - 2))

            rows.append(
                packed.map(alone)._replace(segment_ids=np.pad(np.ones(span.sum(), np.int32), (0, 24 - span.sum())))
            )
    assert_same(whole, update(OBJECTIVE, jax.tree.map(lambda *each: np.stack(each), *rows)))


@pytest.mark.parametrize("tensor", [1, 2])
def test_eight_devices_equal_one(whole, tensor):
    preset = "fsdp_tensor" if tensor > 1 else "fsdp"
    assert_same(
        whole, update(OBJECTIVE, aligned_batch(), None, make_mesh(MeshSection(preset=preset, tensor=tensor)), preset)
    )
