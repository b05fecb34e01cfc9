"""Pairs whose prompt is in a row once give the step of pairs that each have it twice."""

from dataclasses import replace

import jax
import numpy as np
import optax
import pytest
import tiny

from jaxtrain.config import MeshSection
from jaxtrain.data.packing import bundle_tokens, make_row, stack_rows
from jaxtrain.nn.config import DynamicScaling, Latent, Rope
from jaxtrain.objectives.objective import Logp
from jaxtrain.objectives.preference import DPO
from jaxtrain.objectives.reward import BradleyTerry
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.parallel.sharding import RULES, batch_sharding, param_specs
from jaxtrain.train.state import new_state
from jaxtrain.train.step import make_step, scores_of
from jaxtrain.types import SIGN, Example

LENGTH = 64
# (prompt, chosen, rejected) of the pairs of each row; one pair shares nothing.
ROWS = [[(9, 6, 4), (1, 3, 7)], [(0, 8, 5), (12, 2, 1)], [(17, 5, 9)], [(3, 1, 1), (4, 2, 6), (2, 9, 3)]]
WINDOWS = {"num_layers": 2, "pattern": tuple(replace(tiny.KIND, window=window) for window in (7, None))}
LATENT = Latent(query_rank=24, rank=16, plain_width=12, rope_width=8, value_width=10, norm_eps=1e-6, neighbours=True)
SMALL = {"num_layers": 1, "pattern": (tiny.KIND,)}
FAMILIES = {
    "dense": SMALL,
    "windows-softcap-sinks": {**WINDOWS, "attention_softcap": 5.0, "sinks": True},
    "latent": {**SMALL, "latent": LATENT, "head_dim": 20, "num_kv_heads": 4, "qk_norm": None, "qkv_bias": False},
}


def pairs(scored_at_last=False):
    rng = np.random.default_rng(0)

    def example(prompt, size, sign):
        answer = rng.integers(1, 101, size + 1)
        answer[0] = 50 + sign  # so that the prompt is all that both share
        ids = np.concatenate([prompt, answer]).astype(np.int32)
        weights = np.float32(np.arange(len(ids)) == len(ids) - 1) if scored_at_last else np.ones(len(ids), np.float32)
        weights[: max(len(prompt), 1)] = 0
        signals = {SIGN: np.full(len(ids), sign, np.int32), "ref_logps": rng.normal(size=len(ids)).astype(np.float32)}
        return Example(ids, weights, signals)

    return [
        [
            (example(prompt, chosen, 1), example(prompt, rejected, -1))
            for size, chosen, rejected in row
            for prompt in [rng.integers(1, 101, size)]
        ]
        for row in ROWS
    ]


def batches(rows):
    return [stack_rows([make_row(row, LENGTH, share_prefixes=share) for row in rows]) for share in (False, True)]


def one_step(model, params, batch, objective, mesh=None, microbatches=1):
    tx, placed = optax.sgd(1.0), params
    if mesh is not None:
        placed = jax.device_put(params, param_specs(model.axes(), model.abstract(), RULES["fsdp"], mesh))
        batch = jax.device_put(batch, batch_sharding(mesh))
    step = make_step(model, tx, lambda step: 0 * step, objective, microbatches=microbatches)
    state, report = jax.jit(step)(new_state(placed, tx, jax.random.key(0)), {}, batch)
    return jax.tree.map(lambda new, old: np.asarray(new) - np.asarray(old), state.params, params), report


