"""Whatever is sent, the answer has OpenAI's form, and the engine goes on."""

import json
from itertools import islice

import pytest
from http_server import call, running, tiny_folder
from server_fuzz import BROKEN, PATHS, calls, problem

from jaxtrain.sample.requests import EngineLimits
from jaxtrain.serve.served import load_served

pytest.importorskip("uvicorn")
HI = {"prompt": "hi", "max_tokens": 4, "temperature": 0}


def test_calls_of_any_kind_are_answered_or_refused(tmp_path):
    limits = EngineLimits(8, alternatives=20)
    served = load_served(tiny_folder(tmp_path), dtype="float32", max_length=64, slots=8, limits=limits)
    sent = [(path, body) for path in PATHS for body in BROKEN] + list(islice(calls(0), 300))
    statuses = set()
    with running(served) as address:
        expected = call(address, PATHS[0], HI)[1]["choices"]
        for path, body in sent:
            status, answer = call(address, path, body)
            statuses.add(status)
            assert problem(status, json.dumps(answer)) is None, body[:300]
        assert statuses == {200, 400}
        assert call(address, PATHS[0], HI)[1]["choices"] == expected
