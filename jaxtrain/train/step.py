"""`make_step`: the only step builder. What is trained is an `Objective` over the scores of a model's head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxtrain.lora import join
from jaxtrain.nn.heads import SCALAR
from jaxtrain.nn.model import Model
from jaxtrain.objectives.objective import Correct, Entropy, Logp, Objective, Prepared, Request, Value
from jaxtrain.objectives.router import router_loss
from jaxtrain.ops.token_scores import Foreseen, token_scores
from jaxtrain.optim import Schedule
from jaxtrain.parallel.mesh import compiler_options
from jaxtrain.parallel.sharding import constrain_rows
from jaxtrain.types import Array, Batch, Max, Mean, Metric, Min, Norm, Params, Scores, TrainState

Metrics = Mapping[str, Metric]


class StepReport(NamedTuple):
    """What a step says of itself: all on the device until somebody reads it."""

    means: Metrics  # of the objective
    grad_norm: Array  # [] before clipping
    learning_rate: Array  # []
    num_tokens: Array  # [] int32, tokens of the global batch that are no padding
    skipped: Array  # [] int32, steps skipped so far
    skipped_in_a_row: Array  # [] int32


Step = Callable[[TrainState, Params, Batch], tuple[TrainState, StepReport]]


def score(
    model: Model, params: Params, batch: Batch, dropout_key: Array | None = None, *, temperature: float = 1.0
) -> Scores:
    """Scores of every weighted token of packed rows, each among its signal `supports` where the batch has that one."""
    hidden = model.hidden(params, batch, dropout_key)
    return _scores_of(model, params, hidden, batch, (Logp(temperature), Entropy(), Correct()))


def token_values(model: Model, params: Params, batch: Batch, dropout_key: Array | None = None) -> Array:
    """What a scalar head says of the state before every weighted token: float32 [B, T], 0 elsewhere."""
    return _scores_of(model, params, model.hidden(params, batch, dropout_key), batch, (Value(),)).value


def check_needs(objective: Objective, model: Model) -> None:
    """Raise ValueError for scores that the model's head does not give."""
    for request in objective.needs:
        if isinstance(request, Value) != (model.output == SCALAR):
            raise ValueError(
                f"{type(objective).__name__} needs {type(request).__name__}, and model.head={model.output} gives none"
            )


def _scores_of(
    model: Model,
    params: Params,
    hidden: Array,
    batch: Batch,
    needs: Sequence[Request],
    foreseen: Foreseen | None = None,
) -> Scores:
    """What `needs` asks for, and None for the rest."""
    kinds = {type(request): request for request in needs}
    assert len(kinds) == len(needs), f"a score is asked for twice: {needs}"
    if Value in kinds:
        before = model.values(params, hidden)[:, :-1]
        return Scores(value=jnp.where(batch.loss_weights > 0, jnp.pad(before, ((0, 0), (1, 0))), 0))
    logp, entropy = kinds.get(Logp, Logp()), kinds.get(Entropy, Entropy())
    assert isinstance(logp, Logp) and isinstance(entropy, Entropy)
    scores = token_scores(
        hidden,
        model.head(params),
        batch.tokens,
        batch.loss_weights,
        transposed=model.tied,
        vocab_size=model.config.vocab_size,
        supports=batch.signals.get("supports"),
        softcap=model.config.logit_softcap,
        temperature=logp.temperature,
        mesh=model.run.mesh,
        foreseen=foreseen,
        differentiable_entropy=entropy.differentiable,
    )
    return Scores(
        logp=scores.logp if Logp in kinds else None,
        entropy=scores.entropy if Entropy in kinds else None,
        correct=scores.correct if Correct in kinds else None,
    )


def _derivative(objective: Objective) -> Callable[[Array, Batch, Norm], Array] | None:
    """Of the objective by the log-probabilities [B, T], where the head can take it token by token as it scores them."""
    if not objective.separable or Value() in objective.needs or Entropy(differentiable=True) in objective.needs:
        return None

    kinds = {type(request) for request in objective.needs}

    def derivative(logp: Array, rows: Batch, whole: Norm) -> Array:
        # The other scores carry no gradient, so that only metrics read them.
        zeros = jnp.zeros_like(logp)
        others = Scores(entropy=zeros if Entropy in kinds else None, correct=zeros if Correct in kinds else None)
        return jax.grad(lambda logp: objective(others._replace(logp=logp), rows, whole)[0])(logp)

    return derivative


