"""The types of a rollout, and the conversion of trajectories to packed rows and back.

A `Sampler` completes a `Prompt` several times, which gives a group of `Trajectory`s; rewards and advantages are added
later. Everything here is numpy, on the host. As in `Batch`, a per-token value at `t` belongs to the token at `t`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np

from jaxtrain.data.packing import BestFit, SignalTypes, make_row, stack_rows
from jaxtrain.train.agree import gather_values
from jaxtrain.types import Batch, Example, Params

NO_ID = -1  # pads the supports of tokens to the same width
LOST_REWARD = "lost_reward"  # the key in `Trajectory.info` of the reason why a sample has no reward
EXTRA = "extra"  # the key in `Trajectory.info` of what functions gave to `log_extra`: "<function>/<column>" -> value
SUPPORTS = "supports"  # the name of a signal: [B, T, k] ids that could have been sampled, padded with NO_ID


class Prompt(NamedTuple):
    """A row of the prompt data, rendered and tokenised."""

    number: int  # counted from 0 over all epochs; together with a sample's index it seeds that sample
    ids: np.ndarray  # [P] int32
    columns: Mapping[str, Any]  # the row, its prompt included: what rewards and environments receive


class Trajectory(NamedTuple):
    """One sample of a prompt. C is the number of completion tokens: the model's and, in between, the environment's."""

    prompt: Prompt
    sample: int  # its index among the samples of the prompt
    completion_ids: np.ndarray  # [C] int32, including the stop token; never tokenised again
    loss_mask: np.ndarray  # [C] bool: True for tokens of the model, False for those of the environment
    sampler_logps: np.ndarray  # [C] float32, under the sampling distribution, after temperature and filters
    raw_logps: np.ndarray  # [C] float32, under the model's plain softmax
    versions: np.ndarray  # [C] int32, number of optimizer steps of the weights that sampled the token
    text: str  # of the completion, without special tokens
    finish_reason: str  # "stop", "length" (cut off), or in a conversation "turns" or "error"
    supports: np.ndarray | None = None  # [C, k] int32, ids kept by top-k, top-p, min-p; None: the full vocabulary
    rewards: Mapping[str, float] = {}  # by part, unweighted; NaN if a part does not apply or failed
    reward: float = float("nan")  # weighted sum of the parts; NaN before scoring, and if it is lost
    token_rewards: np.ndarray | None = None  # [C] float32, an environment's rewards at the turns' last tokens
    advantages: np.ndarray | None = None  # [C] float32
    timings: Mapping[str, float] = {}  # seconds by part, e.g. rollout, reward
    left_out: bool = False  # it does not train and is in no row, but counts in the divisors of the loss
    info: Mapping[str, Any] = {}  # from the environment or the rewards: turns, tool calls, errors

    @property
    def length(self) -> int:
        """Tokens of prompt and completion."""
        return len(self.prompt.ids) + len(self.completion_ids)

    def with_completion(self, ids: np.ndarray) -> Trajectory:
        """The sample for another model to score: with other tokens [C], all of the model, that nothing has sampled."""
        zeros = np.zeros(len(ids), np.float32)
        return self._replace(
            completion_ids=ids,
            loss_mask=np.ones(len(ids), bool),
            sampler_logps=zeros,
            raw_logps=zeros,
            versions=zeros.astype(np.int32),
            supports=None,
        )

    @property
    def trained_mask(self) -> np.ndarray:
        """[C] bool: the tokens that carry loss."""
        return self.loss_mask & (not self.left_out)

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"


def outline(t: Trajectory) -> Trajectory:
    """What other processes know of a sample: without its ids and texts, which metrics and advantages do not need."""
    return t._replace(
        prompt=Prompt(t.prompt.number, np.zeros(len(t.prompt.ids), np.int8), {}),
        completion_ids=np.zeros(len(t.completion_ids), np.int8),
        raw_logps=np.zeros(0, np.float32),
        text="",
        supports=None if t.supports is None else t.supports[:, -1:],
        info={key: value for key, value in t.info.items() if key not in ("messages", EXTRA)},
    )


class Sampler(Protocol):
    """Completes prompts: an engine in this process, on other devices or in other processes."""

    def sample(self, prompts: Sequence[Prompt], samples: int) -> list[list[Trajectory]]:
        """`samples` unscored trajectories of each prompt, in order. Deterministic. Raises what `stream` does."""
        groups: dict[int, dict[int, Trajectory]] = {prompt.number: {} for prompt in prompts}
        for trajectory in self.stream(iter([prompts]), samples):
            groups[trajectory.prompt.number][trajectory.sample] = trajectory
        return [[group[sample] for sample in range(samples)] for group in groups.values()]

    def stream(self, feed: Iterator[Sequence[Prompt]], samples: int) -> Iterator[Trajectory]:
        """Yield `samples` unscored trajectories of each prompt of `feed` as they are finished, until it is exhausted.

        Prompts have different numbers. The next ones are taken from `feed` whenever samples may begin, often none.
        """
        ...

    def wanted(self) -> bool:
        """Whether another call waits for the end of a `stream`. Thread-safe."""
        ...

    def set_params(self, params: Params, version: int) -> None:
        """Use these weights from now on; `version` is their number of optimizer steps."""
        ...


class Scorer(Protocol):
    """Sets `rewards` and `reward` (and their timings), in order. A failing reward affects only its sample."""

    def __call__(self, trajectories: Sequence[Trajectory]) -> list[Trajectory]: ...


NOT_PACKED = -1  # the row of a trajectory that was left out


class Span(NamedTuple):
    """The position of a trajectory's completion in the packed rows."""

    row: int  # NOT_PACKED: in none, and from 0 to the completion's length
    start: int
    stop: int


