"""Optimizers from optax, schedules, and which parameters decay."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from jaxtrain.config import OptimizerSection
from jaxtrain.types import Array, Params

Schedule = Callable[[Array | int], Array]


def make_schedule(section: OptimizerSection, steps: int) -> Schedule:
    """Learning rate of step i (from 0): a linear warm-up that reaches the peak at `warmup_steps`, then a decay.

    The first step already moves (its rate is peak / warmup_steps, not 0) and the last one has the final rate.
    """
    peak, warmup = section.learning_rate, section.warmup_steps
    final = section.final_learning_rate

    def schedule(step: Array | int) -> Array:
        step = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((step - warmup) / max(steps - warmup, 1), 0, 1)
        match section.schedule:
            case "constant":
                share = jnp.ones_like(progress)
            case "linear":
                share = 1 - (1 - final) * progress
            case "cosine":
                share = final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        return peak * share * jnp.minimum(1, (step + 1) / max(warmup, 1))

    return schedule


def make_optimizer(section: OptimizerSection, schedule: Schedule, axes: Params) -> optax.GradientTransformation:
    """The optax chain behind `optimizer.name`. `axes`: logical axes of the trained parameters, leaf by leaf.

    AdamW: https://arxiv.org/abs/1711.05101; Adafactor: https://arxiv.org/abs/1804.04235; Muon with AdamW for what is no
    hidden matrix: https://kellerjordan.github.io/posts/muon/.
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


def _is_matrix(path: tuple) -> bool:
    """Kernels and adapters: by name, because stacking over layers gives a norm's scale two axes."""
    return path[-1].key in ("kernel", "lora_a", "lora_b")


def _is_axes(node: object) -> bool:
    return isinstance(node, tuple)


def _dimension_numbers(path: tuple, axes: tuple[str, ...]) -> contrib.MuonDimensionNumbers | None:
    """How a stacked kernel is a batch of matrices; None leaves a parameter to Adam."""
    if not _is_matrix(path) or axes[0] != "layers":
        return None
    # One side of every matrix is a single axis: the residual stream's, or the adapter's rank.
    single = "rank" if "rank" in axes else "embed"
    inner = [index for index, axis in enumerate(axes) if axis not in ("layers", "expert")]
    rest = tuple(index for index in inner if axes[index] != single)
    if axes[inner[0]] == single:
        return contrib.MuonDimensionNumbers(reduction_axis=(inner[0],), output_axis=rest)
    return contrib.MuonDimensionNumbers(reduction_axis=rest, output_axis=(len(axes) - 1,))
