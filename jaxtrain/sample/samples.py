"""The state of a running sample on the host: its slot's settings, its tokens so far, the end of its text."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from jaxtrain.sample.constraints import FORBIDDEN, GENERATED, IN_PROMPT, MAX_GENERATED
from jaxtrain.sample.filters import SlotSettings, TokenValues
from jaxtrain.sample.grammar import Matcher
from jaxtrain.sample.requests import (
    BIAS_SLOTS,
    INT32_MAX,
    STOP_SLOTS,
    Alternatives,
    Chunk,
    Completion,
    FinishReason,
    Request,
    Timings,
)

_INCOMPLETE = "\ufffd"  # a tokenizer decodes an incomplete character to this

# Of a sample that failed before its first token.
_NO_VALUES = TokenValues(
    tokens=np.zeros(0, np.int32),
    logps=np.zeros(0, np.float32),
    raw_logps=np.zeros(0, np.float32),
    supports=np.zeros((0, 0), np.int32),
    best=np.zeros((0, 0), np.int32),
    best_logps=np.zeros((0, 0), np.float32),
)


@dataclass
class Sample:
    number: int  # of the request
    index: int  # among the request's samples
    request: Request
    seed: int
    submitted: float
    tokenizer: Any
    prompt: tuple[int, ...] = ()
    admitted: float = 0.0
    first: float | None = None
    parts: list[TokenValues] = field(default_factory=list)  # on the host, one of each device call
    versions: list[int] = field(default_factory=list)  # of the parameters, one of each token
    ids: list[int] = field(default_factory=list)
    sent: int = 0  # characters of the text that previous chunks contain
    matcher: Matcher | None = None  # of its grammar, from its admission on

    @property
    def marked(self) -> bool:
        params = self.request.params
        penalties = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
        return penalties != (1, 0, 0) or params.allowed_ids is not None or params.grammar is not None

    def write_settings(self, settings: SlotSettings, slot: int) -> None:
        """Set the row of a free slot in the engine's `settings`. An exception of a conversion is raised here."""
        params = self.request.params
        biases = list(params.logit_bias.items())
        values = dict[str, Any](
            seed=_seed32(self.seed),
            sample=self.index,
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            stop_ids=_padded(params.stop_ids, STOP_SLOTS, -1, np.int32),
            first_stop=min(len(self.prompt) + params.min_tokens, INT32_MAX),
            want_logps=params.logprobs,
            want_alternatives=params.alternatives > 0,
            repetition=params.repetition_penalty,
            presence=params.presence_penalty,
            frequency=params.frequency_penalty,
            bias_ids=_padded([token for token, _ in biases], BIAS_SLOTS, -1, np.int32),
            bias=_padded([bias for _, bias in biases], BIAS_SLOTS, 0, np.float32),
            marked=self.marked,
        )
        for name in SlotSettings._fields:
            getattr(settings, name)[slot] = values[name]

    def marks(self, vocab_size: int) -> np.ndarray:
        """The slot's row of marks, [V] uint16."""
        params = self.request.params
        if self.matcher is None and params.grammar is not None:
            self.matcher = params.grammar.matcher()
        row = np.zeros(vocab_size, np.uint16)
        if params.allowed_ids is not None:
            row[:] = FORBIDDEN
            row[np.asarray(params.allowed_ids)] = 0
        if self.matcher is not None:
            row[~self.matcher.allowed(vocab_size)] = FORBIDDEN
        row[list(self.prompt)] |= IN_PROMPT
        counts = np.bincount(np.asarray(self.ids, np.int64), minlength=vocab_size)
        return row | np.minimum(counts, MAX_GENERATED).astype(np.uint16) * np.uint16(GENERATED)

    def _alternatives(self, values: TokenValues, tokens: int) -> Alternatives | None:
        """The requested number of alternatives of each of the first `tokens` tokens."""
        count = self.request.params.alternatives
        best, logps = (np.asarray(each)[:tokens, :count] for each in (values.best, values.best_logps))
        return Alternatives(ids=best, logps=logps) if count else None

    def advance(
        self,
        values: TokenValues,
        reason: FinishReason | None,
        ended_by_token: bool,
        version: int,
        now: float,
    ) -> Chunk:
        """Append the `values` [m] of a device call.

        `reason` is given if the call was the sample's last. A complete stop string ends the sample whatever the reason.
        """
        before = len(self.ids)
        stop = self._add(values, version, now)
        if stop is not None:
            reason, ended_by_token = "stop", False
        completion = None
        if reason is not None:
            error = None
            self.ids = self.ids[:stop]
            if reason == "failed":
                error = f"the logits after {len(self.prompt)} prompt and {len(self.ids)} new tokens are not finite"
            text = None if self.tokenizer is None else self._text(ended_by_token)
            completion = self._completion(reason, text, error, now)
        new = len(self.ids) - before
        return Chunk(
            request=self.number,
            sample=self.index,
            ids=np.asarray(values.tokens)[:new],
            raw_logps=np.asarray(values.raw_logps)[:new],
            text=self._new_text(completion, ended_by_token),
            completion=completion,
            alternatives=self._alternatives(values, new),
        )

    def fail(self, error: str, now: float) -> Chunk:
        """End the sample as failed, with the tokens so far and no further text."""
        text = None if self.tokenizer is None else ""
        completion = self._completion("failed", text, error, now)
        return Chunk(
            request=self.number,
            sample=self.index,
            ids=completion.ids[:0],
            raw_logps=completion.raw_logps[:0],
            text=text,
            completion=completion,
        )

    def _add(self, values: TokenValues, version: int, now: float) -> int | None:
        """Append the values. Returns the number of tokens up to the end of a stop string, or None."""
        self.first = self.first or now
        self.parts.append(values)
        self.versions += [version] * len(values.tokens)
        before = len(self.ids)
        self.ids += values.tokens.tolist()
        if self.matcher is not None:
            for token in self.ids[before:]:
                self.matcher.accept(token)
        if not self.request.params.stop or self._stop_at(self._decode(self.ids)) is None:
            return None
        # A token may add several characters but never removes any: find the first that completes a stop string.
        return next(
            n for n in range(before, len(self.ids) + 1) if self._stop_at(self._decode(self.ids[:n])) is not None
        )

    def _new_text(self, completion: Completion | None, ended_by_token: bool) -> str | None:
        """The new text since the last call that no later token can change; the rest if the sample is complete."""
        if self.tokenizer is None:
            return None
        text = self._text(ended_by_token) if completion is None else completion.text or ""
        end = _final_length(text, self.request.params.stop) if completion is None else len(text)
        new = text[self.sent : end]
        self.sent = max(self.sent, end)
        return new

    def _completion(self, reason: FinishReason, text: str | None, error: str | None, now: float) -> Completion:
        """The completion with the tokens in `ids`."""
        count = len(self.ids)
        values = jax.tree.map(lambda *parts: np.concatenate(parts)[:count], *(self.parts or [_NO_VALUES]))
        admitted = self.admitted or now  # a sample may fail before it gets a slot
        return Completion(
            ids=values.tokens,
            text=text,
            logps=values.logps,
            raw_logps=values.raw_logps,
            finish_reason=reason,
            versions=np.array(self.versions[:count], np.int32),
            supports=values.supports if self.request.params.filtered and values.supports.shape[1] else None,
            timings=Timings(admitted - self.submitted, (self.first or now) - self.submitted, now - self.submitted),
            error=error,
            alternatives=self._alternatives(values, count),
        )

    def _text(self, ended_by_token: bool) -> str:
        text = self._decode(self.ids[:-1] if ended_by_token else self.ids)
        return text[: self._stop_at(text)]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=self.request.params.skip_special_tokens)

    def _stop_at(self, text: str) -> int | None:
        """Where the first stop string begins in the text after the first `min_tokens` tokens."""
        params = self.request.params
        first = len(self._decode(self.ids[: params.min_tokens])) if params.stop and params.min_tokens else 0
        found = (text.find(stop, first) for stop in params.stop)
        return min((at for at in found if at >= 0), default=None)


