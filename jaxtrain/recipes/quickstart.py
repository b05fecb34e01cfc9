"""The quickstart: everything from nothing. Data and tokenizer are made, a model learns, is exported and is asked."""

from __future__ import annotations

import importlib
import importlib.resources
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from converters.export_hf import TOKENIZER_FILES
from converters.import_hf import import_params, read_config
from converters.tokenizer import load_tokenizer, write_byte_tokenizer
from jaxtrain.config import RunConfig, SourceSection, load_config
from jaxtrain.config.given import import_path
from jaxtrain.data.arithmetic import write_arithmetic
from jaxtrain.data.formats import Encoder
from jaxtrain.nn.model import Model
from jaxtrain.recipes import rl, sft
from jaxtrain.recipes.made_files import EXPORT, in_the_way, in_the_way_of_run, making, making_run
from jaxtrain.sample.engine import Engine
from jaxtrain.sample.requests import Request, SamplingParams
from jaxtrain.session.export import export_run
from jaxtrain.session.record import read_metrics

QUESTION = "What is 47 + 38?"
CONFIGS = "configs"
_DATA_FILES = ("train.jsonl", "eval.jsonl")
_TRAIN_ROWS, _EVAL_ROWS = 6000, 300
_NEW_TOKENS = 48
# The first model, before reinforcement, sees few problems often: it is sure of what it knows. One that sees many
# briefly is as good when greedy, but its samples are hardly ever right. It is the first of its run's checkpoints that
# gets such a share of the others right: what the last one gets depends on rounding.
_FIRST_ROWS, _FIRST_STEPS, _FIRST_EVERY, _FIRST_SHARE = 300, 500, 25, 0.45


def load_quickstart(path: Path, overrides: list[str] | None = None) -> RunConfig:
    """The config in `path`. A path that begins with `configs/` and does not exist here is that of a file shipped with
    jaxtrain; so is a file of rewards which such a config names.
    """
    shipped = _shipped(path)
    if shipped is None:
        return load_config(path, overrides)
    config = load_config(shipped, overrides)
    if config.rl is None:
        return config
    rewards = []
    for reward in config.rl.rewards:
        file, _, name = import_path(reward.function).rpartition(":")
        found = _shipped(Path(file))
        rewards.append(reward.model_copy(update={"function": f"{found}:{name}"}) if found is not None else reward)
    return config.model_copy(update={"rl": config.rl.model_copy(update={"rewards": rewards})})


def _shipped(path: Path) -> Path | None:
    """The file that jaxtrain ships under this path, unless there is one in the working directory."""
    if path.exists() or path.parts[:1] != (CONFIGS,):
        return None
    package = Path(str(importlib.resources.files("jaxtrain")))
    # A wheel has the configs inside of the package, a checkout beside it.
    home = package if (package / CONFIGS).is_dir() else package.parent
    return home / path if (home / path).is_file() else None


def run(config: RunConfig) -> int:
    """Make what `config` names, train, export, load the export with what is installed and ask it a question.

    Returns the exit code. Starts over each time: an older run of the quickstart is removed. Raises ValueError, before
    anything is touched, where something is in the way that no quickstart made.
    """
    folder, home = Path(config.run.dir), _data_home(config)
    if config.model.tokenizer is None:
        raise ValueError("the quickstart needs a model.tokenizer to write to")
    tokenizer = Path(config.model.tokenizer)
    _check_apart(folder, tokenizer, home)
    _refuse([*in_the_way_of_run(folder), *in_the_way(tokenizer), *in_the_way(home, _DATA_FILES)])
    if not config.eval.generate:
        raise ValueError("the quickstart reports how many held-out answers are right: it needs eval.generate")
    with making_run(folder):
        _write_tokenizer(tokenizer)
        with making(home, _DATA_FILES):
            write_arithmetic(home, _TRAIN_ROWS, _EVAL_ROWS, config.run.seed)

        outcome = sft.run(config)
        if outcome.exit_code:
            return outcome.exit_code
        export = folder / EXPORT
        export_run(folder, export)
    print(f"\nheld-out exact match: {outcome.metrics['eval_exact_match']:.1%}")
    library, answer = ask(export, QUESTION)
    print(f"exported to {export}, which {library} loads and answers from:\n  {QUESTION}\n  {answer}")
    return 0


