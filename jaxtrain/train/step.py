"""`make_step`: the training step. Its loss is an `Objective` of the scores of a model's head."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float

from jaxtrain.lora import join
from jaxtrain.nn.heads import SCALAR
from jaxtrain.nn.model import Model
from jaxtrain.objectives.objective import (
    TEACHER_HIDDEN,
    TEACHER_IDS,
    TEACHER_LOGPS,
    Correct,
    Divergence,
    Entropy,
    HybridDistance,
    Logp,
    Objective,
    Prepared,
    Reward,
    Score,
    ScoreRequest,
    SparseDivergence,
    TopLogps,
    Value,
)
from jaxtrain.objectives.router import router_loss
from jaxtrain.ops.head_chunks import Head, TopK
from jaxtrain.ops.hybrid import MatchedHead
from jaxtrain.ops.states import predicting_states
from jaxtrain.ops.token_scores import LossDerivative, Scoring, Targets, Teacher, token_scores
from jaxtrain.optim import Schedule
from jaxtrain.parallel.mesh import CompilerOptions, compiler_options
from jaxtrain.parallel.sharding import constrain_rows
from jaxtrain.train.hybrid import hybrid_scores
from jaxtrain.train.rounding import apply_updates
from jaxtrain.types import Array, Batch, Max, Mean, Metric, Min, Norm, Params, Scores, TrainState

Metrics = Mapping[str, Metric]

# The requests of each score.
_KINDS = {
    "logp": (Logp,),
    "entropy": (Entropy,),
    "correct": (Correct,),
    "value": (Value,),
    "reward": (Reward,),
    "divergence": (Divergence, SparseDivergence),
    "hybrid": (HybridDistance,),
    "matched": (HybridDistance,),
    "unmatched": (HybridDistance,),
    "top_logps": (TopLogps,),
    "top_ids": (TopLogps,),
}


class StepReport(NamedTuple):
    """Metrics and counters of a step, on the device until they are read."""

    means: Metrics  # of the objective
    grad_norm: Array  # [] before clipping
    learning_rate: Array  # []
    num_tokens: Array  # [] int32, tokens of the global batch that are not padding
    skipped: Array  # [] int32, steps skipped so far
    skipped_in_a_row: Array  # [] int32


class _Gradient(NamedTuple):
    """Of the loss of one microbatch, or the sum over several."""

    grads: Params
    value: Array  # [] the loss
    metrics: Metrics


Step = Callable[..., tuple[TrainState, StepReport]]
"""`step(state, frozen, batch, teacher_head=None)`: see `make_step`."""


def score(
    model: Model, params: Params, batch: Batch, dropout_key: Array | None = None, *, temperature: float = 1.0
) -> Scores:
    """Scores of every weighted token, over the signal `supports` if the batch has it: see `token_scores`."""
    hidden = model.hidden(params, batch, dropout_key)
    return scores_of(model, params, hidden, batch, (Logp(temperature), Entropy(), Correct()))


def token_values(model: Model, params: Params, batch: Batch) -> Float[Array, "B T"]:
    """The output of a scalar head for the state before every weighted token: float32 [B, T], 0 elsewhere."""
    return scores_of(model, params, model.hidden(params, batch), batch, (Value(),)).value


def check_needs(objective: Objective, model: Model) -> None:
    """Raise ValueError if the objective requests scores that the model's head does not compute."""
    for request in objective.needs:
        if isinstance(request, Value | Reward) != (model.output == SCALAR):
            raise ValueError(
                f"{type(objective).__name__} needs {type(request).__name__}, which model.head={model.output} does not "
                "compute"
            )


def check_metrics(objective: Objective, metrics: Metrics) -> None:
    """Raise ValueError for a metric of an objective that microbatches and hosts cannot combine."""
    for name, metric in metrics.items():
        if not isinstance(metric, Mean | Max | Min):
            kind = type(objective).__name__
            raise ValueError(f"{kind}: the metric {name} must be a Mean, Max or Min (got {type(metric).__name__})")


