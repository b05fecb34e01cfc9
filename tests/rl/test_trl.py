"""Every RL objective beside TRL's own: advantages, loss, gradient and metrics, and runs of three steps.

TRL's figures are those of its trainers, called by tests/trl_side.py in the interpreter that JAXTRAIN_TRL_PYTHON names
(with trl, torch and datasets). Without it the tests are skipped. Here the samples take the way of a run: they are
collected, packed into rows, scored and given advantages.
"""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trl_side
from safetensors.numpy import load_file
from trajectories import trajectory

from jaxtrain.config import parse_config
from jaxtrain.objectives.importance import Correction
from jaxtrain.recipes import rl
from jaxtrain.rl.algorithms import ALGORITHMS
from jaxtrain.rl.collect import Collector, LengthLimits, rollout_metrics
from jaxtrain.rl.experience import Experience, add_advantages
from jaxtrain.rl.rollouts import Prompt, pack_parts
from jaxtrain.rl.trajectories import write_step
from jaxtrain.session.export import export_run
from jaxtrain.train.step import add_signals, batch_norm
from jaxtrain.types import Scores

PYTHON = os.environ.get("JAXTRAIN_TRL_PYTHON")
pytestmark = pytest.mark.skipif(not PYTHON, reason="JAXTRAIN_TRL_PYTHON names no interpreter with TRL")

WEIGHTS = {"first": 1.0, "second": 0.5}
BOUNDED = {"cap": 1.1, "floor": 0.9}
# The case of trl_side.py -> algorithm, numbers of the algorithm, numbers of the objective.
OURS = {
    "grpo": ("grpo", {}, {}),
    "grpo, k3": ("grpo", {}, {"beta": 0.04, "kl_bias_correction": False}),
    "grpo, k3 times the ratio": ("grpo", {}, {"beta": 0.04}),
    "grpo, batch": ("grpo", {"scale": "batch"}, {}),
    "grpo, two-sided": ("grpo", {}, {"dual_clip": 1.3, "epsilon_high": 0.1}),
    "grpo, cut off samples masked": ("grpo", {"overlong_filter": True}, {}),
    "grpo, off-policy mask": ("grpo", {}, {"off_policy_threshold": 0.05}),
    "grpo, top entropy": ("grpo", {}, {"top_entropy": 0.3, "entropy_coefficient": 0.1}),
    "dapo, entropy bonus": ("grpo", {}, {"aggregation": "dapo", "entropy_coefficient": 0.1}),
    "bnpo": ("grpo", {}, {"aggregation": "bnpo"}),
    "dr_grpo": ("dr_grpo", {}, {}),
    "dapo": ("grpo", {}, {"aggregation": "dapo", "epsilon_high": 0.28}),
    "gspo": ("gspo", {}, {"epsilon_low": 0.03, "epsilon_high": 0.04}),
    "luspo": ("gspo", {}, {"epsilon_low": 0.03, "epsilon_high": 0.04, "aggregation": "sum"}),
    "cispo": ("cispo", {}, {"epsilon_high": 0.2}),
    "sapo": ("sapo", {}, {}),
    "vespo": ("vespo", {}, {}),
    "gdpo": ("gdpo", {}, {}),
    "rloo": ("rloo", {}, {}),
    "vespo, token_truncate": ("vespo", {}, {"correction": Correction("token", "truncate", **BOUNDED)}),
} | {
    f"dapo, {level}_{mode}": ("grpo", {}, {"aggregation": "dapo", "correction": Correction(level, mode, **BOUNDED)})
    for level in ("token", "sequence")
    for mode in ("truncate", "mask")
}
KEYS = [*trl_side.CASES, *(f"{name}, lost" for name in trl_side.LOST)]
REWARD_METRICS = {"reward", "reward_std", "frac_reward_zero_std"} | {
    f"rewards/{name}/{what}" for name in WEIGHTS for what in ("mean", "std")
}


def algorithm_of(name):
    preset, numbers, objective = OURS[name]
    algorithm = ALGORITHMS[preset]
    made = replace(algorithm.objective, **{"correction": None, "max_completion_length": trl_side.LENGTH} | objective)
    return replace(algorithm, objective=made, **numbers)


