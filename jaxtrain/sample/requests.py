"""What is asked of the engine, and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

FinishReason = Literal["stop", "length", "failed"]


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt. The defaults sample from the model's own distribution, up to the engine's limit.

    Filters apply in this order: temperature, top-k, top-p of what top-k left, min-p. `temperature=0` is greedy
    whatever the filters say.
    """

    max_tokens: int | None = None  # None: as many as the engine's max_length leaves
    temperature: float = 1.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0  # keeps tokens at least this share as probable as the most probable one
    stop_ids: Sequence[int] = ()  # a token of these ends the sample and is its last id
    seed: int | None = None  # decides the samples, whatever else the engine is doing; None: the engine draws one
    n: int = 1  # samples; the prompt is prefilled once for all of them
    logprobs: bool = True  # False spares their computation where no request in a slot wants them

    def __post_init__(self) -> None:
        wrong = {
            f"max_tokens={self.max_tokens} must be at least 1": self.max_tokens is not None and self.max_tokens < 1,
            f"temperature={self.temperature} must be at least 0, and finite": not 0 <= self.temperature < np.inf,
            f"top_k={self.top_k} must be at least 0 (0 keeps all tokens)": self.top_k < 0,
            f"top_p={self.top_p} must be above 0 and at most 1": not 0 < self.top_p <= 1,
            f"min_p={self.min_p} must be between 0 and 1": not 0 <= self.min_p <= 1,
            f"seed={self.seed} must fit into 32 bits": self.seed is not None and not 0 <= self.seed < 2**32,
            f"n={self.n} must be at least 1": self.n < 1,
        }
        for message, holds in wrong.items():
            if holds:
                raise ValueError(f"sampling: {message}")


@dataclass(frozen=True)
class Request:
    prompt_ids: Sequence[int] | np.ndarray  # [n] of the model's vocabulary, n >= 1
    params: SamplingParams = field(default_factory=SamplingParams)


class Timings(NamedTuple):
    """Seconds since the request was submitted."""

    admitted: float  # when the sample got its slot
    first_token: float  # when its first tokens were on the host
    finished: float


class Completion(NamedTuple):
    """One sample. `n` tokens were generated; per-token values at t belong to the token at t."""

    ids: np.ndarray  # [n] int32, the stop token that ended it included
    text: str | None  # without that stop token, special tokens left out; None: the engine has no tokenizer
    logps: np.ndarray  # [n] float32, log-probability under the distribution sampled from (0 where greedy)
    raw_logps: np.ndarray  # [n] float32, log-probability under the model's plain softmax
    finish_reason: FinishReason
    versions: np.ndarray  # [n] int32, of the parameters that each token was sampled with
    supports: np.ndarray | None  # [n, c] int32, the ids the filters kept, filled with -1; None: nothing was filtered
    timings: Timings
    error: str | None = None  # why it failed, where finish_reason is "failed"


class Chunk(NamedTuple):
    """What one device call added to one sample."""

    request: int  # as `Engine.submit` numbered it, or its index in the requests of `stream`
    sample: int
    ids: np.ndarray  # [m] int32, new ones
    completion: Completion | None  # the whole sample, once it is finished


def check_request(request: Request, *, vocab_size: int, max_length: int, stop_slots: int, name: str) -> None:
    """Raise ValueError, naming the request, for one that can never be served."""
    ids, params = np.asarray(request.prompt_ids), request.params
    if ids.size == 0:
        raise ValueError(f"{name}: the prompt is empty; a model continues at least one token (e.g. its bos token)")
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"{name}: prompt_ids must be a list of token ids, not {ids.dtype} of shape {ids.shape}")
    if ids.size + 1 > max_length:
        raise ValueError(
            f"{name}: the prompt has {ids.size} tokens, and max_length={max_length} leaves no room for a new one"
        )
    if params.max_tokens is not None and ids.size + params.max_tokens > max_length:
        raise ValueError(
            f"{name}: {ids.size} prompt tokens + max_tokens={params.max_tokens} = {ids.size + params.max_tokens} "
            f"can never fit into max_length={max_length}; max_tokens={max_length - ids.size} would"
        )
    if len(params.stop_ids) > stop_slots:
        raise ValueError(f"{name}: {len(params.stop_ids)} stop_ids, and the engine holds up to {stop_slots} a request")
    for kind, tokens in (("prompt", ids), ("stop", np.asarray(params.stop_ids, np.int64))):
        outside = tokens[(tokens < 0) | (tokens >= vocab_size)]
        if outside.size:
            raise ValueError(f"{name}: {kind} id {outside[0]} is outside the vocabulary of {vocab_size}")
