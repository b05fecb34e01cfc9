"""The quickstart: makes data and a tokenizer, trains a model, exports it, and asks the export a question."""

import importlib
import importlib.resources
import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np

from converters.export_hf import TOKENIZER_FILES
from converters.import_hf import import_params, read_config
from converters.tokenizer import load_tokenizer, write_byte_tokenizer
from jaxtrain.config import RunConfig, SourceSection, load_config
from jaxtrain.config.evaluation import BestSection
from jaxtrain.config.python_values import import_path
from jaxtrain.data.arithmetic import write_arithmetic, write_arithmetic_pairs
from jaxtrain.data.formats import Encoder
from jaxtrain.nn.model import Model
from jaxtrain.recipes import distill, preference, reward, rl, sft
from jaxtrain.recipes.made_files import EXPORT, find_conflicts, find_run_conflicts, replacing_files, replacing_run
from jaxtrain.sample.engine import Engine
from jaxtrain.sample.requests import Request, SamplingParams
from jaxtrain.session.export import export_run
from jaxtrain.session.record import read_metrics

QUESTION = "What is 47 + 38?"
CONFIGS = "configs"
_RECIPES: Any = {"rl": rl, "preference": preference, "reward": reward}  # that begin with an initial model
_DATA_FILES = ("train.jsonl", "eval.jsonl")
_TRAIN_ROWS, _EVAL_ROWS = 6000, 300
_NEW_TOKENS = 48
# The initial model of reinforcement learning trains often on few problems, so its distributions are sharp: trained
# briefly on many, its greedy answers are as good but its samples are rarely right. It is the first checkpoint with this
# share of correct answers to other problems, because the accuracy of the last one depends on rounding.
_FIRST_QUESTIONS = 200  # that measure it, where the config asks none
_FIRST_ROWS, _FIRST_STEPS, _FIRST_EVERY, _FIRST_SHARE = 300, 500, 25, 0.45
_JUDGE_STEPS = 400  # of the model that becomes a reward model, which may be as good as it gets
_TEACHER_STEPS, _TEACHER_EVERY = 450, 150


def load_quickstart(path: Path, overrides: list[str] | None = None) -> RunConfig:
    """Load the config in `path`. A path that starts with `configs/` and does not exist is that of a file shipped with
    jaxtrain, and so are the files of rewards in such a config. A name without a folder is that of a file in
    `configs/quickstart/`.
    """
    if not path.exists() and path.name == path.stem == str(path):
        path = Path(CONFIGS, "quickstart", f"{path}.yaml")
    shipped = _shipped(path)
    if shipped is None:
        return load_config(path, overrides)
    config = load_config(shipped, overrides)
    if config.rl is None:
        return config
    rewards = []
    for section in config.rl.rewards:
        file, _, name = import_path(section.function).rpartition(":")
        found = _shipped(Path(file))
        rewards.append(section.model_copy(update={"function": f"{found}:{name}"}) if found is not None else section)
    return config.model_copy(update={"rl": config.rl.model_copy(update={"rewards": rewards})})


def _shipped(path: Path) -> Path | None:
    """The file that jaxtrain ships under this path, unless there is one in the working directory."""
    if path.exists() or path.parts[:1] != (CONFIGS,):
        return None
    package = Path(str(importlib.resources.files("jaxtrain")))
    # The configs are inside of the package in a wheel, and next to it in a checkout.
    home = package if (package / CONFIGS).is_dir() else package.parent
    return home / path if (home / path).is_file() else None


def run(config: RunConfig) -> int:
    """Make the data and tokenizer that `config` names, train, export, load the export and ask it a question.

    Returns the exit code. Always starts over: an older run of the quickstart is removed. Raises ValueError, before any
    change, if it would replace files that no quickstart made.
    """
    folder, home = Path(config.run.dir), _data_home(config)
    if config.model.tokenizer is None:
        raise ValueError("the quickstart writes its tokenizer to model.tokenizer, which must be set")
    tokenizer = Path(config.model.tokenizer)
    _check_apart(folder, tokenizer, home)
    _refuse([*find_run_conflicts(folder), *find_conflicts(tokenizer), *find_conflicts(home, _DATA_FILES)])
    if not config.eval.generate:
        raise ValueError("the quickstart reports the held-out accuracy: set eval.generate")
    with replacing_run(folder):
        _write_tokenizer(tokenizer)
        with replacing_files(home, _DATA_FILES):
            write_arithmetic(home, _TRAIN_ROWS, _EVAL_ROWS, config.run.seed)

        outcome = sft.run(config)
        if outcome.exit_code:
            return outcome.exit_code
        export = folder / EXPORT
        export_run(folder, export)
    print(f"\nheld-out exact match: {outcome.metrics['eval_exact_match']:.1%}")
    library, answer = ask(export, QUESTION)
    print(f"exported to {export}; its answer in {library}:\n  {QUESTION}\n  {answer}")
    return 0


