"""Aggregates the metrics of the steps between two log lines, under TRL's names."""

import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import jax
import numpy as np

from jaxtrain.nn.config import ModelConfig
from jaxtrain.nn.model import Model
from jaxtrain.observe.flops import mfu, peak_memory_bytes, train_flops
from jaxtrain.parallel.batches import row_processes
from jaxtrain.train.step import StepReport, add_metrics
from jaxtrain.types import Batch, Mean, Metric

_LOST_TO_ROUNDING = 0.1  # share of a window's updates above which a run warns


class MetricWindow:
    """Collects step reports and turns them into one line of metrics. Only reading them waits for the device."""

    def __init__(self, model: Model, num_tokens: int = 0, updates_per_rollout: int | None = None):
        """`num_tokens`: tokens trained on before. `updates_per_rollout`: given in reinforcement learning."""
        self._model, self._updates_per_rollout = model, updates_per_rollout
        self.num_tokens = num_tokens
        self._warned_of_rounding = False
        self._holders = len(row_processes(model.run.mesh))  # processes that hold the same rows
        self._begin()

    def _begin(self) -> None:
        self._reports: dict[str, list[StepReport]] = {}
        self._recorded: dict[str, list[float]] = {}
        self._steps = 0
        self._flops, self._slots = 0.0, 0
        self._seconds, self._update_seconds = 0.0, 0.0
        self._since = time.perf_counter()

    def add(self, reports: Mapping[str, StepReport], batch: Batch, seconds: float) -> None:
        """Add a step: the reports of its roles, this host's rows, and the seconds until all updates were dispatched."""
        for name, report in reports.items():
            self._reports.setdefault(name, []).append(report)
        self._steps += 1
        self._update_seconds += seconds
        self._slots += batch.segment_ids.size * jax.process_count() // self._holders  # every host has as many rows
        if isinstance(self._model.config, ModelConfig):  # else the sizes of the matrices are unknown
            positions = None if batch.prefix_ids is None else batch.positions
            arrays = batch.segment_ids, batch.loss_weights, self._model.lora, positions
            flops = train_flops(self._model.config, *arrays)
            self._flops += flops / self._holders

    def record(self, metrics: Mapping[str, float]) -> None:
        """Add further metrics; the log line has their means."""
        for name, value in metrics.items():
            self._recorded.setdefault(name, []).append(value)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time of the block from the training time."""
        self._stop_clock()
        yield
        self._since = time.perf_counter()

    def wait(self) -> None:
        """Wait for the dispatched updates; the time counts as update time."""
        start = time.perf_counter()
        jax.block_until_ready(self._reports)
        self._update_seconds += time.perf_counter() - start

    def close(self) -> dict[str, float]:
        """The metrics of the steps since the last call; there must be at least one.

        The metrics of the first role have their plain names, those of the others `ROLE/name`.
        """
        self._stop_clock()
        first, *others = self._reports  # in the order of the roles; device_get sorts the keys
        reports = jax.device_get(self._reports)
        tokens = sum(int(report.num_tokens) for report in reports[first])
        self.num_tokens += tokens
        metrics = _means(reports[first])
        metrics |= {
            "learning_rate": float(reports[first][-1].learning_rate),
            "num_tokens": self.num_tokens,
            "tokens_per_second": tokens / self._seconds,
            "packing_density": tokens / self._slots,
            "skipped_steps": int(reports[first][-1].skipped),
            "peak_memory_gib": peak_memory_bytes() / 2**30,
        }
        self._warn_of_rounding(metrics.get("updates_lost_to_rounding", 0.0))
        utilisation = mfu(self._flops, self._seconds)
        if utilisation:
            metrics["mfu"] = utilisation
        for name in others:
            metrics |= {f"{name}/{key}": value for key, value in _means(reports[name]).items()}
            metrics[f"{name}/skipped_steps"] = int(reports[name][-1].skipped)
        metrics |= {name: float(np.mean(values)) for name, values in self._recorded.items()}
        if self._updates_per_rollout is not None:
            metrics |= self._times_of_a_rollout(metrics)
        self._begin()
        return metrics

    def _warn_of_rounding(self, lost: float) -> None:
        """Warn once per run."""
        if lost > _LOST_TO_ROUNDING and not self._warned_of_rounding:
            self._warned_of_rounding = True
            warnings.warn(
                f"{lost:.0%} of the updates were lost to rounding: they are smaller than half a unit in the last place "
                f"of their {self._model.param_dtype} parameters. Train with "
                "model.param_dtype=float32 (compute_dtype and the export can stay bfloat16) or with model.lora, or "
                "optimizer.rounding=stochastic (bfloat16), or raise optimizer.learning_rate; "
                "metrics.jsonl has the share as updates_lost_to_rounding",
                stacklevel=3,
            )

    def _times_of_a_rollout(self, metrics: Mapping[str, float]) -> dict[str, float]:
        assert self._updates_per_rollout is not None
        times = {"time/update": self._update_seconds / self._steps * self._updates_per_rollout}
        # Prefetched samples cost a step only the time that it waited for them.
        drawn = ("time/wait",) if "time/wait" in metrics else ("time/rollout", "time/reward")
        parts = (*drawn, "time/logps", "time/sync")
        if all(part in metrics for part in parts):
            times["step_time"] = sum(metrics[part] for part in parts) + times["time/update"]
        return times

    def _stop_clock(self) -> None:
        self.wait()
        self._seconds += time.perf_counter() - self._since


def _means(reports: list[StepReport]) -> dict[str, float]:
    """Without means over nothing, which are no number: those of a step whose samples were all left out, with loss 0."""
    means = reports[0].means
    for report in reports[1:]:
        means = add_metrics(means, report.means)

    def says(name: str, metric: Metric) -> bool:
        return name == "loss" or not isinstance(metric, Mean) or bool(metric.weight > 0)

    some = {name: metric for name, metric in means.items() if says(name, metric)}
    metrics = {name: float(metric.value) for name, metric in some.items()}
    metrics["grad_norm"] = float(sum(report.grad_norm for report in reports) / len(reports))
    return metrics
