"""Conversations with a scripted model."""

import asyncio
import threading
from functools import partial

import numpy as np
import pytest
from chat_templates import CHATML, QWEN25, tokenizer

from jaxtrain.data.chat import ChatTokenizer
from jaxtrain.rl.conversations import Conversations
from jaxtrain.rl.environments import GuessingGame, NumberReversal, Opening, Reply
from jaxtrain.rl.rollouts import Prompt, pack
from jaxtrain.rl.tools import calculator_tools
from jaxtrain.sample.requests import Chunk, Completion, SamplingParams, Timings

CALL = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "47 * 38"}}\n</tool_call>'


class Script:
    """An engine whose n-th turn in every conversation is the n-th line, in any ids that decode to it.

    A call of the device answers all requests that were submitted before it: `requests` has those of each call.
    """

    def __init__(self, tok, lines, end="<|im_end|>", finish="stop"):
        self.tok, self.lines, self.end, self.finish, self.requests = tok, lines, end, finish, []
        self.waiting, self.submitted = [], 0

    def submit(self, request):
        self.waiting.append((self.submitted, request))
        self.submitted += 1
        return self.submitted - 1

    def run(self, source):
        while source(not self.waiting) or self.waiting:
            if not self.waiting:
                continue
            answered, self.waiting = self.waiting, []
            self.requests.append([request for _, request in answered])
            for number, request in answered:
                yield Chunk(number, 0, np.zeros(0, np.int32), np.zeros(0, np.float32), "", self.answer(request))

    def answer(self, request):
        return self.say(self.lines[len(self.requests) - 1])

    def say(self, line):
        # Character by character: not how the tokenizer would split it, as a model may do.
        ids = [token for character in line for token in self.tok.encode(character, add_special_tokens=False)]
        ids += self.tok.encode(self.end, add_special_tokens=False)
        values = np.linspace(-1, -0.5, len(ids), dtype=np.float32)
        version = np.full(len(ids), len(self.requests), np.int32)
        return Completion(
            np.array(ids, np.int32), line, values, 2 * values, self.finish, version, None, Timings(0.0, 0.0, 1.0)
        )


def run(script, factory, columns, *, samples=1, max_turns=8, max_length=10_000, seconds=60.0, **settings):
    chat, params = ChatTokenizer(script.tok), SamplingParams(max_tokens=64)
    conversations = Conversations(factory, chat, params, max_turns, max_length, seconds, **settings)
    prompts = [Prompt(number, np.zeros(1, np.int32), row) for number, row in enumerate(columns)]
    ended = list(conversations.run(script, iter([prompts]), samples, lambda number, sample: 10 * number + sample))
    groups = [[t for t in ended if t.prompt.number == prompt.number] for prompt in prompts]
    return [sorted(group, key=lambda t: t.sample) for group in groups]


def pieces(tok, trajectory):
    """The completion as runs of (text, whether the model sampled it)."""
    runs = []
    for token, own in zip(trajectory.completion_ids.tolist(), trajectory.loss_mask.tolist(), strict=True):
        if not runs or runs[-1][1] != own:
            runs.append(([], own))
        runs[-1][0].append(token)
    return [(tok.decode(ids), own) for ids, own in runs]