def run_from_first(config: RunConfig, first: RunConfig) -> int:
    """Train an initial model on a few worked problems by the config `first`, then train it with `config`: on rewards
    (recipe rl), or on pairs of a right and a wrong answer (recipes preference and reward).

    The initial model is exported to `config.model.path`; an existing one is kept, so that several algorithms start from
    the same model. Everything else starts over. Returns the exit code. Raises ValueError, before any change, if it
    would replace files that no quickstart made.
    """
    model, folder, home = config.model.path, Path(config.run.dir), _data_home(config)
    if model is None:
        raise ValueError("the quickstart writes its initial model to model.path, which must be set")
    tokenizer, worked = home / "tokenizer", home / "worked"  # rows with solutions; RL uses only the questions
    _check_apart(folder, Path(model), home)
    first_missing = not Path(model).exists()
    others = [*find_run_conflicts(home / "first"), *find_conflicts(tokenizer), *find_conflicts(home, _DATA_FILES)]
    others += find_conflicts(worked, _DATA_FILES)
    _refuse([*find_run_conflicts(folder), *(others if first_missing else [])])
    with replacing_run(folder):
        if first_missing:
            with replacing_files(worked, _DATA_FILES):
                files = write_arithmetic(worked, _TRAIN_ROWS, _EVAL_ROWS, 0)
                rows = files.train.read_text()
                files.train.write_text("".join(rows.splitlines(keepends=True)[:_FIRST_ROWS]))
            with replacing_files(home, _DATA_FILES):
                if config.recipe == "rl":
                    (home / _DATA_FILES[0]).write_text(rows)
                    (home / _DATA_FILES[1]).write_text(files.eval.read_text())
                else:
                    write_arithmetic_pairs(home, _TRAIN_ROWS, _EVAL_ROWS, 0)
            _write_tokenizer(tokenizer)
            with replacing_run(home / "first"):
                exit_code = _train_first(config, first, Path(model), home=home)
            if exit_code:
                return exit_code
        outcome = _RECIPES[config.recipe].run(config)
    if outcome.exit_code == 0:
        _, share = first_step_with(home / "first", _FIRST_SHARE)
        results = {
            "rl": ("held-out accuracy", "eval_rewards/exact_answer", f"; the initial model's exact match: {share:.1%}"),
            "preference": ("held-out exact match", "eval_exact_match", f"; the initial model's: {share:.1%}"),
            "reward": ("held-out pairs that it ranks rightly", "eval_accuracy", ""),
        }
        text, metric, before = results[config.recipe]
        print(f"\n{text}: {outcome.metrics[metric]:.1%}{before}")
    return outcome.exit_code


def run_distill(config: RunConfig, first: RunConfig) -> int:
    """Train a teacher on worked problems by the config `first`, then distil the model of `config` from it.

    The teacher is exported to `config.teacher.path`; an existing one is kept. Everything else starts over. Prints the
    share of the teacher's accuracy that the student, which starts from random weights, has. Returns the exit code.
    Raises ValueError, before any change, if it would replace files that no quickstart made.
    """
    assert config.teacher is not None and config.teacher.path is not None
    teacher, folder, home = Path(config.teacher.path), Path(config.run.dir), _data_home(config)
    tokenizer = home / "tokenizer"
    if config.model.tokenizer != str(tokenizer):
        raise ValueError(f"the quickstart writes its tokenizer to {tokenizer}: set model.tokenizer to it")
    _check_apart(folder, teacher, home)
    teacher_missing = not teacher.exists()
    others = [*find_run_conflicts(home / "first"), *find_conflicts(tokenizer), *find_conflicts(home, _DATA_FILES)]
    _refuse([*find_run_conflicts(folder), *(others if teacher_missing else [])])
    with replacing_run(folder):
        if teacher_missing:
            with replacing_files(home, _DATA_FILES):
                write_arithmetic(home, _TRAIN_ROWS, _EVAL_ROWS, 0)
            _write_tokenizer(tokenizer)
            with replacing_run(home / "first"):
                exit_code = _train_teacher(config, first, teacher, home=home)
            if exit_code:
                return exit_code
        outcome = distill.run(config)
    if outcome.exit_code == 0:
        student, (_, best) = outcome.metrics["eval_exact_match"], first_step_with(home / "first", math.inf)
        print(f"\nheld-out exact match: student {student:.1%}, teacher {best:.1%}: {student / best:.0%} of the gap")
    return outcome.exit_code


