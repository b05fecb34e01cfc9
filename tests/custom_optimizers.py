"""Optimizers and schedules that tests use by import path."""

import jax.numpy as jnp
import optax


def lion(section, schedule, axes):
    return optax.lion(schedule, b1=section.b1, weight_decay=section.args.get("decay", 0.0))


def inverse_square_root(section, steps):
    return lambda step: section.learning_rate / jnp.sqrt(step + section.args["offset"])


def warmup_steps(section, steps):
    return lambda step: jnp.float32(section.warmup_steps)


def no_optimizer(section, schedule, axes):
    return section.name


def no_schedule(section, steps):
    return section.learning_rate


def vector_schedule(section, steps):
    return lambda step: jnp.ones(3) * step
