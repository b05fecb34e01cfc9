"""Reinforcement learning, from a config to a trained model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from converters.families.registry import has_scalar_head
from jaxtrain.config import RunConfig
from jaxtrain.config.rollouts import RewardModelSection
from jaxtrain.data.formats import Encoder
from jaxtrain.data.prompts import PromptStream
from jaxtrain.data.sources import Row
from jaxtrain.lora import join
from jaxtrain.nn.heads import LANGUAGE, SCALAR
from jaxtrain.nn.model import Model
from jaxtrain.objectives.objective import Objective
from jaxtrain.objectives.value import ClippedValue
from jaxtrain.observe.progress import Progress
from jaxtrain.optim import make_optimizer, make_schedule
from jaxtrain.parallel.batches import local_rows, place_batch
from jaxtrain.parallel.mesh import compiler_options, initialize_distributed
from jaxtrain.parallel.sharding import row_shares
from jaxtrain.recipes.following import Outcome, follow
from jaxtrain.recipes.reporting import RolloutWindow, Window
from jaxtrain.recipes.rl_evaluation import make_rl_evaluation
from jaxtrain.recipes.rl_folder import Trained, initial_params, restore_or_begin, save
from jaxtrain.recipes.run_folder import begin
from jaxtrain.recipes.setup import adapter_params, as_list, base_params, make_policy, make_tokenizer, stop_ids
from jaxtrain.rl.algorithms import find_algorithm
from jaxtrain.rl.collect import Collect
from jaxtrain.rl.controller import Learner, PerToken, Plan, Reference, Roles, Update, reinforce
from jaxtrain.rl.placement import make_meshes, make_sampler
from jaxtrain.rl.reward_models import RewardModel
from jaxtrain.rl.reward_pool import RewardPool
from jaxtrain.rl.rollouts import Prompt, support_metrics
from jaxtrain.rl.scoring import RewardScorer, conversation_metrics
from jaxtrain.rl.sources import Ahead, OnPolicy, Source
from jaxtrain.rl.trajectories import Replay, sample_table, write_step
from jaxtrain.rl.worker import WorkerSpec
from jaxtrain.sample.requests import SamplingParams
from jaxtrain.train.checkpoint import Checkpoints
from jaxtrain.train.preemption import Preemption
from jaxtrain.train.step import jit_step, make_step, score, token_values
from jaxtrain.types import TrainState


def run(config: RunConfig, *, resume: bool = True, replay: Path | None = None) -> Outcome:
    """Train as `config` says, writing into `run.dir`; go on from its newest checkpoint unless `resume` is False.

    `replay`: learn from the samples that the run in that folder recorded, and draw none.

    Raises ValueError for what the user can mend: config, data, checkpoint; NonFiniteError where training diverges.
    """
    initialize_distributed()
    section = config.rl
    assert section is not None
    if jax.process_count() > 1:
        raise ValueError("recipe rl has one controller: start one process; rl.placement.kind=ray adds others")
    algorithm = find_algorithm(section)
    mesh, sampling_mesh = make_meshes(section.placement, config.mesh)
    policy = make_policy(config, mesh)
    if policy.model.output != LANGUAGE:
        raise ValueError(f"model.head={policy.model.output} says no words: recipe rl needs the language-model head")
    tokenizer = make_tokenizer(config.model)
    encode = Encoder(tokenizer, prompt_format=config.data.prompt_format, vocab_size=policy.model.config.vocab_size)
    make_prompt = prompt_maker(encode, config.data.max_length - section.max_completion_length)
    prompts = PromptStream(as_list(config.data.train), config.data, make_prompt, seed=config.run.seed)

    plan = Plan(
        section.iterations,
        section.minibatches,
        config.data.max_length,
        row_shares(mesh) * config.train.microbatches,
        config.train.max_skipped_in_a_row,
    )
    trained = Trained(policy, _optimizer(config, policy.trained_axes))
    critic_config = _critic_config(config)
    critic = None
    if algorithm.critic:
        critic_policy = make_policy(critic_config, mesh)
        critic = Trained(critic_policy, _optimizer(critic_config, critic_policy.trained_axes))

    spec = WorkerSpec(
        policy.model,  # replaced by the one that samples
        SamplingParams(
            max_tokens=section.max_completion_length,
            temperature=section.sampling.temperature,
            top_k=section.sampling.top_k,
            top_p=section.sampling.top_p,
            min_p=section.sampling.min_p,
            stop_ids=stop_ids(config.model, policy, tokenizer),
        ),
        config.run.seed,
        section.sampling.slots,
        config.data.max_length,
        tokenizer,
        support=section.sampling.support if section.sampling.filtered else 0,
        environment=section.environment,
    )
    folder = Path(config.run.dir)
    with (
        RewardPool(section.rewards, section.reward_workers) as pool,
        Checkpoints(str(folder / "checkpoints"), config.checkpoint.every, config.checkpoint.keep) as checkpoints,
        Preemption() as preemption,
    ):
        begin(config, folder, checkpoints, resume)
        begun = restore_or_begin(config, trained, critic, checkpoints, prompts, tokenizer)
        temperature = section.sampling.temperature

        def learner(
            role: Trained, state: TrainState, run: RunConfig, objective: Objective, per_token: PerToken
        ) -> Learner:
            step = make_step(
                role.policy.model,
                role.tx,
                make_schedule(run.optimizer, run.train.steps),
                objective,
                microbatches=run.train.microbatches,
                max_grad_norm=run.train.max_grad_norm,
            )
            return Learner(state, jit_step(step, state, mesh), per_token)

        logps = _log_probabilities(policy.model, temperature)
        roles = Roles(learner(trained, begun.policy, config, algorithm.objective, logps))
        if critic is not None and begun.critic is not None:
            value = ClippedValue(section.critic.epsilon)
            values = _values(critic.policy.model)
            roles = roles._replace(critic=learner(critic, begun.critic, critic_config, value, values))
        if algorithm.needs_reference:
            params = initial_params(config, policy, begun.policy.frozen)
            # Without adapters of its own the reference is the base alone.
            model = policy.model if params else replace(policy.model, lora=None, new_tokens=None)
            roles = roles._replace(reference=Reference(params, _log_probabilities(model, temperature)))

        start = int(begun.policy.step)
        sampler = make_sampler(section.placement, spec, policy.model, roles.policy.params, start, sampling_mesh)
        scorer = RewardScorer(
            section.rewards,
            pool,
            section.environment.weight if section.environment else 1.0,
            [_reward_model(config, each, mesh) for each in section.reward_models],
        )
        collect = Collect(
            prompts.take,
            sampler,
            scorer,
            algorithm,
            prompts=section.prompts,
            samples=section.generations,
            max_completion_length=section.max_completion_length,
        )
        evaluation = make_rl_evaluation(config, policy, encode, tokenizer, sampler, scorer)
        source: Source = OnPolicy(collect, sampler, prompts.get_state)
        if section.placement.staleness:
            if section.reward_models and mesh.size > 1:
                raise ValueError(
                    f"rl.reward_models on the trainer's {mesh.size} devices cannot score beside the training: use "
                    "rl.placement.staleness=0 or a single device that trains"
                )
            staleness = section.placement.staleness
            source = Ahead(collect, sampler, prompts.get_state, staleness=staleness, updates=plan.updates)
        if replay is not None:
            source = Replay(replay)
        window, rollouts = Window(policy.model, begun.num_tokens), RolloutWindow()

        def hear(update: Update, progress: Progress) -> None:
            rollouts.add(update, plan.updates, _extra_metrics(update, sampler, scorer))
            if update.done > 1:
                return
            write_step(folder, update.step, update.experience.trajectories)
            every = section.print_samples * plan.updates
            if every and update.experience.trajectories and (update.step - 1) % every == 0:
                progress.show(sample_table(update.step, update.experience.trajectories))

        with closing(sampler), closing(source):
            updates = reinforce(
                roles,
                source,
                algorithm,
                plan,
                lambda batch: place_batch(batch, mesh, local_rows(mesh, len(batch.tokens)), len(batch.tokens)),
                steps=config.train.steps,
                inspection_dir=folder / "inspection",
                pending=begun.pending,
            )
            return follow(
                updates,
                config,
                window,
                checkpoints,
                preemption,
                start=start,
                evaluation=evaluation and (lambda update: evaluation(update.roles.policy)),
                save=lambda update: save(
                    config, checkpoints, update, plan.updates, source.state(), window.num_tokens, tokenizer
                ),
                hear=hear,
                extra=rollouts.close,
            )


def prompt_maker(encode: Encoder, most: int) -> Callable[[int, Row], Prompt]:
    """Rows -> prompts of at most `most` tokens; a longer one is a ValueError: nobody can answer what is cut off."""

    def make(number: int, row: Row) -> Prompt:
        ids, columns = encode.question(row)
        if not 0 < len(ids) <= most:
            raise ValueError(
                f"the prompt has {len(ids)} tokens; data.max_length - rl.max_completion_length leaves room for {most}"
            )
        return Prompt(number, ids, columns)

    return make


def _optimizer(config: RunConfig, axes: Any) -> Any:
    return make_optimizer(config.optimizer, make_schedule(config.optimizer, config.train.steps), axes)


def _reward_model(config: RunConfig, section: RewardModelSection, mesh: jax.sharding.Mesh) -> RewardModel:
    """On the trainer's devices, split as the policy is."""
    model = config.model.model_copy(update={"path": section.path, "config": None, "lora": None, "head": SCALAR})
    role = make_policy(config.model_copy(update={"model": model}), mesh)
    if not has_scalar_head(role.hf):
        raise ValueError(f"rl.reward_models: {section.path} is no reward model: it has no head of one label")
    base = base_params(model, role, 0)
    params = join(base, adapter_params(model, role, 0, base))
    return RewardModel(
        section.name,
        section.weight,
        role.model,
        params,
        lambda batch: place_batch(batch, mesh, local_rows(mesh, len(batch.tokens)), len(batch.tokens)),
        max_length=config.data.max_length,
        row_multiple=row_shares(mesh),
    )