def _train_teacher(config: RunConfig, first: RunConfig, teacher: Path, *, home: Path) -> int:
    outcome = sft.run(_first_config(config, first, _TEACHER_STEPS, _TEACHER_EVERY, None, home=home, data=home))
    if outcome.exit_code == 0:
        export_run(home / "first", teacher)
    return outcome.exit_code


def _train_first(config: RunConfig, first: RunConfig, model: Path, *, home: Path) -> int:
    """Train the initial model, in a folder of `home`, and export it to `model`. Returns the exit code."""
    steps, every = (_JUDGE_STEPS, _JUDGE_STEPS) if config.recipe == "reward" else (_FIRST_STEPS, _FIRST_EVERY)
    best = (
        None if config.recipe == "reward" else BestSection(metric="eval_exact_match", mode="max", target=_FIRST_SHARE)
    )
    outcome = sft.run(_first_config(config, first, steps, every, best, home=home, data=home / "worked"))
    if outcome.exit_code:
        return outcome.exit_code
    step, share = first_step_with(home / "first", _FIRST_SHARE)
    export_run(home / "first", model, step=step)
    print(f"\nthe initial model is that of step {step}, held-out exact match: {share:.1%}\n")
    return 0


def _first_config(
    config: RunConfig, first: RunConfig, steps: int, every: int, best: BestSection | None, *, home: Path, data: Path
) -> RunConfig:
    """The config `first` for a run in a folder of `home` on the files in `data`, evaluated and saved `every` so many of
    its `steps`, which may end early by `best`."""
    generate = config.eval.generate or _FIRST_QUESTIONS
    train, evaluation = (SourceSection(path=str(data / name)) for name in _DATA_FILES)
    changes = {
        "run": first.run.model_copy(update={"dir": str(home / "first")}),
        "model": first.model.model_copy(update={"tokenizer": str(home / "tokenizer")}),
        "data": first.data.model_copy(update={"train": train, "eval": evaluation}),
        "train": first.train.model_copy(update={"steps": steps}),
        "eval": first.eval.model_copy(update={"every": every, "generate": generate, "best": best}),
        "checkpoint": first.checkpoint.model_copy(update={"every": every, "keep": steps // every}),
    }
    return first.model_copy(update=changes)


def _data_home(config: RunConfig) -> Path:
    """The folder of the data files. Raises ValueError if they do not have the quickstart's names."""
    train, evaluation = config.data.train, config.data.eval
    if not isinstance(train, list) and not isinstance(evaluation, list):
        home = Path(train.path).parent
        if evaluation is not None and [Path(train.path), Path(evaluation.path)] == [
            home / name for name in _DATA_FILES
        ]:
            return home
    raise ValueError(
        f"the quickstart writes its own data: data.train.path and data.eval.path must be {_DATA_FILES[0]} and "
        f"{_DATA_FILES[1]} in the same folder; use `jaxtrain train` for other data"
    )


def _check_apart(folder: Path, *others: Path) -> None:
    if ":/" in str(folder):
        raise ValueError(f"run.dir={folder} is a URL: the quickstart writes to a local folder")
    for other in others:
        if other.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"the quickstart empties run.dir={folder}, so {other} must not be inside of it")


def _refuse(found: list[str]) -> None:
    if found:
        lines = "\n".join(f"  {each}" for each in found)
        raise ValueError(
            f"the quickstart replaces only files that it made, but found:\n{lines}\nMove them away, or choose other "
            "paths in the config; use `jaxtrain train` for other data and tokenizers"
        )


def _write_tokenizer(folder: Path) -> None:
    with replacing_files(folder, TOKENIZER_FILES):
        write_byte_tokenizer(folder)


def first_step_with(run: Path, share: float) -> tuple[int, float]:
    """The first evaluated step with at least this share of exact matches, else the last one, and its share."""
    matches = {line["step"]: line["eval_exact_match"] for line in read_metrics(run) if "eval_exact_match" in line}
    step = next((step for step, match in matches.items() if match >= share), max(matches))
    return step, matches[step]


def ask(folder: Path, question: str) -> tuple[str, str]:
    """The library that was used (transformers if torch is installed, else jaxtrain) and its greedy answer."""
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
