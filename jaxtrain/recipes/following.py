"""Following a run: what is logged, measured and saved after which step, and how the run ends."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

from jaxtrain.config import RunConfig
from jaxtrain.observe.metrics import MetricLog
from jaxtrain.observe.progress import Progress
from jaxtrain.recipes.reporting import Taken, Window
from jaxtrain.train.checkpoint import Checkpoints
from jaxtrain.train.lockstep import Agreement
from jaxtrain.train.preemption import Interrupted, exit_code

Result = TypeVar("Result", bound=Taken)
Metrics = dict[str, float]


class Outcome(NamedTuple):
    exit_code: int  # 0; 128 + the signal's number where one ended the run after a last checkpoint
    metrics: Metrics  # the last value of each


def follow(
    results: Iterable[Result],
    config: RunConfig,
    window: Window,
    checkpoints: Checkpoints,
    agreement: Agreement,
    *,
    start: int,
    evaluation: Callable[[Result], Metrics] | None,
    save: Callable[[Result], None],
    hear: Callable[[Result, Progress], None] = lambda result, progress: None,
    extra: Callable[[], Metrics] = dict,
) -> Outcome:
    """Take the steps after the `start`th, and do after each what is due: report, measure, save.

    They are done in this order, so that a resumed run logs what the uninterrupted one would. After the last step, also
    where the data are exhausted, all three are done, due or not. A signal saves the last step that is done and ends the
    run; an evaluation or a rollout that is under way is given up. Raises Interrupted where no step is done yet.

    `hear` is called with every step; `extra` are metrics of the steps since the last report, beside those of `window`.
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
        result, stopped = None, 0

        def do(actions: Iterable[Callable[[Result], None]]) -> None:
            assert result is not None
            for action in actions:
                if done_at[action] < result.step:
                    action(result)
                    done_at[action] = result.step

        try:
            for result in results:
                number = result.step
                agreement.started()
                window.add(result)
                hear(result, progress)
                progress.update(number)
                stopped = agreement.stopping()
                if stopped:
                    break
                saving = checkpoints.due(number)
                due = {
                    report: number % config.log.every == 0 or number == 1 or saving,
                    measure: number % config.eval.every == 0,
                    save: saving,
                }
                do(action for action in due if due[action])
            if result is not None and not stopped:
                do(done_at)
        except Interrupted:
            if result is None:
                raise
            stopped = agreement.signal()
        if stopped:
            do((report, save))
            checkpoints.wait()
            assert result is not None
            progress.print(f"{signal.Signals(stopped).name}: stopped after step {result.step}, which is saved")
            return Outcome(exit_code(stopped), latest)
    return Outcome(0, latest)
