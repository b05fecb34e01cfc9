"""The sides of benchmarks/grpo.py, each run in a separate process: the same model and prompts, four implementations.

A step samples 8 prompts of 64 tokens 4 times, 64 new tokens each and never fewer, scores them by the share of even ids,
and updates once: GRPO without a reference, AdamW. Each side calls `clock.tick()` before a step, once the one before it
is done.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence

import numpy as np
from sft_sides import LEARNING_RATE, LLAMA, MAX_GRAD_NORM, TRL_ARGUMENTS, VOCAB, Clock, tunix_config

PROMPTS, SAMPLES, PROMPT, NEW = 8, 4, 64, 64
EOS = 0  # forbidden if a side supports that; otherwise one token of 32000


def prompt_ids() -> np.ndarray:
    return np.random.default_rng(0).integers(2, VOCAB, (PROMPTS, PROMPT)).astype(np.int32)


def rewards(completions: Sequence[Sequence[int]]) -> list[float]:
    return [float(np.mean(np.asarray(ids) % 2 == 0)) for ids in completions]


def jaxtrain(clock: Clock) -> None:
    from trainer import trained_role

    from jaxtrain.config import parse_config
    from jaxtrain.rl.collect import Collector, LengthLimits
    from jaxtrain.rl.experience import add_advantages, pack_samples, score_samples
    from jaxtrain.rl.placement import build_sampler
    from jaxtrain.rl.rollouts import Prompt, Trajectory
    from jaxtrain.rl.sample_sources import OnPolicySource
    from jaxtrain.rl.sync import rollout_model
    from jaxtrain.rl.worker import WorkerSpec
    from jaxtrain.sample.requests import SamplingParams

    tree = {
        "recipe": "rl",
        "model": {"config": LLAMA, "tokenizer": "none", "compute_dtype": "float32", "remat": "none"},
        "data": {"train": {"path": "none"}, "max_length": PROMPT + NEW},
        "optimizer": {"learning_rate": LEARNING_RATE, "schedule": "constant", "weight_decay": 0.01},
        "train": {"max_grad_norm": MAX_GRAD_NORM},
        "rl": {
            "prompts": PROMPTS,
            "generations": SAMPLES,
            "max_completion_length": NEW,
            "rewards": [{"function": "none"}],
        },
    }
    config = parse_config(tree, "benchmark")
    assert config.rl is not None
    algorithm = config.algorithm
    policy = trained_role(config, algorithm.objective)
    model = rollout_model(policy.model, policy.mesh)
    spec = WorkerSpec(model, SamplingParams(max_tokens=NEW), 0, PROMPTS * SAMPLES, PROMPT + NEW)
    sampler = build_sampler(config.rl.placement, spec, policy.model, policy.snapshot())
    ids = prompt_ids()

    def take(count: int) -> list[Prompt]:
        clock.tick()
        return [Prompt(number, ids[number], {}) for number in range(count)]

    def scorer(trajectories: Sequence[Trajectory]) -> list[Trajectory]:
        values = rewards([t.completion_ids for t in trajectories])
        return [t._replace(reward=value) for t, value in zip(trajectories, values, strict=True)]

    collect = Collector(take, sampler, scorer, algorithm, prompts=PROMPTS, samples=SAMPLES, limits=LengthLimits(NEW))
    source = OnPolicySource(collect, sampler, dict)
    while True:  # what recipes/rl.py does, without a folder to write into
        samples = source(policy.params, policy.step)
        assert samples is not None
        experience = pack_samples(samples, config, policy.mesh)
        score_samples(experience, algorithm, policy, None, None)
        add_advantages(experience, algorithm)
        for batch in experience:
            policy.update(policy.place(batch))


def torch(clock: Clock) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**LLAMA)
    config._attn_implementation = "sdpa"
    model = LlamaForCausalLM(config).float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    prompts = torch.from_numpy(prompt_ids()).long().repeat_interleave(SAMPLES, 0)
    how = {"do_sample": True, "top_k": 0, "max_new_tokens": NEW, "min_new_tokens": NEW, "eos_token_id": EOS}
    while True:
        clock.tick()
        with torch.inference_mode():
            whole = model.generate(
                prompts, attention_mask=torch.ones_like(prompts), pad_token_id=EOS, use_cache=True, **how
            )
        whole = whole.clone()
        completions = whole[:, PROMPT:]
        reward = torch.tensor(rewards(completions.tolist())).view(PROMPTS, SAMPLES)
        advantages = ((reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-4)).view(-1, 1)
        logits = model(input_ids=whole, use_cache=False, logits_to_keep=NEW + 1).logits[:, :-1]
        logp = torch.log_softmax(logits, -1).gather(-1, completions[..., None])[..., 0]
        ratio = torch.exp(logp - logp.detach())
        loss = -torch.minimum(ratio * advantages, torch.clamp(ratio, 0.8, 1.2) * advantages).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()


def trl(clock: Clock) -> None:
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class Rounds(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            clock.tick()

    config = LlamaConfig(**LLAMA)
    config._attn_implementation = "sdpa"
    tokenizer = words()
    with tempfile.TemporaryDirectory() as folder:
        arguments = GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=PROMPTS * SAMPLES,
            num_generations=SAMPLES,
            max_completion_length=NEW,
            generation_kwargs={"min_new_tokens": NEW, "eos_token_id": EOS},
            beta=0.0,
            logging_steps=10**6,
            **TRL_ARGUMENTS,
        )
        texts = tokenizer.batch_decode(prompt_ids().tolist())
        GRPOTrainer(
            LlamaForCausalLM(config).float(),
            lambda completion_ids, **_: rewards(completion_ids),
            args=arguments,
            train_dataset=Dataset.from_dict({"prompt": texts}),
            processing_class=tokenizer,
            callbacks=[Rounds()],
        ).train()


def tunix(clock: Clock) -> None:
    import jax
    import optax
    from flax import nnx
    from tunix.models.llama3.model import Llama3
    from tunix.rl import rl_cluster
    from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
    from tunix.rl.rollout.base_rollout import RolloutConfig

    config = tunix_config()
    tokenizer = words()
    texts = tokenizer.batch_decode(prompt_ids().tolist())

    def batches():
        while True:
            clock.tick()
            yield {"prompts": np.array(texts)}

    def reward(prompts, completions, **_):
        return rewards([tokenizer(text)["input_ids"] for text in completions])

    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        tx = optax.chain(optax.clip_by_global_norm(MAX_GRAD_NORM), optax.adamw(LEARNING_RATE))
        cluster = rl_cluster.RLCluster(
            actor=Llama3(config, rngs=nnx.Rngs(0)),
            tokenizer=tokenizer,
            cluster_config=rl_cluster.ClusterConfig(
                role_to_mesh=dict.fromkeys((rl_cluster.Role.ACTOR, rl_cluster.Role.ROLLOUT), mesh),
                training_config=rl_cluster.RLTrainingConfig(
                    actor_optimizer=tx, eval_every_n_steps=10**6, max_steps=10**6
                ),
                rollout_config=RolloutConfig(
                    max_tokens_to_generate=NEW,
                    max_prompt_length=PROMPT,
                    kv_cache_size=PROMPT + NEW + 8,
                    temperature=1.0,
                    top_p=1.0,
                    eos_tokens=[VOCAB],  # never drawn
                ),
            ),
        )
        learner = GRPOLearner(cluster, GRPOConfig(num_generations=SAMPLES, beta=0.0), reward)
        learner.train(batches())


def words():
    """A tokenizer with one word per id, so that a prompt of 64 ids has 64 words for every side."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = {"<eos>": 0, "<unk>": 1} | {f"w{number}": number for number in range(2, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(names, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>", bos_token="<eos>")
    made.padding_side = "left"
    return made


SIDES = {side.__name__: side for side in (jaxtrain, torch, trl, tunix)}

if __name__ == "__main__":
    SIDES[sys.argv[1]](Clock(int(sys.argv[2])))
