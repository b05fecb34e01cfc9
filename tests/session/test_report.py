"""A window's metrics are exact means over its steps, whatever their sizes, and its clock counts training alone."""

import time
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxtrain.session.report import MetricWindow
from jaxtrain.train.step import StepReport
from jaxtrain.types import Max, Mean

BATCH = tiny.packed_batch([[9, 20], [14]], 32)


def report(total, weight, tokens, largest=0.0, **means):
    metrics = {"loss": Mean(jnp.float32(total), jnp.float32(weight)), "top": Max(jnp.float32(largest)), **means}
    return StepReport(metrics, jnp.float32(total), jnp.float32(0.1), jnp.int32(tokens), jnp.int32(0), jnp.int32(0))


def closed(window, *reports, **others):
    for number, each in enumerate(reports):
        window.add({"policy": each, **{name: found[number] for name, found in others.items()}}, BATCH, 0.01)
    return window.close()


def test_means_weigh_every_token_alike_and_tokens_add_up_over_windows():
    window = MetricWindow(tiny.model(), num_tokens=1000)
    metrics = closed(window, report(6, 2, 30, 5), report(1, 8, 12, 3))
    assert metrics["loss"] == pytest.approx(7 / 10) and metrics["top"] == 5
    assert metrics["grad_norm"] == pytest.approx(3.5)  # a mean over steps
    assert metrics["num_tokens"] == 1042
    assert metrics["packing_density"] == pytest.approx(42 / (2 * BATCH.tokens.size))
    assert closed(window, report(4, 1, 10))["num_tokens"] == 1052


def test_means_over_nothing_are_left_out():
    """A window in which all samples were left out has no entropy; a zero would be taken for a number."""
    window = MetricWindow(tiny.model())
    entropy = {"entropy": Mean(jnp.float32(0), jnp.float32(0))}
    metrics = closed(window, report(0, 0, 0, **entropy))
    assert "entropy" not in metrics and metrics["loss"] == metrics["grad_norm"] == 0
    assert closed(window, report(0, 0, 0), report(3, 2, 10))["loss"] == 1.5


def test_other_roles_have_their_name_before_their_metrics():
    metrics = closed(MetricWindow(tiny.model()), report(1, 1, 10), critic=[report(2, 1, 10)])
    assert (metrics["loss"], metrics["critic/loss"], metrics["critic/skipped_steps"]) == (1, 2, 0)
    assert "critic/num_tokens" not in metrics


def test_recorded_values_are_means_of_the_window_alone():
    window = MetricWindow(tiny.model())
    window.record({"reward": 1.0})
    window.record({"reward": 0.0})
    assert closed(window, report(1, 1, 10))["reward"] == 0.5
    assert "reward" not in closed(window, report(1, 1, 10))


def test_a_pause_does_not_count_as_training():
    window = MetricWindow(tiny.model())
    with window.paused():
        time.sleep(0.3)
    assert closed(window, report(1, 1, 3000))["tokens_per_second"] > 3000 / 0.3


def test_the_time_of_a_step_is_the_sum_of_a_rollouts_parts():
    parts = {"time/rollout": 2.0, "time/reward": 1.0, "time/logps": 0.5, "time/sync": 0.25}
    window = MetricWindow(tiny.model(), updates_per_rollout=4)
    window.record(parts)
    metrics = closed(window, report(1, 1, 10), report(1, 1, 10))
    assert metrics["time/update"] == pytest.approx(4 * 0.01, rel=0.5)
    assert metrics["step_time"] == pytest.approx(3.75 + metrics["time/update"])
    window.record(parts | {"time/wait": 0.125})  # drawn while the trainer worked
    metrics = closed(window, report(1, 1, 10))
    assert metrics["step_time"] == pytest.approx(0.875 + metrics["time/update"])


def test_updates_lost_to_rounding_are_told_once():
    window = MetricWindow(tiny.model())
    lost = {"updates_lost_to_rounding": Mean(jnp.float32(1), jnp.float32(2))}
    with pytest.warns(UserWarning, match="50% of the updates were lost to rounding"):
        closed(window, report(1, 1, 10, **lost))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isclose(closed(window, report(1, 1, 10, **lost))["updates_lost_to_rounding"], 0.5)
