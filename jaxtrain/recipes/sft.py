"""Supervised fine-tuning, from a config to a trained model."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtrain.config import RunConfig
from jaxtrain.data.formats import Encoder
from jaxtrain.losses.sft import sft_loss
from jaxtrain.nn.heads import SCALAR
from jaxtrain.optim import make_optimizer, make_schedule
from jaxtrain.parallel.batches import local_rows, place_batch
from jaxtrain.parallel.mesh import initialize_distributed, make_mesh
from jaxtrain.recipes.evaluation import make_evaluation
from jaxtrain.recipes.following import Outcome, follow
from jaxtrain.recipes.open_run import RunFolder, open_run
from jaxtrain.recipes.reporting import Window
from jaxtrain.recipes.run_folder import restore_or_begin, save
from jaxtrain.recipes.setup import check_batch, make_policy, make_tokenizer, open_stream
from jaxtrain.train.checkpoint import Checkpoints
from jaxtrain.train.lockstep import Agreement, Lockstep
from jaxtrain.train.loop import train
from jaxtrain.train.preemption import Preemption
from jaxtrain.train.step import jit_step, make_step


def run(
    config: RunConfig,
    *,
    resume: bool = True,
    allow_change: Sequence[str] = (),
    preemption: Preemption | None = None,
) -> Outcome:
    """Train as `config` says, writing into `run.dir`; go on from its newest checkpoint unless `resume` is False.

    `allow_change`: keys that may differ from the config that the run began with, though that changes its numbers.
    `preemption`: one that is in force already, so that signals are handled from the start of the process on.

    Raises ValueError for a config, data or a checkpoint that cannot be used; NonFiniteError where training diverges;
    Interrupted where a signal asks to stop before the first step.
    """
    with preemption or Preemption() as requests:
        initialize_distributed()
        with open_run(config, resume=resume, allow_change=allow_change) as folder:
            outcome = _run(config, folder, requests)
            if outcome.exit_code == 0:
                folder.finish()
            return outcome


def _run(config: RunConfig, folder: RunFolder, preemption: Preemption) -> Outcome:
    mesh = make_mesh(config.mesh)
    agreement = Agreement(preemption, mesh)
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
    evaluation = make_evaluation(config, policy, encode, tokenizer, agreement.check)

    schedule = make_schedule(config.optimizer, config.train.steps)
    tx = make_optimizer(config.optimizer, schedule, policy.trained_axes)
    step = make_step(
        policy.model,
        tx,
        schedule,
        sft_loss,
        separable=True,
        microbatches=config.train.microbatches,
        max_grad_norm=config.train.max_grad_norm,
    )

    held = local_rows(mesh, rows)
    with (
        open_stream(config, encode, mesh) as stream,
        Checkpoints(str(folder.path / "checkpoints"), config.checkpoint.every, config.checkpoint.keep) as checkpoints,
    ):
        state, num_tokens = restore_or_begin(folder, policy, tx, checkpoints, stream, tokenizer)
        if folder.finished(int(state.step)):
            return Outcome(0, {})
        folder.start(int(state.step))
        window = Window(policy.model, num_tokens)
        results = train(
            jit_step(step, state, mesh),
            state,
            Lockstep(stream, agreement),
            lambda batch: place_batch(batch, mesh, held, rows),
            steps=config.train.steps,
            max_skipped_in_a_row=config.train.max_skipped_in_a_row,
            inspection_dir=folder.path / "inspection",
        )
        return follow(
            results,
            config,
            window,
            checkpoints,
            agreement,
            start=int(state.step),
            evaluation=evaluation and (lambda result: evaluation(result.state)),
            save=lambda result: save(folder, checkpoints, result, stream, window.num_tokens, tokenizer),
        )