def trajectories_of(samples):
    made = []
    for index, sample in enumerate(samples):
        known = [reward for reward in sample["rewards"] if reward is not None]
        parts = [np.nan if reward is None else reward for reward in sample["rewards"]]
        total = sum(weight * part for weight, part in zip(WEIGHTS.values(), parts, strict=True)) if known else np.nan
        t = trajectory(length=len(sample["ids"]), number=index // trl_side.SAMPLES, sample=index % trl_side.SAMPLES)
        made.append(
            t._replace(
                prompt=Prompt(t.prompt.number, np.array(sample["prompt"], np.int32), {}),
                completion_ids=np.array(sample["ids"], np.int32),
                loss_mask=np.array(sample["mask"], bool),
                sampler_logps=np.array(sample["sampler"], np.float32),
                finish_reason="length" if sample["cut_off"] else "stop",
                rewards=dict(zip(WEIGHTS, parts, strict=True)),
                reward=total,
            )
        )
    return made


class Given:
    """A sampler of these trajectories."""

    def __init__(self, trajectories):
        self.trajectories = trajectories

    def sample(self, prompts, samples):
        return [self.trajectories[p.number * samples : (p.number + 1) * samples] for p in prompts]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("trl")
    script = Path(trl_side.__file__)
    done = subprocess.run([PYTHON, script, made], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr[-2000:]
    return made


@pytest.fixture(scope="module")
def results(folder):
    return json.loads((folder / "results.json").read_text())


def test_every_case_is_compared():
    assert OURS.keys() == trl_side.CASES.keys()
    assert {OURS[name][0] for name in OURS} >= ALGORITHMS.keys() - {"dapo", "reinforce++", "ppo"}


@pytest.mark.parametrize("key", KEYS)
def test_advantages_loss_gradient_and_metrics_are_trls(results, key):
    name, expected = key.removesuffix(", lost"), results[key]
    samples = trl_side.make_samples(name, key != name)
    algorithm = algorithm_of(name)
    collected = Collector(
        lambda count: [Prompt(number, np.zeros(1, np.int32), {}) for number in range(count)],
        Given(trajectories_of(samples)),
        list,
        algorithm,
        prompts=trl_side.GROUPS,
        samples=trl_side.SAMPLES,
        limits=LengthLimits(trl_side.LENGTH),
    )()
    trajectories = collected.trajectories
    experience = Experience(pack_parts([trajectories], 40, 1), 1, trajectories)
    for signal, given in (("old_logps", "old"), ("ref_logps", "ref"), ("new", "new"), ("entropy", "entropy")):
        experience.spread_signal(signal, [np.array(sample[given], np.float32) for sample in samples])
    add_advantages(experience, algorithm, WEIGHTS)
    (packed,) = experience.minibatches
    batch, objective = packed.batch, algorithm.objective

    def scores(logp, entropy):
        own = batch.loss_weights > 0
        return Scores(*(jnp.where(own, given, 0) for given in (logp, entropy, logp)))

    given = batch.signals["new"], batch.signals["entropy"]
    batch = add_signals(objective, lambda *needs: scores(*given), batch)

    def loss(*given):
        return objective(scores(*given), batch, batch_norm(batch))

    (value, metrics), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(*given)
    assert float(value) == pytest.approx(expected["loss"], rel=1e-6, abs=1e-6)
    for gradient, kind in zip(gradients, ("gradient", "entropy_gradient"), strict=True):
        for found, theirs in zip(packed.gather(np.asarray(gradient)), expected[kind], strict=True):
            np.testing.assert_allclose(found, theirs, rtol=1e-6, atol=1e-6)
    for t, advantage in zip(experience.trajectories, expected["advantages"], strict=True):
        found = t.advantages[t.loss_mask]
        np.testing.assert_allclose(found, np.full(len(found), 0 if t.left_out else advantage), rtol=1e-5, atol=1e-6)
    ours = {key: float(metric.value) for key, metric in metrics.items()} | experience.metrics
    ours |= rollout_metrics(collected.trajectories)
    compared = expected["metrics"].keys() & ours.keys()
    if any(t.left_out for t in trajectories):  # which TRL counts in the means of tokens
        compared = REWARD_METRICS
    assert compared >= REWARD_METRICS and (compared == REWARD_METRICS) == any(t.left_out for t in trajectories)
    for metric in compared:
        assert ours[metric] == pytest.approx(expected["metrics"][metric], rel=1e-5, abs=1e-6), metric


@pytest.mark.parametrize("name", trl_side.RUNS)
def test_three_steps_of_adamw_end_at_trls_parameters(folder, tmp_path, name):
    algorithm, samples = algorithm_of(name), trl_side.make_samples(name, False)
    preset, _, numbers = OURS[name]
    trajectories = trajectories_of(samples)
    (tmp_path / "train.jsonl").write_text('{"prompt": "w3"}\n')
    write_step(tmp_path / "given", 1, trajectories)
    config = {
        "recipe": "rl",
        "run": {"dir": str(tmp_path / "run")},
        "model": {"path": str(folder / "model"), "compute_dtype": "float32"},
        "data": {"train": {"path": str(tmp_path / "train.jsonl")}, "max_length": 40, "prompt_format": "plain"},
        "train": {"steps": trl_side.STEPS, "max_grad_norm": 1e9},
        "optimizer": {
            "learning_rate": trl_side.LEARNING_RATE,
            "schedule": "constant",
            "b1": 0.9,
            "b2": 0.999,
            "eps": trl_side.ADAM_EPSILON,
            "weight_decay": 0.0,
        },
        "log": {"to": []},
        "rl": {
            "algorithm": preset,
            "iterations": trl_side.STEPS,
            "max_completion_length": trl_side.LENGTH,
            "rewards": [{"function": "length_penalty", "args": {"max_tokens": 9}}],
            "reward_workers": 1,
        },
        "objective": {"correction": None} | numbers,
    }
    parsed = parse_config(config)
    assert parsed.algorithm == replace(algorithm, name=preset)
    assert rl.run(parsed, replay=tmp_path / "given").exit_code == 0
    export_run(tmp_path / "run", tmp_path / "out")
    found, theirs, start = (
        load_file(path / "model.safetensors") for path in (tmp_path / "out", folder / name, folder / "model")
    )
    assert found.keys() == theirs.keys()
    for key, parameter in theirs.items():
        np.testing.assert_allclose(found[key], parameter, atol=2e-5, err_msg=key)
    assert max(np.abs(theirs[key] - start[key]).max() for key in start) > 1e-3
