"""Many conversations between the model and environments at once, a turn of all of them at a time.

Token in, token out: what the model wrote stays the ids that were drawn, and every further turn of the engine continues
exactly them. Of what the environment says only the new part is rendered and tokenised, and it carries no loss.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from jaxtrain.data.chat import ChatTokenizer, Message
from jaxtrain.rl.deadlines import call_all
from jaxtrain.rl.environments import PART, Environment, Factory, Opening, Reply
from jaxtrain.rl.rollouts import NO_ID, Prompt, Trajectory
from jaxtrain.sample.requests import Completion, Request, SamplingParams

log = logging.getLogger(__name__)

Generate = Callable[[Sequence[Request]], list[list[Completion]]]


@dataclass(frozen=True)
class Conversations:
    """How conversations are led."""

    factory: Factory
    chat: ChatTokenizer
    params: SamplingParams  # of every turn
    max_turns: int  # of the model
    max_length: int  # tokens, opening included
    seconds: float  # that an environment has for a reset or a step
    interrupted: threading.Event = field(default_factory=threading.Event)  # set: give up, as `call_all` does

    def lead(
        self, generate: Generate, prompts: Sequence[Prompt], samples: int, seed: Callable[[int, int], int]
    ) -> list[list[Trajectory]]:
        """`samples` conversations on every prompt. `seed(number, sample)` decides what the model says.

        An environment that raises or takes too long costs its sample: the trajectory ends there, with the reason
        "error". Raises ValueError where the chat template has no place for what an environment says.
        """
        talks = [[_Talk(prompt, sample) for sample in range(samples)] for prompt in prompts]
        everyone = [talk for group in talks for talk in group]
        begun = call_all(
            [partial(_begin, self.factory, talk.prompt) for talk in everyone], self.seconds, self.interrupted
        )
        for talk, answer in zip(everyone, begun, strict=True):
            if isinstance(answer, BaseException):
                talk.lose(answer)
            else:
                talk.environment, opening = answer
                self._open(talk, opening)
        while live := [talk for talk in everyone if not talk.ended]:
            answers = generate([self._request(talk, seed) for talk in live])
            for talk, (completion,) in zip(live, answers, strict=True):
                talk.hear(completion)
            listening = [talk for talk in live if not talk.ended]
            replies = call_all(
                [partial(_step, talk.environment, talk.said) for talk in listening], self.seconds, self.interrupted
            )
            for talk, reply in zip(listening, replies, strict=True):
                if isinstance(reply, BaseException):
                    talk.lose(reply)
                else:
                    self._answer(talk, reply)
        return [[talk.trajectory(self.chat) for talk in group] for group in talks]

    def _request(self, talk: _Talk, seed: Callable[[int, int], int]) -> Request:
        most = min(self.params.max_tokens or self.max_length, self._room(talk))
        params = replace(self.params, n=1, max_tokens=most, seed=seed(talk.prompt.number, talk.sample))
        return Request([*talk.opening, *talk.ids], params)

    def _room(self, talk: _Talk) -> int:
        return self.max_length - len(talk.opening) - len(talk.ids)

    def _open(self, talk: _Talk, opening: Opening) -> None:
        options = talk.prompt.columns.get("chat_template_kwargs") or {}
        tools = list(opening.tools) or None
        talk.opening = self.chat.prompt(list(opening.messages), tools=tools, template_kwargs=options).tolist()
        if self._room(talk) < 1:
            talk.end("error", f"the opening of {len(talk.opening)} tokens leaves no room for an answer")
            talk.opening = []  # a row could not hold it

    def _answer(self, talk: _Talk, reply: Reply) -> None:
        talk.reward(reply)
        if not reply.messages:
            talk.end("stop")
        elif talk.turns == self.max_turns:
            talk.end("turns")
        else:
            options = talk.prompt.columns.get("chat_template_kwargs") or {}
            ids, closing = self.chat.reply(list(reply.messages), options)
            # The model has mostly drawn the end of its turn itself; where it stopped otherwise, the template's is put.
            drawn = closing if talk.ids[-closing:] == ids[:closing] else 0
            if self._room(talk) <= len(ids) - drawn:
                talk.end("length")
            else:
                talk.read(ids[drawn:], reply.messages)


@dataclass
class _Talk:
    """A conversation under way. All lists but `opening` and `messages` have an entry per token of the completion."""

    prompt: Prompt
    sample: int
    environment: Environment | None = None
    opening: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    own: list[bool] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    raw_logps: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    supports: list[np.ndarray | None] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    turns: int = 0
    calls: int = 0
    failures: int = 0
    seconds: float = 0.0
    ended: str = ""  # why
    error: str = ""
    timed_out: bool = False

    @property
    def said(self) -> str:
        return self.messages[-1]["content"]

    def end(self, reason: str, error: str = "") -> None:
        self.ended, self.error = reason, error

    def lose(self, error: BaseException) -> None:
        """The environment raised or hung, which ends this conversation and nothing else."""
        said = f"{type(error).__name__}: {error}"
        log.warning("the environment of prompt %d, sample %d failed: %s", self.prompt.number, self.sample, said)
        self.end("error", said)
        self.timed_out = isinstance(error, TimeoutError)

    def hear(self, completion: Completion) -> None:
        """Take a turn of the model, which ends the conversation where it was cut off."""
        count = len(completion.ids)
        self.turns += 1
        self.ids += completion.ids.tolist()
        self.own += [True] * count
        self.logps += completion.logps.tolist()
        self.raw_logps += completion.raw_logps.tolist()
        self.versions += completion.versions.tolist()
        self.rewards += [0.0] * count
        self.supports += [None] * count if completion.supports is None else list(completion.supports)
        self.messages.append({"role": "assistant", "content": completion.text or ""})
        self.seconds += completion.timings.finished
        if completion.finish_reason != "stop":
            self.end(completion.finish_reason, completion.error or "")

    def read(self, ids: list[int], messages: Sequence[Message]) -> None:
        """Put what the environment says behind the model's turn."""
        count = len(ids)
        self.ids += ids
        self.own += [False] * count
        self.logps += [0.0] * count
        self.raw_logps += [0.0] * count
        self.versions += [self.versions[-1]] * count
        self.rewards += [0.0] * count
        self.supports += [None] * count
        self.messages += messages

    def reward(self, reply: Reply) -> None:
        self.rewards[-1] += reply.reward
        self.calls += reply.calls
        self.failures += reply.failures

    def trajectory(self, chat: ChatTokenizer) -> Trajectory:
        info: dict[str, Any] = {"messages": self.messages, "turns": self.turns}
        info |= {"tool_calls": self.calls, "tool_failures": self.failures, "timed_out": self.timed_out}
        return Trajectory(
            prompt=self.prompt._replace(ids=np.array(self.opening, np.int32)) if self.opening else self.prompt,
            sample=self.sample,
            completion_ids=np.array(self.ids, np.int32),
            loss_mask=np.array(self.own, bool),
            sampler_logps=np.array(self.logps, np.float32),
            raw_logps=np.array(self.raw_logps, np.float32),
            versions=np.array(self.versions, np.int32),
            text=chat.decode(self.ids),
            finish_reason=self.ended,
            supports=_stacked(self.supports),
            rewards={PART: float("nan") if self.error else sum(self.rewards)},
            token_rewards=np.array(self.rewards, np.float32),
            timings={"rollout": self.seconds},
            info=info | ({"error": self.error} if self.error else {}),
        )


def _begin(factory: Factory, prompt: Prompt) -> tuple[Environment, Opening]:
    environment = factory()
    return environment, environment.reset(prompt.columns)


def _step(environment: Environment | None, text: str) -> Reply:
    assert environment is not None
    return environment.step(text)


def _stacked(supports: list[np.ndarray | None]) -> np.ndarray | None:
    """[C, k], a row of NO_ID where a token has no support of its own; None where no token has one."""
    widths = {len(support) for support in supports if support is not None}
    if not widths:
        return None
    nothing = np.full(max(widths), NO_ID, np.int32)
    return np.stack([nothing if support is None else support for support in supports])