def make_step(
    model: Model,
    tx: optax.GradientTransformation,
    schedule: Schedule,
    objective: Objective,
    *,
    microbatches: int = 1,
    max_grad_norm: float | None = None,
) -> Step:
    """A pure `(state, frozen, batch) -> (state, report)`, to be compiled by `jit_step`.

    `frozen` are the parameters that the optimizer does not change ({} for none).

    The batch's norm is taken over all of it before it is cut into microbatches, so k of them give one batch's gradient.
    The load-balancing loss of a mixture of experts is the exception: each microbatch has one, weighed by its tokens.
    A step whose loss or gradient is not finite changes nothing but the counters.
    With parameters below float32, the metrics include `updates_lost_to_rounding`.

    Raises ValueError for an objective that needs what the model's head does not give; the step does for a batch without
    the objective's signals.
    """
    check_needs(objective, model)
    derivative = _derivative(objective)

    def loss(params: Params, frozen: Params, batch: Batch, norm: Norm, key: Array) -> tuple[Array, Metrics]:
        dropout_key = key if model.lora and model.lora.dropout else None
        whole = join(params, frozen)
        hidden, routing = model.forward(whole, batch, dropout_key)
        foreseen = derivative and Foreseen(derivative, batch, norm)
        value, metrics = objective(_scores_of(model, whole, hidden, batch, objective.needs, foreseen), batch, norm)
        if routing is None:
            return value, metrics
        assert model.config.moe is not None
        of_router, of_routing = router_loss(routing, model.config.moe, model.router_loss)
        share = routing.tokens[0] / jnp.maximum(norm.real, 1)
        return value + of_router * share, {**metrics, **of_routing}

    gradient = jax.value_and_grad(loss, has_aux=True)

    def prepared(params: Params, batch: Batch) -> Batch:
        """The batch with the signals that the objective computes itself."""
        if isinstance(objective, Prepared):
            params = jax.lax.stop_gradient(params)

            def score_all(*needs: Request) -> Scores:
                def of(rows: Batch) -> Scores:
                    return _scores_of(model, params, model.hidden(params, rows), rows, needs)

                if microbatches == 1:
                    return of(batch)
                return uncut(jax.lax.map(of, cut(batch, microbatches, model.run.mesh)), model.run.mesh)

            batch = batch._replace(signals={**batch.signals, **objective.prepare(score_all, batch)})
        if missing := [name for name in objective.signals if name not in batch.signals]:
            raise ValueError(
                f"{type(objective).__name__} needs the signal {missing[0]!r}, and the batch has "
                f"{', '.join(batch.signals) or 'none'}"
            )
        return batch

    def step(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, StepReport]:
        key = jax.random.fold_in(state.key, state.step)
        norm = batch_norm(batch)
        batch = prepared(join(state.params, frozen), batch)

        def of_microbatch(index: Array | int, rows: Batch) -> tuple[Params, Array, Metrics]:
            (value, metrics), grads = gradient(state.params, frozen, rows, norm, jax.random.fold_in(key, index))
            return grads, value, metrics

        if microbatches == 1:
            grads, value, metrics = of_microbatch(0, batch)
        else:
            pieces = cut(batch, microbatches, model.run.mesh)
            shapes = jax.eval_shape(of_microbatch, 0, jax.tree.map(lambda leaf: leaf[0], pieces))
            *zeros, means = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
            nothing = (*zeros, {name: _empty(metric) for name, metric in means.items()})

            def accumulate(total: tuple, piece: tuple[Array, Batch]) -> tuple[tuple, None]:
                *sums, means = of_microbatch(*piece)
                return (*jax.tree.map(jnp.add, total[:2], tuple(sums)), add_metrics(total[2], means)), None

            (grads, value, metrics), _ = jax.lax.scan(accumulate, nothing, (jnp.arange(microbatches), pieces))

        grad_norm = optax.tree.norm(grads)
        ok = jnp.isfinite(grad_norm) & jnp.isfinite(value)
        if max_grad_norm is not None:
            shrink = jnp.minimum(1, max_grad_norm / jnp.maximum(grad_norm, 1e-9))
            grads = jax.tree.map(lambda g: g * shrink.astype(g.dtype), grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {**metrics, **_lost_to_rounding(state.params, updates, ok)}

        state = TrainState(
            step=state.step + 1,
            params=_choose(ok, params, state.params),
            opt_state=_choose(ok, opt_state, state.opt_state),
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


def jit_step(step: Step, state: TrainState, mesh: jax.sharding.Mesh) -> jax.stages.Wrapped:
    """The compiled step. It donates the state, which keeps its sharding, so the step compiles once; `frozen` is not
    donated, since a reference or an engine may share it."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None), compiler_options=compiler_options(mesh))


def add_metrics(one: Metrics, other: Metrics) -> dict[str, Metric]:
    """The metrics of two microbatches, or two steps, taken together."""

    def add(a: Metric, b: Metric) -> Metric:
        if isinstance(a, Max):
            return Max(jnp.maximum(a.value, b.value))
        if isinstance(a, Min):
            return Min(jnp.minimum(a.value, b.value))
        assert isinstance(b, Mean)
        return Mean(a.total + b.total, a.weight + b.weight)

    return {name: add(metric, other[name]) for name, metric in one.items()}


def _empty(metric: Metric) -> Metric:
    if isinstance(metric, Mean):
        return metric
    return type(metric)(metric.value + (-jnp.inf if isinstance(metric, Max) else jnp.inf))


def batch_norm(batch: Batch) -> Norm:
    """Counts of a whole batch: weighted tokens, segments that hold one, and tokens that are no padding."""
    weights, segments = batch.loss_weights, batch.segment_ids
    rows = jnp.arange(segments.shape[0])[:, None] * (segments.shape[1] + 1)
    weighted = jnp.zeros(segments.shape[0] * (segments.shape[1] + 1), bool)
    weighted = weighted.at[rows + segments].max(weights > 0)
    real = jnp.sum(segments > 0, dtype=jnp.float32)
    return Norm(jnp.sum(weights), jnp.sum(weighted, dtype=jnp.float32), real)


def cut(batch: Batch, pieces: int, mesh: jax.sharding.Mesh | None) -> Batch:
    """[B, ...] -> [pieces, B / pieces, ...]. Strided, so that every device cuts the rows it already has."""

    def cut_leaf(leaf: Array) -> Array:
        strided = leaf.reshape(leaf.shape[0] // pieces, pieces, *leaf.shape[1:])
        return jnp.moveaxis(constrain_rows(strided, mesh), 1, 0)

    return jax.tree.map(cut_leaf, batch)


def uncut(pieces: Any, mesh: jax.sharding.Mesh | None) -> Any:
    """[pieces, B / pieces, ...] -> [B, ...]: `cut` undone."""

    def join_leaf(leaf: Array) -> Array:
        strided = jnp.moveaxis(leaf, 0, 1)
        return constrain_rows(strided.reshape(-1, *strided.shape[2:]), mesh)

    return jax.tree.map(join_leaf, pieces)


def _lost_to_rounding(params: Params, updates: Any, ok: Array) -> dict[str, Metric]:
    """The share of updates that round to no change, over the parameters held below float32; nothing if none are."""
    lost, some = jnp.zeros(()), jnp.zeros(())
    narrow = False
    for leaf, update in zip(jax.tree.leaves(params), jax.tree.leaves(updates), strict=True):
        if leaf.dtype.itemsize >= 4:
            continue
        narrow, precision = True, jnp.finfo(leaf.dtype)
        before, update = leaf.astype(jnp.float32), update.astype(jnp.float32)
        # Explicit, because XLA may leave out a rounding to bfloat16 whose result is only compared.
        after = jax.lax.reduce_precision(before + update, precision.nexp, precision.nmant)
        lost += _count(ok & (update != 0) & (after == before))
        some += _count(ok & (update != 0))
    return {"updates_lost_to_rounding": Mean(lost, some)} if narrow else {}


def _count(mask: Array) -> Array:
    """float32 []: by means over axes, since a float32 sum of ones stops at 2**24 and an int32 one overflows."""
    return mask.astype(jnp.float32).mean(-1).mean() * mask.size


def _choose(ok: Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, old)
