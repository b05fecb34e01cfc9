"""Runs in an interpreter with TRL, torch and datasets: `python trl_side.py FOLDER`, for tests/rl/test_trl.py.

TRL's own trainers reward the given samples, compute advantages, importance weights, loss and gradient, and train a tiny
model for three steps. Only what they would sample, and the log-probabilities of the first part, are given. Writes the
samples, `model/` and the results to FOLDER.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

GROUPS, SAMPLES, VOCAB, LENGTH = 2, 4, 60, 12
EOS, PAD = 1, 0
STEPS, LEARNING_RATE = 3, 1e-3
ADAM_EPSILON = 1e-4  # so that a gradient of nearly 0 makes no step of full size
NUMBERS = ("new", "old", "ref", "sampler", "entropy")

# By name: the arguments of GRPOConfig (or RLOOConfig) and whether some rewards are lost. What jaxtrain has for each is
# in tests/rl/test_trl.py.
PLAIN = {"loss_type": "grpo", "vllm_importance_sampling_correction": False}
LOST = ("grpo", "dr_grpo", "dapo", "gspo", "luspo", "sapo", "vespo", "gdpo", "grpo, cut off samples masked", "rloo")
CASES: dict[str, dict[str, Any]] = {
    "grpo": {},
    "grpo, k3": {"beta": 0.04, "use_bias_correction_kl": False},
    "grpo, k3 times the ratio": {"beta": 0.04},
    "grpo, batch": {"scale_rewards": "batch"},
    "grpo, two-sided": {"delta": 1.3, "epsilon_high": 0.1},
    "grpo, cut off samples masked": {"mask_truncated_completions": True},
    "grpo, off-policy mask": {"off_policy_mask_threshold": 0.05},
    "grpo, top entropy": {"top_entropy_quantile": 0.3, "entropy_coef": 0.1},
    "dapo, entropy bonus": {"loss_type": "dapo", "entropy_coef": 0.1},
    "bnpo": {"loss_type": "bnpo"},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "gspo": {"importance_sampling_level": "sequence", "epsilon": 0.03, "epsilon_high": 0.04},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence", "epsilon": 0.03, "epsilon_high": 0.04},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.2},
    "sapo": {"loss_type": "sapo"},
    "vespo": {"loss_type": "vespo"},
    "gdpo": {"multi_objective_aggregation": "normalize_then_sum"},
    "rloo": {},
} | {
    f"{loss}, {mode}": {
        "loss_type": loss,
        "vllm_importance_sampling_correction": True,
        "vllm_importance_sampling_mode": mode,
        "vllm_importance_sampling_clip_max": 1.1,
        "vllm_importance_sampling_clip_min": 0.9,
    }
    for loss, modes in (
        ("dapo", ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")),
        ("vespo", ("token_truncate",)),
    )
    for mode in modes
}
RUNS = ("grpo, k3 times the ratio", "dr_grpo", "dapo", "gspo", "cispo", "sapo", "vespo", "rloo")


def make_samples(name: str, lost: bool) -> list[dict[str, Any]]:
    """The samples of a case, groups contiguous: ids, masks of the model's tokens, scores, rewards (None: lost)."""
    rng = np.random.default_rng(7)
    samples = []
    for index in range(GROUPS * SAMPLES):
        if index % SAMPLES == 0:
            prompt = rng.integers(3, VOCAB, int(rng.integers(2, 6))).tolist()
        length = int(rng.integers(3, LENGTH + 1))
        ids = rng.integers(3, VOCAB, length).tolist()
        cut_off = index in (2, 5)
        mask = np.ones(length, int)
        if index in (1, 6) and name != "rloo":  # whose trainer has no masks of tools
            mask[1 : length // 2 + 1] = 0  # written by a tool
        old = -rng.random(length) * 2 - 0.05
        given = {"old": old, "new": old + rng.normal(0, 0.2, length), "ref": old + rng.normal(0, 0.2, length)}
        given |= {"sampler": old + rng.normal(0, 0.1, length), "entropy": rng.random(length) * 2}
        rewards = [float(rng.integers(0, 3)), round(float(rng.random()), 2)]
        samples.append(
            {"prompt": prompt, "ids": ids if cut_off else [*ids[:-1], EOS], "mask": mask.tolist(), "cut_off": cut_off}
            | {name: values.astype(np.float32).tolist() for name, values in given.items()}
            | {"rewards": [None, None] if lost and index in (3, 4) else rewards}
        )
    return samples


def make_model(folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w2"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w1", pad_token="w0").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.3,
        eos_token_id=EOS,
        pad_token_id=PAD,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).float().save_pretrained(folder)