def scores_of(
    model: Model,
    params: Params,
    hidden: Float[Array, "B T D"],
    batch: Batch,
    needs: Sequence[ScoreRequest],
    loss_derivative: LossDerivative | None = None,
    teacher_head: Head | MatchedHead | None = None,
) -> Scores:
    """The scores that `needs` requests; the others are None. A divergence needs the head of the teacher, whose hidden
    states are a signal of the batch."""
    kinds = {type(request): request for request in needs}
    assert len(kinds) == len(needs), f"a score is asked for twice: {needs}"
    if not kinds.keys().isdisjoint((Value, Reward)):
        at = model.values(params, hidden)
        before = jnp.where(batch.loss_weights > 0, jnp.pad(at[:, :-1], ((0, 0), (1, 0))), 0)
        return _requested(needs, lambda name: {"value": before, "reward": at}[name])
    logp, entropy, top = kinds.get(Logp, Logp()), kinds.get(Entropy, Entropy()), kinds.get(TopLogps)
    assert isinstance(logp, Logp) and isinstance(entropy, Entropy) and isinstance(top, TopLogps | None)
    divergence = teacher = None
    for request in needs:
        if isinstance(request, Divergence | SparseDivergence):
            assert divergence is None, f"a score is asked for twice: {needs}"
            divergence, teacher = request, _teacher(request, batch, teacher_head)
    scores = token_scores(
        hidden if batch.prefix_ids is None else predicting_states(hidden, batch),
        model.head(params),
        Targets(batch.tokens, batch.loss_weights, batch.signals.get("supports")),
        Scoring(logp.temperature, entropy.differentiable, divergence, top and top.k, model.run.head_chunk),
        teacher=teacher,
        loss_derivative=loss_derivative,
        mesh=model.run.mesh,
    )
    if isinstance(hybrid := kinds.get(HybridDistance), HybridDistance):
        assert isinstance(teacher_head, MatchedHead), "a hybrid distance needs the teacher's matched head"
        scores = scores._replace(**hybrid_scores(model, params, hidden, batch, scores.logp, hybrid, teacher_head))
    return _requested(needs, lambda name: getattr(scores, name))


def _requested(needs: Sequence[ScoreRequest], score: Callable[[str], Array]) -> Scores:
    """The scores that are requested, from their names."""
    names = [name for name, kinds in _KINDS.items() if any(isinstance(request, kinds) for request in needs)]
    return Scores(**{name: score(name) for name in names})


def _teacher(request: ScoreRequest, batch: Batch, head: Head | MatchedHead | None) -> Teacher | TopK:
    if isinstance(request, SparseDivergence):
        return TopK(batch.signals[TEACHER_IDS], batch.signals[TEACHER_LOGPS])
    assert isinstance(head, Head), "a divergence needs the teacher's head"
    return Teacher(batch.signals[TEACHER_HIDDEN], head)


def _derivative(objective: Objective) -> Callable[[Scores, Batch, Norm], Scores] | None:
    """The derivative of the objective by its differentiable scores, if that of a token depends on its own alone and has
    one number for each score."""
    differentiable = Logp | Divergence | SparseDivergence
    if not objective.separable or not any(isinstance(request, differentiable) for request in objective.needs):
        return None
    if any(isinstance(request, TopLogps) for request in objective.needs):
        return None

    def derivative(scores: Scores, rows: Batch, norm: Norm) -> Scores:
        # The other scores have no gradient, so only metrics depend on their values.
        zeros = jnp.zeros_like(rows.loss_weights)
        others = _requested(objective.needs, lambda name: zeros)

        def loss(scores: Scores) -> Array:
            given = {name: array for name, array in scores._asdict().items() if array is not None}
            return objective(others._replace(**given), rows, norm)[0]

        return jax.grad(loss)(scores)

    return derivative


def add_signals(objective: Objective, score: Score, batch: Batch) -> Batch:
    """The batch with the signals that the objective computes itself, from `score(*requests)` without a gradient.

    Raises ValueError for a batch without the objective's signals.
    """
    if isinstance(objective, Prepared):
        batch = batch._replace(signals={**batch.signals, **objective.prepare(score, batch)})
    if missing := [name for name in objective.signals if name not in batch.signals]:
        raise ValueError(
            f"{type(objective).__name__} needs the signal {missing[0]!r}, and the batch has "
            f"{', '.join(batch.signals) or 'none'}"
        )
    return batch


