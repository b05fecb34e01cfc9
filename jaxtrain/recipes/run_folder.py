"""A run's folder: `config.yaml metrics.jsonl tensorboard/ checkpoints/`, and how a run goes on from it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import optax
from tokenizers import Tokenizer

from jaxtrain.config import RunConfig, dump_config, load_config
from jaxtrain.data.pipeline import TrainStream
from jaxtrain.lora import join
from jaxtrain.recipes.setup import Policy, adapter_params, base_params
from jaxtrain.train.checkpoint import Checkpoints
from jaxtrain.train.loop import StepResult
from jaxtrain.train.state import new_state, state_shardings
from jaxtrain.types import Params, TrainState

CONFIG = "config.yaml"


def begin(config: RunConfig, folder: Path, checkpoints: Checkpoints, resume: bool) -> None:
    """Write the resolved config. A folder that holds a run is only reused to go on with that run."""
    if not resume and checkpoints.steps():
        raise ValueError(
            f"{folder} holds checkpoints up to step {checkpoints.steps()[-1]}: choose another run.dir, remove the "
            "folder, or go on with --resume"
        )
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(dump_config(config))


def read_run_config(folder: Path) -> RunConfig:
    """The config that a run was started with. Raises ValueError where the folder is none of a run."""
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} is no folder of a run: it holds no {CONFIG}")
    return load_config(folder / CONFIG)


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
    config: RunConfig,
    policy: Policy,
    tx: optax.GradientTransformation,
    checkpoints: Checkpoints,
    stream: TrainStream,
    tokenizer: Any,
) -> tuple[TrainState, int]:
    """The newest checkpoint's state (the stream is set to go on after it), else step 0; and the tokens seen so far."""
    seed = config.run.seed
    target = abstract_state(policy, tx, seed)
    restored = checkpoints.restore(target._replace(frozen={}))
    base = base_params(config.model, policy, seed) if restored is None or policy.model.base_frozen else {}
    if restored is not None:
        check_tokenizer(config, restored.meta, tokenizer)
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


def check_tokenizer(config: RunConfig, meta: dict[str, Any], tokenizer: Any) -> None:
    """Raise ValueError where a checkpoint's `meta` is of a run with another tokenizer."""
    if meta["tokenizer"] != fingerprint(tokenizer):
        raise ValueError(
            f"{config.run.dir} was trained with another tokenizer or chat template: go on with that one, or choose "
            "another run.dir"
        )


def save(
    config: RunConfig,
    checkpoints: Checkpoints,
    result: StepResult,
    stream: TrainStream,
    num_tokens: int,
    tokenizer: Any,
) -> None:
    """Save a step. Frozen weights are left out: they are read, or drawn, again as they were."""
    meta = {
        "num_tokens": num_tokens,
        "config": config.model_dump(mode="json"),
        "model": config.model.path or config.model.config,
        "tokenizer": fingerprint(tokenizer),
    }
    checkpoints.save(result.step, result.state._replace(frozen={}), stream.get_state(), meta)


def fingerprint(tokenizer: Any) -> str:
    """Changes with the ids or the chat template; not with padding and truncation, which encoding turns off."""
    if tokenizer is None:
        return ""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    content = backend.to_str() + str(tokenizer.chat_template)
    return hashlib.sha256(content.encode()).hexdigest()[:16]
