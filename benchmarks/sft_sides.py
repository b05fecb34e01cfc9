"""The sides of benchmarks/sft.py, each run in a separate process: the same model, batch and optimizer.

Each side calls `clock.tick()` before every step, once the steps before it are done; the parent starts the rounds.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from typing import Any

import numpy as np

ROWS, LENGTH, VOCAB = 8, 512, 32_000
LEARNING_RATE, MAX_GRAD_NORM = 1e-4, 1.0
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
}
MARK = "@@"


class Clock:
    """Rounds of `steps` steps, each started by a line "go" on stdin; its seconds are printed to stdout."""

    def __init__(self, steps: int):
        self.steps, self.left = steps, 0
        self.wall = self.cpu = 0.0

    def tick(self) -> None:
        """Call it before a step. Raises SystemExit when the parent has no more rounds."""
        if self.left == 0:
            if self.wall:
                self.say(seconds=time.perf_counter() - self.wall, cpu=time.process_time() - self.cpu)
            if sys.stdin.readline().strip() != "go":
                # Kilobytes on Linux.
                self.say(peak_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
                raise SystemExit(0)
            self.left = self.steps
            self.wall, self.cpu = time.perf_counter(), time.process_time()
        self.left -= 1

    @staticmethod
    def say(**values: float) -> None:
        print(MARK + json.dumps(values), flush=True)


TRL_ARGUMENTS: dict[str, Any] = {  # of every trainer
    "max_steps": 10**6,
    "learning_rate": LEARNING_RATE,
    "max_grad_norm": MAX_GRAD_NORM,
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


def token_ids() -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32)


def jaxtrain(clock: Clock) -> None:
    from trainer import trained_role

    from jaxtrain.config import parse_config
    from jaxtrain.objectives.sft import SFT
    from jaxtrain.types import Batch

    tree = {
        "recipe": "sft",
        "model": {"config": LLAMA, "tokenizer": "none", "compute_dtype": "float32", "remat": "none"},
        "data": {"train": {"path": "none"}},
        "optimizer": {"learning_rate": LEARNING_RATE, "schedule": "constant", "weight_decay": 0.01},
        "train": {"max_grad_norm": MAX_GRAD_NORM},
    }
    role = trained_role(parse_config(tree, "benchmark"), SFT())
    weights = np.ones((ROWS, LENGTH), np.float32)
    weights[:, 0] = 0
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    host = Batch(token_ids(), positions, np.ones((ROWS, LENGTH), np.int32), weights)
    while True:
        clock.tick()
        report = role.update(role.place(host))
        float(report.means["loss"].value)


def torch(clock: Clock) -> None:
    import torch

    model = _llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    ids = torch.from_numpy(token_ids()).long()
    while True:
        clock.tick()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()


def trl(clock: Clock) -> None:
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Rounds(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            clock.tick()

    words = Tokenizer(models.WordLevel({"<eos>": 0, "<unk>": 1}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>")
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=ROWS,
            max_length=LENGTH,
            **TRL_ARGUMENTS,
        )
        data = Dataset.from_dict({"input_ids": token_ids().tolist()})
        SFTTrainer(_llama(), arguments, train_dataset=data, processing_class=tokenizer, callbacks=[Rounds()]).train()


def tunix_config():
    """The benchmark's model in Tunix."""
    from tunix.models.llama3.model import ModelConfig

    return ModelConfig(
        num_layers=LLAMA["num_hidden_layers"],
        vocab_size=VOCAB,
        embed_dim=LLAMA["hidden_size"],
        hidden_dim=LLAMA["intermediate_size"],
        num_heads=LLAMA["num_attention_heads"],
        head_dim=LLAMA["head_dim"],
        num_kv_heads=LLAMA["num_key_value_heads"],
        rope_theta=10_000,
        norm_eps=LLAMA["rms_norm_eps"],
        weight_tying=True,
    )


def tunix(clock: Clock) -> None:
    import jax
    import optax
    from flax import nnx
    from tunix.models.llama3.model import Llama3
    from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig, TrainingInput

    config = tunix_config()
    causal = np.tril(np.ones((LENGTH, LENGTH), bool))[None].repeat(ROWS, 0)
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))

    def batches():
        while True:
            jax.block_until_ready(jax.live_arrays())
            clock.tick()
            yield TrainingInput(input_tokens=token_ids(), input_mask=np.ones((ROWS, LENGTH), np.int32))

    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        tx = optax.chain(optax.clip_by_global_norm(MAX_GRAD_NORM), optax.adamw(LEARNING_RATE))
        trainer = PeftTrainer(Llama3(config, rngs=nnx.Rngs(0)), tx, TrainingConfig(eval_every_n_steps=10**6))
        trainer = trainer.with_gen_model_input_fn(
            lambda each: {
                "input_tokens": each.input_tokens,
                "input_mask": each.input_mask,
                "positions": positions,
                "attention_mask": causal,
            }
        )
        trainer.train(batches())


def _llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**LLAMA)
    config._attn_implementation = "sdpa"
    return LlamaForCausalLM(config).float().train()


SIDES = {side.__name__: side for side in (jaxtrain, torch, trl, tunix)}

if __name__ == "__main__":
    SIDES[sys.argv[1]](Clock(int(sys.argv[2])))
