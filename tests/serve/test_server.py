"""Clients that are many, slow or silent do not harm the others, and a server that is stopped drains."""

import asyncio
import json
import socket
import threading
import time

import pytest
from http_server import call, running, tiny_folder, wait_until

from jaxtrain.sample.requests import EngineLimits
from jaxtrain.serve.limits import Limits
from jaxtrain.serve.served import load_served

pytest.importorskip("uvicorn")
PATH = "/v1/completions"
HI = {"prompt": "hi", "max_tokens": 4, "temperature": 0}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tiny_folder(tmp_path_factory.mktemp("model"))
    return load_served(folder, dtype="float32", max_length=96, slots=8, limits=EngineLimits(8, alternatives=5))


@pytest.fixture
def address(served):  # the other tests' servers run the same engine, which one server may do at a time
    with running(served, Limits(max_client_queue=1100)) as address:
        yield address


def test_a_thousand_clients_are_all_answered_or_refused(address, served):
    expected = call(address, PATH, HI)[1]["choices"]
    body = json.dumps(HI)
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n{body}"

    async def ask(number):
        reader, writer = await asyncio.open_connection(address.host, address.port)
        writer.write(head.encode())
        response = await reader.read()
        writer.close()
        return response

    async def everybody():
        return await asyncio.gather(*map(ask, range(1000)))

    answers = [response.split(b"\r\n\r\n", 1) for response in asyncio.run(everybody())]
    statuses = [head.split()[1] for head, _ in answers]
    assert set(statuses) <= {b"200", b"429", b"503"} and statuses.count(b"200") > 8
    assert all(json.loads(body)["choices"] == expected for head, body in answers if b" 200 " in head)
    assert not served.engine.busy


def test_a_call_with_many_samples_does_not_delay_another(address, served):
    answers = []
    body = {"prompt": "ab", "max_tokens": 90, "min_tokens": 90, "n": 48}
    many = threading.Thread(target=lambda: answers.append(call(address, PATH, body)))
    many.start()
    wait_until(lambda: served.engine.busy)
    assert call(address, PATH, HI)[0] == 200 and not answers
    many.join()
    assert answers[0][0] == 200


def test_a_reader_that_stops_is_disconnected_and_others_are_answered(served, monkeypatch):
    """Its socket's buffers are full, so that its connection ends only if the server aborts it."""
    finished, step = [], served.engine.step

    def watched():
        chunks = step()
        finished.extend(chunk for chunk in chunks if chunk.completion)
        return chunks

    monkeypatch.setattr(served.engine, "step", watched)
    body = json.dumps({"prompt": "ab", "max_tokens": 90, "n": 256, "stream": True, "logprobs": 5})
    with running(served, Limits(stalled_seconds=0.5, max_unread=4)) as address:
        slow = []
        for _ in range(3):
            client = socket.socket()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            client.connect((address.host, address.port))
            client.sendall(f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
            slow.append(client)
        assert call(address, PATH, HI)[0] == 200
        wait_until(lambda: not served.engine.busy and len(address.server.server_state.connections) == 0)
        assert len(finished) < 3 * 256
        for client in slow:
            client.close()


HALF = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{{"


@pytest.mark.parametrize("sent", ["", "POST /v1/compl", HALF])
def test_a_client_that_does_not_send_its_call_is_disconnected(served, sent):
    with running(served, Limits(stalled_seconds=0.3)) as address:
        with socket.create_connection((address.host, address.port), timeout=120) as client:
            client.sendall(sent.encode())
            answer = b""
            while piece := client.recv(4096):
                answer += piece
        assert not answer or (answer.startswith(b"HTTP/1.1 408") and b"timeout_error" in answer)


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_takes_too_long_is_ended(served, monkeypatch, stream):
    step = served.engine.step
    monkeypatch.setattr(served.engine, "step", lambda: time.sleep(0.2) or step())
    with running(served, Limits(call_seconds=0.3)) as address:
        status, answer = call(address, PATH, {"prompt": "a", "max_tokens": 90, "n": 64, "stream": stream})
        assert status == (200 if stream else 504)
        error = json.loads(answer.split("data: ")[-1]) if stream else answer
        assert error["error"]["type"] == "timeout_error" and "longer than 0.3 seconds" in error["error"]["message"]
        wait_until(lambda: not served.engine.busy)


def test_a_stopped_server_answers_running_calls(served, monkeypatch):
    step, answers = served.engine.step, []
    monkeypatch.setattr(served.engine, "step", lambda: time.sleep(0.1) or step())
    with running(served) as address:
        body = HI | {"max_tokens": 60, "stream": True}
        thread = threading.Thread(target=lambda: answers.append(call(address, PATH, body)))
        thread.start()
        wait_until(lambda: served.engine.busy)
        address.server.should_exit = True
        thread.join()
        ((status, events),) = answers
        assert status == 200 and events.endswith("data: [DONE]\n\n") and '"finish_reason":"length"' in events
        with pytest.raises(OSError):
            call(address, PATH, HI)


def test_metrics_count_calls_and_tokens(served):
    with running(served) as address:
        for _ in range(3):
            assert call(address, PATH, HI | {"n": 2, "min_tokens": 4})[0] == 200
        assert call(address, PATH, HI | {"n": 0})[0] == 400
        assert call(address, "/unknown")[1]["error"]["message"] == "GET /unknown: Not Found"
        lines = dict(line.rsplit(" ", 1) for line in call(address, "/metrics")[1].splitlines() if line[0] != "#")
    name = "jaxtrain_calls_total{{endpoint={},status={}}}"
    assert float(lines[name.format(f'"{PATH}"', '"200"')]) == 3
    assert float(lines[name.format(f'"{PATH}"', '"400"')]) == 1
    assert float(lines[name.format('"other"', '"404"')]) == 1
    assert float(lines["jaxtrain_generated_tokens_total"]) == 3 * 2 * 4
    assert float(lines["jaxtrain_prompt_tokens_total"]) == 3 * 2
    assert float(lines["jaxtrain_samples"]) == 0


def test_a_body_that_is_too_long_is_answered_while_it_is_sent(served):
    """A client that sends its whole call first gets the response too."""
    with running(served, Limits(max_body=100_000)) as address:
        status, answer = call(address, PATH, b'{"prompt": "' + b"a" * 500_000)
        assert status == 413 and answer["error"]["message"] == "the body is longer than 100000 bytes"
