"""PPO and REINFORCE++ beside verl's own functions, called by tests/verl_side.py in the interpreter that
JAXTRAIN_VERL_PYTHON names (with verl and torch). Without it the tests are skipped.
"""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import policy_samples
import pytest
import verl_side

from jaxtrain.objectives.value import ClippedValue
from jaxtrain.rl.advantages import Outcomes, Settings, gae, globally_normalised
from jaxtrain.rl.algorithms import ALGORITHMS
from jaxtrain.train.step import batch_norm
from jaxtrain.types import Scores

PYTHON = os.environ.get("JAXTRAIN_VERL_PYTHON")
pytestmark = pytest.mark.skipif(not PYTHON, reason="JAXTRAIN_VERL_PYTHON names no interpreter with verl")


@pytest.fixture(scope="module")
def batch():
    made, _, _ = policy_samples.problem()
    rng = np.random.default_rng(1)
    signals = dict(zip(("values", "new_values", "returns"), rng.normal(size=(3, *made.tokens.shape)), strict=True))
    return made._replace(signals=made.signals | {name: value.astype(np.float32) for name, value in signals.items()})


@pytest.fixture(scope="module")
def verl(batch, tmp_path_factory):
    names = {"new": "new", "old": "old_logps"} | {
        name: name for name in ("advantages", "values", "new_values", "returns")
    }
    own = batch.loss_weights > 0
    path = tmp_path_factory.mktemp("verl") / "tokens.json"
    path.write_text(json.dumps({name: batch.signals[signal][own].tolist() for name, signal in names.items()}))
    script = Path(verl_side.__file__)
    done = subprocess.run([PYTHON, script, path], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("name", "estimator"), [("gae", gae), ("reinforce++", globally_normalised)])
def test_advantages_are_verls(verl, name, estimator):
    """But for the std, which is verl's unbiased one."""
    given = verl_side.samples()
    columns = {
        key: [row[:n] for row, n in zip(given[key], verl_side.LENGTHS, strict=True)]
        for key in given
        if key != "rewards"
    }
    masks = [mask > 0 for mask in columns["mask"]]
    zeros = [np.zeros(n) for n in verl_side.LENGTHS]
    outcomes = Outcomes(given["rewards"], np.arange(len(masks)), masks, zeros, columns["penalties"], columns["values"])
    found = estimator(outcomes, Settings(verl_side.GAMMA, verl_side.LAM))
    count = sum(mask.sum() for mask in masks)
    for row, mask in enumerate(masks):
        theirs = np.array(verl[name][row])[: len(mask)][mask]
        np.testing.assert_allclose(found.advantages[row][mask] * np.sqrt((count - 1) / count), theirs, rtol=1e-5)
        if found.returns is not None:
            returns = np.array(verl["returns"][row])[: len(mask)][mask]
            np.testing.assert_allclose(found.returns[row][mask], returns, rtol=1e-5)


@pytest.mark.parametrize("name", ["ppo", "reinforce++"])
def test_the_policys_loss_and_gradient_are_verls(verl, batch, name):
    objective = replace(
        ALGORITHMS[name].objective,
        aggregation="dapo",
        correction=None,
        dual_clip=verl_side.DUAL_CLIP,
        **dict.fromkeys(("epsilon_low", "epsilon_high"), verl_side.CLIP),
    )
    value, _, gradient = policy_samples.run(batch, objective)
    assert value == pytest.approx(verl["policy"], rel=1e-5)
    np.testing.assert_allclose(gradient[batch.loss_weights > 0], verl["policy_gradient"], rtol=1e-5, atol=1e-7)


def test_the_critics_loss_and_gradient_are_verls(verl, batch):
    def loss(values):
        return ClippedValue(verl_side.CLIP_VALUE)(Scores(value=values), batch, batch_norm(batch))[0]

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(batch.signals["new_values"]))
    assert float(value) == pytest.approx(verl["value"], rel=1e-5)
    own = np.asarray(gradient)[batch.loss_weights > 0]
    np.testing.assert_allclose(own, verl["value_gradient"], rtol=1e-5, atol=1e-7)