def _final_length(text: str, stops: Sequence[str]) -> int:
    """Characters that no later token can change: without an incomplete one or the possible start of a stop string."""
    length = len(text.rstrip(_INCOMPLETE))
    for stop in stops:
        for size in range(min(len(stop) - 1, length), 0, -1):
            if text[:length].endswith(stop[:size]):
                length -= size
                break
    return length


def _seed32(seed: int) -> int:
    """The 32 bits that the device computes with; those of a seed below 2^32 are the seed."""
    return seed if 0 <= seed < 2**32 else int(np.random.SeedSequence(seed % 2**64).generate_state(1)[0])


def _padded(values: Sequence[Any] | np.ndarray, size: int, fill: int, kind: Any) -> np.ndarray:
    return np.pad(np.asarray(values, kind), (0, size - len(values)), constant_values=fill)


def default_settings(slots: int) -> SlotSettings:
    """Settings on the host for greedy decoding, without filters, penalties or biases."""
    return SlotSettings(
        seed=np.zeros(slots, np.uint32),
        sample=np.zeros(slots, np.int32),
        temperature=np.zeros(slots, np.float32),
        top_k=np.zeros(slots, np.int32),
        top_p=np.ones(slots, np.float32),
        min_p=np.zeros(slots, np.float32),
        stop_ids=np.full((slots, STOP_SLOTS), -1, np.int32),
        first_stop=np.zeros(slots, np.int32),
        want_logps=np.zeros(slots, np.bool_),
        want_alternatives=np.zeros(slots, np.bool_),
        repetition=np.ones(slots, np.float32),
        presence=np.zeros(slots, np.float32),
        frequency=np.zeros(slots, np.float32),
        bias_ids=np.full((slots, BIAS_SLOTS), -1, np.int32),
        bias=np.zeros((slots, BIAS_SLOTS), np.float32),
        marked=np.zeros(slots, np.bool_),
    )
