"""A stream of events holds what a complete response does, and an error is its last event."""

import asyncio
import json

import numpy as np
import pytest

from converters.tokenizer import load_tokenizer, write_byte_tokenizer
from jaxtrain.sample.requests import Alternatives, Chunk, Completion, Request, SamplingParams, Timings
from jaxtrain.serve.answers import error_answer
from jaxtrain.serve.outputs import parser
from jaxtrain.serve.protocol import Call
from jaxtrain.serve.responses import FailedError, ResponseBuilder
from jaxtrain.serve.schema import ChatCall, CompletionCall
from jaxtrain.serve.served import Served


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(folder)
    return load_tokenizer(folder)


def piece(sample, text, completion=None):
    ids = np.array([ord(letter) - ord("a") + 64 for letter in text], np.int32)  # the byte tokenizer's
    logps = -np.arange(1, len(ids) + 1, dtype=np.float32)
    others = Alternatives(np.stack([ids, ids + 1], 1), np.stack([logps, logps - 1], 1))
    return Chunk(0, sample, ids, logps, text, completion, others)


def completion(text, error=None):
    made = piece(0, text)
    reason = "stop" if error is None else "failed"
    versions = np.zeros_like(made.ids)
    return Completion(
        made.ids,
        text,
        made.raw_logps,
        made.raw_logps,
        reason,
        versions,
        None,
        Timings(0, 0, 0),
        error,
        made.alternatives,
    )


def chunks(error=None):
    """Two samples, "abcd" in two pieces and "xy" in one; `error`: of the first."""
    yield piece(0, "ab")
    yield piece(1, "xy", completion("xy"))
    yield piece(0, "cd", completion("abcd", error))


async def engine(given):
    for chunk in given:
        yield chunk


def builder(tokenizer, chat=True, logprobs=True, usage=False):
    request = Request([1, 2, 3], SamplingParams(n=2))
    given = {"messages": [{"role": "user", "content": "hi"}]} if chat else {"prompt": [1, 2, 3]}
    body = (ChatCall if chat else CompletionCall).model_validate({**given, "n": 2})
    served = Served("tiny", None, tokenizer, None, [])
    return ResponseBuilder(served, Call(body, [request], logprobs, usage, parser("", None) if chat else None))


def whole(tokenizer, given, **call):
    return json.loads(asyncio.run(builder(tokenizer, **call).build(engine(given))))


def events(tokenizer, given, **call):
    async def collect():
        return [event async for event in builder(tokenizer, **call).stream(engine(given))]

    told = asyncio.run(collect())
    assert all(event.startswith("data: ") and event.endswith("\n\n") for event in told)
    return [event.removeprefix("data: ").strip() for event in told]


def test_the_pieces_of_a_chat_join_to_the_message(tokenizer):
    expected = whole(tokenizer, chunks())["choices"]
    *told, done = events(tokenizer, chunks())
    assert done == "[DONE]"
    choices = [json.loads(event)["choices"][0] for event in told]
    for choice in expected:
        own = [each for each in choices if each["index"] == choice["index"]]
        assert "".join(each["delta"]["content"] for each in own) == choice["message"]["content"]
        assert ["role" in each["delta"] for each in own] == [True] + [False] * (len(own) - 1)
        assert [each["finish_reason"] for each in own] == [None] * (len(own) - 1) + [choice["finish_reason"]]
        assert [entry["token"] for each in own for entry in each["logprobs"]["content"]] == [
            entry["token"] for entry in choice["logprobs"]["content"]
        ]


def test_offsets_of_a_completion_count_on_over_its_pieces(tokenizer):
    told = [json.loads(event)["choices"][0] for event in events(tokenizer, chunks(), chat=False)[:-1]]
    first = [each["logprobs"] for each in told if each["index"] == 0]
    assert [each["text_offset"] for each in first] == [[0, 1], [2, 3]]
    assert first[0]["top_logprobs"][0] == {"a": -1.0, "b": -2.0}
    (joined, _) = whole(tokenizer, chunks(), chat=False)["choices"]
    assert joined["text"] == "abcd" and joined["logprobs"]["text_offset"] == [0, 1, 2, 3]


def test_usage_counts_all_samples_and_stands_at_the_end_where_asked_for(tokenizer):
    usage = {"prompt_tokens": 3, "completion_tokens": 6, "total_tokens": 9}
    assert whole(tokenizer, chunks())["usage"] == usage
    *others, last, _ = [json.loads(e) if e != "[DONE]" else e for e in events(tokenizer, chunks(), usage=True)]
    assert last["usage"] == usage and last["choices"] == []
    assert [each["usage"] for each in others] == [None] * 3


def test_a_sample_that_fails_ends_the_response_with_its_error(tokenizer):
    with pytest.raises(FailedError, match="the logits are not finite"):
        whole(tokenizer, chunks("the logits are not finite"))
    *before, last = events(tokenizer, chunks("the logits are not finite"))
    assert json.loads(last) == error_answer("the logits are not finite", "server_error").model_dump()
    assert len(before) == 2 and "[DONE]" not in before


def test_without_log_probabilities_none_are_told(tokenizer):
    assert whole(tokenizer, chunks(), logprobs=False)["choices"][0]["logprobs"] is None
    assert json.loads(events(tokenizer, chunks(), logprobs=False)[0])["choices"][0]["logprobs"] is None
