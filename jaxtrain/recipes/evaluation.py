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
from jaxtrain.data.sources import read_rows
from jaxtrain.lora import join
from jaxtrain.nn.model import Model
from jaxtrain.objectives.sft import SFT
from jaxtrain.parallel.batches import place_batch
from jaxtrain.recipes.setup import Policy, as_list, stop_ids
from jaxtrain.sample.engine import Engine
from jaxtrain.sample.placement import row_shares
from jaxtrain.sample.requests import Completion, Request, SamplingParams
from jaxtrain.train.evaluate import evaluate, make_eval_step
from jaxtrain.types import Batch, Params, TrainState

_SLOTS = 32  # questions answered at a time

Evaluation = Callable[[TrainState], dict[str, float]]


def make_evaluation(config: RunConfig, policy: Policy, encode: Encoder, tokenizer: Any) -> Evaluation | None:
    """`state -> eval_* metrics` over `data.eval`; None where there is none. Wrong data are an error now, not later."""
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
    eval_step = jax.jit(make_eval_step(policy.model, SFT()))

    def batches() -> Iterator[Batch]:
        # Every host packs all rows and places its own: an evaluation is short and its batches are the same everywhere.
        whole = eval_batches(sources, config.data, encode, rows=rows)
        for batch in itertools.islice(whole, config.eval.batches):
            yield place_batch(batch, mesh, range(rows), rows)

    def of_state(state: TrainState) -> dict[str, float]:
        metrics = evaluate(eval_step, state.params, state.frozen, batches())
        if prompts:
            params = join(state.params, state.frozen)
            answers = answer(policy.model, params, tokenizer, prompts, stops, config.eval.max_new_tokens)
            right = sum(given.strip() == prompt.answer.strip() for given, prompt in zip(answers, prompts, strict=True))
            metrics["eval_exact_match"] = right / len(prompts)
        return metrics

    return of_state


def held_out_prompts(config: RunConfig, encode: Encoder) -> list[Prompt]:
    """The first `eval.generate` questions of `data.eval`."""
    assert config.data.eval is not None
    rows = itertools.chain.from_iterable(read_rows(source) for source in as_list(config.data.eval))
    return [encode.prompt(row) for row in itertools.islice(rows, config.eval.generate)]


def answer(
    model: Model, params: Params, tokenizer: Any, prompts: list[Prompt], stops: list[int], max_new_tokens: int
) -> list[str]:
    """Greedy answers as text, special tokens left out."""
    asked = [prompt.input_ids for prompt in prompts]
    return [str(each.text) for each in greedy_completions(model, params, tokenizer, asked, stops, max_new_tokens)]


def greedy_completions(
    model: Model, params: Params, tokenizer: Any, prompts: Sequence[np.ndarray], stops: list[int], max_new_tokens: int
) -> list[Completion]:
    """Greedy answers to prompts of ids [n]."""
    # Made anew each time, so that its copy of the weights is not kept while training; what it compiled is.
    engine = Engine(
        model,
        params,
        slots=-(-min(len(prompts), _SLOTS) // row_shares(model)) * row_shares(model),
        max_length=max(map(len, prompts)) + max_new_tokens,
        tokenizer=tokenizer,
    )
    params_of_all = SamplingParams(max_tokens=max_new_tokens, temperature=0, stop_ids=stops, logprobs=False)
    return [completion for (completion,) in engine.generate([Request(ids, params_of_all) for ids in prompts])]
