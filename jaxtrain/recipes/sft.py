"""Supervised fine-tuning, from a config to a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from jaxtrain.config import RunConfig
from jaxtrain.data.formats import Encoder
from jaxtrain.losses.sft import sft_loss
from jaxtrain.nn.heads import SCALAR
from jaxtrain.observe.metrics import MetricLog
from jaxtrain.observe.progress import Progress
from jaxtrain.optim import make_optimizer, make_schedule
from jaxtrain.parallel.batches import local_rows, place_batch
from jaxtrain.parallel.mesh import initialize_distributed, make_mesh
from jaxtrain.recipes.evaluation import make_evaluation
from jaxtrain.recipes.reporting import Window
from jaxtrain.recipes.run_folder import begin, restore_or_begin, save
from jaxtrain.recipes.setup import check_batch, make_policy, make_tokenizer, open_stream
from jaxtrain.train.checkpoint import Checkpoints
from jaxtrain.train.loop import StepResult, train
from jaxtrain.train.preemption import EXIT_CODE, Preemption
from jaxtrain.train.step import jit_step, make_step


class Outcome(NamedTuple):
    exit_code: int  # 0; 143 where SIGTERM ended the run after a last checkpoint
    metrics: dict[str, float]  # the last value of each


def run(config: RunConfig, *, resume: bool = True) -> Outcome:
    """Train as `config` says, writing into `run.dir`; go on from its newest checkpoint unless `resume` is False.

    Raises ValueError for what the user can mend: config, data, checkpoint; NonFiniteError where training diverges.
    """
    initialize_distributed()
    mesh = make_mesh(config.mesh)
    rows = config.train.batch_size
    check_batch(config, mesh)
    policy = make_policy(config, mesh)
    if policy.model.output == SCALAR:
        raise ValueError("model.head=scalar gives numbers, no tokens: recipe sft needs a head over the vocabulary")
    tokenizer = make_tokenizer(config.model)
    encode = Encoder(
        tokenizer,
        loss_on=config.data.loss_on,
        prompt_format=config.data.prompt_format,
        vocab_size=policy.model.config.vocab_size,
    )
    evaluation = make_evaluation(config, policy, encode, tokenizer)

    schedule = make_schedule(config.optimizer, config.train.steps)
    tx = make_optimizer(config.optimizer, schedule, policy.trained_axes)
    step = make_step(
        policy.model,
        tx,
        schedule,
        sft_loss,
        linear=True,
        microbatches=config.train.microbatches,
        max_grad_norm=config.train.max_grad_norm,
    )

    folder = Path(config.run.dir)
    held = local_rows(mesh, rows)
    with (
        open_stream(config, encode, mesh) as stream,
        Checkpoints(str(folder / "checkpoints"), config.checkpoint.every, config.checkpoint.keep) as checkpoints,
        Preemption() as preemption,
    ):
        begin(config, folder, checkpoints, resume)
        state, num_tokens = restore_or_begin(config, policy, tx, checkpoints, stream, tokenizer)
        start = int(state.step)
        window = Window(policy.model, num_tokens)
        with (
            MetricLog(folder, config.log.tensorboard, start or None) as log,
            Progress(config.train.steps, start) as progress,
        ):
            latest: dict[str, float] = {}

            def report(result: StepResult) -> None:
                metrics = window.close()
                log.log(result.step, metrics)
                progress.update(result.step, metrics)
                latest.update(metrics)

            def measure(result: StepResult) -> None:
                if evaluation is None:
                    return
                window.pause()
                metrics = evaluation(result.state)
                log.log(result.step, metrics)
                progress.print(f"step {result.step}  " + "  ".join(f"{k} {v:.4f}" for k, v in metrics.items()))
                latest.update(metrics)
                window.go_on()

            def keep(result: StepResult) -> None:
                save(config, checkpoints, result, stream, window.num_tokens, tokenizer)

            # Logged and measured before it is saved, so that a resumed run logs what the uninterrupted one would.
            done_at = dict.fromkeys((report, measure, keep), start)
            result = None
            for result in train(
                jit_step(step, state, mesh),
                state,
                stream,
                lambda batch: place_batch(batch, mesh, held, rows),
                steps=config.train.steps,
                max_skipped_in_a_row=config.train.max_skipped_in_a_row,
                inspection_dir=folder / "inspection",
            ):
                window.add(result)
                progress.update(result.step)
                stopping = preemption.reached(result.step)
                saving = checkpoints.due(result.step) or stopping
                due = {
                    report: result.step % config.log.every == 0 or result.step == 1 or saving,
                    measure: result.step % config.eval.every == 0 and not stopping,
                    keep: saving,
                }
                for action in (action for action in due if due[action]):
                    action(result)
                    done_at[action] = result.step
                if stopping:
                    progress.print(f"SIGTERM: stopped after step {result.step}, which is saved")
                    return Outcome(EXIT_CODE, latest)
            if result is not None:  # all steps are taken, or the data ran dry before that
                for action in (action for action in done_at if done_at[action] < result.step):
                    action(result)
    return Outcome(0, latest)
