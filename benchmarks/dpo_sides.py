"""The sides of benchmarks/dpo.py, each run in a separate process: the same model, pairs and optimizer.

A pair has a prompt of 128 tokens and two answers of 128. The reference is a second model; each step computes its
log-probabilities. Each side calls `clock.tick()` before a step, once the one before it is done.
"""

from __future__ import annotations

import sys
import tempfile

import numpy as np
from sft_sides import LEARNING_RATE, LLAMA, MAX_GRAD_NORM, TRL_ARGUMENTS, VOCAB, Clock, tunix_config

PAIRS, PROMPT, ANSWER = 8, 128, 128
LENGTH, BETA = PROMPT + ANSWER, 0.1


def pairs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Prompts, chosen and rejected answers."""
    ids = np.random.default_rng(0).integers(2, VOCAB, (PAIRS, PROMPT + 2 * ANSWER)).astype(np.int32)
    return ids[:, :PROMPT], ids[:, PROMPT:LENGTH], ids[:, LENGTH:]


def jaxtrain(clock: Clock) -> None:
    from trainer import Trainer

    from jaxtrain.data.packing import make_row, stack_rows
    from jaxtrain.objectives.preference import DPO
    from jaxtrain.types import SIGN, Example

    tree = {
        "recipe": "preference",
        "model": {"config": LLAMA, "tokenizer": "none", "compute_dtype": "float32", "remat": "none"},
        "data": {"train": {"path": "none"}, "max_length": LENGTH},
        "optimizer": {"learning_rate": LEARNING_RATE, "schedule": "constant", "weight_decay": 0.01},
        "train": {"max_grad_norm": MAX_GRAD_NORM, "batch_size": PAIRS},
    }
    trainer = Trainer(tree, DPO(beta=BETA))
    weights = np.repeat(np.array([0, 1], np.float32), [PROMPT, ANSWER])

    def example(prompt: np.ndarray, answer: np.ndarray, sign: int) -> Example:
        return Example(np.concatenate([prompt, answer]), weights, {SIGN: np.full(LENGTH, sign, np.int32)})

    rows = [  # as recipe preference packs them
        make_row(
            [(example(prompt, chosen, 1), example(prompt, rejected, -1))], PROMPT + 2 * ANSWER, share_prefixes=True
        )
        for prompt, chosen, rejected in zip(*pairs(), strict=True)
    ]
    batch = stack_rows(rows)
    trainer.compile(batch)
    while True:  # what recipes/preference.py does, without a folder to write into
        clock.tick()
        trainer.step(batch)


def torch(clock: Clock) -> None:
    import torch
    from torch.nn.functional import logsigmoid
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**LLAMA)
    config._attn_implementation = "sdpa"
    model = LlamaForCausalLM(config).float()
    reference = LlamaForCausalLM(config).float()
    reference.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    prompts, *answers = (torch.from_numpy(ids).long() for ids in pairs())
    whole = torch.cat([torch.cat([prompts, answer], 1) for answer in answers])

    def log_probabilities(model) -> torch.Tensor:
        logits = model(input_ids=whole, use_cache=False, logits_to_keep=ANSWER + 1).logits[:, :-1]
        return torch.log_softmax(logits, -1).gather(-1, whole[:, PROMPT:, None])[..., 0].sum(1)

    while True:
        clock.tick()
        with torch.inference_mode():
            expected = log_probabilities(reference)
        chosen, rejected = (log_probabilities(model) - expected.clone()).chunk(2)
        loss = -logsigmoid(BETA * (chosen - rejected)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()


def trl(clock: Clock) -> None:
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class Rounds(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            clock.tick()

    vocabulary = {"<eos>": 0, "<pad>": 1} | {str(token): token for token in range(2, VOCAB)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>")

    def text(ids: np.ndarray) -> str:
        return "".join(f"{token} " for token in ids)

    rows = [  # an end of text is added to the answers
        {"prompt": text(prompt), "chosen": text(chosen[1:]), "rejected": text(rejected[1:])}
        for prompt, chosen, rejected in zip(*pairs(), strict=True)
    ]
    config = LlamaConfig(**LLAMA)
    config._attn_implementation = "sdpa"
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).float().save_pretrained(f"{folder}/model")
        arguments = DPOConfig(
            output_dir=folder,
            per_device_train_batch_size=PAIRS,
            max_length=LENGTH,
            beta=BETA,
            **TRL_ARGUMENTS,
        )
        model = LlamaForCausalLM.from_pretrained(f"{folder}/model", dtype="float32", attn_implementation="sdpa")
        reference = LlamaForCausalLM.from_pretrained(f"{folder}/model", dtype="float32", attn_implementation="sdpa")
        trainer = DPOTrainer(
            model,
            reference,
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[Rounds()],
        )
        sides = ("chosen_ids", "rejected_ids")
        lengths = {len(row["prompt_ids"]) + len(row[side]) for row in trainer.train_dataset for side in sides}
        assert lengths == {LENGTH}, lengths
        trainer.train()


def tunix(clock: Clock) -> None:
    import jax
    import optax
    from flax import nnx
    from tunix.models.llama3.model import Llama3
    from tunix.sft.dpo.dpo_trainer import DPOTrainer, DPOTrainingConfig, TrainingInput

    config = tunix_config()
    prompts, chosen, rejected = pairs()
    ones = np.ones_like(prompts), np.ones_like(chosen), np.ones_like(rejected)

    def batches():
        while True:
            jax.block_until_ready(jax.live_arrays())
            clock.tick()
            yield TrainingInput(
                prompt_ids=prompts,
                prompt_mask=ones[0],
                chosen_ids=chosen,
                chosen_mask=ones[1],
                rejected_ids=rejected,
                rejected_mask=ones[2],
            )

    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        tx = optax.chain(optax.clip_by_global_norm(MAX_GRAD_NORM), optax.adamw(LEARNING_RATE))
        policy, reference = (Llama3(config, rngs=nnx.Rngs(0)) for _ in range(2))
        DPOTrainer(policy, reference, tx, DPOTrainingConfig(eval_every_n_steps=10**6, beta=BETA)).train(batches())


SIDES = {side.__name__: side for side in (jaxtrain, torch, trl, tunix)}

if __name__ == "__main__":
    SIDES[sys.argv[1]](Clock(int(sys.argv[2])))