def test_a_tool_is_called_answered_and_the_models_ids_are_kept():
    tok = tokenizer(QWEN25)
    script = Script(tok, [CALL, "It is 1786."])
    prompt = [{"role": "user", "content": "What is 47 * 38?"}]
    ((trajectory,),) = run(script, calculator_tools, [{"prompt": prompt}])
    assert pieces(tok, trajectory) == [
        (CALL + "<|im_end|>", True),
        (
            "\n<|im_start|>user\n<tool_response>\n1786\n</tool_response><|im_end|>\n<|im_start|>assistant\n",
            False,
        ),
        ("It is 1786.<|im_end|>", True),
    ]
    assert tok.decode(trajectory.prompt.ids).startswith("<|im_start|>system\n# Tools\n<tools>\n")
    # Token in, token out: the second request continues exactly what was drawn, however it would be tokenised again.
    first = script.say(CALL).ids.tolist()
    assert trajectory.completion_ids[: len(first)].tolist() == first != tok.encode(CALL + "<|im_end|>")
    asked = script.requests[1][0].prompt_ids
    assert asked == [*trajectory.prompt.ids, *trajectory.completion_ids[: len(asked) - len(trajectory.prompt.ids)]]
    # Of the environment's tokens nothing is scored, and every token knows who drew it.
    assert (trajectory.sampler_logps[~trajectory.loss_mask] == 0).all()
    assert (trajectory.raw_logps == 2 * trajectory.sampler_logps).all()
    assert set(trajectory.versions[trajectory.loss_mask]) == {1, 2}
    assert trajectory.finish_reason == "stop"
    assert [message["role"] for message in trajectory.info["messages"]] == ["assistant", "tool", "assistant"]
    assert {key: trajectory.info[key] for key in ("turns", "tool_calls", "tool_failures")} == {
        "turns": 2,
        "tool_calls": 1,
        "tool_failures": 0,
    }


def test_rewards_lie_on_the_last_token_of_their_turn():
    tok = tokenizer(CHATML)
    ((trajectory,),) = run(Script(tok, ["4322", "4321"]), NumberReversal, [{"number": 1234}])
    assert trajectory.rewards == {"environment": 1.75}
    ends = np.flatnonzero(trajectory.token_rewards)
    assert trajectory.token_rewards[ends].tolist() == [0.75, 1.0]
    closing = tok.convert_tokens_to_ids("<|im_end|>")
    assert (trajectory.completion_ids[ends] == closing).all() and trajectory.loss_mask[ends].all()
    assert ends[-1] == len(trajectory.completion_ids) - 1


def test_conversations_run_in_parallel_and_end_independently():
    tok = tokenizer(CHATML)
    script = Script(tok, ["8", "12", "10", "11"])
    rows = [{"secret": secret} for secret in (8, 10, 11, 15)]
    groups = run(script, GuessingGame, rows, samples=2, max_turns=3)
    assert [len(requests) for requests in script.requests] == [8, 6, 6]
    assert [[t.rewards["environment"] for t in group] for group in groups] == [[1] * 2, [0.25] * 2, [0] * 2, [0] * 2]
    assert [[t.finish_reason for t in group] for group in groups] == [["stop"] * 2] * 2 + [["turns"] * 2] * 2
    assert pieces(tok, groups[1][0])[1] == ("\n<|im_start|>user\nHigher.<|im_end|>\n<|im_start|>assistant\n", False)
    seeds = [request.params.seed for request in script.requests[0]]
    assert seeds == [0, 1, 10, 11, 20, 21, 30, 31]


class Ordered:
    """The environment "late" responds to its first turn after "early" has seen its second one."""

    def __init__(self, events):
        self.events, self.turns = events, 0

    def reset(self, row):
        self.name = row["name"]
        return Opening([{"role": "user", "content": self.name}])

    def step(self, text):
        self.turns += 1
        if self.name == "early" and self.turns == 2:
            self.events.set()
        if self.name == "late":
            self.events.wait()
        return Reply([{"role": "user", "content": "More."}] if self.turns < 2 else (), reward=1.0)


def test_a_conversation_waits_for_the_environments_of_others_only_in_turns():
    tok, rows = tokenizer(CHATML), [{"name": "late"}, {"name": "early"}]
    finished = run(Script(tok, ["1"] * 6), partial(Ordered, threading.Event()), rows, in_turns=False)
    assert [group[0].rewards for group in finished] == [{"environment": 2.0}] * 2
    events = threading.Event()
    script = Script(tok, ["1"] * 6)
    (late,), (early,) = run(script, partial(Ordered, events), rows, seconds=2.0)
    events.set()
    assert late.info["timed_out"] and early.rewards == {"environment": 2.0}
    assert [len(requests) for requests in script.requests] == [2, 1]


