"""Tests a server with OpenAI's client and with plain HTTP."""

import json
import socket
import threading
import time
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection

import pytest
from http_server import call, running, tiny_folder

from jaxtrain.sample.requests import EngineLimits
from jaxtrain.serve.limits import Limits
from jaxtrain.serve.served import load_served
from jaxtrain.serve.server import listen, serve


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def served(folder):
    return load_served(folder, dtype="float32", max_length=96, slots=8, limits=EngineLimits(8, alternatives=5))


def test_a_port_in_use_is_reported_before_loading():
    pytest.importorskip("uvicorn")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"cannot listen on 127.0.0.1, port {port}: .*in use"):
            listen("127.0.0.1", port)


@pytest.fixture(scope="module")
def apart(folder):
    """Another engine than that of `client`, whose server runs it."""
    return load_served(folder, dtype="float32", max_length=96, slots=8, limits=EngineLimits(8, alternatives=5))


@contextmanager
def client_of(served, limits):
    """OpenAI's client for a server in a thread."""
    openai = pytest.importorskip("openai")
    pytest.importorskip("uvicorn")
    with running(served, limits) as address:
        yield openai.OpenAI(base_url=f"http://{address.host}:{address.port}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def client(served):
    with client_of(served, None) as client:
        yield client


@pytest.fixture
def serving():
    """Starts a server with the engine `apart`, which may run one at a time."""
    with ExitStack() as stack:
        yield lambda apart, limits: stack.enter_context(client_of(apart, limits))


PARTS = [{"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}]
HELLO = [{"role": "user", "content": "hello"}]


def test_openais_client_gets_chat_completions(served, client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    reply = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=8, temperature=0.7, seed=3, n=2, logprobs=True
    )
    assert [choice.index for choice in reply.choices] == [0, 1]
    assert reply.usage.prompt_tokens == len(served.prompt_ids({"messages": HELLO}))
    first = reply.choices[0]
    assert first.finish_reason in ("stop", "length") and first.message.role == "assistant"
    assert 1 <= len(first.logprobs.content) <= 8 and all(token.logprob <= 0 for token in first.logprobs.content)


def test_the_chunks_of_a_stream_join_to_the_full_response(client):
    options = {"model": "tiny", "messages": HELLO, "max_tokens": 40, "temperature": 0.7, "seed": 3}
    whole = client.chat.completions.create(**options).choices[0]
    pieces = list(client.chat.completions.create(**options, stream=True))
    assert len(pieces) > 1
    assert "".join(piece.choices[0].delta.content for piece in pieces) == whole.message.content
    assert pieces[-1].choices[0].finish_reason == whole.finish_reason


def test_alternatives_are_returned_with_log_probabilities(client):
    options = {"model": "tiny", "max_tokens": 6, "temperature": 0}
    plain = client.chat.completions.create(messages=HELLO, logprobs=True, **options).choices[0].logprobs.content
    told = client.chat.completions.create(messages=HELLO, logprobs=True, top_logprobs=3, **options)
    content = told.choices[0].logprobs.content
    assert [each.logprob for each in content] == pytest.approx([each.logprob for each in plain], abs=1e-5)
    for each in content:
        values = [other.logprob for other in each.top_logprobs]
        assert len(values) == 3 and values == sorted(values, reverse=True)
        assert each.top_logprobs[0].token == each.token and values[0] == pytest.approx(each.logprob, abs=1e-5)
    pieces = client.chat.completions.create(messages=HELLO, logprobs=True, top_logprobs=3, stream=True, **options)
    streamed = [each for piece in pieces for each in piece.choices[0].logprobs.content]
    assert [len(each.top_logprobs) for each in streamed] == [3] * len(content)
    text = client.completions.create(prompt="ab", logprobs=2, **options).choices[0].logprobs
    assert max(text.top_logprobs[0].values()) == pytest.approx(text.token_logprobs[0], abs=1e-5)
    assert text.text_offset == [sum(map(len, text.tokens[:i])) for i in range(len(text.tokens))]
    pieces = client.completions.create(prompt="ab", logprobs=2, stream=True, **options)
    assert [offset for piece in pieces for offset in piece.choices[0].logprobs.text_offset] == text.text_offset


def test_content_in_parts_is_one_text(client):
    whole, parts = (
        client.chat.completions.create(model="tiny", messages=messages, max_tokens=5, temperature=0)
        for messages in (HELLO, PARTS)
    )
    assert whole.usage == parts.usage and whole.choices == parts.choices


@pytest.mark.parametrize("prompt", ["", ["a", ""], [[1, 2], []], {"a": 1}, ["a", 1]], ids=str)
def test_an_invalid_prompt_is_refused(client, prompt):
    import openai

    with pytest.raises(
        openai.BadRequestError, match=r"the prompt is empty|prompt must be a string, a list of token ids"
    ):
        client.completions.create(model="tiny", prompt=prompt, max_tokens=5)


def test_completions_continue_text_or_ids(served, client):
    text = client.completions.create(model="tiny", prompt="ab", max_tokens=5, temperature=0, logprobs=1)
    ids = client.completions.create(model="tiny", prompt=served.tokenizer.encode("ab"), max_tokens=5, temperature=0)
    assert text.choices[0].text == ids.choices[0].text
    assert len(text.choices[0].logprobs.token_logprobs) == text.usage.completion_tokens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 1000}, "can never fit into max_length=96"),
        ({"temperature": -1}, "temperature must be greater than or equal to 0, not -1"),
        ({"max_tokens": "many"}, "max_tokens must be a valid integer, not 'many'"),
        ({"stop": [5]}, "stop\\[0\\] must be a valid string"),
        ({"logit_bias": {"3": "much"}}, "logit_bias.3 must be a valid number"),
        ({"logprobs": True, "top_logprobs": 9}, "alternatives=9, and the engine returns up to 5"),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs"),
        ({"extra_body": {"wanted": 3}}, "wanted is not supported"),
        ({"response_format": {"type": "yaml"}}, "response_format must have one of the types"),
    ],
)
def test_unsupported_chat_options_are_refused(client, options, message):
    import openai

    with pytest.raises(openai.BadRequestError, match=message):
        client.chat.completions.create(model="tiny", messages=HELLO, **options)


