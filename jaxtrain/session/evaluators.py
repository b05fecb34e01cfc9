"""Evaluators of language models: held-out loss, and the exact-match accuracy of answers."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

import jax
import numpy as np

from jaxtrain.config import SourceSection
from jaxtrain.data.encoder import RowEncoder
from jaxtrain.data.pipeline import eval_batches
from jaxtrain.data.prompts import held_out_prompts
from jaxtrain.data.sources import Row
from jaxtrain.objectives.objective import Objective
from jaxtrain.parallel.batches import place_batch
from jaxtrain.parallel.sharding import row_shares
from jaxtrain.roles.role import TrainedRole
from jaxtrain.sample.engine import Engine
from jaxtrain.sample.requests import Completion, Request, SamplingParams
from jaxtrain.session.session import MetricValues, Session
from jaxtrain.train.evaluate import evaluate, make_eval_step
from jaxtrain.types import Batch

T = TypeVar("T")

_SLOTS = 32  # prompts answered at a time


def held_out_loss(
    session: Session,
    role: TrainedRole,
    objective: Objective,
    encode: RowEncoder,
    signals: Callable[[Batch], Batch] | None = None,
) -> Callable[[], MetricValues] | None:
    """`eval_*` means of the objective's metrics over `data.eval`, in recipe sft also `eval_perplexity`; None where
    there is none.

    `signals` adds signals to placed batches. Several sources, or one that has a `name`, have their own
    `eval_NAME_loss`.
    """
    config, mesh = session.config, session.mesh
    if config.data.eval is None:
        return None
    rows = config.train.batch_size
    eval_step = jax.jit(make_eval_step(role.model, objective))

    sources = config.data.eval_sources
    names = config.data.eval_names if len(sources) > 1 or sources[0].name else [""]

    def batches(source: SourceSection) -> Iterator[Batch]:
        # Every host packs all rows and places its own: an evaluation is short and its batches are the same everywhere.
        packed = eval_batches([source], config.data, encode, rows=rows, bundle_size=encode.bundle_size)
        for batch in itertools.islice(packed, config.eval.batches):
            session.check()
            placed = place_batch(batch, mesh, rows)
            yield placed if signals is None else signals(placed)

    def run() -> MetricValues:
        by_name = {name: batches(source) for name, source in zip(names, sources, strict=True)}
        step = functools.partial(eval_step, teacher_head=role.teacher_head)
        means = evaluate(step, role.state.params, role.frozen, by_name)
        if config.recipe == "sft" and "eval_loss" in means:
            means["eval_perplexity"] = math.exp(min(means["eval_loss"], 700))
        return means

    return run


def exact_match(session: Session, role: TrainedRole, encode: RowEncoder) -> Callable[[], MetricValues] | None:
    """An evaluator of `eval_exact_match`: the share of answers to the first `eval.generate` prompts that are those of
    the data; with `eval.greedy` also of `eval_greedy_exact_match`.

    None without `eval.generate`. Unusable data raise ValueError now, not at the first evaluation.
    """
    prompts = eval_prompts(session, lambda number, row: encode.prompt(row), keep_columns=False)
    if not prompts:
        return None

    def share(*, greedy: bool) -> float:
        answers = answer_prompts(session, role, [prompt.input_ids for prompt in prompts], greedy=greedy)
        right = [
            str(answer.text).strip() == prompt.answer.strip()
            for group, prompt in zip(answers, prompts, strict=True)
            for answer in group
        ]
        return sum(right) / len(right)

    def run() -> MetricValues:
        found = {"eval_exact_match": share(greedy=False)}
        return found | ({"eval_greedy_exact_match": share(greedy=True)} if session.config.eval.greedy else {})

    return run


def eval_prompts(session: Session, make: Callable[[int, Row], T], *, keep_columns: bool) -> list[T]:
    """`make` of the first `eval.generate` rows of `eval.prompts`, or of `data.eval`; none if there are none.

    Raises ValueError for unusable data.
    """
    config = session.config
    sources = config.eval.prompt_sources or config.data.eval_sources
    if not sources or not config.eval.generate:
        return []
    if session.tokenizer is None:
        raise ValueError("eval.generate needs a tokenizer: set model.tokenizer")
    return held_out_prompts(sources, config.data, make, count=config.eval.generate, keep_columns=keep_columns)


def answer_prompts(
    session: Session, role: TrainedRole, prompts: Sequence[np.ndarray], *, greedy: bool = False
) -> list[list[Completion]]:
    """`eval.samples` answers of `role` to each prompt of ids [n], the same draws at every evaluation; or a greedy one.

    They end at the model's end tokens and at `sampling.stop`. Raises Interrupted if the run was asked to stop.
    """
    section, shares = session.config.eval, row_shares(role.model.run.mesh)
    samples, temperature = (1, 0.0) if greedy else (section.samples, section.temperature)
    # Created for each call, so that its copy of the weights is not kept during training; its compiled programs are.
    engine = Engine(
        role.model,
        role.params,
        slots=-(-min(len(prompts) * samples, _SLOTS) // shares) * shares,
        max_length=max(map(len, prompts)) + section.max_new_tokens,
        tokenizer=session.tokenizer,
        version=session.step,
    )
    given = session.config.sampling or SamplingParams()
    sampling = SamplingParams(
        max_tokens=section.max_new_tokens,
        temperature=temperature,
        n=samples,
        stop=given.stop,
        min_tokens=given.min_tokens,
        stop_ids=session.stop_ids(role),
        logprobs=False,
    )
    requests = [
        Request(ids, sampling if not temperature else replace(sampling, seed=number))
        for number, ids in enumerate(prompts)
    ]
    return engine.generate(requests, session.check)
