"""Runs many conversations between the model and environments in parallel, turn by turn.

Token in, token out: the sampled ids of the model's turns are kept, and the next turn continues exactly these. Only the
new messages of the environment are rendered and tokenised; they carry no loss.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from jaxtrain.data.chat import ChatTokenizer, Message
from jaxtrain.rl.deadlines import awaited, call_all, error_text
from jaxtrain.rl.environments import (
    REWARD_PART,
    Environment,
    Factory,
    Opening,
    Reply,
    checked_opening,
    checked_reply,
)
from jaxtrain.rl.rollouts import NO_ID, Prompt, Trajectory
from jaxtrain.sample.requests import Completion, Request, SamplingParams

Generate = Callable[[Sequence[Request]], list[list[Completion]]]


@dataclass(frozen=True)
class Conversations:
    """The settings of conversations, and the loop over their turns."""

    factory: Factory
    chat: ChatTokenizer
    params: SamplingParams  # of every turn
    max_turns: int  # turns of the model
    max_length: int  # tokens, including the opening
    seconds: float  # time limit of a reset or a step
    interrupted: threading.Event = field(default_factory=threading.Event)  # when set, `run` raises Interrupted

    def run(
        self, generate: Generate, prompts: Sequence[Prompt], samples: int, seed: Callable[[int, int], int]
    ) -> list[list[Trajectory]]:
        """Run `samples` conversations for every prompt. `seed(prompt number, sample)` is the model's sampling seed.

        If an environment raises, exceeds its time limit or returns an invalid value, its trajectory ends with the
        finish reason "error" and the error in `info`.

        Raises ValueError if the chat template cannot render an environment's messages or ignores its tools.
        """
        groups = [[_Conversation(prompt, sample) for sample in range(samples)] for prompt in prompts]
        conversations = [conversation for group in groups for conversation in group]
        openings = [partial(_open_environment, self.factory, c.prompt) for c in conversations]
        opened = call_all(openings, self.seconds, self.interrupted)
        for conversation, result in zip(conversations, opened, strict=True):
            if isinstance(result, BaseException):
                conversation.fail(result)
            else:
                conversation.environment, opening = result
                self._render_opening(conversation, opening)
        while active := [conversation for conversation in conversations if not conversation.finish_reason]:
            completions = generate([self._request(conversation, seed) for conversation in active])
            for conversation, (completion,) in zip(active, completions, strict=True):
                conversation.add_turn(completion)
            active = [conversation for conversation in active if not conversation.finish_reason]
            steps = [partial(_step, c.environment, c.last_text) for c in active]
            replies = call_all(steps, self.seconds, self.interrupted)
            for conversation, reply in zip(active, replies, strict=True):
                if isinstance(reply, BaseException):
                    conversation.fail(reply)
                else:
                    self._render_reply(conversation, reply)
        return [[conversation.trajectory(self.chat) for conversation in group] for group in groups]

    def _request(self, conversation: _Conversation, seed: Callable[[int, int], int]) -> Request:
        max_tokens = min(self.params.max_tokens or self.max_length, self._room(conversation))
        seed_value = seed(conversation.prompt.number, conversation.sample)
        params = replace(self.params, n=1, max_tokens=max_tokens, seed=seed_value)
        return Request([*conversation.opening, *conversation.ids], params)

    def _room(self, conversation: _Conversation) -> int:
        return self.max_length - len(conversation.opening) - len(conversation.ids)

    def _render_opening(self, conversation: _Conversation, opening: Opening) -> None:
        kwargs, tools = _template_kwargs(conversation.prompt), list(opening.tools) or None
        conversation.opening = self.chat.prompt(list(opening.messages), tools=tools, template_kwargs=kwargs).tolist()
        if self._room(conversation) < 1:
            count = len(conversation.opening)
            conversation.finish("error", f"the opening of {count} tokens leaves no room for an answer")
            conversation.opening = []  # the opening does not fit into a packed row

    def _render_reply(self, conversation: _Conversation, reply: Reply) -> None:
        conversation.add_reward(reply)
        if not reply.messages:
            conversation.finish("stop")
        elif conversation.turns == self.max_turns:
            conversation.finish("turns")
        else:
            ids, closing = self.chat.reply(list(reply.messages), _template_kwargs(conversation.prompt))
            # The model has usually sampled the end of its turn; if not, the template's end of turn is added.
            sampled = closing if conversation.ids[-closing:] == ids[:closing] else 0
            if self._room(conversation) <= len(ids) - sampled:
                conversation.finish("length")
            else:
                conversation.add_messages(ids[sampled:], reply.messages)


@dataclass
class _Conversation:
    """A running conversation. All lists except `opening` and `messages` have an entry per completion token."""

    prompt: Prompt
    sample: int
    environment: Environment | None = None
    opening: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)  # True for tokens of the model, False for the environment's
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
    finish_reason: str = ""  # empty while it is running
    error: str = ""
    timed_out: bool = False

    @property
    def last_text(self) -> str:
        return self.messages[-1]["content"]

    def finish(self, reason: str, error: str = "") -> None:
        self.finish_reason, self.error = reason, error

    def fail(self, error: BaseException) -> None:
        """End this conversation because its environment failed."""
        self.finish("error", f"{type(error).__name__}: {error_text(error)}")
        self.timed_out = isinstance(error, TimeoutError)

    def add_turn(self, completion: Completion) -> None:
        """Append a turn of the model. A truncated turn ends the conversation."""
        count = len(completion.ids)
        self.turns += 1
        self.ids += completion.ids.tolist()
        self.sampled += [True] * count
        self.logps += completion.logps.tolist()
        self.raw_logps += completion.raw_logps.tolist()
        self.versions += completion.versions.tolist()
        self.rewards += [0.0] * count
        self.supports += [None] * count if completion.supports is None else list(completion.supports)
        self.messages.append({"role": "assistant", "content": completion.text or ""})
        self.seconds += completion.timings.finished
        if completion.finish_reason != "stop":
            self.finish(completion.finish_reason, completion.error or "")

    def add_messages(self, ids: list[int], messages: Sequence[Message]) -> None:
        """Append messages of the environment."""
        count = len(ids)
        self.ids += ids
        self.sampled += [False] * count
        self.logps += [0.0] * count
        self.raw_logps += [0.0] * count
        self.versions += [self.versions[-1]] * count
        self.rewards += [0.0] * count
        self.supports += [None] * count
        self.messages += messages

    def add_reward(self, reply: Reply) -> None:
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
            loss_mask=np.array(self.sampled, bool),
            sampler_logps=np.array(self.logps, np.float32),
            raw_logps=np.array(self.raw_logps, np.float32),
            versions=np.array(self.versions, np.int32),
            text=chat.decode(self.ids),
            finish_reason=self.finish_reason,
            supports=_stacked(self.supports),
            rewards={REWARD_PART: float("nan") if self.error else sum(self.rewards)},
            token_rewards=np.array(self.rewards, np.float32),
            timings={"rollout": self.seconds},
            info=info | ({"error": self.error} if self.error else {}),
        )


def _open_environment(factory: Factory, prompt: Prompt) -> tuple[Environment, Opening]:
    environment = awaited(factory())
    return environment, checked_opening(awaited(environment.reset(prompt.columns)))


def _step(environment: Environment | None, text: str) -> Reply:
    assert environment is not None
    return checked_reply(awaited(environment.step(text)))


def _template_kwargs(prompt: Prompt) -> dict[str, Any]:
    """The row's options for the chat template: a mapping or its JSON, which was checked when the prompt was made."""
    kwargs = prompt.columns.get("chat_template_kwargs") or {}
    return json.loads(kwargs) if isinstance(kwargs, str) else kwargs


def _stacked(supports: list[np.ndarray | None]) -> np.ndarray | None:
    """[C, k], rows of NO_ID for tokens without a support; None if no token has one."""
    widths = {len(support) for support in supports if support is not None}
    if not widths:
        return None
    missing = np.full(max(widths), NO_ID, np.int32)
    return np.stack([missing if support is None else support for support in supports])
