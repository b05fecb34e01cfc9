"""What a run of reinforcement learning keeps: the states of all trained roles, and a step's samples half learned from.

A checkpoint in the middle of the n updates needs the samples they are taken on. Those are written beside it before it
is, so that a checkpoint that can be read always finds them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from jaxtrain.config import RunConfig
from jaxtrain.data.prompts import PromptStream
from jaxtrain.recipes.run_folder import abstract_state, check_tokenizer, fingerprint, fresh_state
from jaxtrain.recipes.setup import Policy, base_params
from jaxtrain.rl.controller import Experience, Pending, Update
from jaxtrain.train.checkpoint import Checkpoints
from jaxtrain.types import Batch, Params, TrainState

_EXPERIENCE = "experience"


class Trained(NamedTuple):
    """A role before it has parameters."""

    policy: Policy
    tx: optax.GradientTransformation


class Begun(NamedTuple):
    policy: TrainState
    critic: TrainState | None
    pending: Pending | None
    num_tokens: int


def restore_or_begin(
    config: RunConfig,
    policy: Trained,
    critic: Trained | None,
    checkpoints: Checkpoints,
    prompts: PromptStream[Any],
    tokenizer: Any,
) -> Begun:
    """The newest checkpoint's states, its prompts' place and its half-learned samples; else step 0."""
    seed = config.run.seed
    targets = {"policy": abstract_state(*policy, seed)._replace(frozen={})}
    if critic is not None:
        targets["critic"] = abstract_state(*critic, seed)._replace(frozen={})
    restored = checkpoints.restore(_tree(targets))
    if restored is None:
        states = {"policy": _fresh(config, policy, targets["policy"])}
        if critic is not None:
            states["critic"] = _fresh(config, critic, targets["critic"])
        return Begun(states["policy"], states.get("critic"), None, 0)
    check_tokenizer(config, restored.meta, tokenizer)
    prompts.set_state(restored.data_state)
    states = {"policy": TrainState(**{name: restored.state[name] for name in TrainState._fields})}
    states["policy"] = states["policy"]._replace(frozen=_frozen(config, policy))
    if critic is not None:
        states["critic"] = restored.state["critic"]._replace(frozen=_frozen(config, critic))
    done = restored.meta["updates_done"]
    pending = Pending(_read(_path(config, restored.step)), done) if done else None
    return Begun(states["policy"], states.get("critic"), pending, restored.meta["num_tokens"])


def save(
    config: RunConfig,
    checkpoints: Checkpoints,
    update: Update,
    updates: int,
    data_state: Any,
    num_tokens: int,
    tokenizer: Any,
) -> None:
    """Save a step; `updates` are taken on every step's samples, and `data_state` is that of the prompts behind them."""
    done = update.done if update.done < updates else 0
    if done and jax.process_index() == 0:
        _write(_path(config, update.step), update.experience)
    meta = {
        "num_tokens": num_tokens,
        "updates_done": done,
        "config": config.model_dump(mode="json"),
        "model": config.model.path or config.model.config,
        "tokenizer": fingerprint(tokenizer),
    }
    states = {"policy": update.roles.policy.state._replace(frozen={})}
    if update.roles.critic is not None:
        states["critic"] = update.roles.critic.state._replace(frozen={})
    checkpoints.save(update.step, _tree(states), data_state, meta)
    kept = {update.step, *checkpoints.steps()}
    for path in (Path(config.run.dir) / _EXPERIENCE).glob("*.npz"):
        if jax.process_index() == 0 and int(path.stem) not in kept:
            path.unlink()


def initial_params(config: RunConfig, policy: Policy) -> Params:
    """The parameters that a run begins with, without adapters: what the reference is, also of a resumed run."""
    return base_params(config.model, policy, config.run.seed)


def _tree(states: dict[str, TrainState]) -> dict[str, Any]:
    """The policy's leaves have the names that they have in every other recipe, so that `export` finds them."""
    return {**states["policy"]._asdict(), **{name: state for name, state in states.items() if name != "policy"}}


def _frozen(config: RunConfig, role: Trained) -> Params:
    return base_params(config.model, role.policy, config.run.seed) if role.policy.model.base_frozen else {}


def _fresh(config: RunConfig, role: Trained, target: TrainState) -> TrainState:
    return fresh_state(config, *role, target, base_params(config.model, role.policy, config.run.seed))


def _path(config: RunConfig, step: int) -> Path:
    return Path(config.run.dir) / _EXPERIENCE / f"{step}.npz"


def _write(path: Path, experience: Experience) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {"metrics": np.array(json.dumps(experience.metrics))}
    for number, batch in enumerate(experience.batches):
        arrays |= {f"{number}.{name}": array for name, array in batch.arrays().items()}
    partial = path.with_suffix(".tmp")
    with partial.open("wb") as file:
        np.savez(file, **arrays)
    partial.replace(path)


def _read(path: Path) -> Experience:
    if not path.is_file():
        raise ValueError(f"{path} is gone: it holds the samples that the newest checkpoint is in the middle of")
    with np.load(path) as stored:
        arrays = dict(stored)
    metrics = json.loads(str(arrays.pop("metrics")))
    batches = []
    while f"{len(batches)}.tokens" in arrays:
        prefix = f"{len(batches)}."
        own = {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}
        batches.append(Batch.from_arrays(own))
    return Experience(batches, metrics, [])