class Packed(NamedTuple):
    """Trajectories as rows: prompts and completions side by side, loss on the model's own tokens."""

    batch: Batch  # [B, T]
    spans: tuple[Span, ...]  # of the completions, in the order of the trajectories

    def spread(self, **values: Sequence[np.ndarray]) -> Packed:
        """Add signals: one array [C] or [C, k] per trajectory becomes [B, T] or [B, T, k]; 0 outside of completions.

        Without trajectories a signal is float32.
        """
        signals = dict(self.batch.signals)
        for name, pieces in values.items():
            first = pieces[0] if len(pieces) else np.zeros(0, np.float32)
            spread = np.zeros((*self.batch.tokens.shape, *first.shape[1:]), first.dtype)
            for (row, start, stop), piece in zip(self.spans, pieces, strict=True):
                if row != NOT_PACKED:
                    spread[row, start:stop] = piece
            signals[name] = spread
        return self._replace(batch=self.batch._replace(signals=signals))

    def gather(self, values: np.ndarray) -> list[np.ndarray]:
        """The inverse: [B, T, ...] -> the completion's part [C, ...] of each trajectory; 0 for those left out."""
        return [
            np.zeros((stop, *values.shape[2:]), values.dtype) if row == NOT_PACKED else values[row, start:stop]
            for row, start, stop in self.spans
        ]


def pack(trajectories: Sequence[Trajectory], max_length: int, rows: int | None = None) -> Packed:
    """Pack trajectories (best fit) into rows of `max_length` tokens, padded to `rows` rows.

    Signals: `sampler_logps`, `versions`, and `supports` if a sample has them. Samplers respect the limit, so a
    trajectory is never longer than a row.
    """
    encode = PolicySamples(_support_width(trajectories))
    laid_out = _laid_out(trajectories, max_length, encode)
    return _packed(laid_out, max_length, rows or len(laid_out.layout), encode.types)


def pack_parts(
    parts: Sequence[Sequence[Trajectory]], max_length: int, multiple: int, encode: SampleEncoder | None = None
) -> list[Packed]:
    """Pack each part separately, all into the same number of rows, a multiple of `multiple`.

    All processes call it together, each with its own samples, and get the same shapes. `encode`: default, the
    signals of a policy objective.
    """
    if encode is None:
        encode = PolicySamples(max(gather_values(max(map(_support_width, parts)))))
    laid_out = [_laid_out(part, max_length, encode) for part in parts]
    rows = common_rows([part.layout for part in laid_out], multiple)
    return [_packed(part, max_length, rows, encode.types) for part in laid_out]


