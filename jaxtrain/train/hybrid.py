"""The scores of `HybridDistance`: GOLD's distance of groups of tokens from a teacher with another vocabulary."""

import jax.numpy as jnp
from jaxtyping import Float

from jaxtrain.nn.model import Model
from jaxtrain.objectives.objective import TEACHER_FURTHER, TEACHER_HIDDEN, HybridDistance
from jaxtrain.objectives.segments import further_logps
from jaxtrain.ops.hybrid import GroupStarts, MatchedHead, hybrid_distances
from jaxtrain.parallel.sharding import row_shares
from jaxtrain.types import GROUP_PLACE, Array, Batch, Params


def hybrid_scores(
    model: Model,
    params: Params,
    hidden: Float[Array, "B T D"],
    batch: Batch,
    logp: Float[Array, "B T"],
    of: HybridDistance,
    teacher: MatchedHead,
) -> dict[str, Array]:
    """`hybrid`, `matched` and `unmatched` [B, T] by their names in `Scores`. `logp`: of the student's tokens."""
    places, signals = batch.signals[GROUP_PLACE], batch.signals
    groups = GroupStarts(places == 1, further_logps(logp, places), signals[TEACHER_HIDDEN], signals[TEACHER_FURTHER])
    mesh = model.run.mesh
    rows = len(hidden) // (1 if mesh is None else row_shares(mesh))
    chunk = max(1, model.run.head_chunk // max(rows, 1))
    matched, unmatched = hybrid_distances(hidden, model.head(params), groups, teacher, beta=of.beta, chunk=chunk)
    weights = (teacher.share, 1 - teacher.share) if of.weights is None else of.weights
    hybrid = weights[0] * matched + weights[1] * unmatched
    return {"hybrid": jnp.asarray(hybrid), "matched": matched, "unmatched": unmatched}
