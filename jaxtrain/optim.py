"""Optimizers from optax, learning-rate schedules, and which parameters decay.

`optimizer.name` and `optimizer.schedule` also take the import path (`package.module:function`) of a function with the
signature of `make_optimizer` or `make_schedule`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from jaxtrain.config import OptimizerSection
from jaxtrain.named import load_named
from jaxtrain.types import Params


class StochasticallyRounded(optax.GradientTransformation):
    """An optimizer that computes in float32 and whose updates of bfloat16 parameters are rounded stochastically."""


Schedule = Callable[[jax.typing.ArrayLike], jax.Array]


def make_schedule(section: OptimizerSection, steps: int) -> Schedule:
    """The learning rate as a function of the step, counted from 0, for a run of `steps` steps.

    The schedules that are named without a path warm up linearly, reach the peak at step `warmup_steps` and then decay.
    The rate of step 0 is peak / warmup_steps, not 0, and the last step has the final rate. `warmup_ratio` is a share of
    `steps`; a function named by path reads the steps that it makes as `section.warmup_steps`.

    Raises ValueError if `section.schedule` is the path of a function that does not return a schedule.
    """
    section = section.for_steps(steps)
    if ":" in section.schedule:
        return _own_schedule(section, steps)
    peak, warmup = section.learning_rate, section.warmup_steps
    final = section.final_learning_rate

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((step - warmup) / max(steps - warmup, 1), 0, 1)
        match section.schedule:
            case "constant":
                factor = jnp.ones_like(progress)
            case "linear":
                factor = 1 - (1 - final) * progress
            case "cosine":
                factor = final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
            case name:
                raise AssertionError(name)
        return peak * factor * jnp.minimum(1, (step + 1) / max(warmup, 1))

    return schedule


def _own_schedule(section: OptimizerSection, steps: int) -> Schedule:
    schedule = load_named(section.schedule, "optimizer.schedule")(section, steps)
    if not callable(schedule):
        raise ValueError(f"optimizer.schedule={section.schedule} must return a function of the step, not {schedule!r}")
    rate = jax.eval_shape(lambda step: jnp.asarray(schedule(step)), jax.ShapeDtypeStruct((), jnp.int32))
    if rate.shape != () or not jnp.issubdtype(rate.dtype, jnp.floating):
        raise ValueError(
            f"optimizer.schedule={section.schedule}: the learning rate of a step must be a floating-point scalar, not "
            f"{rate.dtype}{list(rate.shape)}"
        )
    return lambda step: jnp.asarray(schedule(step))


def make_optimizer(section: OptimizerSection, schedule: Schedule, axes: Params) -> optax.GradientTransformation:
    """The optimizer that `section` describes. `axes`: a tree with the logical axes of each trained parameter.

    Raises ValueError if `section.name` is the path of a function that does not return an
    `optax.GradientTransformation`.
    """
    made = _named(section, schedule, axes)
    if section.rounding == "nearest":
        return made

    def wide(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)

    def update(updates: Any, state: optax.OptState, params: Any = None) -> tuple[Any, optax.OptState]:
        return made.update(wide(updates), state, None if params is None else wide(params))

    return StochasticallyRounded(lambda params: made.init(wide(params)), update)


def _named(section: OptimizerSection, schedule: Schedule, axes: Params) -> optax.GradientTransformation:
    """The optax chain that `section.name` names. `axes`: a tree with the logical axes of each trained parameter.

    AdamW: https://arxiv.org/abs/1711.05101; Adafactor: https://arxiv.org/abs/1804.04235; Muon for the hidden matrices
    with AdamW for all other parameters: https://kellerjordan.github.io/posts/muon/.
    """
    decays = partial(jax.tree_util.tree_map_with_path, lambda path, _: _is_matrix(path))
    match section.name:
        case "adamw":
            return optax.adamw(
                schedule,
                b1=section.b1,
                b2=section.b2,
                eps=section.eps,
                weight_decay=section.weight_decay,
                mask=decays,
                mu_dtype=section.state_dtype,
            )
        case "adafactor":
            return optax.adafactor(
                schedule,
                weight_decay_rate=section.weight_decay or None,
                weight_decay_mask=decays,
                dtype_momentum=jnp.dtype(section.state_dtype),
            )
        case "muon":
            return contrib.muon(
                schedule,
                weight_decay=section.weight_decay,
                weight_decay_mask=decays,
                adam_b1=section.b1,
                adam_b2=section.b2,
                muon_weight_dimension_numbers=jax.tree_util.tree_map_with_path(
                    _dimension_numbers, axes, is_leaf=_is_axes
                ),
                mu_dtype=section.state_dtype,
            )
        case path:
            made = load_named(path, "optimizer.name")(section, schedule, axes)
            if not isinstance(made, optax.GradientTransformation):
                raise ValueError(f"optimizer.name={path} must return an optax.GradientTransformation, not {made!r}")
            return made


def _is_matrix(path: tuple) -> bool:
    """Kernels and adapters, recognised by name: stacked over layers, the scale of a norm has two axes as well."""
    return path[-1].key in ("kernel", "lora_a", "lora_b")


def _is_axes(node: object) -> bool:
    return isinstance(node, tuple)


def _dimension_numbers(path: tuple, axes: tuple[str, ...]) -> contrib.MuonDimensionNumbers | None:
    """Which axes of a stacked kernel form the rows and columns of its matrices; None: Adam updates the parameter."""
    if not _is_matrix(path) or axes[0] != "layers":
        return None
    # One side of every matrix is a single axis: the adapter's rank, the residual stream's, or a latent vector's.
    single = next(name for name in ("rank", "embed", "latent") if name in axes)
    inner = [index for index, axis in enumerate(axes) if axis not in ("layers", "expert")]
    rest = tuple(index for index in inner if axes[index] != single)
    if axes[inner[0]] == single:
        return contrib.MuonDimensionNumbers(reduction_axis=(inner[0],), output_axis=rest)
    return contrib.MuonDimensionNumbers(reduction_axis=rest, output_axis=(len(axes) - 1,))