def common_rows(layouts: Sequence[Sequence[Any]], multiple: int) -> int:
    """The rows into which each of the layouts of all processes fits, a multiple of `multiple`.

    Every number of rows needs another compiled program, so it is rounded up to one of four sizes per power of two: of
    many rows, at most a fifth is padding.
    """
    pieces = max(-(-max(gather_values(max(map(len, layouts)))) // multiple), 1)
    grain = max(1 << (pieces.bit_length() - 3), 1) if pieces > 4 else 1
    return -(-pieces // grain) * grain * multiple


def best_fit_rows(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """The indices in each row, by best-fit decreasing; a length of 0 is in none."""
    packer: BestFit[int] = BestFit(max_length, max_open=len(lengths))
    layout: list[list[int]] = []
    # Longest first, ties in order: deterministic.
    for index in sorted((i for i, length in enumerate(lengths) if length), key=lambda i: -lengths[i]):
        full = packer.add(index, lengths[index])
        layout += [full] if full else []
    while (row := packer.pop()) is not None:
        layout.append(row)
    return layout


class _LaidOut(NamedTuple):
    trajectories: Sequence[Trajectory]
    examples: list[Example | None]  # None: it is left out
    layout: list[list[int]]  # the indices of the trajectories in each row


def _laid_out(trajectories: Sequence[Trajectory], max_length: int, encode: SampleEncoder) -> _LaidOut:
    made = iter(encode([t for t in trajectories if not t.left_out]))
    examples = [None if t.left_out else next(made) for t in trajectories]
    lengths = [0 if example is None else len(example.input_ids) for example in examples]
    too_long = max(lengths, default=0)
    assert too_long <= max_length, f"a trajectory of {too_long} tokens does not fit into a row of {max_length}"
    return _LaidOut(trajectories, examples, best_fit_rows(lengths, max_length))


def _packed(laid_out: _LaidOut, max_length: int, rows: int, types: SignalTypes) -> Packed:
    """`types`: not those of the examples, since a process without samples has the same signals as the others."""
    trajectories, examples, layout = laid_out
    assert len(layout) <= rows, f"{len(layout)} rows of trajectories and room for {rows}"
    spans = {i: Span(NOT_PACKED, 0, len(t.completion_ids)) for i, t in enumerate(trajectories)}
    for number, row in enumerate(layout):
        end = 0
        for index in row:
            t, example = trajectories[index], examples[index]
            assert example is not None
            spans[index] = Span(number, end + len(t.prompt.ids), end + t.length)
            end += len(example.input_ids)
    padding = [[]] * (rows - len(layout))
    made = [make_row([examples[index] for index in row], max_length, types) for row in [*layout, *padding]]
    left_out = np.zeros((len(made), 3), np.float32)
    for t in trajectories:
        left_out[:1] += t.left_out * np.array([t.loss_mask.sum(), 1, 1])
    return Packed(stack_rows(made)._replace(left_out=left_out), tuple(spans[index] for index in range(len(spans))))


def _support_width(trajectories: Sequence[Trajectory]) -> int:
    return max((t.supports.shape[1] for t in trajectories if t.supports is not None), default=0)


def support_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """`sampling/support_full`: the share of tokens with a full support, where the filters may have kept more tokens."""
    own = [t.supports[t.loss_mask, -1] != NO_ID for t in trajectories if t.supports is not None]
    full = np.concatenate(own) if own else np.zeros(0)
    return {"sampling/support_full": float(full.mean())} if len(full) else {}


class SampleEncoder(Protocol):
    """Makes the examples of trajectories. They begin with the tokens of prompt and completion; any further ones carry
    no loss."""

    @property
    def types(self) -> SignalTypes:
        """Of the examples' signals."""
        ...

    def __call__(self, trajectories: Sequence[Trajectory]) -> list[Example]: ...


class TokensAlone:
    """A `SampleEncoder`: loss on the model's tokens, and no signals."""

    types: SignalTypes = MappingProxyType({})

    def __call__(self, trajectories: Sequence[Trajectory]) -> list[Example]:
        return [tokens_example(t) for t in trajectories]


class PolicySamples:
    """A `SampleEncoder` for policy objectives. Signals are 0 on the prompt."""

    def __init__(self, width: int):
        """`width`: of supports; 0: no sample has them."""
        self._width = width
        self.types: SignalTypes = {"sampler_logps": (np.dtype(np.float32), ()), "versions": (np.dtype(np.int32), ())}
        if width:
            self.types |= {SUPPORTS: (np.dtype(np.int32), (width,))}

    def __call__(self, trajectories: Sequence[Trajectory]) -> list[Example]:
        return [self._example(t) for t in trajectories]

    def _example(self, t: Trajectory) -> Example:
        signals = {"sampler_logps": t.sampler_logps, "versions": t.versions}
        if self._width:
            signals[SUPPORTS] = _support(t, self._width)
        return tokens_example(t)._replace(signals={name: _with_prompt(t, array) for name, array in signals.items()})


def tokens_example(t: Trajectory) -> Example:
    """Prompt and completion, with loss on the model's tokens."""
    ids = np.concatenate([t.prompt.ids, t.completion_ids]).astype(np.int32)
    return Example(ids, _with_prompt(t, t.loss_mask.astype(np.float32)))


def _with_prompt(t: Trajectory, values: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros((len(t.prompt.ids), *values.shape[1:]), values.dtype), values])


def _support(trajectory: Trajectory, width: int) -> np.ndarray:
    """[C, width]; all NO_ID, which means the full vocabulary, if a sample has no support."""
    support = np.full((len(trajectory.completion_ids), width), NO_ID, np.int32)
    if trajectory.supports is not None:
        support[:, : trajectory.supports.shape[1]] = trajectory.supports
    return support