def post(client, path, body):
    """The status and JSON object of the response to a POST of bytes, a string or an object."""
    return call(client.base_url, path, body)


HI = {"prompt": "hi", "max_tokens": 4}


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (HI | {"top_k": 10**12}, "top_k"),
        (HI | {"logprobs": 2.5}, "logprobs"),
        (HI | {"prompt": [2**31]}, "prompt"),
        (HI | {"stop_token_ids": [None]}, "stop_token_ids"),
        (HI | {"stop_token_ids": [1.5, True]}, "stop_token_ids"),
        (HI | {"logit_bias": {"5": 1e300}}, "logit_bias"),
        (HI | {"repetition_penalty": 1e-320}, "repetition_penalty"),
        (HI | {"n": 3_000_000}, "n"),
        (HI | {"stream": "no"}, "stream"),
        (HI | {"temperature": int("9" * 400)}, "temperature"),
        (HI | {"repetition_penalty": int("9" * 400)}, "repetition_penalty"),
        (HI | {"prompt": "a\ud800"}, None),
        ('{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}", None),
        ('{"\\ud800": 1}', None),
        (b"\xff", None),
    ],
    ids=lambda value: str(value)[:60].encode(errors="backslashreplace").decode(),
)
def test_values_that_used_to_end_the_server_get_status_400_with_the_field(client, body, field):
    status, answer = post(client, "/v1/completions", body)
    assert status == 400 and answer["error"]["param"] == field and answer["error"]["type"] == "invalid_request_error"
    assert field is None or field in answer["error"]["message"]
    status, answer = post(client, "/v1/completions", HI)
    assert status == 200 and answer["usage"]["completion_tokens"]


@pytest.mark.parametrize("chat", [True, False])
def test_the_last_event_of_a_stream_has_the_usage(client, chat):
    options = {"model": "tiny", "max_tokens": 20, "temperature": 0.7, "seed": 3, "n": 2}
    create = client.chat.completions.create if chat else client.completions.create
    options |= {"messages": HELLO} if chat else {"prompt": "ab"}
    whole = create(**options)
    *pieces, last = create(**options, stream=True, stream_options={"include_usage": True})
    assert last.choices == [] and last.usage == whole.usage
    assert all(piece.usage is None and piece.choices for piece in pieces)
    assert all(piece.usage is None for piece in create(**options, stream=True))


def test_a_body_beyond_the_limit_is_not_read(apart, serving):
    client = serving(apart, Limits(max_body=1000))
    status, answer = post(client, "/v1/completions", HI | {"prompt": "a" * 1000})
    assert status == 413 and answer["error"]["message"] == "the body is longer than 1000 bytes"
    assert post(client, "/v1/completions", HI)[0] == 200


def test_calls_beyond_the_queue_are_refused_until_there_is_room(apart, serving, monkeypatch):
    openai = pytest.importorskip("openai")
    client, step = serving(apart, Limits(max_queue=5)), apart.engine.step
    go_on = threading.Event()

    def held():
        go_on.wait(20)
        return step()

    monkeypatch.setattr(apart.engine, "step", held)
    answers = []
    first = threading.Thread(target=lambda: answers.append(post(client, "/v1/completions", HI | {"n": 4})))
    first.start()
    end = time.monotonic() + 20
    while not apart.engine.busy and time.monotonic() < end:
        time.sleep(0.01)
    full = "cannot accept 1 more samples: 5 are running or waiting, and the maximum is 5"
    with pytest.raises(openai.InternalServerError, match=full) as error:
        client.completions.create(model="tiny", prompt="hi", n=2, max_tokens=4)
    assert error.value.status_code == 503 and error.value.response.headers["retry-after"] == "1"
    go_on.set()
    first.join()
    assert answers[0][0] == 200
    for _ in range(3):  # the refused call gave its place back, and so did the others
        assert post(client, "/v1/completions", HI | {"n": 5})[0] == 200
    for _ in range(3):
        assert len(list(client.completions.create(model="tiny", prompt="hi", n=5, max_tokens=4, stream=True))) >= 5