def _critic_config(config: RunConfig) -> RunConfig:
    """The run as the critic sees it: a scalar head, and a learning rate of its own."""
    assert config.rl is not None
    model = config.model.model_copy(update={"head": SCALAR})
    optimizer = config.optimizer.model_copy(update={"learning_rate": config.rl.critic.learning_rate})
    return config.model_copy(update={"model": model, "optimizer": optimizer})


def _log_probabilities(model: Model, temperature: float) -> PerToken:
    return _jit(model, lambda params, batch: score(model, params, batch, temperature=temperature).logp)


def _values(model: Model) -> PerToken:
    return _jit(model, lambda params, batch: token_values(model, params, batch))


def _jit(model: Model, function: PerToken) -> PerToken:
    assert model.run.mesh is not None
    return jax.jit(function, compiler_options=compiler_options(model.run.mesh))


def _extra_metrics(update: Update, sampler: Any, scorer: RewardScorer) -> Mapping[str, float]:
    """Of a rollout, once: what sampler, rewards and environments count."""
    if update.done > 1 or not update.experience.trajectories:
        return {}
    trajectories = update.experience.trajectories
    versions = [update.step - 1 - t.versions[t.loss_mask] for t in trajectories if t.loss_mask.any()]
    staleness = np.concatenate(versions) if versions else np.zeros(1)
    return {
        **sampler.metrics(),
        **scorer.metrics(),
        **conversation_metrics(trajectories),
        **support_metrics(trajectories),
        "staleness/mean": float(staleness.mean()),
        "staleness/max": float(staleness.max()),
    }
