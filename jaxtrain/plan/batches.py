"""The batch of a step as shapes: the arrays that a recipe's data, reference, teacher or samples would give it."""

from __future__ import annotations

import jax
import numpy as np

from jaxtrain.config import RunConfig
from jaxtrain.data.formats import Encoder
from jaxtrain.data.pairs import answer_encoder
from jaxtrain.objectives.objective import TEACHER_IDS, TEACHER_LOGPS
from jaxtrain.parallel.batches import check_batch_size, check_row_length
from jaxtrain.parallel.sharding import batch_sharding
from jaxtrain.roles.role import Role, shares_prefixes
from jaxtrain.session.teacher_cache import DEFAULT_TOP
from jaxtrain.types import ALIGNED, GROUP_PLACE, LABEL, SIGN, Batch

_INTEGERS = (SIGN, *ALIGNED, TEACHER_IDS, "versions", "supports")


def bundle_size(config: RunConfig) -> int:
    """How many examples the objective reads together."""
    if config.recipe not in ("preference", "reward"):
        return 1
    return answer_encoder(config, Encoder.configured(None, config.data, vocab_size=1)).bundle_size


def data_batch(config: RunConfig, role: Role, reference: Role | None = None) -> Batch:
    """The batch that `training_data` yields for both. Raises ValueError if it does not divide over the devices."""
    mesh, examples = role.mesh, bundle_size(config)
    check_batch_size(config.train.batch_size, config.train.microbatches, mesh)
    names: tuple[str, ...] = ()
    if config.recipe in ("preference", "reward"):
        names = tuple(name for name in config.objective.signals if name in (SIGN, LABEL))
    elif GROUP_PLACE in config.objective.signals:
        names = ALIGNED
    elif TEACHER_IDS in config.objective.signals:
        names = (TEACHER_IDS, TEACHER_LOGPS)
    length = config.data.tokens_per_row(examples)
    check_row_length(length, mesh)
    signals = {name: _width(config, name) for name in names}
    batch = abstract_batch(mesh, config.train.batch_size, length, signals)
    return batch._replace(prefix_ids=batch.segment_ids) if shares_prefixes(examples, role, reference) else batch


def abstract_batch(
    mesh: jax.sharding.Mesh, rows: int, length: int, signals: dict[str, tuple[int, ...]], *, left_out: bool = False
) -> Batch:
    """A packed batch [rows, length] as `jax.ShapeDtypeStruct`s. `signals`: name -> the axes after [B, T]."""
    sharding = batch_sharding(mesh)

    def array(kind: type, *tail: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, length, *tail), kind, sharding=sharding)

    ids = array(np.int32)
    values = {name: array(np.int32 if name in _INTEGERS else np.float32, *tail) for name, tail in signals.items()}
    counts = jax.ShapeDtypeStruct((rows, 3), np.float32, sharding=sharding) if left_out else None
    return Batch(ids, ids, ids, array(np.float32), values, ids, counts)  # type: ignore[arg-type]


def with_signal(batch: Batch, name: str, value: jax.ShapeDtypeStruct) -> Batch:
    """The batch with one more signal."""
    return batch._replace(signals={**batch.signals, name: value})  # type: ignore[dict-item]


def _width(config: RunConfig, name: str) -> tuple[int, ...]:
    if name in (TEACHER_IDS, TEACHER_LOGPS):
        assert config.teacher is not None
        return (config.teacher.top_logps or DEFAULT_TOP,)
    return ()