def make_trainer(model: Path, name: str, samples: list[dict[str, Any]], output: str, **more: Any) -> Any:
    """TRL's trainer, which draws the given samples."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    tokenizer, network = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    rloo = name == "rloo"
    arguments: dict[str, Any] = {
        "output_dir": output,
        "per_device_train_batch_size": len(samples),
        "num_generations": SAMPLES,
        "max_completion_length": LENGTH,
        "num_iterations": STEPS,
        "max_steps": STEPS,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "weight_decay": 0.0,
        "adam_epsilon": ADAM_EPSILON,
        "max_grad_norm": 1e9,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "shuffle_dataset": False,
        "reward_weights": [1.0, 0.5],
    }
    arguments |= CASES[name] if rloo else PLAIN | CASES[name]

    def first(completions: Any, **_: Any) -> list[float | None]:
        return [sample["rewards"][0] for sample in samples]

    def second(completions: Any, **_: Any) -> list[float | None]:
        return [sample["rewards"][1] for sample in samples]

    trainer: Any = (RLOOTrainer if rloo else GRPOTrainer)(
        model=network,
        reward_funcs=[first, second],
        args=(RLOOConfig if rloo else GRPOConfig)(**arguments | more),
        train_dataset=Dataset.from_list([{"prompt": f"w{3 + group}"} for group in range(GROUPS)]),
        processing_class=tokenizer,
    )

    def generate(prompts: Any) -> Any:
        # As TRL's own `_generate`, which takes a model's or vLLM's output.
        drawn = [s["prompt"] for s in samples], [s["ids"] for s in samples]
        texts = tokenizer.batch_decode(drawn[1])
        if rloo:
            return *drawn, texts
        masks = [s["mask"] for s in samples]
        return *drawn, masks, texts, [s["sampler"] for s in samples], {}, None, []

    trainer._generate = generate
    return trainer


def one_loss(model: Path, name: str, samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Loss, gradient by the log-probabilities and entropies, advantages and metrics, at the given scores."""
    import torch

    with tempfile.TemporaryDirectory() as output:
        trainer = make_trainer(model, name, samples, output)
    width = max(len(sample["ids"]) for sample in samples)
    scores = {
        kind: torch.tensor([sample[kind] + [0.0] * (width - len(sample["ids"])) for sample in samples])
        for kind in NUMBERS
    }
    scores["new"].requires_grad_()
    scores["entropy"].requires_grad_()

    def given(of: Any, *args: Any, **kwargs: Any) -> Any:
        reference = trainer.beta and of is trainer.ref_model
        kind = "ref" if reference else "new" if torch.is_grad_enabled() else "old"
        return scores[kind], scores["entropy"], None

    trainer._get_per_token_logps_and_entropies = given
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    if name != "rloo":
        trainer.use_vllm = trainer.vllm_importance_sampling_correction  # so that the weights are computed
    rows = [{"prompt": "w3"}] * len(samples)
    inputs = trainer._generate_and_score_completions(rows)
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    gradients = {}
    for kind in ("new", "entropy"):
        gradient = scores[kind].grad
        rows = torch.zeros_like(scores[kind]) if gradient is None else gradient
        gradients[kind] = [row[: len(s["ids"])].tolist() for row, s in zip(rows, samples, strict=True)]
    metrics = {key: values[-1] for key, values in trainer._metrics["train"].items()}
    return {
        "loss": loss.item(),
        "gradient": gradients["new"],
        "entropy_gradient": gradients["entropy"],
        "advantages": inputs["advantages"].tolist(),
        "metrics": metrics,
    }


def trained(model: Path, name: str, samples: list[dict[str, Any]], output: Path) -> None:
    """Three steps of TRL's own training loop on the samples; the model goes to `output`."""
    trainer = make_trainer(model, name, samples, str(output))
    trainer.train()
    trainer.model.save_pretrained(output)


def main() -> None:
    folder = Path(sys.argv[1])
    make_model(folder / "model")
    results = {}
    for name in CASES:
        for lost in (False, True) if name in LOST else (False,):
            key = f"{name}, lost" if lost else name
            results[key] = one_loss(folder / "model", name, make_samples(name, lost))
    for name in RUNS:
        trained(folder / "model", name, make_samples(name, False), folder / name)
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
