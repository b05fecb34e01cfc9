"""GSM8K by lm-evaluation-harness: a model served by `jaxtrain serve` beside the same model in transformers.

Usage: python benchmarks/lm_eval.py MODEL GSM8K_FOLDER LM_EVAL_PYTHON [--rows 8]

MODEL is a Hugging Face folder, GSM8K_FOLDER has train.jsonl and test.jsonl, and LM_EVAL_PYTHON is an interpreter with
`lm-eval[api,hf]`. Both sides are float32 and greedy: their answers must be the same texts, and the log-probabilities
of the multiple-choice task the same numbers. RESULTS.md gets both.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from results import machine, write_section

ANSWERS = """\
task: gsm8k_local
dataset_path: json
dataset_kwargs: {{data_files: {{train: {folder}/train.jsonl, test: {folder}/test.jsonl}}}}
output_type: generate_until
training_split: train
fewshot_split: train
test_split: test
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: "{{{{answer}}}}"
num_fewshot: 2
generation_kwargs: {{until: ["Question:", "<|im_end|>"], do_sample: false, max_gen_toks: 96}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
filter_list:
  - name: last-number
    filter: [{{function: regex, group_select: -1, regex_pattern: "(-?[0-9.,]*[0-9])"}}, {{function: take_first}}]
"""
SCORES = """\
task: gsm8k_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/test.jsonl}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: [" 7", " 18", " 36 dollars"]
doc_to_target: 1
metric_list: [{{metric: acc}}]
"""


def evaluate(python: str, model: str, arguments: str, tasks: Path, rows: int, out: Path) -> dict[str, list[Any]]:
    """The responses of each task, in the order of its rows."""
    command = [python, "-m", "lm_eval", "--model", model, "--model_args", arguments, "--include_path", str(tasks)]
    command += ["--tasks", "gsm8k_local,gsm8k_choice", "--limit", str(rows), "--output_path", str(out), "--log_samples"]
    command += ["--device", "cpu"] if model == "hf" else []
    subprocess.run(command, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}, stdout=sys.stderr)
    found = {}
    for task in ("gsm8k_local", "gsm8k_choice"):
        (file,) = out.glob(f"*/samples_{task}_*.jsonl")
        samples = sorted(map(json.loads, file.read_text().splitlines()), key=lambda sample: sample["doc_id"])
        found[task] = [sample["resps"] for sample in samples]
    return found


def wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    while server.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5)
        except OSError:
            time.sleep(1)
        else:
            return
    raise RuntimeError(f"the server ended with exit code {server.returncode}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("gsm8k", type=Path)
    parser.add_argument("lm_eval_python")
    parser.add_argument("--rows", type=int, default=8)
    given = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = Path(__file__).resolve().parent.parent
    serve = [sys.executable, "-m", "jaxtrain.cli", "serve", given.model, "--dtype", "float32", "--port", str(port)]
    with tempfile.TemporaryDirectory() as folder:
        tasks = Path(folder) / "tasks"
        tasks.mkdir()
        for name, text in {"answers": ANSWERS, "scores": SCORES}.items():
            (tasks / f"{name}.yaml").write_text(text.format(folder=given.gsm8k.resolve()))
        server = subprocess.Popen(serve, env=os.environ | {"PYTHONPATH": str(root)})
        try:
            wait_for(f"http://127.0.0.1:{port}/health", server)
            address = f"base_url=http://127.0.0.1:{port}/v1/completions,num_concurrent=4"
            arguments = f"model={Path(given.model).name},{address},tokenizer={given.model},max_length=2048"
            run = (given.lm_eval_python, "local-completions", arguments, tasks, given.rows)
            served = evaluate(*run, Path(folder) / "served")
        finally:
            server.terminate()
            server.wait()
        arguments = f"pretrained={given.model},dtype=float32"
        reference = evaluate(given.lm_eval_python, "hf", arguments, tasks, given.rows, Path(folder) / "transformers")
    same = sum(a == b for a, b in zip(served["gsm8k_local"], reference["gsm8k_local"], strict=True))
    numbers = [
        (float(ours[0][0]), float(theirs[0][0]))
        for mine, others in zip(served["gsm8k_choice"], reference["gsm8k_choice"], strict=True)
        for ours, theirs in zip(mine, others, strict=True)
    ]
    apart = max(abs(ours - theirs) for ours, theirs in numbers)
    text = (
        f"{same} of {given.rows} greedy answers of the served model are the same texts as those of transformers; the "
        f"{len(numbers)} log-probabilities of answers that were given differ by at most {apart:.1e}. "
        f"`jaxtrain serve --dtype float32`, {Path(given.model).name}, two examples in the prompt, up to 96 tokens.\n\n"
        f"{machine('jax')}."
    )
    print(text)
    write_section("lm_eval", "GSM8K by lm-evaluation-harness, served and in transformers", text)


if __name__ == "__main__":
    main()
