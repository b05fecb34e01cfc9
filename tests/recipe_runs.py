"""Short runs of all recipes in this process, and what a run leaves in its folder."""

import random
import shutil
from pathlib import Path
from typing import Any

import commands
import numpy as np
import yaml

from converters.tokenizer import write_byte_tokenizer
from jaxtrain.config import load_config
from jaxtrain.data.arithmetic import write_arithmetic, write_arithmetic_pairs
from jaxtrain.recipes.run import run
from jaxtrain.session.folder import checkpoint_steps
from jaxtrain.session.record import CHECKPOINTS, checkpoint_folder, read_metrics
from jaxtrain.train.checkpoint import Checkpoints

STEPS = 6
CLOCKS = ("seconds", "time", "per_second", "memory", "mfu", "goodput", "engine")
RL = {
    "prompts": 4,
    "generations": 4,
    "max_completion_length": 8,
    "rewards": [{"function": f"{Path(__file__).parent / 'recipes' / 'digits.py'}:digits"}],
    "reward_workers": 1,
    "slots": 16,
}
TEACHER = {
    "vocab_size": 300,  # padded differently than the student's 259
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}


def model_section(folder: Path) -> dict[str, Any]:
    """A tiny model with random weights and the tokenizer in `folder`."""
    return {
        "config": commands.MODEL | {"max_position_embeddings": 128},
        "tokenizer": str(folder / "tokenizer"),
        "compute_dtype": "float32",
        "remat": "none",
    }


def prepare(folder: Path, recipe: str = "preference") -> Path:
    """Write run.yaml, its data, a tokenizer, and for recipe distill a teacher."""
    write_byte_tokenizer(folder / "tokenizer")
    write = write_arithmetic_pairs if recipe in ("preference", "reward") else write_arithmetic
    files = write(folder, train_rows=40, eval_rows=10, seed=0)
    config = {
        "recipe": recipe,
        "run": {"dir": str(folder / "whole")},
        "model": model_section(folder),
        "data": {"train": {"path": str(files.train)}, "eval": {"path": str(files.eval)}, "max_length": 96},
        "train": {"steps": STEPS, "batch_size": 8},
        "optimizer": {"learning_rate": 1e-2, "schedule": "constant"},
        "checkpoint": {"every": 2, "keep": 10},
        "eval": {"every": 2 if recipe == "distill" else 3},
        "log": {"every": 1, "to": []},
    }
    if recipe == "distill":
        write_teacher(folder / "teacher")
        config["teacher"] = {"path": str(folder / "teacher")}
    if recipe == "rl":
        # A larger eps than the default: Adam makes whole updates of gradients that are zero but for rounding.
        optimizer = {"learning_rate": 1e-2, "schedule": "constant", "eps": 1e-3}
        config |= {"train": {"steps": 4}, "rl": RL, "optimizer": optimizer, "checkpoint": {"every": 1, "keep": 10}}
        config["data"] = {"train": {"path": str(files.train)}, "max_length": 48}
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder


def rl_tree(folder: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """The config of a run of recipe rl in `folder`, whose data and tokenizer are written there, and where
    `sections` differ from it in some keys."""
    if not (folder / "tokenizer").exists():
        write_byte_tokenizer(folder / "tokenizer")
        write_arithmetic(folder, train_rows=64, eval_rows=8, seed=0)
    tree: dict[str, Any] = {
        "recipe": "rl",
        "run": {"dir": str(folder / "run")},
        "model": model_section(folder),
        "data": {"train": {"path": str(folder / "train.jsonl")}, "max_length": 48},
        "train": {"steps": 4},
        "optimizer": {"learning_rate": 0.02, "schedule": "constant"},
        "checkpoint": {"every": 1, "keep": 10},
        "log": {"every": 1, "to": []},
        "rl": dict(RL),
    }
    return tree | {name: tree.get(name, {}) | section for name, section in sections.items()}


def write_teacher(folder: Path, **changes: float) -> None:
    """A random Qwen3 model of another family, width and vocabulary size than the student, with the byte tokenizer."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(**TEACHER | changes)).save_pretrained(folder)
    write_byte_tokenizer(folder)


def prepare_stages(folder: Path) -> Path:
    """As `prepare`, with a file of two stages."""
    prepare(folder)
    files = write_arithmetic(folder / "worked", train_rows=40, eval_rows=10, seed=1)
    whole = yaml.safe_load((folder / "run.yaml").read_text())
    shared = {key: whole[key] for key in ("model", "optimizer", "checkpoint", "log")}
    worked = {"train": {"path": str(files.train)}, "eval": {"path": str(files.eval)}, "max_length": 96}
    tree = shared | {
        "run": {"dir": str(folder / "pipeline")},
        "train": {"steps": 4, "batch_size": 8},
        "eval": {"every": 2},
        "stages": [
            {"name": "sft", "recipe": "sft", "data": worked},
            {"name": "dpo", "recipe": "preference", "data": whole["data"], "train": {"steps": 6}},
        ],
    }
    (folder / "stages.yaml").write_text(yaml.safe_dump(tree))
    return folder


def train(place: Path, name: str, *overrides: str) -> list[dict[str, Any]]:
    """The log of a run in this process."""
    run(load_config(place / "run.yaml", [f"run.dir={place / name}", *overrides]))
    return read_metrics(place / name)


def losses(lines: list[dict[str, Any]], key: str = "loss") -> np.ndarray:
    return np.array([line[key] for line in lines if key in line])


def logged(run: Path) -> list[dict[str, Any]]:
    """The log of a run without what a clock has measured."""
    return [{k: v for k, v in line.items() if not any(word in k for word in CLOCKS)} for line in read_metrics(run)]


def checksums(run: Path) -> dict[str, str]:
    """Checksums of every leaf in the newest checkpoint."""
    with Checkpoints(checkpoint_folder(run), 1, 1) as checkpoints:
        return checkpoints._read_record(checkpoint_steps(run)[-1])["checksums"]


def killed_copy(whole: Path, copy: Path, step: int | None = None) -> None:
    """What a kill leaves of a complete run: checkpoints up to `step`, by default a random one, and a longer log."""
    shutil.copytree(whole, copy)
    steps = checkpoint_steps(whole)
    step = random.choice(steps[:-1]) if step is None else step
    for later in steps[steps.index(step) + 1 :]:
        shutil.rmtree(copy / CHECKPOINTS / str(later))


def check_killed_copy_goes_on(place: Path) -> None:
    """A run goes on from what a kill leaves as if uninterrupted; tests/test_kill_campaign.py kills real processes."""
    killed_copy(place / "whole", place / "killed")
    train(place, "killed")
    assert logged(place / "killed") == logged(place / "whole")
    assert checksums(place / "killed") == checksums(place / "whole")
