"""A folder's model answers: a file of prompts, a conversation, OpenAI's client over HTTP."""

import json
import socket
import threading
import time
from http.client import HTTPConnection

import numpy as np
import pytest
from hf_folders import save

from converters.tokenizer import write_byte_tokenizer
from jaxtrain.recipes.generate import chat, generate_file, load_served
from jaxtrain.recipes.serve import listen, serve
from jaxtrain.sample.requests import Request, SamplingParams

SIZES = {"vocab_size": 259, "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = save(tmp_path_factory.mktemp("model") / "tiny", "llama", **SIZES)
    write_byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def served(folder):
    return load_served(folder, dtype="float32", max_length=96, slots=8, cache_gib=None, steps=8, alternatives=5)


def test_a_file_of_prompts_comes_back_in_order_with_completions(served, tmp_path):
    rows = [{"prompt": "ab", "tag": 1}, {"messages": [{"role": "user", "content": "c"}]}, {"prompt_ids": [5, 6, 7]}] * 4
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    params = SamplingParams(max_tokens=6, n=2, seed=0)
    tokens = generate_file(served, tmp_path / "in.jsonl", tmp_path / "out.jsonl", params)
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [{k: v for k, v in row.items() if k != "completions"} for row in written] == rows
    assert tokens == sum(len(each["ids"]) for row in written for each in row["completions"])
    assert all(len(row["completions"]) == 2 for row in written)
    assert written[0]["completions"] == written[3]["completions"]  # the same prompt and seed, another slot
    ids = served.prompt_ids(rows[1])
    ((again,),) = served.engine.generate([Request(ids, SamplingParams(6, seed=0, stop_ids=served.stop_ids))])
    assert written[1]["completions"][0]["ids"] == again.ids.tolist()
    np.testing.assert_allclose(written[1]["completions"][0]["logps"], again.raw_logps, atol=1e-5)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "?"}, r"in.jsonl, row 2: .* this one has question"),
        ({"prompt": "a" * 200}, r"in.jsonl, row 2: the prompt has \d+ tokens, and max_length=96"),
    ],
)
def test_a_bad_row_is_named_and_nothing_written(served, tmp_path, row, message):
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": "a"}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=message):
        generate_file(served, tmp_path / "in.jsonl", tmp_path / "out.jsonl", SamplingParams())
    assert not (tmp_path / "out.jsonl").exists()


def test_a_port_in_use_is_said_before_anything_is_loaded():
    pytest.importorskip("uvicorn")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"cannot listen at 127.0.0.1, port {port}: .*in use"):
            listen("127.0.0.1", port)


def test_a_conversation_remembers_what_was_said(served):
    asked, said = iter(["a", "b"]), []

    def ask():
        for text in asked:
            return text
        raise EOFError

    chat(served, SamplingParams(max_tokens=3, temperature=0), ask, said.append)
    first = "".join(said).split("\n")[0]
    assert "".join(said).count("\n") >= 2 and isinstance(first, str)


def test_a_conversation_ends_where_there_is_no_room(served):
    turns, said = iter(["a" * 20] * 9), []
    with pytest.raises(ValueError, match=r"the conversation has \d+ tokens by now, and max_length=96"):
        chat(served, SamplingParams(max_tokens=60, temperature=0), lambda: next(turns), said.append)
    assert "".join(said).count("\n") >= 1  # answers before it, longer than there is room for


def test_a_cache_budget_decides_the_slots(folder):
    roomy = load_served(folder, dtype="float32", max_length=64, slots=None, cache_gib=0.001).engine
    # One layer, two heads of 16, keys and values of 64 tokens in float32, once more while it grows; 259 marks.
    each = 2 * 2 * 16 * 64 * 4 * 2 + 2 * 259
    assert roomy.slots == int(0.001 * 2**30) // each * 8
    with pytest.raises(ValueError, match=r"holds no sample of 64 tokens, which takes 0\.0 MiB"):
        load_served(folder, dtype="float32", max_length=64, slots=None, cache_gib=1e-6)


@pytest.fixture(scope="module")
def client(served):
    openai = pytest.importorskip("openai")
    uvicorn = pytest.importorskip("uvicorn")
    from jaxtrain.recipes.serve import make_app

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(make_app(served), port=port, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    server.should_exit = True
    thread.join()


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


def test_a_stream_is_the_whole_in_pieces(client):
    options = {"model": "tiny", "messages": HELLO, "max_tokens": 40, "temperature": 0.7, "seed": 3}
    whole = client.chat.completions.create(**options).choices[0]
    pieces = list(client.chat.completions.create(**options, stream=True))
    assert len(pieces) > 1
    assert "".join(piece.choices[0].delta.content for piece in pieces) == whole.message.content
    assert pieces[-1].choices[0].finish_reason == whole.finish_reason


def test_alternatives_come_with_the_log_probabilities(client):
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


@pytest.mark.parametrize("prompt", ["", ["a", "b"], [[1, 2], [3]], {"a": 1}], ids=str)
def test_a_prompt_that_is_none_is_refused(client, prompt):
    import openai

    with pytest.raises(openai.BadRequestError, match=r"the prompt is empty|prompt must be one text"):
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
        ({"temperature": -1}, "temperature=-1 must be at least 0"),
        ({"max_tokens": "many"}, "max_tokens must be int, not 'many'"),
        ({"stop": [5]}, "what is in stop must be text"),
        ({"logit_bias": {"3": "much"}}, "must be a number"),
        ({"logprobs": True, "top_logprobs": 9}, "alternatives=9, and the engine tells up to 5"),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs"),
        ({"extra_body": {"best_of": 3}}, "best_of is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format is not supported"),
    ],
)
def test_what_cannot_be_done_is_said(client, options, message):
    import openai

    with pytest.raises(openai.BadRequestError, match=message):
        client.chat.completions.create(model="tiny", messages=HELLO, **options)


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_client_that_hangs_up_frees_its_slots(served, client, monkeypatch, stream):
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


def test_a_server_whose_engine_fails_says_so_and_ends(folder):
    openai = pytest.importorskip("openai")
    pytest.importorskip("uvicorn")
    served = load_served(folder, dtype="float32", max_length=96, slots=2, cache_gib=None, steps=8)
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
