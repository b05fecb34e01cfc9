"""Runs many conversations between the model and environments at the same time.

Token in, token out: the sampled ids of the model's turns are kept, and the next turn continues exactly these. Only the
new messages of the environment are rendered and tokenised; they carry no loss.
"""

from __future__ import annotations

import itertools
import json
import pickle
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np

from jaxtrain.data.chat import ChatTokenizer, Message
from jaxtrain.rl.deadlines import POLL_SECONDS, Calls, awaited, error_text
from jaxtrain.rl.dealing import Deal
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
from jaxtrain.sample.requests import Chunk, Completion, Request, SamplingParams
from jaxtrain.train.agree import gather_values, on_all
from jaxtrain.train.preemption import Interrupted


class TurnEngine(Protocol):
    """The part of `Engine` that conversations use."""

    def submit(self, request: Request) -> int: ...

    def run(self, source: Callable[[bool], bool]) -> Generator[Chunk]: ...


@dataclass(frozen=True)
class Conversations:
    """The settings of conversations, and the loop over their turns.

    With `in_turns` the engine begins the next turn of all conversations when every environment has responded. So its
    device calls do not depend on how long environments take, and a repeated run is bit-identical. Otherwise a
    conversation continues as soon as its own environment has responded.

    An engine of several processes (`deal`), which call `run` together, needs `in_turns`: each process has the
    environments of its own prompts, and sends their responses to the others.
    """

    factory: Factory
    chat: ChatTokenizer
    params: SamplingParams  # of every turn
    max_turns: int  # turns of the model
    max_length: int  # tokens, including the opening
    seconds: float  # time limit of a reset or a step
    in_turns: bool = True
    deal: Deal = Deal()  # noqa: RUF009 - immutable
    interrupted: threading.Event = field(default_factory=threading.Event)  # when set, `run` raises Interrupted

    def run(
        self,
        engine: TurnEngine,
        feed: Iterator[Sequence[Prompt]],
        samples: int,
        seed: Callable[[int, int], int],
        between: Callable[[], None] = lambda: None,
    ) -> Iterator[Trajectory]:
        """Run `samples` conversations for every prompt of `feed`. Yields each after it has ended.

        `seed(prompt number, sample)` is the model's sampling seed. `between` is called before every device call, after
        the next prompts were taken from `feed`.

        If an environment raises, exceeds its time limit or returns an invalid value, its trajectory ends with the
        finish reason "error" and the error in `info`.

        Raises ValueError if the chat template cannot render an environment's messages or ignores its tools.
        """
        running: dict[int, _Conversation] = {}
        ended: deque[_Conversation] = deque()
        requests: dict[int, int] = {}  # request -> conversation
        responses, numbers, more = _Responses(self), itertools.count(), True

        def source(idle: bool) -> bool:
            nonlocal more
            prompts = next(feed, None)
            more = prompts is not None
            for prompt, sample in itertools.product(prompts or (), range(samples)):
                number, conversation = next(numbers), _Conversation(prompt, sample)
                running[number] = conversation
                responses.ask(number, conversation, partial(_open_environment, self.factory, conversation))
            between()
            for number, response in responses.next(idle) if running else ():
                conversation = running[number]
                self._render(conversation, response)
                if conversation.finish_reason:
                    ended.append(running.pop(number))
                else:
                    requests[engine.submit(self._request(conversation, seed))] = number
            return bool(more or running) and not ended  # an idle engine gives no chunk with which these are yielded

        while more or running:
            with closing(engine.run(source)) as chunks:
                for chunk in chunks:
                    if chunk.completion is not None:
                        number = requests.pop(chunk.request)
                        conversation = running[number]
                        conversation.add_turn(chunk.completion)
                        if conversation.finish_reason:
                            ended.append(running.pop(number))
                        else:
                            responses.ask(number, conversation, partial(_step, conversation, conversation.last_text))
                    while ended:
                        yield ended.popleft().trajectory(self.chat)
            while ended:
                yield ended.popleft().trajectory(self.chat)

    def _render(self, conversation: _Conversation, response: _Response) -> None:
        """Continue or end a conversation."""
        match response:
            case Opening():
                self._render_opening(conversation, response)
            case Reply():
                self._render_reply(conversation, response)
            case _Failure():
                conversation.fail(response)

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

    def fail(self, failure: _Failure) -> None:
        """End this conversation because its environment failed."""
        self.finish("error", failure.error)
        self.timed_out = failure.timed_out

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


class _Failure(NamedTuple):
    """An environment has raised an exception, exceeded its time limit or returned an invalid value."""

    error: str
    timed_out: bool


_Response = Opening | Reply | _Failure


class _Responses:
    """The responses of environments, by the number of the conversation, in the order in which they are used."""

    def __init__(self, settings: Conversations):
        self._settings, self._processes = settings, settings.deal.engine_group
        assert settings.in_turns or self._processes is None, "processes would not agree on who has responded"
        self._calls: Calls[_Response] = Calls(settings.seconds)
        self._arrived: dict[int, _Response] = {}  # not returned yet

    def ask(self, number: int, conversation: _Conversation, call: Callable[[], _Response]) -> None:
        prompt = conversation.prompt.number
        owned = self._settings.deal.owns(prompt)
        assert owned or self._processes is not None, f"prompt {prompt} is of another process"
        if owned:
            self._calls.start(number, call)

    def next(self, idle: bool) -> list[tuple[int, _Response]]:
        """The responses with which conversations continue now. Waits for some if the engine is `idle`; a long wait
        raises Interrupted shortly after `interrupted` is set."""
        self._collect(0.0)
        if self._settings.in_turns:
            return sorted(self._all().items()) if idle else []
        if idle and not self._arrived:
            self._collect(POLL_SECONDS)
        return sorted(self._pop_arrived().items())

    def _all(self) -> dict[int, _Response]:
        """Those of all environments, when all have responded; for an engine of several processes with the others'."""
        if self._processes is None:
            return self._own()
        own = on_all(self._own, self._processes)
        return {number: response for part in gather_values(own, self._processes) for number, response in part.items()}

    def _own(self) -> dict[int, _Response]:
        while self._calls.pending:
            if self._settings.interrupted.is_set():
                raise Interrupted
            self._collect(POLL_SECONDS)
        return self._pop_arrived()

    def _pop_arrived(self) -> dict[int, _Response]:
        arrived, self._arrived = self._arrived, {}
        return arrived

    def _collect(self, wait: float) -> None:
        for number, result in self._calls.results(wait):
            if isinstance(result, BaseException):
                text = f"{type(result).__name__}: {error_text(result)}"
                result = _Failure(text, isinstance(result, TimeoutError))
            self._arrived[number] = result if self._processes is None else _sendable(result)


def _sendable(response: _Response) -> _Response:
    try:
        pickle.dumps(response)
    except Exception as error:  # values of user code raise anything
        return _Failure(f"its response cannot be sent to the other processes of the engine: {error_text(error)}", False)
    return response


def _open_environment(factory: Factory, conversation: _Conversation) -> Opening:
    environment = awaited(factory())
    conversation.environment = environment
    return checked_opening(awaited(environment.reset(conversation.prompt.columns)))


def _step(conversation: _Conversation, text: str) -> Reply:
    assert conversation.environment is not None
    return checked_reply(awaited(conversation.environment.step(text)))


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
