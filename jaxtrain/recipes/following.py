"""Following a run: what is logged, measured and saved after which step, and how the run ends."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

from jaxtrain.config import RunConfig
from jaxtrain.observe.metrics import MetricLog
from jaxtrain.observe.progress import Progress
from jaxtrain.recipes.reporting import Taken, Window
from jaxtrain.train.checkpoint import Checkpoints
from jaxtrain.train.preemption import EXIT_CODE, Preemption

Result = TypeVar("Result", bound=Taken)
Metrics = dict[str, float]


class Outcome(NamedTuple):
    exit_code: int  # 0; 143 where SIGTERM ended the run after a last checkpoint
    metrics: Metrics  # the last value of each


def follow(
    results: Iterable[Result],
    config: RunConfig,
    window: Window,
    checkpoints: Checkpoints,
    preemption: Preemption,
    *,
    start: int,
    evaluation: Callable[[Result], Metrics] | None,
    save: Callable[[Result], None],
    hear: Callable[[Result, Progress], None] = lambda result, progress: None,
    extra: Callable[[], Metrics] = dict,
) -> Outcome:
    """Take the steps after the `start`th, and do after each what is due: report, measure, save.

    They are done in this order, so that a resumed run logs what the uninterrupted one would. After the last step, also
    where the data ran dry, all three are done, due or not. SIGTERM saves the step under way and ends the run.

    `hear` is told of every step; `extra` are metrics of the steps since the last report, beside those of `window`.
    """
    latest: Metrics = {}
    with (
        MetricLog(config.run.dir, config.log.tensorboard, start or None) as log,
        Progress(config.train.steps, start) as progress,
    ):

        def report(result: Result) -> None:
            metrics = extra() | window.close()
            log.log(result.step, metrics)
            progress.update(result.step, metrics)
            latest.update(metrics)

        def measure(result: Result) -> None:
            if evaluation is None:
                return
            with window.paused():
                metrics = evaluation(result)
                log.log(result.step, metrics)
                progress.print(f"step {result.step}  " + "  ".join(f"{k} {v:.4f}" for k, v in metrics.items()))
                latest.update(metrics)

        done_at = {report: start, measure: start, save: start}
        result = None
        for result in results:
            number = result.step
            window.add(result)
            hear(result, progress)
            progress.update(number)
            stopping = preemption.reached(number)
            saving = checkpoints.due(number) or stopping
            due = {
                report: number % config.log.every == 0 or number == 1 or saving,
                measure: number % config.eval.every == 0 and not stopping,
                save: saving,
            }
            for action in (action for action in due if due[action]):
                action(result)
                done_at[action] = number
            if stopping:
                progress.print(f"SIGTERM: stopped after step {number}, which is saved")
                return Outcome(EXIT_CODE, latest)
        if result is not None:
            for action in (action for action in done_at if done_at[action] < result.step):
                action(result)
    return Outcome(0, latest)
