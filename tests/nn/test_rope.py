"""Every rope type turns as far as transformers' `modeling_rope_utils` says, short and long."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
import transformers
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from converters.families import llama
from converters.families.keys import ConfigKeys
from converters.families.rope import read_rope, rope_parameters
from jaxtrain.nn.config import DynamicScaling, LayerKind, LongRopeScaling, Rope
from jaxtrain.nn.rope import apply_rope, rope_table, token_segment_lengths

HEAD = 32
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONG = {
    "rope_type": "longrope",
    "short_factor": np.linspace(1, 1.3, HEAD // 2).tolist(),
    "long_factor": np.linspace(1, 9, HEAD // 2).tolist(),
    "original_max_position_embeddings": 300,
}
TYPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": YARN,
    "yarn-truncate": {**YARN, "truncate": False, "beta_fast": 16, "beta_slow": 2.0},
    "yarn-attention": {**YARN, "attention_factor": 0.7},
    "yarn-mscale": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.2},
    "longrope": LONG,
    "longrope-factor": {**LONG, "factor": 5.0},
    "longrope-attention": {**LONG, "attention_factor": 1.1},
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "proportional": {"rope_type": "proportional", "factor": 2.0, "partial_rotary_factor": 0.5},
}
PARTIAL = ["default", "linear", "dynamic", "yarn"]


def keys(section: dict) -> ConfigKeys:
    section = {"rope_theta": 500.0, **section}
    return ConfigKeys({"max_position_embeddings": 300, "rope_parameters": section}, llama.DEFAULTS)


def theirs(section: dict, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The cosines and sines of transformers, [T, 1, R/2]; Phi-3's module is one that takes all types."""
    config = transformers.LlamaConfig(
        hidden_size=4 * HEAD,
        num_attention_heads=4,
        max_position_embeddings=300,
        rope_parameters={"rope_theta": 500.0, **section},
    )
    table = Phi3RotaryEmbedding(config)(torch.zeros(1), torch.arange(length)[None])
    return tuple(half[0, :, None, : half.shape[-1] // 2].numpy() for half in table)


@pytest.mark.parametrize("length", [250, 600])
@pytest.mark.parametrize(("name", "partial"), [*((name, None) for name in TYPES), *((name, 0.75) for name in PARTIAL)])
def test_tables_equal_those_of_transformers(name, partial, length):
    section = {**TYPES[name]} | ({} if partial is None else {"partial_rotary_factor": partial})
    rope = read_rope(keys(section), partial=partial is not None)
    ours = rope_table(rope, HEAD, jnp.arange(length)[None], jnp.asarray(length))
    for mine, reference in zip(ours, theirs(section, length), strict=True):
        np.testing.assert_allclose(mine[0], reference, atol=1e-4)


@pytest.mark.parametrize("name", TYPES)
def test_a_rope_goes_there_and_back(name):
    rope = read_rope(keys(TYPES[name]))
    assert read_rope(keys(rope_parameters(rope))) == rope


def test_a_partial_rope_leaves_the_other_channels():
    rope = Rope(500.0, partial=0.5)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 8, 2, HEAD)), jnp.float32)
    turned = apply_rope(x, rope_table(rope, HEAD, jnp.arange(8)[None], jnp.asarray(8)))
    np.testing.assert_array_equal(turned[..., HEAD // 2 :], x[..., HEAD // 2 :])
    whole = apply_rope(x[..., : HEAD // 2], rope_table(Rope(500.0), HEAD // 2, jnp.arange(8)[None], jnp.asarray(8)))
    np.testing.assert_array_equal(turned[..., : HEAD // 2], whole)


def test_lengths_are_of_segments():
    batch = tiny.packed_batch([[9, 20, 3], [14, 14]], 32)
    lengths = token_segment_lengths(batch.positions, batch.segment_ids)
    np.testing.assert_array_equal(lengths[0], [9] * 9 + [20] * 20 + [3] * 3)
    np.testing.assert_array_equal(lengths[1, :28], [14] * 28)


@pytest.mark.parametrize(
    "scaling",
    [DynamicScaling(4.0, 12), LongRopeScaling((1.0,) * 8, tuple(map(float, range(2, 10))), 12, 1.3)],
    ids=["dynamic", "longrope"],
)
def test_a_segment_does_not_know_how_long_its_neighbours_are(scaling):
    """And what is decoded piece by piece equals the whole row, where the sampler knows how long it becomes."""
    model = tiny.model(pattern=(LayerKind(None, Rope(500.0, scaling)),) * 3)
    params = tiny.random_params(model)
    packed = tiny.packed_batch([[9, 20, 3]], 32)
    hidden_of = jax.jit(model.hidden)
    together = hidden_of(params, packed)
    for segment in (slice(0, 9), slice(9, 29), slice(29, 32)):
        tokens, positions, _, _ = alone = [leaf[:, segment] for leaf in packed[:4]]
        hidden = hidden_of(params, packed._replace(**dict(zip(packed._fields, alone, strict=False))))
        np.testing.assert_allclose(hidden, together[:, segment], atol=1e-5)
        length = tokens.shape[1]
        sampler = replace(model, run=replace(model.run, rope_length=length))
        extend = jax.jit(sampler.extend)
        cache, parts = sampler.empty_cache(1, length), []
        for span in (slice(0, 2), slice(2, length)):
            ones = jnp.ones_like(tokens[:, span])
            part, cache = extend(params, tokens[:, span], positions[:, span], ones, cache)
            parts.append(part)
        np.testing.assert_allclose(jnp.concatenate(parts, 1), hidden, atol=1e-5)
