"""What is asked of the engine, and what it answers."""

import numbers
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple, get_type_hints

import numpy as np
from annotated_types import BaseMetadata, Ge, GroupedMetadata, Le
from typing_extensions import Doc

from jaxtrain.sample.grammar import Grammar
from jaxtrain.sample.trie import Trie

STOP_SLOTS, BIAS_SLOTS = 8, 64  # how many of each a request may bring
INT32_MAX = 2**31 - 1

FinishReason = Literal["stop", "length", "failed"]


class FieldError(ValueError):
    """A request that is refused because of one of its fields."""

    def __init__(self, where: str, field: str, problem: str):
        super().__init__(f"{where}: {problem}")
        self.field, self.problem = field, problem


@dataclass(frozen=True)
class Bounds(GroupedMetadata):
    """The numbers that a field may hold, both ends included. In a field's `Annotated`, where pydantic reads it too."""

    kind: type[int] | type[float]
    minimum: float
    maximum: float

    def __iter__(self) -> Iterator[BaseMetadata]:
        yield Ge(self.minimum)
        yield Le(self.maximum)

    def problem(self, name: str, value: Any) -> str | None:
        """What is wrong with a value, if anything is. A boolean is not a number here."""
        number = numbers.Integral if self.kind is int else numbers.Real
        if not isinstance(value, number) or isinstance(value, bool):
            return f"{name} must be {'int' if self.kind is int else 'a number'}, not {shown(value)}"
        if value < self.minimum:
            return f"{name}={shown(value)} must be at least {self.minimum:.10g}"
        if not value <= self.maximum:  # NaN too
            return f"{name}={shown(value)} must be at most {self.maximum:.10g}"
        return None


