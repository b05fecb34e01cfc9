"""Evaluators of a model over the vocabulary: held-out loss, and the share of greedy answers that are right."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from jaxtrain.data.formats import Encoder, Prompt
from jaxtrain.data.pipeline import eval_batches
from jaxtrain.data.sources import DataError, Source
from jaxtrain.objectives.objective import Objective
from jaxtrain.parallel.batches import place_batch
from jaxtrain.roles.role import TrainedRole
from jaxtrain.sample.engine import Engine
from jaxtrain.sample.placement import row_shares
from jaxtrain.sample.requests import Completion, Request, SamplingParams
from jaxtrain.session.session import Metrics, Session
from jaxtrain.train.evaluate import evaluate, make_eval_step
from jaxtrain.types import Batch

_SLOTS = 32  # prompts answered at a time


def held_out_loss(
    session: Session, role: TrainedRole, objective: Objective, encode: Encoder
) -> Callable[[], Metrics] | None:
    """`eval_*` means of the objective's metrics over `data.eval`; None where there is none."""
    config, mesh = session.config, session.mesh
    if config.data.eval is None:
        return None
    rows = config.train.batch_size
    eval_step = jax.jit(make_eval_step(role.model, objective))

    def batches() -> Iterator[Batch]:
        # Every host packs all rows and places its own: an evaluation is short and its batches are the same everywhere.
        packed = eval_batches(config.data.eval_sources, config.data, encode, rows=rows)
        for batch in itertools.islice(packed, config.eval.batches):
            session.check()
            yield place_batch(batch, mesh, range(rows), rows)

    return lambda: evaluate(eval_step, role.state.params, role.frozen, batches())


def exact_match(session: Session, role: TrainedRole, encode: Encoder) -> Callable[[], Metrics] | None:
    """`eval_exact_match`: the share of the first `eval.generate` rows of `data.eval` answered as the row is.

    None where there are none. Unusable data are a ValueError now, not at the first evaluation.
    """
    config = session.config
    if config.data.eval is None or config.eval.generate == 0:
        return None
    if session.tokenizer is None:
        raise ValueError("eval.generate asks questions in text, which needs a tokenizer (model.tokenizer)")
    prompts = _held_out_prompts(session, encode)
    stops, limit = session.stop_ids(role), config.eval.max_new_tokens

    def run() -> Metrics:
        answers = greedy_completions(session, role, [prompt.input_ids for prompt in prompts], stops, limit)
        right = sum(
            str(answer.text).strip() == prompt.answer.strip() for answer, prompt in zip(answers, prompts, strict=True)
        )
        return {"eval_exact_match": right / len(prompts)}

    return run


def greedy_completions(
    session: Session, role: TrainedRole, prompts: Sequence[np.ndarray], stops: list[int], max_new_tokens: int
) -> list[Completion]:
    """Greedy answers of `role` to prompts of ids [n]. Raises Interrupted where the run shall stop."""
    # Created for each call, so that its copy of the weights is not kept during training; its compiled programs are.
    engine = Engine(
        role.model,
        role.params,
        slots=-(-min(len(prompts), _SLOTS) // row_shares(role.model)) * row_shares(role.model),
        max_length=max(map(len, prompts)) + max_new_tokens,
        tokenizer=session.tokenizer,
    )
    sampling = SamplingParams(max_tokens=max_new_tokens, temperature=0, stop_ids=stops, logprobs=False)
    answers = engine.generate([Request(ids, sampling) for ids in prompts], session.check)
    return [completion for (completion,) in answers]


def _held_out_prompts(session: Session, encode: Encoder) -> list[Prompt]:
    """The first `eval.generate` questions of `data.eval`; bad rows are an error or left out, by `data.on_bad_row`.

    Raises DataError.
    """
    config = session.config
    prompts: list[Prompt] = []
    for section in config.data.eval_sources:
        source = Source(section)
        for row in range(len(source)):
            if len(prompts) == config.eval.generate:
                return prompts
            try:
                prompts.append(source.make(row, encode.prompt))
            except DataError:
                if config.data.on_bad_row == "error":
                    raise
    if not prompts:
        raise DataError(f"no row of data.eval is a question that eval.generate={config.eval.generate} could ask")
    return prompts
