"""Held-out evaluation of a conversational model: loss over all of it, answers to some of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxtrain.config import RunConfig
from jaxtrain.data.formats import Encoder, Prompt
from jaxtrain.data.pipeline import eval_batches
from jaxtrain.data.sources import DataError, Source
from jaxtrain.lora import join
from jaxtrain.losses.sft import sft_loss
from jaxtrain.nn.model import Model
from jaxtrain.parallel.batches import place_batch
from jaxtrain.recipes.setup import Policy, as_list, stop_ids
from jaxtrain.sample.engine import Engine
from jaxtrain.sample.placement import row_shares
from jaxtrain.sample.requests import Completion, Request, SamplingParams
from jaxtrain.train.evaluate import evaluate, make_eval_step
from jaxtrain.types import Batch, Params, TrainState

_SLOTS = 32  # questions answered at a time

Evaluation = Callable[[TrainState], dict[str, float]]


def make_evaluation(
    config: RunConfig, policy: Policy, encode: Encoder, tokenizer: Any, check: Callable[[], None]
) -> Evaluation | None:
    """`state -> eval_* metrics` over `data.eval`; None where there is none. Wrong data are an error now, not later.

    `check` is called before every piece of work, the same number of times on all hosts; what it raises ends the
    evaluation (see `Agreement.check`).
    """
    if config.data.eval is None:
        return None
    mesh = policy.model.run.mesh
    assert mesh is not None
    rows = config.train.batch_size
    sources = as_list(config.data.eval)
    prompts = held_out_prompts(config, encode)
    if config.eval.generate and tokenizer is None:
        raise ValueError("eval.generate asks questions in text, which needs a tokenizer (model.tokenizer)")
    stops = stop_ids(config.model, policy, tokenizer)
    eval_step = jax.jit(make_eval_step(policy.model, sft_loss))

    def batches() -> Iterator[Batch]:
        # Every host packs all rows and places its own: an evaluation is short and its batches are the same everywhere.
        whole = eval_batches(sources, config.data, encode, rows=rows)
        for batch in itertools.islice(whole, config.eval.batches):
            check()
            yield place_batch(batch, mesh, range(rows), rows)

    def of_state(state: TrainState) -> dict[str, float]:
        metrics = evaluate(eval_step, state.params, state.frozen, batches())
        if prompts:
            params = join(state.params, state.frozen)
            answers = answer(policy.model, params, tokenizer, prompts, stops, config.eval.max_new_tokens, check)
            right = sum(given.strip() == prompt.answer.strip() for given, prompt in zip(answers, prompts, strict=True))
            metrics["eval_exact_match"] = right / len(prompts)
        return metrics

    return of_state


def held_out_prompts(config: RunConfig, encode: Encoder) -> list[Prompt]:
    """The first `eval.generate` questions of `data.eval`. Bad rows are an error or left out, as `data.on_bad_row` says.

    Raises DataError.
    """
    assert config.data.eval is not None
    prompts: list[Prompt] = []
    for section in as_list(config.data.eval) if config.eval.generate else []:
        source = Source(section)
        for row in range(len(source)):
            if len(prompts) == config.eval.generate:
                return prompts
            try:
                prompts.append(source.make(row, encode.prompt))
            except DataError:
                if config.data.on_bad_row == "error":
                    raise
    if config.eval.generate and not prompts:
        raise DataError(f"no row of data.eval is a question that eval.generate={config.eval.generate} could ask")
    return prompts


def answer(
    model: Model,
    params: Params,
    tokenizer: Any,
    prompts: list[Prompt],
    stops: list[int],
    max_new_tokens: int,
    check: Callable[[], None],
) -> list[str]:
    """Greedy answers as text, special tokens left out."""
    asked = [prompt.input_ids for prompt in prompts]
    completions = greedy_completions(model, params, tokenizer, asked, stops, max_new_tokens, check)
    return [str(each.text) for each in completions]


def greedy_completions(
    model: Model,
    params: Params,
    tokenizer: Any,
    prompts: Sequence[np.ndarray],
    stops: list[int],
    max_new_tokens: int,
    check: Callable[[], None],
) -> list[Completion]:
    """Greedy answers to prompts of ids [n]. `check` is called before every call of the engine, and may raise."""
    # Made anew each time, so that its copy of the weights is not kept while training; what it compiled is.
    engine = Engine(
        model,
        params,
        slots=-(-min(len(prompts), _SLOTS) // row_shares(model)) * row_shares(model),
        max_length=max(map(len, prompts)) + max_new_tokens,
        tokenizer=tokenizer,
    )
    params_of_all = SamplingParams(max_tokens=max_new_tokens, temperature=0, stop_ids=stops, logprobs=False)
    numbers = [engine.submit(Request(ids, params_of_all)) for ids in prompts]
    done: dict[int, Completion] = {}
    while engine.busy:
        check()
        done |= {chunk.request: chunk.completion for chunk in engine.step() if chunk.completion is not None}
    return [done[number] for number in numbers]