LEAST_TEMPERATURE = 1e-6  # above 0, which is greedy: a smaller one overflows the scaled logits
BIAS = Bounds(float, -1e6, 1e6)  # of logit_bias
TOKEN_ID = Bounds(int, 0, INT32_MAX)  # a vocabulary is smaller, which `check_request` knows
STOP_STRINGS, STOP_CHARACTERS = 16, 1024  # how many, and of what length: all are searched for after every token


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt. The defaults sample from the model's own distribution, up to the engine's limit.

    In this order: penalties, biases, allowed ids and trie, temperature, top-k, top-p of what top-k left, min-p.
    `temperature=0` is greedy whatever the filters say. Raises FieldError for a value outside `BOUNDS` or of another
    type: the command line, the server and reinforcement learning all rely on this check.
    """

    max_tokens: Annotated[
        int | None, Bounds(int, 1, INT32_MAX), Doc("new tokens; default: as many as max_length leaves")
    ] = None
    temperature: Annotated[float, Bounds(float, 0, 1e6), Doc("0 is greedy")] = 1.0
    top_k: Annotated[int, Bounds(int, 0, INT32_MAX), Doc("keep the k most probable tokens; 0 keeps all")] = 0
    top_p: Annotated[
        float, Bounds(float, 1e-6, 1), Doc("keep the most probable tokens up to this share; 1 keeps all")
    ] = 1.0
    min_p: Annotated[
        float, Bounds(float, 0, 1), Doc("keep tokens at least this share as probable as the first; 0 keeps all")
    ] = 0.0
    stop: Annotated[Sequence[str], Doc("text that ends a sample, and is no part of it; as often as needed")] = ()
    min_tokens: Annotated[
        int, Bounds(int, 0, INT32_MAX), Doc("new tokens before which no end token or stop string ends a sample")
    ] = 0
    stop_ids: Sequence[int] | np.ndarray = ()  # a token of these ends the sample and is its last id
    repetition_penalty: Annotated[
        float, Bounds(float, 1e-6, 1e6), Doc("above 1 makes tokens of prompt and sample less probable")
    ] = 1.0
    presence_penalty: Annotated[
        float, Bounds(float, -1e6, 1e6), Doc("above 0 makes tokens of the sample less probable")
    ] = 0.0
    frequency_penalty: Annotated[
        float,
        Bounds(float, -1e6, 1e6),
        Doc("above 0 makes them less probable proportionally to how often they occurred"),
    ] = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # id -> what is added to its logit
    allowed_ids: Sequence[int] | np.ndarray | None = None  # nothing else is generated; None: all
    trie: Trie | None = None  # the sample is one of the trie's sequences, and ends with it
    grammar: Grammar | None = None  # what the sample must follow; see `sample.grammar`
    # None: the engine draws one. What else the engine is doing makes no difference.
    seed: Annotated[int | None, Bounds(int, -(2**63), 2**64 - 1), Doc("decides what is sampled")] = None
    n: Annotated[int, Bounds(int, 1, INT32_MAX), Doc("samples of each prompt")] = 1  # the prompt is prefilled once
    # of the most probable tokens at each place, ids and log-probabilities; see `Engine`
    alternatives: Annotated[int, Bounds(int, 0, INT32_MAX)] = 0
    skip_special_tokens: Annotated[bool, Doc("leave special tokens out of the text")] = True
    logprobs: bool = True  # False spares their computation where no request in a slot wants them

    def __post_init__(self) -> None:
        for name, bounds in BOUNDS.items():
            value = getattr(self, name)
            if value is not None or name not in ("max_tokens", "seed"):
                self._refuse(name, bounds.problem(name, value))
        if 0 < self.temperature < LEAST_TEMPERATURE:
            raise FieldError(
                "sampling", "temperature", f"temperature={self.temperature} must be 0 or at least {LEAST_TEMPERATURE}"
            )
        self._refuse("stop", _stop_problem(self.stop))
        self._refuse("stop_ids", ids_problem("stop_ids", self.stop_ids))
        if self.allowed_ids is not None:
            self._refuse("allowed_ids", ids_problem("allowed_ids", self.allowed_ids))
            if not len(self.allowed_ids):
                self._refuse("allowed_ids", "allowed_ids is empty, so nothing could be generated")
        if not isinstance(self.logit_bias, Mapping):
            self._refuse("logit_bias", f"logit_bias must map token ids to numbers, not be {shown(self.logit_bias)}")
        self._refuse("logit_bias", ids_problem("logit_bias", list(self.logit_bias)))
        for token, bias in self.logit_bias.items():
            self._refuse("logit_bias", BIAS.problem(f"logit_bias of token {token}", bias))
        if self.trie is not None and self.min_tokens:
            self._refuse("min_tokens", "a trie defines where a sample ends, so min_tokens must be 0")
        if self.grammar is not None and self.min_tokens:
            self._refuse("min_tokens", "a grammar defines where a sample may end, so min_tokens must be 0")
        object.__setattr__(self, "stop", tuple(self.stop))  # so that equal parameters compare equal
        if not isinstance(self.trie, Trie | None):
            self._refuse("trie", f"trie must be a Trie, not {shown(self.trie)}")
        for name in ("logprobs", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                self._refuse(name, f"{name} must be true or false, not {shown(getattr(self, name))}")

    def _refuse(self, name: str, problem: str | None) -> None:
        if problem is not None:
            raise FieldError("sampling", name, problem)

    @property
    def filtered(self) -> bool:
        """Whether less than the whole vocabulary can be drawn."""
        drawn = self.top_k > 0 or self.top_p < 1 or self.min_p > 0
        constraints = (self.allowed_ids, self.trie, self.grammar)
        return self.temperature > 0 and (drawn or any(each is not None for each in constraints))


# Every number of a request. They are computed with in int32, uint32 and float32, so what overflows there is out.
BOUNDS: Mapping[str, Bounds] = {
    name: mark
    for name, hint in get_type_hints(SamplingParams, include_extras=True).items()
    for mark in getattr(hint, "__metadata__", ())
    if isinstance(mark, Bounds)
}


def shown(value: Any) -> str:
    """A value for an error message: in full where it is short."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"  # Python refuses to write one of more than 4300 digits
    return shortened(repr(value))


def shortened(text: str) -> str:
    """A text for an error message: at most 60 characters."""
    return text if len(text) <= 60 else f"{text[:57]}..."