def make_step(
    model: Model,
    tx: optax.GradientTransformation,
    schedule: Schedule,
    objective: Objective,
    *,
    microbatches: int = 1,
    max_grad_norm: float | None = None,
) -> Step:
    """A pure function `(state, frozen, batch, teacher_head=None) -> (state, report)`; `jit_step` compiles it.

    `frozen` are the parameters that the optimizer does not change ({} if there are none). `teacher_head` is for an
    objective that requests a `Divergence`.

    The divisors of the loss are counted over the whole batch before it is split into microbatches, so the gradient does
    not depend on their number. The load-balancing loss of a mixture of experts is an exception: it is computed for each
    microbatch and weighted by its tokens. If loss or gradient are not finite, the step changes only the counters.
    With parameters below float32 whose updates are rounded to the nearest value, the metrics include
    `updates_lost_to_rounding`.

    Raises ValueError if the objective requests scores that the model's head does not compute. The step raises
    ValueError if the batch lacks a signal of the objective.
    """
    check_needs(objective, model)
    derivative = _derivative(objective)

    def loss(
        params: Params, frozen: Params, batch: Batch, norm: Norm, key: Array, teacher_head: Head | MatchedHead | None
    ) -> tuple[Array, Metrics]:
        dropout_key = key if model.lora and model.lora.dropout else None
        params = join(params, frozen)
        hidden, routing = model.forward(params, batch, dropout_key)
        loss_derivative = derivative and LossDerivative(derivative, batch, norm)
        scores = scores_of(model, params, hidden, batch, objective.needs, loss_derivative, teacher_head)
        value, metrics = objective(scores, batch, norm)
        check_metrics(objective, metrics)
        if routing is None:
            return value, metrics
        assert model.config.moe is not None
        auxiliary, router_metrics = router_loss(routing, model.config.moe, model.router_loss)
        share = routing.tokens[0] / jnp.maximum(norm.real, 1)
        return value + auxiliary * share, {**metrics, **router_metrics}

    gradient = jax.value_and_grad(loss, has_aux=True)

    def prepared(params: Params, batch: Batch) -> Batch:
        params = jax.lax.stop_gradient(params)

        def score_all(*needs: ScoreRequest) -> Scores:
            def score_rows(rows: Batch) -> Scores:
                return scores_of(model, params, model.hidden(params, rows), rows, needs)

            if microbatches == 1:
                return score_rows(batch)
            pieces = split_rows(batch, microbatches, model.run.mesh)
            return merge_rows(jax.lax.map(score_rows, pieces), model.run.mesh)

        return add_signals(objective, score_all, batch)

    def step(
        state: TrainState, frozen: Params, batch: Batch, teacher_head: Head | MatchedHead | None = None
    ) -> tuple[TrainState, StepReport]:
        key = jax.random.fold_in(state.key, state.step)
        norm = batch_norm(batch)
        batch = prepared(join(state.params, frozen), batch)

        def of_microbatch(index: Array | int, rows: Batch) -> _Gradient:
            key_of = jax.random.fold_in(key, index)
            (value, metrics), grads = gradient(state.params, frozen, rows, norm, key_of, teacher_head)
            return _Gradient(grads, value, metrics)

        if microbatches == 1:
            total = of_microbatch(0, batch)
        else:
            pieces = split_rows(batch, microbatches, model.run.mesh)
            shapes = jax.eval_shape(of_microbatch, 0, jax.tree.map(lambda leaf: leaf[0], pieces))
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
            initial = zeros._replace(metrics={name: _identity(metric) for name, metric in zeros.metrics.items()})

            def accumulate(total: _Gradient, piece: tuple[Array, Batch]) -> tuple[_Gradient, None]:
                new = of_microbatch(*piece)
                grads = jax.tree.map(jnp.add, total.grads, new.grads)
                return _Gradient(grads, total.value + new.value, add_metrics(total.metrics, new.metrics)), None

            total, _ = jax.lax.scan(accumulate, initial, (jnp.arange(microbatches), pieces))

        grad_norm = optax.tree.norm(total.grads)
        ok = jnp.isfinite(grad_norm) & jnp.isfinite(total.value)
        grads = total.grads
        if max_grad_norm is not None:
            clip_factor = jnp.minimum(1, max_grad_norm / jnp.maximum(grad_norm, 1e-9))
            grads = jax.tree.map(lambda g: g * clip_factor.astype(g.dtype), grads)
        with jax.named_scope("optimizer"):
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
            params, rounding = apply_updates(tx, state.params, updates, ok, key)
        metrics = {**total.metrics, **rounding}

        state = TrainState(
            step=state.step + 1,
            params=_select(ok, params, state.params),
            opt_state=_select(ok, opt_state, state.opt_state),
            key=state.key,
            skipped=state.skipped + ~ok,
            skipped_in_a_row=jnp.where(ok, 0, state.skipped_in_a_row + 1),
        )
        report = StepReport(
            means=metrics,
            grad_norm=grad_norm,
            learning_rate=schedule(state.step - 1),
            num_tokens=jnp.sum(batch.segment_ids > 0),
            skipped=state.skipped,
            skipped_in_a_row=state.skipped_in_a_row,
        )
        return state, report

    return step


