"""Calibration of a reward model: whether its probabilities are frequencies."""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxtrain.data.encoder import RowEncoder
from jaxtrain.data.pipeline import eval_batches
from jaxtrain.objectives.segments import bundle_sums, bundles_with
from jaxtrain.parallel.batches import place_batch
from jaxtrain.roles.role import TrainedRole
from jaxtrain.session.session import MetricValues, Session
from jaxtrain.types import LABEL, SIGN, Array, Batch

BINS = 10


def calibration(session: Session, role: TrainedRole, encode: RowEncoder) -> Callable[[], MetricValues] | None:
    """An evaluator of `eval_calibration_error` over `data.eval`; None without it, and where labels are no probabilities
    (an objective with `kind="regression"`).

    The expected calibration error (Guo et al. 2017, arXiv:1706.04599) in 10 bins of equal width: the mean of
    |confidence - accuracy| over the bins, weighted by their predictions. The confidence of a pair is that its
    better-rated text is the chosen one, s(|r_c - r_l|); that of a text is s(|r|), for a label on one side of 1/2.
    """
    config = session.config
    if config.data.eval is None or getattr(config.objective, "kind", "binary") == "regression":
        return None
    rows = config.train.batch_size
    of_batch = jax.jit(bin_sums)

    def run() -> MetricValues:
        batches = eval_batches(config.data.eval_sources, config.data, encode, rows=rows, bundle_size=encode.bundle_size)
        total = jnp.zeros((3, BINS))
        for batch in itertools.islice(batches, config.eval.batches):
            session.check()
            placed = place_batch(batch, session.mesh, rows)
            total = total + of_batch(role.rewards(placed), placed)
        confidence, right, count = jax.device_get(total)
        return {"eval_calibration_error": float(abs(confidence - right).sum() / max(count.sum(), 1))}

    return run


def bin_sums(rewards: Array, batch: Batch) -> Array:
    """[3, BINS]: sums of the confidence, of right predictions, and the number of predictions, by confidence."""
    scored = batch.loss_weights > 0
    if SIGN in batch.signals:
        assert batch.bundle_ids is not None
        logits = bundle_sums(jnp.where(scored, rewards * batch.signals[SIGN], 0), batch.bundle_ids)
        real = bundles_with(scored.astype(jnp.float32), batch.bundle_ids)
        right = logits > 0
    else:
        logits, real = rewards, scored
        right = (rewards > 0) == (batch.signals[LABEL] > 0.5)
    confidence = jax.nn.sigmoid(jnp.abs(logits))
    bins = jnp.clip(((confidence - 0.5) * 2 * BINS).astype(jnp.int32), 0, BINS - 1)
    values = jnp.stack([confidence, right.astype(jnp.float32), jnp.ones_like(confidence)])
    return jax.ops.segment_sum((values * real).reshape(3, -1).T, bins.reshape(-1), BINS).T
