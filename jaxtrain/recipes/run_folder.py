"""The state of a run in its folder: where a run begins or goes on, and what it saves."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import optax

from jaxtrain.config import RunConfig
from jaxtrain.data.pipeline import TrainStream
from jaxtrain.lora import join
from jaxtrain.recipes.open_run import RunFolder
from jaxtrain.recipes.setup import Policy, adapter_params, base_params
from jaxtrain.train.checkpoint import Checkpoints
from jaxtrain.train.loop import StepResult
from jaxtrain.train.state import new_state, state_shardings
from jaxtrain.types import Params, TrainState

_TOKENIZER_KEYS = ("model.path", "model.tokenizer", "model.chat_template", "model.add_tokens")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def abstract_state(policy: Policy, tx: optax.GradientTransformation, seed: int) -> TrainState:
    """Shapes, dtypes and shardings of the whole state; no memory is touched."""
    mesh = policy.model.run.mesh
    assert mesh is not None

    def born(params: Params, frozen: Params) -> TrainState:
        return new_state(params, frozen, tx, jax.random.key(seed))

    shapes = jax.eval_shape(born, policy.trained, policy.frozen)._replace(params=policy.trained, frozen=policy.frozen)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        state_shardings(shapes, mesh),
    )


def restore_or_begin(
    folder: RunFolder,
    policy: Policy,
    tx: optax.GradientTransformation,
    checkpoints: Checkpoints,
    stream: TrainStream,
    tokenizer: Any,
) -> tuple[TrainState, int]:
    """The newest checkpoint's state (the stream is set to go on after it), else step 0; and the tokens seen so far."""
    config = folder.config
    seed = config.run.seed
    target = abstract_state(policy, tx, seed)
    restored = checkpoints.restore(target._replace(frozen={}))
    base = base_params(config.model, policy, seed) if restored is None or policy.model.base_frozen else {}
    if restored is not None:
        check_tokenizer(folder, restored.meta, tokenizer)
        stream.set_state(restored.data_state)
        return restored.state._replace(frozen=base), restored.meta["num_tokens"]
    return fresh_state(config, policy, tx, target, base), 0


def fresh_state(
    config: RunConfig, policy: Policy, tx: optax.GradientTransformation, target: TrainState, base: Params
) -> TrainState:
    """The state at step 0, laid out as `target` is; `base` are all parameters but adapters and new heads."""
    new = adapter_params(config.model, policy, config.run.seed, base)
    trained, frozen = (new, base) if policy.model.base_frozen else (join(new, base), {})

    def born(params: Params) -> TrainState:
        return new_state(params, {}, tx, jax.random.key(config.run.seed))

    shardings = jax.tree.map(lambda leaf: leaf.sharding, target._replace(frozen={}))
    # Donated: the parameters move into the state instead of being there twice.
    return jax.jit(born, out_shardings=shardings, donate_argnums=0)(trained)._replace(frozen=frozen)


def check_tokenizer(folder: RunFolder, meta: dict[str, Any], tokenizer: Any) -> None:
    """Raise ValueError where a checkpoint's `meta` is of a run with another tokenizer, unless a change is permitted."""
    if meta["tokenizer"] != fingerprint(tokenizer) and not folder.permits(_TOKENIZER_KEYS):
        raise ValueError(
            f"{folder.path} was trained with another tokenizer or chat template: go on with that one, choose another "
            "run.dir, or permit the change with --allow-change model.tokenizer"
        )


def save(
    folder: RunFolder,
    checkpoints: Checkpoints,
    result: StepResult,
    stream: TrainStream,
    num_tokens: int,
    tokenizer: Any,
) -> None:
    """Save a step. Frozen weights are left out: they are read, or drawn, again as they were."""
    meta = {
        "num_tokens": num_tokens,
        "tokenizer": fingerprint(tokenizer),
        **folder.meta(),
    }
    checkpoints.save(result.step, result.state._replace(frozen={}), stream.get_state(), meta)


def fingerprint(tokenizer: Any) -> str:
    """Changes when ids or the chat template do."""
    if tokenizer is None:
        return ""
    content = tokenizer.backend_tokenizer.to_str() + str(tokenizer.chat_template)
    return hashlib.sha256(content.encode()).hexdigest()[:16]