def check_equal(expected, found):
    for name, metric in expected[1].means.items():
        np.testing.assert_allclose(found[1].means[name].value, metric.value, rtol=1e-5, atol=1e-6, err_msg=name)
    for old, new in zip(jax.tree.leaves(expected[0]), jax.tree.leaves(found[0]), strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(
    ("family", "attention"),
    [("dense", "xla"), ("dense", "splash"), ("windows-softcap-sinks", "xla"), ("latent", "xla")],
)
def test_loss_and_gradients_are_those_of_two_copies(family, attention):
    model = tiny.model(**FAMILIES[family])
    model = replace(model, run=replace(model.run, attention=attention))
    assert model.shares_prefixes
    params, (twice, once) = tiny.random_params(model), batches(pairs())
    assert np.count_nonzero(once.segment_ids) < 0.85 * np.count_nonzero(twice.segment_ids)
    check_equal(*(one_step(model, params, batch, DPO(beta=0.5)) for batch in (twice, once)))


def test_eight_devices_and_microbatches_have_them_too():
    mesh = make_mesh(MeshSection())
    single, sharded = tiny.model(**SMALL), tiny.model(mesh=mesh, remat="full", **SMALL)
    params, (twice, once) = tiny.random_params(single), batches(pairs() * 2)
    expected = one_step(single, params, twice, DPO())
    check_equal(expected, one_step(sharded, params, once, DPO(), mesh))
    check_equal(expected, one_step(single, params, once, DPO(), microbatches=4))


def test_rewards_are_those_of_the_last_tokens():
    model = replace(tiny.model(**SMALL), output="scalar")
    params, (twice, once) = tiny.random_params(model), batches(pairs(scored_at_last=True))
    check_equal(*(one_step(model, params, batch, BradleyTerry()) for batch in (twice, once)))


def test_every_answer_has_its_log_probabilities():
    model = tiny.model(**SMALL)
    params, (twice, once) = tiny.random_params(model), batches(pairs())
    logps = [scores_of(model, params, model.hidden(params, each), each, (Logp(),)).logp for each in (twice, once)]
    expected, found = (np.asarray(logp)[each.loss_weights > 0] for logp, each in zip(logps, (twice, once), strict=True))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_an_answer_does_not_see_the_other():
    model = tiny.model(**SMALL)
    params, (_, once) = tiny.random_params(model), batches(pairs())
    before = model.hidden(params, once)
    first = once.segment_ids == np.where(once.prefix_ids > 0, once.prefix_ids + 1, -1)
    changed = once._replace(tokens=np.where(first, 1 + once.tokens % 100, once.tokens))
    same = np.isclose(model.hidden(params, changed), before, atol=1e-6).all(-1)
    assert same[~first].all() and not same[first].any()


def test_a_row_has_a_prompt_once():
    pair = pairs()[0][0]
    assert (bundle_tokens(pair, share_prefixes=False), bundle_tokens(pair, share_prefixes=True)) == (30, 21)
    row = make_row([pair], 24, share_prefixes=True)
    assert row.positions.tolist() == [*range(9), *range(9, 16), *range(9, 14), 0, 0, 0]
    assert row.prefix_ids.tolist() == [0] * 9 + [1] * 12 + [0] * 3
    assert row.segment_ids.tolist() == [1] * 9 + [2] * 7 + [3] * 5 + [0] * 3
    assert row.bundle_ids.tolist() == [1] * 21 + [0] * 3
    np.testing.assert_array_equal(row.tokens[:16], pair[0].input_ids)
    np.testing.assert_array_equal(row.tokens[[*range(9), *range(16, 21)]], pair[1].input_ids)
    equal = (pair[0], pair[0]._replace(signals=pair[1].signals))
    assert bundle_tokens(equal, share_prefixes=True) == 16 + 7  # the prompt, not the answer


@pytest.mark.parametrize(
    "changes",
    [
        {"pattern": (tiny.DELTA_KIND,) * 3, "delta": tiny.DELTA},
        {"moe": tiny.MOE},
        {"pattern": (replace(tiny.KIND, rope=Rope(theta=1e4, scaling=DynamicScaling(2.0, 64))),) * 3},
    ],
    ids=["recurrent", "experts", "rope by length"],
)
def test_models_whose_states_would_differ_do_not_share(changes):
    assert not tiny.model(**changes).shares_prefixes


def test_kernels_that_cannot_do_not_share():
    for changes, attention, shares in [
        (SMALL, "cudnn", False),
        (WINDOWS, "splash", False),
        (WINDOWS, "auto", jax.default_backend() != "tpu"),
    ]:
        model = tiny.model(**changes)
        assert replace(model, run=replace(model.run, attention=attention)).shares_prefixes == shares
    assert not tiny.model(mesh=make_mesh(MeshSection(context=8)), **SMALL).shares_prefixes
