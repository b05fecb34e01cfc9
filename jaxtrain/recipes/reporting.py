"""What a run says of itself between two log lines, under TRL's names."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import jax
import numpy as np

from jaxtrain.nn.config import ModelConfig
from jaxtrain.nn.model import Model
from jaxtrain.observe.flops import mfu, peak_memory_bytes, train_flops
from jaxtrain.rl.controller import Update
from jaxtrain.train.step import StepReport, add_metrics
from jaxtrain.types import Batch

_LOST_TO_ROUNDING = 0.1  # share of a window's updates from which a run warns


class Taken(Protocol):
    """An optimizer step, of whichever recipe."""

    @property
    def step(self) -> int: ...  # its number, from 1

    @property
    def report(self) -> StepReport: ...

    @property
    def batch(self) -> Batch: ...  # this host's rows


class Window:
    """Collects steps and turns them into one line of metrics; reading them is what waits for the device."""

    def __init__(self, model: Model, num_tokens: int = 0):
        """`num_tokens` were seen by an earlier part of the run."""
        self._model = model
        self.num_tokens = num_tokens
        self._reports: list[StepReport] = []
        self._flops, self._slots = 0.0, 0
        self._warned = False
        self._seconds = 0.0
        self._since = time.perf_counter()

    def add(self, step: Taken) -> None:
        batch = step.batch
        self._reports.append(step.report)
        self._slots += batch.segment_ids.size * jax.process_count()  # every host has as many rows
        if isinstance(self._model.config, ModelConfig):  # else nobody knows its matrices
            self._flops += train_flops(self._model.config, batch.segment_ids, batch.loss_weights, self._model.lora)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The clock stands still inside: that is no training."""
        self._wait()
        yield
        self._since = time.perf_counter()

    def close(self) -> dict[str, float]:
        """The metrics of the steps since the last call; there must have been some."""
        reports = jax.device_get(self._reports)
        self._wait()
        tokens = sum(int(report.num_tokens) for report in reports)
        self.num_tokens += tokens
        means = reports[0].means
        for report in reports[1:]:
            means = add_metrics(means, report.means)
        metrics = {name: float(mean.value) for name, mean in means.items()}
        metrics |= {
            "grad_norm": float(sum(report.grad_norm for report in reports) / len(reports)),
            "learning_rate": float(reports[-1].learning_rate),
            "num_tokens": self.num_tokens,
            "tokens_per_second": tokens / self._seconds,
            "packing_density": tokens / self._slots,
            "skipped_steps": int(reports[-1].skipped),
            "peak_memory_gib": peak_memory_bytes() / 2**30,
        }
        self._warn_of_rounding(metrics.get("updates_lost_to_rounding", 0.0))
        utilisation = mfu(self._flops, self._seconds)
        if utilisation:
            metrics["mfu"] = utilisation
        self._reports, self._flops, self._slots, self._seconds = [], 0.0, 0, 0.0
        self._since = time.perf_counter()
        return metrics

    def _warn_of_rounding(self, lost: float) -> None:
        """Once a run."""
        if lost > _LOST_TO_ROUNDING and not self._warned:
            self._warned = True
            warnings.warn(
                f"{lost:.0%} of the updates were lost to rounding: they are smaller than half a unit in the last place "
                f"of the {self._model.param_dtype} parameters that they should change. Train with "
                "model.param_dtype=float32 (compute_dtype and the export can stay bfloat16) or with model.lora, or "
                "raise optimizer.learning_rate; metrics.jsonl has the share as updates_lost_to_rounding",
                stacklevel=3,
            )

    def _wait(self) -> None:
        """Wait for the steps that were sent off, and count the time since the clock was set going."""
        jax.block_until_ready(self._reports)
        self._seconds += time.perf_counter() - self._since


class RolloutWindow:
    """Collects what steps of reinforcement learning say beside the policy's own report, and averages it."""

    def __init__(self) -> None:
        self._critic: list[StepReport] = []
        self._seconds: list[float] = []
        self._sums: dict[str, list[float]] = {}

    def add(self, update: Update, updates: int, extra: Mapping[str, float]) -> None:
        """`updates` are taken on every rollout; `extra` are further metrics of the rollout."""
        if update.done == 1:
            for name, value in {**update.experience.metrics, **extra}.items():
                self._sums.setdefault(name, []).append(value)
        if update.critic_report is not None:
            self._critic.append(update.critic_report)
        self._seconds.append(update.seconds * updates)

    def close(self) -> dict[str, float]:
        """Means over the rollouts since the last call, and the critic's metrics as `critic/*`."""
        metrics = {name: float(np.mean(values)) for name, values in self._sums.items()}
        metrics["time/update"] = float(np.mean(self._seconds))
        # Samples that were drawn ahead of time cost a step only what it waited for them.
        drawn = ("time/wait",) if "time/wait" in metrics else ("time/rollout", "time/reward")
        parts = (*drawn, "time/logps", "time/sync", "time/update")
        if all(part in metrics for part in parts):
            metrics["step_time"] = sum(metrics[part] for part in parts)
        reports = jax.device_get(self._critic)
        if reports:
            means = reports[0].means
            for report in reports[1:]:
                means = add_metrics(means, report.means)
            metrics |= {f"critic/{name}": float(metric.value) for name, metric in means.items()}
            metrics["critic/grad_norm"] = float(sum(report.grad_norm for report in reports) / len(reports))
        self._sums, self._critic, self._seconds = {}, [], []
        return metrics
