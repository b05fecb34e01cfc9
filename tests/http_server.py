"""A server of a tiny model in a thread, and plain HTTP calls to it."""

import json
import socket
import threading
import time
from contextlib import contextmanager
from http.client import HTTPConnection
from typing import Any, NamedTuple

from hf_folders import save

from converters.tokenizer import write_byte_tokenizer
from jaxtrain.serve.app import make_app
from jaxtrain.serve.limits import Limits
from jaxtrain.serve.server import make_server

SIZES = {"vocab_size": 259, "num_hidden_layers": 1}


def tiny_folder(root):
    """A Hugging Face folder with a tiny model and a tokenizer of bytes."""
    folder = save(root / "tiny", "llama", **SIZES)
    write_byte_tokenizer(folder)
    return folder


class Address(NamedTuple):
    host: str
    port: int
    server: Any  # uvicorn.Server


@contextmanager
def running(served, limits=None, api_key=None):
    """The address of a server in a thread."""
    limits = limits or Limits()
    listening = socket.create_server(("127.0.0.1", 0))
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # soon full if a client does not read
    server = make_server(make_app(served, limits=limits, api_key=api_key), limits)
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield Address(*listening.getsockname(), server)
    finally:
        server.should_exit = True
        thread.join()


def wait_until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.02)


def call(address, path, body=None, headers=None):
    """The status and the body of the response to a POST of bytes, a string or an object, or to a GET without `body`."""
    connection = HTTPConnection(address.host, address.port, timeout=300)
    raw = body if body is None or isinstance(body, bytes | str) else json.dumps(body)
    connection.request("GET" if body is None else "POST", path, raw, headers or {})
    response = connection.getresponse()
    answer = response.read()
    connection.close()
    return response.status, json.loads(answer) if answer.startswith((b"{", b"[")) else answer.decode()
