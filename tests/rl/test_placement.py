"""All placements give the same samples and weights."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from samplers import COLOCATED, DISJOINT, PROMPTS, meshes, place, same, trained

from jaxtrain.config.rl_parts import PlacementSection
from jaxtrain.lora import merge_adapters
from jaxtrain.rl.placement import trainer_devices
from jaxtrain.rl.sync import WeightSync, rollout_model
from jaxtrain.rl.weight_chunks import chunk_weights, place_chunks
from jaxtrain.sample.capacity import cast_matrices


def test_disjoint_meshes_share_no_device_and_sample_what_one_mesh_does():
    colocated, together, _ = place(COLOCATED)
    disjoint, model, params = place(DISJOINT)
    expected = colocated.sample(PROMPTS, 3)
    same(disjoint.sample(PROMPTS, 3), expected)
    same(disjoint.sample(PROMPTS[1:], 3), expected[1:])  # whatever else is asked for
    assert {t.versions[0] for group in expected for t in group} == {0}
    lengths = [len(t.completion_ids) for group in expected for t in group]
    assert max(lengths) == 6 and len({t.completion_ids[0] for group in expected for t in group}) > 1

    _, other = trained(model.run.mesh, seed=5)
    disjoint.set_params(other, 7)
    moved = disjoint.sample(PROMPTS, 3)
    assert [t.completion_ids.tolist() for t in moved[0]] != [t.completion_ids.tolist() for t in expected[0]]
    assert (moved[0][0].versions == 7).all()
    colocated.set_params(trained(together.run.mesh, seed=5)[1], 7)
    same(colocated.sample(PROMPTS, 3), moved)
    assert disjoint.metrics()["sync/bytes"] == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert disjoint.metrics()["sync/seconds"] > 0


def test_weights_are_merged_cast_and_placed_on_the_sampling_devices():
    mesh, sampling = meshes(DISJOINT)
    assert sampling is not None and not set(mesh.devices.flat) & set(sampling.devices.flat)
    model, params = trained(mesh, tiny.LORA)
    model = replace(model, run=replace(model.run, dtype=jnp.dtype("bfloat16")))
    rollout = rollout_model(model, sampling)
    synced = WeightSync(model, rollout)(params)
    expected = cast_matrices(merge_adapters(params, tiny.LORA), jnp.dtype("bfloat16"))
    assert jax.tree.structure(synced.params) == jax.tree.structure(rollout.abstract())
    for leaf, wanted in zip(jax.tree.leaves(synced.params), jax.tree.leaves(expected), strict=True):
        assert leaf.dtype == wanted.dtype and leaf.devices() <= set(sampling.devices.flat)
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(wanted))
    assert synced.params["layers"]["attn"]["q_proj"]["kernel"].dtype == jnp.bfloat16
    assert synced.bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(expected))
    # Through another process's memory: the same bits.
    there = place_chunks(rollout_model(model, None), chunk_weights(model, params))
    for leaf, wanted in zip(jax.tree.leaves(there), jax.tree.leaves(synced.params), strict=True):
        assert leaf.dtype == wanted.dtype
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(wanted))


def test_the_trainer_may_donate_its_weights_after_the_sync():
    sampler, _, params = place(COLOCATED)
    sampler.set_params(params, 1)
    jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)(params)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(params))
    assert sampler.sample(PROMPTS[:1], 1)[0][0].versions[0] == 1


def test_an_impossible_placement_is_an_error():
    with pytest.raises(ValueError, match="rollout_devices=8 of 8 devices leaves none"):
        trainer_devices(PlacementSection(kind="disjoint", rollout_devices=8))
    with pytest.raises(ValueError, match="staleness=1 samples while training"):
        trainer_devices(PlacementSection(staleness=1))
    with pytest.raises(ValueError, match="they belong to `disjoint`"):
        PlacementSection(kind="disjoint")
