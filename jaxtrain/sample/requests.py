"""What is asked of the engine, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from jaxtrain.sample.constraints import Trie

STOP_SLOTS, BIAS_SLOTS = 8, 64  # how many of each a request may bring

FinishReason = Literal["stop", "length", "failed"]


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt. The defaults sample from the model's own distribution, up to the engine's limit.

    In this order: penalties, biases, allowed ids and trie, temperature, top-k, top-p of what top-k left, min-p.
    `temperature=0` is greedy whatever the filters say.
    """

    max_tokens: int | None = None  # None: as many as the engine's max_length leaves
    temperature: float = 1.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0  # keeps tokens at least this share as probable as the most probable one
    stop: Sequence[str] = ()  # text that ends the sample, and is no part of its text
    stop_ids: Sequence[int] = ()  # a token of these ends the sample and is its last id
    repetition_penalty: float = 1.0  # above 1: makes tokens of the prompt and of the sample less probable
    presence_penalty: float = 0.0  # above 0: makes tokens of the sample less probable
    frequency_penalty: float = 0.0  # above 0: the same, by as much for every time that a token came
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # id -> what is added to its logit
    allowed_ids: Sequence[int] | np.ndarray | None = None  # nothing else is generated; None: all
    trie: Trie | None = None  # the sample is one of the trie's sequences, and ends with it
    seed: int | None = None  # decides the samples, whatever else the engine is doing; None: the engine draws one
    n: int = 1  # samples; the prompt is prefilled once for all of them
    alternatives: int = 0  # of the most probable tokens at each place, ids and log-probabilities; see `Engine`
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
            f"alternatives={self.alternatives} must be at least 0": self.alternatives < 0,
            f"repetition_penalty={self.repetition_penalty} must be above 0": not self.repetition_penalty > 0,
            f"presence_penalty={self.presence_penalty} must be finite": not np.isfinite(self.presence_penalty),
            f"frequency_penalty={self.frequency_penalty} must be finite": not np.isfinite(self.frequency_penalty),
            "a bias in logit_bias must be finite": not all(map(np.isfinite, self.logit_bias.values())),
            f"stop={self.stop!r} must be a list of strings": isinstance(self.stop, str),
            "what is in stop must be text, and not empty": not all(
                isinstance(each, str) and each for each in self.stop
            ),
            "allowed_ids is empty, so nothing could be generated": (
                self.allowed_ids is not None and not len(self.allowed_ids)
            ),
        }
        for message, holds in wrong.items():
            if holds:
                raise ValueError(f"sampling: {message}")


@dataclass(frozen=True)
class Request:
    prompt_ids: Sequence[int] | np.ndarray  # [n] of the model's vocabulary, n >= 1
    params: SamplingParams = field(default_factory=SamplingParams)

    @property
    def filtered(self) -> bool:
        """Whether less than the whole vocabulary can be drawn."""
        each = self.params
        drawn = each.top_k > 0 or each.top_p < 1 or each.min_p > 0
        return each.temperature > 0 and (drawn or each.allowed_ids is not None or each.trie is not None)


class Timings(NamedTuple):
    """Seconds since the request was submitted."""

    admitted: float  # when the sample got its slot
    first_token: float  # when its first tokens were on the host
    finished: float


class Alternatives(NamedTuple):
    """The most probable tokens at n places under the model's plain softmax, most probable first."""

    ids: np.ndarray  # [n, a] int32
    logps: np.ndarray  # [n, a] float32


class Completion(NamedTuple):
    """One sample. `n` tokens were generated; per-token values at t belong to the token at t."""

    ids: np.ndarray  # [n] int32, the stop token (or the tokens of the stop string) that ended it included
    text: str | None  # without what ended it, special tokens left out; None: the engine has no tokenizer
    logps: np.ndarray  # [n] float32, log-probability under the distribution sampled from (0 where greedy)
    raw_logps: np.ndarray  # [n] float32, log-probability under the model's plain softmax
    finish_reason: FinishReason
    versions: np.ndarray  # [n] int32, of the parameters that each token was sampled with
    supports: np.ndarray | None  # [n, c] int32, the ids the filters kept, filled with -1; None: nothing was filtered
    timings: Timings
    error: str | None = None  # why it failed, where finish_reason is "failed"
    alternatives: Alternatives | None = None  # where asked for


class Chunk(NamedTuple):
    """What one device call added to one sample."""

    request: int  # as `Engine.submit` numbered it, or its index in the requests of `stream`
    sample: int
    ids: np.ndarray  # [m] int32, new ones
    raw_logps: np.ndarray  # [m] float32, as in `Completion`
    text: str | None  # new text; a call's may come with the next, while it could still become a stop string
    completion: Completion | None  # the whole sample, once it is finished
    alternatives: Alternatives | None = None  # of the new tokens, where asked for


def check_request(
    request: Request,
    *,
    vocab_size: int,
    max_length: int,
    support: int,
    alternatives: int,
    has_tokenizer: bool,
    name: str,
) -> None:
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
    for kind, given, most in (
        ("stop_ids", params.stop_ids, STOP_SLOTS),
        ("biases", params.logit_bias, BIAS_SLOTS),
    ):
        if len(given) > most:
            raise ValueError(f"{name}: {len(given)} {kind}, and the engine holds up to {most} a request")
    if 0 < support < min(params.top_k, vocab_size):
        raise ValueError(f"{name}: top_k={params.top_k}, and the engine returns supports of up to {support} tokens")
    if params.alternatives > alternatives:
        raise ValueError(f"{name}: alternatives={params.alternatives}, and the engine tells up to {alternatives}")
    if params.stop and not has_tokenizer:
        raise ValueError(f"{name}: stop strings need an engine with a tokenizer; use stop_ids")
    allowed = () if params.allowed_ids is None else params.allowed_ids
    for kind, tokens in (
        ("prompt", ids),
        ("stop", params.stop_ids),
        ("biased", list(params.logit_bias)),
        ("allowed", allowed),
        ("trie", () if params.trie is None else params.trie.tokens),
    ):
        tokens = np.asarray(tokens, np.int64)
        outside = tokens[(tokens < 0) | (tokens >= vocab_size)]
        if outside.size:
            raise ValueError(f"{name}: {kind} id {outside[0]} is outside the vocabulary of {vocab_size}")
