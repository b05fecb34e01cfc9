"""Supervised fine-tuning, from a config to a trained model."""

from __future__ import annotations

from pathlib import Path

from jaxtrain.config import RunConfig
from jaxtrain.data.formats import Encoder
from jaxtrain.nn.heads import SCALAR
from jaxtrain.objectives.sft import SFT
from jaxtrain.optim import make_optimizer, make_schedule
from jaxtrain.parallel.batches import local_rows, place_batch
from jaxtrain.parallel.mesh import initialize_distributed, make_mesh
from jaxtrain.recipes.evaluation import make_evaluation
from jaxtrain.recipes.following import Outcome, follow
from jaxtrain.recipes.reporting import Window
from jaxtrain.recipes.run_folder import begin, restore_or_begin, save
from jaxtrain.recipes.setup import check_batch, make_policy, make_tokenizer, open_stream
from jaxtrain.train.checkpoint import Checkpoints
from jaxtrain.train.loop import train
from jaxtrain.train.preemption import Preemption
from jaxtrain.train.step import jit_step, make_step


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
        SFT(),
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
        window = Window(policy.model, num_tokens)
        results = train(
            jit_step(step, state, mesh),
            state,
            stream,
            lambda batch: place_batch(batch, mesh, held, rows),
            steps=config.train.steps,
            max_skipped_in_a_row=config.train.max_skipped_in_a_row,
            inspection_dir=folder / "inspection",
        )
        return follow(
            results,
            config,
            window,
            checkpoints,
            preemption,
            start=int(state.step),
            evaluation=evaluation and (lambda result: evaluation(result.state)),
            save=lambda result: save(config, checkpoints, result, stream, window.num_tokens, tokenizer),
        )
