"""What a run says of itself between two log lines, under TRL's names."""

from __future__ import annotations

import time

import jax

from jaxtrain.nn.model import Model
from jaxtrain.observe.flops import mfu, peak_memory_bytes, train_flops
from jaxtrain.train.loop import StepResult
from jaxtrain.train.step import StepReport, add_metrics


class Window:
    """Collects steps and turns them into one line of metrics; reading them is what waits for the device."""

    def __init__(self, model: Model, tokens_per_batch: int, num_tokens: int = 0):
        """`tokens_per_batch` counts padding too; `num_tokens` were seen by an earlier part of the run."""
        self._model, self._tokens_per_batch = model, tokens_per_batch
        self.num_tokens = num_tokens
        self._reports: list[StepReport] = []
        self._flops = 0.0
        self._seconds = 0.0
        self._since = time.perf_counter()

    def add(self, result: StepResult) -> None:
        batch = result.batch
        self._reports.append(result.report)
        self._flops += train_flops(self._model.config, batch.segment_ids, batch.loss_weights, self._model.lora)

    def pause(self) -> None:
        """Stop the clock: what follows is no training."""
        jax.block_until_ready(self._reports)
        self._seconds += time.perf_counter() - self._since

    def go_on(self) -> None:
        self._since = time.perf_counter()

    def close(self) -> dict[str, float]:
        """The metrics of the steps since the last call; there must have been some."""
        reports = jax.device_get(self._reports)
        self.pause()
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
            "packing_density": tokens / (len(reports) * self._tokens_per_batch),
            "skipped_steps": int(reports[-1].skipped),
            "peak_memory_gib": peak_memory_bytes() / 2**30,
        }
        utilisation = mfu(self._flops, self._seconds)
        if utilisation is not None:
            metrics["mfu"] = utilisation
        self._reports, self._flops, self._seconds = [], 0.0, 0.0
        self.go_on()
        return metrics
