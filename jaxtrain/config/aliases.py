"""What users of other frameworks type, and the key and value that mean the same here."""

from __future__ import annotations

from typing import Any

ALIASES = {
    "lr": "optimizer.learning_rate",
    "learning_rate": "optimizer.learning_rate",
    "optim": "optimizer.name",
    "adam_beta1": "optimizer.b1",
    "adam_beta2": "optimizer.b2",
    "adam_epsilon": "optimizer.eps",
    "warmup_steps": "optimizer.warmup_steps",
    "warmup_ratio": "optimizer.warmup_ratio",
    "weight_decay": "optimizer.weight_decay",
    "lr_scheduler_type": "optimizer.schedule",
    "lr_scheduler": "optimizer.schedule",
    "max_steps": "train.steps",
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "steps": "train.steps",
    "batch_size": "train.batch_size",
    "micro_batch_size": "train.batch_size",
    "per_device_train_batch_size": "train.batch_size",
    "gradient_accumulation_steps": "train.microbatches",
    "max_grad_norm": "train.max_grad_norm",
    "max_length": "data.max_length",
    "max_seq_length": "data.max_length",
    "sequence_len": "data.max_length",
    "seq_len": "data.max_length",
    "sample_packing": "data.packing",
    "train_on_inputs": "data.loss_on",
    "assistant_only_loss": "data.loss_on",
    "completion_only_loss": "data.loss_on",
    "dataset_num_proc": "data.processes",
    "dataset": "data.train.path",
    "datasets": "data.train",
    "dataset_name": "data.train.path",
    "train_file": "data.train.path",
    "test_datasets": "data.eval",
    "chat_template_path": "model.chat_template",
    "base_model": "model.path",
    "model_name": "model.path",
    "model_name_or_path": "model.path",
    "output_dir": "run.dir",
    "seed": "run.seed",
    "bf16": "model.compute_dtype",
    "fp16": "model.compute_dtype",
    "load_in_4bit": "model.quantize",
    "load_in_8bit": "model.quantize",
    "gradient_checkpointing": "model.remat",
    "attn_implementation": "model.attention",
    "flash_attention": "model.attention",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "eval_steps": "eval.every",
    "logging_steps": "log.every",
    "report_to": "log.to",
    "tensorboard": "log.to",
    "peft_config": "model.lora",
    "lora_r": "model.lora.rank",
    "lora_alpha": "model.lora.alpha",
    "lora_dropout": "model.lora.dropout",
    "target_modules": "model.lora.targets",
    "lora_target_modules": "model.lora.targets",
    "lora_target_linear": "model.lora.targets",
    "use_rslora": "model.lora.rslora",
    "modules_to_save": "model.lora.modules_to_save",
    "tensor_parallel_size": "mesh.tensor",
    "expert_parallel_size": "mesh.expert",
    "context_parallel_size": "mesh.context",
    "eval_every_n_steps": "eval.every",
    "train_micro_batch_size": "train.batch_size",
    "mini_batch_size": "rl.minibatches",
    "max_tokens_to_generate": "rl.max_completion_length",
    "checkpoint_root_directory": "run.dir",
    "reward_funcs": "rl.rewards",
    "num_generations": "rl.generations",
    "max_completion_length": "rl.max_completion_length",
    "num_iterations": "rl.iterations",
    "loss_type": "objective.name",
    "entropy_coef": "objective.entropy_coefficient",
    "entropy_coeff": "objective.entropy_coefficient",
    "use_bias_correction_kl": "objective.kl_bias_correction",
    "off_policy_mask_threshold": "objective.off_policy_threshold",
    "top_entropy_quantile": "objective.top_entropy",
    "scale_rewards": "rl.algorithm.scale",
}

VALUES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "load_in_4bit": "nf4",
    "load_in_8bit": "int8",
    "gradient_checkpointing": "full",
    "train_on_inputs": "all",
    "assistant_only_loss": "assistant",
    "completion_only_loss": "assistant",
    "lora_target_linear": "[all-linear]",
}
"""Of switches: what `true` there is as the value here."""

_GLOBAL_BATCH = "packed rows of the global batch, over all devices and microbatches"
_REMARKS = {
    "report_to": "a list of tensorboard, wandb, mlflow and trackio",
    "tensorboard": "a list: [tensorboard] or []",
    "micro_batch_size": _GLOBAL_BATCH,
    "train_micro_batch_size": _GLOBAL_BATCH,
    "mini_batch_size": "into how many updates the samples of a step are divided",
    "per_device_train_batch_size": _GLOBAL_BATCH,
    "gradient_accumulation_steps": "pieces in which a batch is computed; its size stays train.batch_size",
}

_RECIPES = {
    **{name.lower(): f"preference, with objective: {name}" for name in ("DPO", "SimPO", "ORPO", "CPO", "KTO")},
    **dict.fromkeys(("rm", "reward_model", "reward_modeling"), "reward"),
    **dict.fromkeys(("gkd", "kd", "distillation"), "distill"),
    **dict.fromkeys(("lora", "qlora"), "sft, with model.lora"),
    **{name: f"rl, with rl.algorithm: {name}" for name in ("grpo", "dr_grpo", "dapo", "gspo", "rloo", "ppo", "cispo")},
}


def remark(name: str) -> str:
    """What to know of the key that means `name`, in parentheses after a space; empty if there is nothing."""
    return f" ({_REMARKS[name]})" if name in _REMARKS else ""


def recipe_hint(given: Any) -> str:
    """The recipe of what is an algorithm or an objective; empty if it is neither."""
    recipe = _RECIPES.get(given.lower()) if isinstance(given, str) else None
    return f"; did you mean {recipe}?" if recipe else ""


def recipe_names() -> list[tuple[str, list[str]]]:
    """Each recipe, with what decides on it, and the names that others have for it."""
    found: dict[str, list[str]] = {}
    for name, recipe in _RECIPES.items():
        found.setdefault(recipe, []).append(name)
    return list(found.items())