def test_slow_tokenisation_does_not_block_other_calls(apart, serving):
    begun, go_on = threading.Event(), threading.Event()

    class Slow(type(apart)):
        def prompt_ids(self, row, plain=False):
            if row.get("prompt") == "slow":
                begun.set()
                assert go_on.wait(20)
            return super().prompt_ids(row, plain)

    client, answers = serving(Slow(*apart), None), []
    slow = threading.Thread(target=lambda: answers.append(post(client, "/v1/completions", HI | {"prompt": "slow"})))
    slow.start()
    assert begun.wait(20)
    assert post(client, "/v1/completions", HI)[0] == 200 and not answers
    go_on.set()
    slow.join()
    assert answers[0][0] == 200


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("where", ["engine", "logprobs", "template"])
def test_an_exception_in_one_calls_text_fails_only_that_call(apart, serving, monkeypatch, where, stream):
    """Concurrent calls are answered as usual."""
    decode = apart.tokenizer.decode

    def brittle(ids, **options):
        if 5 in ids and (where == "engine") == bool(options):
            raise KeyError("no such token")
        return decode(ids, **options)

    class Brittle(type(apart)):
        def prompt_ids(self, row, plain=False):
            if row.get("prompt") == "bad" and where == "template":
                raise KeyError("no such token")
            return super().prompt_ids(row, plain)

    monkeypatch.setattr(apart.tokenizer, "decode", brittle)
    client = serving(Brittle(*apart), None)
    asked = HI | {"logprobs": 1, "temperature": 0, "max_tokens": 30}
    good = asked | {"logit_bias": {"6": 1000}}
    answers = []
    others = [threading.Thread(target=lambda: answers.append(post(client, "/v1/completions", good))) for _ in range(3)]
    for other in others:
        other.start()
    connection = HTTPConnection(client.base_url.host, client.base_url.port, timeout=20)
    wrong = asked | {"prompt": "bad", "logit_bias": {"5": 1000}, "stream": stream}
    connection.request("POST", "/v1/completions", json.dumps(wrong))
    response = connection.getresponse()
    said = response.read().decode()
    assert response.status == (200 if stream and where != "template" else 500)
    assert "KeyError: 'no such token'" in json.loads(said.removeprefix("data: "))["error"]["message"]
    for other in others:
        other.join()
    assert [status for status, _ in answers] == [200] * 3
    assert post(client, "/v1/completions", good)[0] == 200 and not apart.engine.busy


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_disconnected_client_frees_its_slots(served, client, monkeypatch, stream):
    finished, step = [], served.engine.step

    def slow():
        time.sleep(0.02)
        chunks = step()
        finished.extend(chunk for chunk in chunks if chunk.completion)
        return chunks

    monkeypatch.setattr(served.engine, "step", slow)
    body = json.dumps({"prompt": "ab", "max_tokens": 90, "n": 200, "stream": stream})
    connection = HTTPConnection(client.base_url.host, client.base_url.port, timeout=20 if stream else 0.5)
    connection.request("POST", f"{client.base_url.path}completions", body, {"Content-Type": "application/json"})
    if stream:
        assert connection.getresponse().readline().startswith(b"data: {")
    else:
        with pytest.raises(TimeoutError):
            connection.getresponse()
    connection.close()
    end = time.monotonic() + 20
    while served.engine.busy and time.monotonic() < end:
        time.sleep(0.02)
    assert not served.engine.busy and len(finished) < 200
    assert client.completions.create(model="tiny", prompt="ab", max_tokens=5).usage.completion_tokens


def test_a_failing_engine_is_reported_and_ends_the_server(folder):
    openai = pytest.importorskip("openai")
    pytest.importorskip("uvicorn")
    served = load_served(folder, dtype="float32", max_length=96, slots=2, limits=EngineLimits(8))
    step, calls, ended = served.engine.step, [], []

    def fail_on_the_second():
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError("no room")
        return step()

    def run():
        with pytest.raises(MemoryError) as error:
            serve(served, listening)
        ended.append(error.value)

    served.engine.step = fail_on_the_second
    listening = listen("127.0.0.1", 0)
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{listening.getsockname()[1]}/v1", api_key="none", max_retries=0)
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    pieces = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=40, stream=True)
    with pytest.raises(openai.APIError, match="the engine has stopped: MemoryError: no room"):
        list(pieces)
    thread.join(20)
    assert not thread.is_alive() and len(ended) == 1
