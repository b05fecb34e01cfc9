"""The step of GOLD's distance: the same in microbatches and on eight devices."""

import numpy as np
import tiny
from updates import assert_same, group_places, update

from jaxtrain.config import MeshSection
from jaxtrain.objectives.gold import GOLD
from jaxtrain.ops.head_chunks import Head
from jaxtrain.ops.hybrid import MatchedHead, match_vocabularies
from jaxtrain.parallel.mesh import make_mesh

LENGTHS = [[9, 11, 3], [14, 9], [23], [5, 5, 5], [1, 20], [16, 8], [2, 2, 2, 2], [24]]
OBJECTIVE = GOLD(ce_weight=0.3)


def problem():
    """Random groups of weighted tokens with what a teacher says of them, and the teacher's head."""
    batch, rng = tiny.packed_batch(LENGTHS, 24), np.random.default_rng(4)
    places = group_places(batch, rng)
    first = places == 1
    hidden = rng.normal(size=(*places.shape, 8)).astype(np.float32) * first[..., None]
    further = -rng.exponential(size=places.shape).astype(np.float32) * first
    batch = batch._replace(signals={"group_place": places, "teacher_hidden": hidden, "teacher_further": further})
    size = tiny.CONFIG.vocab_size
    vocabularies = {str(n): n for n in range(size)}, {str(n + 60): n for n in range(60)}
    weight = rng.normal(size=(8, 60)).astype(np.float32)
    return batch, MatchedHead(Head(weight, 60), match_vocabularies(*vocabularies, size, 60))


def test_microbatches_and_eight_devices_equal_one_batch():
    whole = update(OBJECTIVE, *problem())
    assert whole[1].means["matched"].value > 0.01 and whole[1].means["unmatched"].value > 0.01
    assert_same(whole, update(OBJECTIVE, *problem(), microbatches=4))
    mesh = make_mesh(MeshSection(preset="fsdp_tensor", tensor=2))
    assert_same(whole, update(OBJECTIVE, *problem(), mesh, "fsdp_tensor"))