def test_the_template_ends_a_turn_without_its_end_token():
    tok = tokenizer(CHATML)
    ((trajectory,),) = run(Script(tok, ["1", "1", "1"], end="</s>"), NumberReversal, [{"number": 12}])
    assert pieces(tok, trajectory)[:2] == [
        ("1</s>", True),
        ("<|im_end|>\n<|im_start|>user\nThat is not right. Try again.<|im_end|>\n<|im_start|>assistant\n", False),
    ]


def test_limits_end_a_conversation():
    tok = tokenizer(CHATML)
    rows = [{"number": 12}]
    ((whole,),) = run(Script(tok, ["1", "1", "1"]), NumberReversal, rows)
    for limit in (whole.length - 1, whole.length - 2 * len("1</s>")):
        script = Script(tok, ["1", "1", "1"])
        ((cut,),) = run(script, NumberReversal, rows, max_length=limit)
        room = [r.params.max_tokens + len(r.prompt_ids) for requests in script.requests for r in requests]
        assert max(room) <= limit
    ((cut,),) = run(Script(tok, ["1", "1", "1"]), NumberReversal, rows, max_length=len(whole.prompt.ids) + 30)
    assert cut.truncated and cut.length <= len(whole.prompt.ids) + 30 and cut.loss_mask[-1]
    ((none,),) = run(Script(tok, []), NumberReversal, rows, max_length=len(whole.prompt.ids))
    assert "leaves no room" in none.info["error"] and none.length == 1
    # A turn that the engine cut off is not shown to the environment.
    ((cut,),) = run(Script(tok, ["21"], finish="length"), NumberReversal, rows)
    assert cut.truncated and cut.rewards == {"environment": 0.0}


class Breaks:
    def reset(self, row):
        if row["when"] == "reset":
            raise RuntimeError("cannot begin")
        self.when = row["when"]
        return Opening([{"role": "user", "content": "Hello"}])

    def step(self, text):
        if self.when == "step":
            raise KeyError("cannot go on")
        return Reply([{"role": "user", "content": "More."}] if text == "first" else (), reward=1.0)


def test_a_raising_environment_loses_only_its_sample():
    tok = tokenizer(CHATML)
    rows = [{"when": when} for when in ("reset", "never", "step")]
    (at_reset,), (well,), (at_step,) = run(Script(tok, ["first", "second"]), Breaks, rows)
    assert at_reset.info["error"] == "RuntimeError: cannot begin" and at_reset.completion_ids.size == 0
    assert at_step.info["error"] == "KeyError: 'cannot go on'" and at_step.info["turns"] == 1
    assert np.isnan(at_reset.rewards["environment"]) and np.isnan(at_step.rewards["environment"])
    assert at_reset.finish_reason == at_step.finish_reason == "error"
    packed = pack([at_reset, well, at_step], max_length=400)
    assert [stop - start for _, start, stop in packed.spans] == [
        t.completion_ids.size for t in (at_reset, well, at_step)
    ]
    assert well.rewards == {"environment": 2.0} and well.info["turns"] == 2 and "error" not in well.info


class Hangs:
    over = threading.Event()

    def reset(self, row):
        self.when = row["when"]
        if self.when == "reset":
            self.over.wait()
        return Opening([{"role": "user", "content": "Hello"}])

    def step(self, text):
        if self.when == "step":
            self.over.wait()
        return Reply([{"role": "user", "content": "More."}] if text == "first" else (), reward=1.0)


def test_a_hanging_environment_loses_only_its_sample():
    tok = tokenizer(CHATML)
    rows = [{"when": when} for when in ("reset", "never", "step")]
    (at_reset,), (well,), (at_step,) = run(Script(tok, ["first", "second"]), Hangs, rows, seconds=1.0)
    Hangs.over.set()
    assert at_reset.info["error"] == at_step.info["error"] == "TimeoutError: took longer than 1 seconds"
    assert [t.info["timed_out"] for t in (at_reset, well, at_step)] == [True, False, True]
    assert np.isnan(at_reset.rewards["environment"]) and np.isnan(at_step.rewards["environment"])
    assert at_step.info["turns"] == 1 and at_step.loss_mask.all()
    assert well.rewards == {"environment": 2.0} and well.info["turns"] == 2 and "error" not in well.info