def jit_step(
    step: Step, state: TrainState, mesh: jax.sharding.Mesh, options: CompilerOptions = ()
) -> jax.stages.Wrapped:
    """The jitted step. It donates the state, which keeps its shardings, so the step compiles once. `frozen` is not
    donated, because other roles or an engine may share it."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    options_of_step = compiler_options(mesh, options)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None), compiler_options=options_of_step)


def add_metrics(one: Metrics, other: Metrics) -> dict[str, Metric]:
    """The metrics of two microbatches, or of two steps, combined."""

    def add(a: Metric, b: Metric) -> Metric:
        if isinstance(a, Max):
            return Max(jnp.maximum(a.value, b.value))
        if isinstance(a, Min):
            return Min(jnp.minimum(a.value, b.value))
        assert isinstance(b, Mean)
        return Mean(a.total + b.total, a.weight + b.weight)

    return {name: add(metric, other[name]) for name, metric in one.items()}


def _identity(metric: Metric) -> Metric:
    """The neutral element of `add_metrics`, from a metric of zeros."""
    if isinstance(metric, Mean):
        return metric
    return type(metric)(metric.value + (-jnp.inf if isinstance(metric, Max) else jnp.inf))


def batch_norm(batch: Batch) -> Norm:
    """Counts of a whole batch; those of segments and bundles are of the ones that hold a weighted token.

    The samples of `left_out` count as if they were in it.
    """

    def weighted(ids: Array) -> Array:
        rows = jnp.arange(ids.shape[0])[:, None] * (ids.shape[1] + 1)
        holds = jnp.zeros(ids.shape[0] * (ids.shape[1] + 1), bool).at[rows + ids].max(batch.loss_weights > 0)
        return jnp.sum(holds, dtype=jnp.float32)

    segments = weighted(batch.segment_ids)
    left_out = jnp.zeros(3) if batch.left_out is None else jnp.sum(batch.left_out, 0)
    return Norm(
        tokens=jnp.sum(batch.loss_weights) + left_out[0],
        segments=segments + left_out[1],
        bundles=(segments if batch.bundle_ids is None else weighted(batch.bundle_ids)) + left_out[2],
        real=jnp.sum(batch.segment_ids > 0, dtype=jnp.float32),
    )


def split_rows(batch: Batch, pieces: int, mesh: jax.sharding.Mesh | None) -> Batch:
    """[B, ...] -> [pieces, B / pieces, ...]. Strided, so that no row moves to another device."""

    def split_leaf(leaf: Array) -> Array:
        strided = leaf.reshape(leaf.shape[0] // pieces, pieces, *leaf.shape[1:])
        return jnp.moveaxis(constrain_rows(strided, mesh), 1, 0)

    return jax.tree.map(split_leaf, batch)


def merge_rows(pieces: Any, mesh: jax.sharding.Mesh | None) -> Any:
    """[pieces, B / pieces, ...] -> [B, ...]: the inverse of `split_rows`."""

    def merge_leaf(leaf: Array) -> Array:
        strided = jnp.moveaxis(leaf, 0, 1)
        return constrain_rows(strided.reshape(-1, *strided.shape[2:]), mesh)

    return jax.tree.map(merge_leaf, pieces)


def _select(ok: Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, old)
