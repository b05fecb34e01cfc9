"""The losses of the first steps on the same rows, here and in TRL's SFTTrainer, where both define the mask alike.

Usage: python benchmarks/losses.py [--trl-python PYTHON]

A Llama of random weights, float32, AdamW at a constant rate, batches of 4 rows that are not packed, 3 steps: the losses
must agree to 1e-5 relative in every case. `--trl-python` is an interpreter that has TRL, torch and datasets. Writes its
section of benchmarks/RESULTS.md and exits with 1 where a loss differs.

Left out is what TRL trains otherwise: of conversations as prompt and completion it also trains what the template writes
after the end-of-turn token, such as the line break after `<|im_end|>`; of rows with both `labels` and masks it reads
the labels alone, where jaxtrain trains a token that all of them select.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from results import machine, write_section

ROWS, STEPS, LENGTH = 4, 3, 96
LEARNING_RATE, TOLERANCE = 1e-3, 1e-5
SPECIAL = ("<pad>", "<eos>", "<user>", "<assistant>", "<end>")
CHAT = (  # nothing is written after the end of a turn
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<assistant>' }}{% generation %}{{ m.content + '<end>' }}"
    "{% endgeneration %}{% else %}{{ '<user>' + m.content + '<end>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
SENTENCE = "the model learns what a token costs and how long an answer may become when nobody reads it twice"


def cases() -> dict[str, dict[str, Any]]:
    """By name: `rows`, and what differs in the `data` of jaxtrain and the `SFTConfig` of TRL."""
    rng = random.Random(0)

    def words(least: int, most: int) -> str:
        return " ".join(rng.choice(SENTENCE.split()) for _ in range(rng.randint(least, most)))

    def chat(turns: int, longest: int = 8) -> list[dict[str, str]]:
        roles = ("user", "assistant") * turns
        return [{"role": role, "content": words(1, longest)} for role in roles]

    def rows(make: Any) -> list[dict[str, Any]]:
        return [make() for _ in range(ROWS * STEPS)]

    def ids() -> dict[str, Any]:
        found = [rng.randrange(10, 200) for _ in range(rng.randint(4, 60))]
        mask = [int(rng.random() < 0.6) for _ in found[:-1]]
        return {"input_ids": found, "completion_mask": [*mask, 1]}

    def labelled() -> dict[str, Any]:
        row = ids()
        mask = row.pop("completion_mask")
        return row | {"labels": [token if one else -100 for token, one in zip(row["input_ids"], mask, strict=True)]}

    def split(messages: list[dict[str, str]]) -> dict[str, Any]:
        return {"prompt": messages[:-1], "completion": messages[-1:]}

    kept = {"data": {"overlong": "keep_completion"}, "trl": {"truncation_mode": "keep_end"}}
    return {
        "text": {"rows": rows(lambda: {"text": words(5, 20)})},
        "prompt and completion, plain": {
            "rows": rows(lambda: {"prompt": words(2, 10), "completion": " " + words(1, 8)}),
            "data": {"prompt_format": "plain"},
        },
        "prompt and completion, messages": {"rows": rows(lambda: split(chat(2)))},
        "messages, the assistant's turns": {
            "rows": rows(lambda: {"messages": chat(3, 4)}),
            "trl": {"assistant_only_loss": True},
        },
        "messages, everything": {"rows": rows(lambda: {"messages": chat(2)}), "data": {"loss_on": "all"}},
        "input_ids and labels": {"rows": rows(labelled)},
        "input_ids and completion_mask": {"rows": rows(ids), "trl": {"completion_only_loss": True}},
        "prompts cut from the left": {"rows": rows(lambda: split([*chat(3, 25)[:-1], chat(1, 20)[1]]))} | kept,
    }


def make_model(folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([SENTENCE] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>", chat_template=CHAT
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).float().save_pretrained(folder)


def ours(folder: Path, case: dict[str, Any], mesh: dict[str, Any] | None = None) -> list[float]:
    import jaxtrain as jt

    data = {
        "train": {"rows": case["rows"]},
        "max_length": LENGTH,
        "packing": False,
        "shuffle": False,
        "virtual_shards": 1,
        **case.get("data", {}),
    }
    tree = {
        "recipe": "sft",
        "model": {"path": str(folder), "compute_dtype": "float32"},
        "data": data,
        "train": {"steps": STEPS, "batch_size": ROWS},
        "mesh": mesh or {},
        "optimizer": {"learning_rate": LEARNING_RATE, "schedule": "constant"},
    }
    with tempfile.TemporaryDirectory() as runs:
        tree["run"] = {"dir": f"{runs}/run"}
        with jt.Session.open(jt.parse_config(tree)) as session:
            policy = session.trained_role("policy", jt.objectives.SFT())
            batches = session.training_data(policy)
            session.restore(policy, data=batches)
            losses = []
            for batch in session.steps(batches):
                report = policy.update(batch)
                losses.append(float(report.means["loss"].value))
                session.report(policy=report)
            assert batches.stats["prompt_truncated"] or "overlong" not in data, "no prompt is too long"
    return losses


def trl(folder: Path, case: dict[str, Any]) -> list[float]:
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    losses = []

    class InOrder(SFTTrainer):
        def _get_train_sampler(self, dataset=None):
            return SequentialSampler(self.train_dataset)

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            losses.append(loss.item())
            return loss

    with tempfile.TemporaryDirectory() as output:
        arguments = SFTConfig(
            output_dir=output,
            per_device_train_batch_size=ROWS,
            max_steps=STEPS,
            max_length=LENGTH,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            optim="adamw_torch",
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **case.get("trl", {}),
        )
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        InOrder(model, arguments, train_dataset=Dataset.from_list(case["rows"]), processing_class=tokenizer).train()
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", default=sys.executable, help="an interpreter that has trl, torch and datasets")
    parser.add_argument("--trl-side", metavar="FOLDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.trl_side:
        folder = Path(arguments.trl_side)
        found = {name: trl(folder, case) for name, case in cases().items()}
        (folder / "losses.json").write_text(json.dumps(found))
        return

    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder)
        subprocess.run([arguments.trl_python, __file__, "--trl-side", name], check=True, stdout=subprocess.DEVNULL)
        theirs = json.loads((folder / "losses.json").read_text())
        here = {name: ours(folder, case) for name, case in cases().items()}

    lines = ["| rows | losses of 3 steps | largest relative difference from TRL's |", "|---|---|---|"]
    worst = 0.0
    for name, losses in here.items():
        pairs = zip(losses, theirs[name], strict=True)
        difference = max(abs(one - other) / abs(other) for one, other in pairs)
        worst = max(worst, difference)
        lines.append(f"| {name} | {' '.join(f'{loss:.4f}' for loss in losses)} | {difference:.1e} |")
    text = "\n".join([*lines, "", machine("jax", "transformers") + "."])
    print(text)
    write_section("losses", "The first losses beside TRL's, on the same rows", text)
    if worst > TOLERANCE:
        raise SystemExit(f"a loss differs by {worst:.1e}, more than {TOLERANCE:g}")


if __name__ == "__main__":
    main()
