import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recipe_runs import prepare, train, write_teacher

from jaxtrain.config import MeshSection
from jaxtrain.ops.head_chunks import Head
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.session.teacher import on_mesh


def test_a_teacher_of_other_token_ids_is_refused(tmp_path):
    place, other = prepare(tmp_path, "distill"), tmp_path / "other"
    write_teacher(other, vocab_size=200)
    with pytest.raises(ValueError, match="has 259 tokens, and one of the models has only 200"):
        train(place, "refused", f"teacher.path={other}")
    vocabulary = other / "tokenizer.json"
    vocabulary.write_text(vocabulary.read_text().replace('"a"', '"another"'))
    with pytest.raises(ValueError, match="has another tokenizer than the student"):
        train(place, "refused", f"teacher.path={other}")


@pytest.mark.parametrize("transposed", [False, True])
def test_a_head_is_split_over_the_students_devices(transposed):
    mesh = make_mesh(MeshSection(preset="fsdp_tensor", tensor=2, fsdp=2), jax.devices()[:4])
    weight = jnp.arange(96.0).reshape((8, 12) if transposed else (12, 8))
    moved = on_mesh(Head(weight, 7, transposed), mesh, "fsdp_tensor")
    np.testing.assert_array_equal(moved.weight, weight)
    assert moved.weight.sharding.device_set == set(jax.devices()[:4])
    assert {shard.data.shape for shard in moved.weight.addressable_shards} == {(4, 6) if transposed else (6, 4)}
    with pytest.raises(ValueError, match="teacher's head"):
        on_mesh(Head(weight[:3], 7, transposed), mesh, "fsdp_tensor")
