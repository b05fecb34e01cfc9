"""The quickstart: everything from nothing. Data and tokenizer are made, a model learns, is exported and is asked."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from converters.import_hf import import_params, read_config
from converters.tokenizer import load_tokenizer, write_byte_tokenizer
from jaxtrain.config import RunConfig, SourceSection
from jaxtrain.data.arithmetic import write_arithmetic
from jaxtrain.data.formats import Encoder
from jaxtrain.nn.model import Model
from jaxtrain.recipes import rl, sft
from jaxtrain.sample.engine import Engine
from jaxtrain.sample.requests import Request, SamplingParams
from jaxtrain.session.export import export_run
from jaxtrain.session.record import read_metrics

QUESTION = "What is 47 + 38?"
_TRAIN_ROWS, _EVAL_ROWS = 6000, 300
_NEW_TOKENS = 48
# The first model, before reinforcement, sees few problems often: it is sure of what it knows. One that sees many
# briefly is as good when greedy, but its samples are hardly ever right. It is the first of its run's checkpoints that
# gets such a share of the others right: what the last one gets depends on rounding.
_FIRST_ROWS, _FIRST_STEPS, _FIRST_EVERY, _FIRST_SHARE = 300, 500, 25, 0.45


def run(config: RunConfig) -> int:
    """Make what `config` names, train, export, load the export with what is installed and ask it a question.

    Returns the exit code. Starts over each time: an older run of the quickstart is removed.
    """
    data, folder = config.data.train, Path(config.run.dir)
    if isinstance(data, list) or config.model.tokenizer is None:
        raise ValueError("the quickstart needs one data.train.path and a model.tokenizer to write to")
    shutil.rmtree(folder, ignore_errors=True)
    write_byte_tokenizer(config.model.tokenizer)
    write_arithmetic(Path(data.path).parent, _TRAIN_ROWS, _EVAL_ROWS, config.run.seed)

    outcome = sft.run(config)
    if outcome.exit_code:
        return outcome.exit_code
    export = folder / "export"
    export_run(folder, export)
    print(f"\nheld-out exact match: {outcome.metrics['eval_exact_match']:.1%}")
    library, answer = ask(export, QUESTION)
    print(f"exported to {export}, which {library} loads and answers from:\n  {QUESTION}\n  {answer}")
    return 0


def run_rl(config: RunConfig, first: RunConfig) -> int:
    """Train a first model on a few worked problems as `first` says, export it, and go on with reinforcement.

    It is exported to `config.model.path`; one that is there already is kept, so that several algorithms begin alike.
    All else starts over each time. Returns the exit code.
    """
    model, data, folder = config.model.path, config.data.train, Path(config.run.dir)
    if isinstance(data, list) or model is None:
        raise ValueError("the quickstart needs one data.train.path and a model.path to write to")
    shutil.rmtree(folder, ignore_errors=True)
    home = Path(data.path).parent
    if not Path(model).exists():
        files = write_arithmetic(home, _TRAIN_ROWS, _EVAL_ROWS, 0)
        tokenizer = home / "tokenizer"
        write_byte_tokenizer(tokenizer)
        shutil.rmtree(home / "first", ignore_errors=True)
        worked = home / "worked.jsonl"  # the others are only asked
        worked.write_text("".join(files.train.read_text().splitlines(keepends=True)[:_FIRST_ROWS]))
        changes = {
            "run": first.run.model_copy(update={"dir": str(home / "first")}),
            "model": first.model.model_copy(update={"tokenizer": str(tokenizer)}),
            "data": first.data.model_copy(
                update={
                    "train": SourceSection(path=str(worked)),
                    "eval": SourceSection(path=str(files.eval)),
                }
            ),
            "train": first.train.model_copy(update={"steps": _FIRST_STEPS}),
            "eval": first.eval.model_copy(update={"every": _FIRST_EVERY, "generate": config.eval.generate}),
            "checkpoint": first.checkpoint.model_copy(
                update={"every": _FIRST_EVERY, "keep": _FIRST_STEPS // _FIRST_EVERY}
            ),
        }
        outcome = sft.run(first.model_copy(update=changes))
        if outcome.exit_code:
            return outcome.exit_code
        step, share = first_with(home / "first", _FIRST_SHARE)
        export_run(home / "first", Path(model), step=step)
        print(f"\nthe first model is that of step {step}, held-out exact match: {share:.1%}\n")
    outcome = rl.run(config)
    if outcome.exit_code == 0:
        print(f"\nheld-out answers that are right: {outcome.metrics['eval_rewards/exact_answer']:.1%}")
    return outcome.exit_code


def first_with(run: Path, share: float) -> tuple[int, float]:
    """The first evaluated step of a run with so many exact matches, or the last of all, and how many it has."""
    matches = {line["step"]: line["eval_exact_match"] for line in read_metrics(run) if "eval_exact_match" in line}
    step = next((step for step, match in matches.items() if match >= share), max(matches))
    return step, matches[step]


def ask(folder: Path, question: str) -> tuple[str, str]:
    """Who answered (transformers, if it has torch to run on; else jaxtrain) and the greedy answer."""
    tokenizer = load_tokenizer(folder)
    prompt = Encoder(tokenizer).prompt({"prompt": question, "completion": "?"}).input_ids
    has_torch = importlib.util.find_spec("torch") is not None
    reply = _with_transformers(folder, prompt) if has_torch else _with_jaxtrain(folder, prompt, tokenizer)
    (text,) = tokenizer.batch_decode([reply], skip_special_tokens=True)
    return "transformers" if has_torch else "jaxtrain", text


def _with_transformers(folder: Path, prompt: np.ndarray) -> list[int]:
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor(prompt[None].tolist())
    output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=_NEW_TOKENS)
    return output[0, len(prompt) :].tolist()


def _with_jaxtrain(folder: Path, prompt: np.ndarray, tokenizer: Any) -> list[int]:
    config, _ = read_config(folder)
    model = Model(config)
    params = import_params(folder, config, model.abstract())
    engine = Engine(model, params, slots=1, max_length=len(prompt) + _NEW_TOKENS)
    greedy = SamplingParams(max_tokens=_NEW_TOKENS, temperature=0, stop_ids=[tokenizer.eos_token_id])
    ((completion,),) = engine.generate([Request(prompt, greedy)])
    return completion.ids.tolist()