def run_rl(config: RunConfig, first: RunConfig) -> int:
    """Train a first model on a few worked problems as `first` says, export it, and go on with reinforcement.

    It is exported to `config.model.path`; one that is there already is kept, so that several algorithms begin alike.
    All else starts over each time. Returns the exit code. Raises ValueError, before anything is touched, where
    something is in the way that no quickstart made.
    """
    model, folder, home = config.model.path, Path(config.run.dir), _data_home(config)
    if model is None:
        raise ValueError("the quickstart needs a model.path to write its first model to")
    tokenizer, worked = home / "tokenizer", home / "worked.jsonl"  # of the rows not in it only the questions are used
    _check_apart(folder, Path(model), home)
    first_missing = not Path(model).exists()
    names = (*_DATA_FILES, worked.name)
    others = [*in_the_way_of_run(home / "first"), *in_the_way(tokenizer), *in_the_way(home, names)]
    _refuse([*in_the_way_of_run(folder), *(others if first_missing else [])])
    with making_run(folder):
        if first_missing:
            with making(home, names):
                files = write_arithmetic(home, _TRAIN_ROWS, _EVAL_ROWS, 0)
                worked.write_text("".join(files.train.read_text().splitlines(keepends=True)[:_FIRST_ROWS]))
            _write_tokenizer(tokenizer)
            with making_run(home / "first"):
                exit_code = _train_first(config, first, Path(model), train=worked, evaluation=files.eval)
            if exit_code:
                return exit_code
        outcome = rl.run(config)
    if outcome.exit_code == 0:
        print(f"\nheld-out answers that are right: {outcome.metrics['eval_rewards/exact_answer']:.1%}")
    return outcome.exit_code


def _train_first(config: RunConfig, first: RunConfig, model: Path, *, train: Path, evaluation: Path) -> int:
    """Train the first model beside `train` and export it to `model`. Returns the exit code."""
    folder = train.parent / "first"
    changes = {
        "run": first.run.model_copy(update={"dir": str(folder)}),
        "model": first.model.model_copy(update={"tokenizer": str(train.parent / "tokenizer")}),
        "data": first.data.model_copy(
            update={"train": SourceSection(path=str(train)), "eval": SourceSection(path=str(evaluation))}
        ),
        "train": first.train.model_copy(update={"steps": _FIRST_STEPS}),
        "eval": first.eval.model_copy(update={"every": _FIRST_EVERY, "generate": config.eval.generate}),
        "checkpoint": first.checkpoint.model_copy(update={"every": _FIRST_EVERY, "keep": _FIRST_STEPS // _FIRST_EVERY}),
    }
    outcome = sft.run(first.model_copy(update=changes))
    if outcome.exit_code:
        return outcome.exit_code
    step, share = first_with(folder, _FIRST_SHARE)
    export_run(folder, model, step=step)
    print(f"\nthe first model is that of step {step}, held-out exact match: {share:.1%}\n")
    return 0


def _data_home(config: RunConfig) -> Path:
    """The folder of the data files. Raises ValueError where they are not named as the quickstart names them."""
    train, evaluation = config.data.train, config.data.eval
    if not isinstance(train, list) and not isinstance(evaluation, list):
        home = Path(train.path).parent
        if evaluation is not None and [Path(train.path), Path(evaluation.path)] == [
            home / name for name in _DATA_FILES
        ]:
            return home
    raise ValueError(
        f"the quickstart writes its own data: data.train.path and data.eval.path must be {_DATA_FILES[0]} and "
        f"{_DATA_FILES[1]} in one folder; `jaxtrain train` trains on yours"
    )


def _check_apart(folder: Path, *others: Path) -> None:
    for other in others:
        if other.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"the quickstart empties run.dir={folder}, so {other} must be outside of it")


def _refuse(found: list[str]) -> None:
    if found:
        lines = "\n".join(f"  {each}" for each in found)
        raise ValueError(
            f"the quickstart replaces only what it made itself, and this is in the way:\n{lines}\nMove it away, or "
            "choose other paths in the config; `jaxtrain train` trains on data and a tokenizer of your own"
        )


def _write_tokenizer(folder: Path) -> None:
    with making(folder, TOKENIZER_FILES):
        write_byte_tokenizer(folder)


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