def test_messages_that_the_template_cannot_render_end_the_run():
    template = CHATML.replace(
        "{% for", "{% if messages[2] is defined %}{{ raise_exception('two turns') }}{% endif %}{% for", 1
    )
    with pytest.raises(ValueError, match="two turns"):
        run(Script(tokenizer(template), ["1", "1"]), NumberReversal, [{"number": 12}])


class Awaited:
    """An environment of coroutines, with a client that is bound to one event loop and used in every call."""

    async def reset(self, row):
        self.loop = asyncio.get_running_loop()
        await asyncio.sleep(0.001)
        return Opening([{"role": "user", "content": "Hello"}])

    async def step(self, text):
        assert asyncio.get_running_loop() is self.loop
        await asyncio.sleep(0.001)
        return Reply([{"role": "user", "content": "More."}] if text == "first" else (), reward=1.0)


async def awaited_factory():
    return Awaited()


def test_coroutines_are_awaited():
    tok = tokenizer(CHATML)
    ((trajectory,),) = run(Script(tok, ["first", "second"]), awaited_factory, [{}])
    assert trajectory.rewards == {"environment": 2.0} and "error" not in trajectory.info


class BadShape:
    """The first turn gets a valid reply, the second an invalid value."""

    def reset(self, row):
        self.reply = row.get("reply", Reply(reward=1.0))
        return row.get("opening", Opening([{"role": "user", "content": "Hello"}]))

    def step(self, text):
        return self.reply


def test_an_invalid_value_loses_only_its_sample():
    tok = tokenizer(CHATML)
    rows = [{}, {"reply": None}, {"reply": Reply([{"role": "user", "content": "a\udc00"}])}, {"opening": None}, {}]
    rows.insert(4, {"reply": Reply([{"role": "user", "content": [5]}])})
    groups = run(Script(tok, ["first"]), BadShape, rows)
    errors = [group[0].info.get("error", "") for group in groups]
    assert errors[0] == errors[5] == "" and "a part of the content must be" in errors[4]
    assert errors[1] == "ValueError: step must return a Reply, not NoneType"
    assert "not valid Unicode" in errors[2] and errors[3] == "ValueError: reset must return an Opening, not NoneType"
    assert [np.isnan(group[0].rewards["environment"]) for group in groups] == [False, True, True, True, True, False]


def test_an_exception_without_a_readable_message_loses_its_sample():
    class Unreadable(Exception):
        def __str__(self):
            raise RuntimeError("no message")

    class Raises(BadShape):
        def step(self, text):
            raise Unreadable

    ((trajectory,),) = run(Script(tokenizer(CHATML), ["first"]), Raises, [{}])
    assert trajectory.info["error"] == "Unreadable: (its message cannot be read: RuntimeError)"


def test_a_template_without_tools_is_refused():
    with pytest.raises(ValueError, match=r"never writes the schemas of tools.* not see calculator"):
        run(Script(tokenizer(CHATML), ["1"]), calculator_tools, [{"prompt": "What is 47 * 38?"}])


def test_template_options_may_be_json():
    template = "{{ mood | default('plain') }}" + CHATML
    script = Script(tokenizer(template), ["21"])
    ((trajectory,),) = run(script, NumberReversal, [{"number": 12, "chat_template_kwargs": '{"mood": "good"}'}])
    assert tokenizer(template).decode(trajectory.prompt.ids).startswith("good")


def test_conversations_that_cannot_begin_end_although_the_model_is_idle():
    def broken():
        raise OSError("no such simulator")

    script, ended = Script(tokenizer(CHATML), []), []
    conversations = Conversations(broken, ChatTokenizer(script.tok), SamplingParams(max_tokens=64), 8, 10_000, 60.0)

    def feed():
        for number in range(3):
            yield [Prompt(number, np.zeros(1, np.int32), {})]
            while len(ended) <= number:  # the next prompt waits for the end of this one
                yield []

    for t in conversations.run(script, feed(), 1, lambda number, sample: 0):
        ended.append(t)
    assert [t.prompt.number for t in ended] == [0, 1, 2] and {t.finish_reason for t in ended} == {"error"}
