"""A sample under way, on the host: what it asks of its slot, what it has so far, where its text ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from jaxtrain.sample.constraints import FORBIDDEN, IN_PROMPT
from jaxtrain.sample.filters import Knobs
from jaxtrain.sample.requests import (
    BIAS_SLOTS,
    STOP_SLOTS,
    Alternatives,
    Chunk,
    Completion,
    FinishReason,
    Request,
    Timings,
)

_INCOMPLETE = "\ufffd"  # what a tokenizer makes of the first bytes of a character

# The columns of a sample that failed before its first token: those of `Generated`, and the versions.
_NO_VALUES = tuple(
    np.zeros(shape, kind)
    for shape, kind in (
        (0, np.int32),
        (0, np.float32),
        (0, np.float32),
        ((0, 0), np.int32),
        ((0, 0), np.int32),
        ((0, 0), np.float32),
        (0, np.int32),
    )
)


class SlotValues(NamedTuple):
    """What a sample asks of its slot."""

    knobs: Knobs  # of one slot
    marks: np.ndarray | None  # [V] uint16; None: the slot's marks are not read


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
    parts: list[tuple[np.ndarray, ...]] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    sent: int = 0  # characters of the text that went out in chunks

    @property
    def marked(self) -> bool:
        params = self.request.params
        penalties = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
        return penalties != (1, 0, 0) or params.allowed_ids is not None

    def slot_values(self, vocab_size: int) -> SlotValues:
        """What its slot is set to. Raises whatever a value that does not convert raises, before anything is set."""
        return SlotValues(self._knobs(), self._marks(vocab_size) if self.marked else None)

    def _knobs(self) -> Knobs:
        params = self.request.params
        knobs = no_knobs(1)
        biases = list(params.logit_bias.items())
        values = Knobs(
            seed=self.seed,
            sample=self.index,
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            stop_ids=_filled(params.stop_ids, STOP_SLOTS, -1, np.int32),
            want_logps=params.logprobs,
            want_best=params.alternatives > 0,
            repetition=params.repetition_penalty,
            presence=params.presence_penalty,
            frequency=params.frequency_penalty,
            bias_ids=_filled([token for token, _ in biases], BIAS_SLOTS, -1, np.int32),
            bias=_filled([bias for _, bias in biases], BIAS_SLOTS, 0, np.float32),
            marked=self.marked,
        )
        for knob, value in zip(knobs, values, strict=True):
            knob[0] = value
        return knobs

    def _marks(self, vocab_size: int) -> np.ndarray:
        """The slot's row of marks, [V] uint16."""
        allowed = self.request.params.allowed_ids
        row = np.zeros(vocab_size, np.uint16)
        if allowed is not None:
            row[:] = FORBIDDEN
            row[np.asarray(allowed)] = 0
        row[list(self.prompt)] |= IN_PROMPT
        return row

    def _alternatives(self, ids: np.ndarray, logps: np.ndarray) -> Alternatives | None:
        """As many of those of each token, [m, a], as were asked for."""
        most = self.request.params.alternatives
        return Alternatives(ids[:, :most], logps[:, :most]) if most else None

    def advance(
        self,
        values: tuple[np.ndarray, ...],
        reason: FinishReason | None,
        ended_by_token: bool,
        version: int,
        now: float,
    ) -> Chunk:
        """Take what a call made: ids, logps, raw logps, supports and alternatives, [m] or [m, c]; and why it was the
        sample's last, if it was. Where a stop string is complete the sample ends there, whatever the `reason`.
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
        ids, _, raw_logps, _, best, best_logps = (value[:new] for value in values)
        text = self._new_text(completion, ended_by_token)
        return Chunk(self.number, self.index, ids, raw_logps, text, completion, self._alternatives(best, best_logps))

    def fail(self, error: str, now: float) -> Chunk:
        """Finish, with the tokens that there are and no further text."""
        text = None if self.tokenizer is None else ""
        completion = self._completion("failed", text, error, now)
        empty = completion.ids[:0], completion.raw_logps[:0]
        return Chunk(self.number, self.index, *empty, text, completion, None)

    def _add(self, values: tuple[np.ndarray, ...], version: int, now: float) -> int | None:
        """Append the values. Returns how many tokens there are up to the end of a stop string, if one is there."""
        self.first = self.first or now
        self.parts.append((*values, np.full(len(values[0]), version, np.int32)))
        before = len(self.ids)
        self.ids += values[0].tolist()
        if not self.request.params.stop or self._stop_at(self._decode(self.ids)) is None:
            return None
        # One token may bring several characters, but never takes any back: the first that completes a stop string.
        return next(
            n for n in range(before, len(self.ids) + 1) if self._stop_at(self._decode(self.ids[:n])) is not None
        )

    def _new_text(self, completion: Completion | None, ended_by_token: bool) -> str | None:
        """What is sure of the text since the last call; all of it if the sample is complete."""
        if self.tokenizer is None:
            return None
        text = self._text(ended_by_token) if completion is None else completion.text or ""
        sure = _sure(text, self.request.params.stop) if completion is None else len(text)
        new = text[self.sent : sure]
        self.sent = max(self.sent, sure)
        return new

    def _completion(self, reason: FinishReason, text: str | None, error: str | None, now: float) -> Completion:
        """The sample of the tokens in `ids`."""
        count = len(self.ids)
        columns = zip(*(self.parts or [_NO_VALUES]), strict=True)
        ids, logps, raw_logps, supports, best, best_logps, versions = (
            np.concatenate(column)[:count] for column in columns
        )
        admitted = self.admitted or now  # a sample may fail before it gets a slot
        return Completion(
            ids=ids,
            text=text,
            logps=logps,
            raw_logps=raw_logps,
            finish_reason=reason,
            versions=versions,
            supports=supports if self.request.filtered and supports.shape[1] else None,
            timings=Timings(admitted - self.submitted, (self.first or now) - self.submitted, now - self.submitted),
            error=error,
            alternatives=self._alternatives(best, best_logps),
        )

    def _text(self, ended_by_token: bool) -> str:
        text = self._decode(self.ids[:-1] if ended_by_token else self.ids)
        return text[: self._stop_at(text)]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _stop_at(self, text: str) -> int | None:
        return min((text.find(stop) for stop in self.request.params.stop if stop in text), default=None)


def _sure(text: str, stops: Sequence[str]) -> int:
    """Characters that no later token changes: without one cut short, and without what may become a stop string."""
    sure = len(text.rstrip(_INCOMPLETE))
    for stop in stops:
        for size in range(min(len(stop) - 1, sure), 0, -1):
            if text[:sure].endswith(stop[:size]):
                sure -= size
                break
    return sure


def _filled(values: Sequence[Any] | np.ndarray, size: int, fill: int, kind: Any) -> np.ndarray:
    return np.pad(np.asarray(values, kind), (0, size - len(values)), constant_values=fill)


def no_knobs(slots: int) -> Knobs:
    """Knobs on the host that ask for nothing: greedy, all tokens."""
    return Knobs(
        seed=np.zeros(slots, np.uint32),
        sample=np.zeros(slots, np.int32),
        temperature=np.zeros(slots, np.float32),
        top_k=np.zeros(slots, np.int32),
        top_p=np.ones(slots, np.float32),
        min_p=np.zeros(slots, np.float32),
        stop_ids=np.full((slots, STOP_SLOTS), -1, np.int32),
        want_logps=np.zeros(slots, np.bool_),
        want_best=np.zeros(slots, np.bool_),
        repetition=np.ones(slots, np.float32),
        presence=np.zeros(slots, np.float32),
        frequency=np.zeros(slots, np.float32),
        bias_ids=np.full((slots, BIAS_SLOTS), -1, np.int32),
        bias=np.zeros((slots, BIAS_SLOTS), np.float32),
        marked=np.zeros(slots, np.bool_),
    )
