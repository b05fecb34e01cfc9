"""The training data of a run: the stream of its batches, how many steps they make, and what is reported of them."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax

from jaxtrain.config import RunConfig
from jaxtrain.data.encoder import RowEncoder
from jaxtrain.data.pipeline import TrainStream, count_shards
from jaxtrain.data.shards import COUNTERS
from jaxtrain.parallel.batches import check_batch_size, check_row_length, local_shards, row_processes
from jaxtrain.train.agree import gather_values

log = logging.getLogger(__name__)

_GATHERED = ("rows", "examples", *COUNTERS)


class Resumable(Protocol):
    """What a run reads its batches from: its state is saved with every checkpoint."""

    def get_state(self) -> dict[str, Any]:
        """JSON-serializable: the position after the last returned batch."""
        ...

    def set_state(self, state: dict[str, Any]) -> None: ...


def open_stream(
    config: RunConfig, mesh: jax.sharding.Mesh, encode: Callable[[Any], Any], bundle_size: int
) -> TrainStream:
    """This host's part of `data.train`, which ends after `train.epochs`.

    Raises ValueError where the rows of a microbatch, or the tokens of a row, cannot be divided over the devices.
    """
    rows = config.train.batch_size
    check_batch_size(rows, config.train.microbatches, mesh)
    check_row_length(config.data.tokens_per_row(bundle_size), mesh)
    shards = count_shards(config.data, rows)
    stream = TrainStream(
        config.data.train_sources,
        config.data,
        encode,
        rows=rows,
        seed=config.run.seed,
        shards=local_shards(mesh, rows, shards),
        num_shards=shards,
        bundle_size=bundle_size,
    )
    if row_processes(mesh)[0] != jax.process_index():
        stream.follow()
    if config.train.epochs is not None:
        stream.end_after(config.train.epochs)
    return stream


def run_length(config: RunConfig, stream: TrainStream, encode: Callable[[Any], Any]) -> int:
    """The steps of the run: `train.steps`, or as many as the data makes, counted.

    Every host counts the batches of all hosts. Raises ValueError where the data ends before `train.steps`, and where
    neither gives the length of the run.
    """
    if not stream.finite:
        stream.check_length(config.train.steps)
        assert config.train.steps is not None
        return config.train.steps
    started = time.perf_counter()
    count = stream.count(stream.lengths(encode.fingerprint if isinstance(encode, RowEncoder) else None))
    log.info(
        "data.train makes %d steps: %d examples, %d tokens, packed to %.0f%% (counted in %.1f s)",
        *(count.steps, count.totals["examples"], count.totals["tokens"], 100 * count.density),
        time.perf_counter() - started,
    )
    return checked_length(config, count.steps)


def checked_length(config: RunConfig, counted: int) -> int:
    """The steps of a run whose data is enough for `counted` steps.

    Raises ValueError where that is less than `train.steps`, for which the learning rate would be scheduled.
    """
    steps = config.train.steps
    if steps is not None and steps > counted:
        raise ValueError(
            f"data.train ends after step {counted}, by the `epochs` of its sources, and train.steps={steps}: leave "
            "train.steps out to train until the data ends, or give train.epochs and no `epochs` of the sources"
        )
    if config.optimizer.warmup_steps > (steps or counted):
        raise ValueError(
            f"optimizer.warmup_steps={config.optimizer.warmup_steps} is more than the {counted} steps that data.train "
            "makes; optimizer.warmup_ratio is a share of them"
        )
    return steps or counted


def warn_of_positions(hf: Mapping[str, Any], max_length: int) -> None:
    """Warn where rows are longer than the positions that the model of the config.json `hf` was made for."""
    text = hf.get("text_config") or hf
    scaling = text.get("rope_scaling") or {}
    scaled = scaling.get("factor", 1) * (scaling.get("original_max_position_embeddings") or 0)
    positions = max(text.get("max_position_embeddings") or 0, int(scaled))
    if 0 < positions < max_length:
        warnings.warn(
            f"data.max_length={max_length} is beyond the {positions} positions that the model was made for "
            "(max_position_embeddings in its config.json): the model was not trained on later "
            "positions, and others that serve it may refuse longer texts",
            stacklevel=3,
        )


def data_metrics(stream: TrainStream, *, is_last: bool) -> dict[str, float]:
    """Of all hosts, since the start of training: `epoch` (of the mixture, once its length is known), `data/examples`
    and the rows that were truncated, dropped, split or bad. After the last step also those rows count that the last
    batch left.

    Every host calls it after the same step.
    """
    if is_last and stream.finite:
        stream.has_next()  # reads on to the end, where this is one
    stats = stream.stats
    counts = gather_values([stats[name] for name in _GATHERED])
    rows, *others = (sum(each) for each in zip(*counts, strict=True))
    epoch = {"epoch": rows / stream.epoch_rows} if math.isfinite(stream.epoch_rows) else {}
    return epoch | {f"data/{name}": count for name, count in zip(_GATHERED[1:], others, strict=True)}