def ids_problem(name: str, ids: Any) -> str | None:
    """What keeps `ids` from being token ids, if anything does: those outside int32, fractions, booleans, null."""
    if isinstance(ids, np.ndarray):
        if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
            return f"{name} must be a list of token ids, not {ids.dtype} of shape {ids.shape}"
        outside = ids[(ids < TOKEN_ID.minimum) | (ids > TOKEN_ID.maximum)] if ids.size else ids
        problem = TOKEN_ID.problem("a token id", int(outside[0])) if outside.size else None
        return problem and f"{name} must be a list of token ids: {problem}"
    if not isinstance(ids, Sequence) or isinstance(ids, str | bytes):
        return f"{name} must be a list of token ids, not {shown(ids)}"
    problems = (TOKEN_ID.problem("a token id", each) for each in ids)
    problem = next((each for each in problems if each is not None), None)
    return problem and f"{name} must be a list of token ids: {problem}"


def _stop_problem(stop: Any) -> str | None:
    if isinstance(stop, str) or not isinstance(stop, Sequence):
        return f"stop={shown(stop)} must be a list of strings"
    if len(stop) > STOP_STRINGS:
        return f"stop has {len(stop)} strings, and there may be up to {STOP_STRINGS}"
    for each in stop:
        if not isinstance(each, str) or not each:
            return f"what is in stop must be text, and not empty; there is {shown(each)}"
        if len(each) > STOP_CHARACTERS:
            return f"a string in stop has {len(each)} characters, and there may be up to {STOP_CHARACTERS}"
    return None


@dataclass(frozen=True)
class Request:
    prompt_ids: Sequence[int] | np.ndarray  # [n] of the model's vocabulary, n >= 1
    params: SamplingParams = field(default_factory=SamplingParams)


class EngineLimits(NamedTuple):
    """Maxima that an engine is compiled for."""

    steps: int = 32  # tokens per slot and device call, and so of a streamed chunk
    support: int = 0  # ids that filters keep, see `Engine`; 0: no limit, and none are returned
    alternatives: int = 0  # of `SamplingParams.alternatives`


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
    limits: EngineLimits,
    has_tokenizer: bool,
    name: str,
) -> None:
    """Raise FieldError, naming the request, for one that can never be served."""
    params = request.params

    def refuse(field: str, problem: str) -> None:
        raise FieldError(name, field, problem)

    if problem := ids_problem("prompt_ids", request.prompt_ids):
        refuse("prompt_ids", problem)
    ids = np.asarray(request.prompt_ids)
    if ids.size == 0:
        refuse("prompt_ids", "the prompt is empty; a model continues at least one token (e.g. its bos token)")
    if ids.size + 1 > max_length:
        refuse(
            "prompt_ids",
            f"the prompt has {ids.size} tokens, and max_length={max_length} leaves no room for a new one",
        )
    if params.max_tokens is not None and ids.size + params.max_tokens > max_length:
        refuse(
            "max_tokens",
            f"{ids.size} prompt tokens + max_tokens={params.max_tokens} = {ids.size + params.max_tokens} "
            f"can never fit into max_length={max_length}; max_tokens={max_length - ids.size} would",
        )
    for field_name, kind, given, limit in (
        ("stop_ids", "stop_ids", params.stop_ids, STOP_SLOTS),
        ("logit_bias", "biases", params.logit_bias, BIAS_SLOTS),
    ):
        if len(given) > limit:
            refuse(field_name, f"{len(given)} {kind}, and the engine holds up to {limit} a request")
    if 0 < limits.support < min(params.top_k, vocab_size):
        refuse("top_k", f"top_k={params.top_k}, and the engine returns supports of up to {limits.support} tokens")
    if params.alternatives > limits.alternatives:
        refuse(
            "alternatives", f"alternatives={params.alternatives}, and the engine returns up to {limits.alternatives}"
        )
    if params.stop and not has_tokenizer:
        refuse("stop", "stop strings need an engine with a tokenizer; use stop_ids")
    allowed = () if params.allowed_ids is None else params.allowed_ids
    for field_name, kind, tokens in (
        ("prompt_ids", "prompt", ids),
        ("stop_ids", "stop", params.stop_ids),
        ("logit_bias", "biased", list(params.logit_bias)),
        ("allowed_ids", "allowed", allowed),
        ("trie", "trie", () if params.trie is None else params.trie.tokens),
    ):
        tokens = np.asarray(tokens, np.int64)
        outside = tokens[(tokens < 0) | (tokens >= vocab_size)]
        if outside.size:
            refuse(field_name, f"{kind} id {outside[0]} is outside the vocabulary of {vocab_size}")
