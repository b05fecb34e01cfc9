"""Evaluation of a model on a file of questions, judged as the section `eval` of a run judges answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console

from jaxtrain.config import ConfigError, RunConfig, parse_config
from jaxtrain.data.formats import Encoder
from jaxtrain.data.prompts import held_out_prompts
from jaxtrain.data.sources import Row
from jaxtrain.observe.history import STD_ERROR
from jaxtrain.observe.progress import Progress
from jaxtrain.rl.pass_rates import pass_rates
from jaxtrain.rl.reward_pool import RewardPool
from jaxtrain.rl.rollouts import Prompt, Trajectory
from jaxtrain.rl.sampler import trajectory_of
from jaxtrain.rl.scoring import RewardScorer
from jaxtrain.sample.requests import Completion, Request, SamplingParams
from jaxtrain.serve.served import Served

EXACT_MATCH = "exact_match"
_ALL = 1 << 30  # rows
_OF_TRAINING = ("every", "batches", "best")  # keys of `eval` that mean nothing here


def load_task(path: Path) -> RunConfig:
    """A config whose section `eval` is that of the YAML file of a task, and whose `data` is its key `data`.

    The file has the keys of `eval`, of which `prompts` is required and `generate` is by default the number of all rows.
    Raises ValueError, with the file and the key.
    """
    if not path.is_file():
        raise ValueError(f"no task file {path}")
    try:
        task = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(task, dict) or not task.get("prompts"):
        raise ValueError(f"{path}: a task has the keys of the section `eval`, and `prompts: {{path: FILE}}` among them")
    if useless := [name for name in _OF_TRAINING if name in task]:
        raise ValueError(f"{path}: {useless[0]} is only for a run that trains: leave it out")
    data, section = task.pop("data", None) or {}, {"generate": _ALL, **task}
    first = section["prompts"][0] if isinstance(section["prompts"], list) else section["prompts"]
    tree = {
        "recipe": "sft",
        "model": {"path": "none"},
        "data": {"train": first, **data},
        "train": {"steps": 1},
        "eval": section,
    }
    try:
        return parse_config(tree, str(path))
    except ConfigError as error:
        raise ValueError(str(error)) from error


def run_task(served: Served, task: RunConfig) -> dict[str, float]:
    """Answer the prompts of a task and judge the answers: metrics with their standard errors (`pass_rates`).

    With `rewards` these are `reward` and `rewards/NAME`, else `exact_match` with the answers of the rows. In addition
    there are the number of prompts, and the lengths of answers in tokens. With `greedy` everything also of one greedy
    answer to each prompt, with the prefix `greedy_`.

    Raises ValueError for rows that are no prompts, that have no answer where one is needed, or that are too long.
    """
    section = task.eval
    encode = Encoder.configured(served.tokenizer, task.data, vocab_size=len(served.tokenizer))

    def make(number: int, row: Row) -> Prompt:
        prompt = Prompt(number, *encode.question(row))
        if not section.rewards and prompt.columns.get("answer") is None:
            raise ValueError("the row has no answer to compare with: name one, or give the task `rewards`")
        return prompt

    prompts = held_out_prompts(section.prompt_sources, task.data, make, count=section.generate)
    with RewardPool(section.rewards) as pool:
        scorer = RewardScorer(section.rewards, pool) if section.rewards else None
        found = {"prompts": float(len(prompts))} | _judged(_answers(served, task, prompts, greedy=False), scorer)
        if section.greedy:
            greedy = _judged(_answers(served, task, prompts, greedy=True), scorer)
            found |= {f"greedy_{name}": value for name, value in greedy.items()}
    return found


def _answers(served: Served, task: RunConfig, prompts: list[Prompt], *, greedy: bool) -> list[list[Trajectory]]:
    """The answers to each prompt: the same draws each time."""
    section = task.eval
    samples, temperature = (1, 0.0) if greedy else (section.samples, section.temperature)
    params = served.ending(SamplingParams(section.max_new_tokens, temperature=temperature, n=samples, logprobs=False))
    requests = [
        Request(prompt.ids, replace(params, seed=prompt.number) if temperature else params) for prompt in prompts
    ]
    served.engine.check(requests)
    groups: list[list[Completion | None]] = [[None] * samples for _ in prompts]
    done, every = 0, max(len(prompts) * samples // 20, 1)
    console = Console(stderr=True, highlight=False)  # stdout has the result
    with Progress(len(prompts) * samples, console=console, activity=lambda: "answering") as progress:
        for chunk in served.engine.stream(requests):
            if chunk.completion is not None:
                groups[chunk.request][chunk.sample] = chunk.completion
                done += 1
                progress.update(done, {} if done % every == 0 else None)
    return [
        [trajectory_of(prompt, sample, each) for sample, each in enumerate(group) if each is not None]
        for prompt, group in zip(prompts, groups, strict=True)
    ]


def _judged(groups: list[list[Trajectory]], scorer: RewardScorer | None) -> dict[str, float]:
    answers = [answer for group in groups for answer in group]
    texts = np.array([answer.text for answer in answers], object).reshape(len(groups), -1)
    columns: dict[str, list[float]] = {}
    if scorer is None:
        columns[EXACT_MATCH] = [
            float(answer.text.strip() == str(answer.prompt.columns["answer"]).strip()) for answer in answers
        ]
    else:
        answers = scorer(answers)
        columns["reward"] = [answer.reward for answer in answers]
        for name in sorted({name for answer in answers for name in answer.rewards}):
            columns[f"rewards/{name}"] = [answer.rewards.get(name, np.nan) for answer in answers]
    found: dict[str, float] = {}
    for name, values in columns.items():
        found |= pass_rates(name, np.array(values, float).reshape(texts.shape), texts)
    lengths = np.array([len(answer.completion_ids) for answer in answers], float)
    cut = np.array([answer.finish_reason == "length" for answer in answers], float)
    for name, values in (("length", lengths), ("cut_off", cut)):
        found |= pass_rates(name, values.reshape(texts.shape).mean(1, keepdims=True), texts[:, :1])
    found["length_max"] = float(lengths.max())
    if scorer is not None:
        found |= {name: value for name, value in scorer.metrics().items() if value}
    return found


def task_rows(metrics: dict[str, Any]) -> list[tuple[str, float, float | None]]:
    """Name, value and standard error of each metric."""
    return [
        (name, value, metrics.get(name + STD_ERROR)) for name, value in metrics.items() if not name.endswith(STD_ERROR)
    ]
