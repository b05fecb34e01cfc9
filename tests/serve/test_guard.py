"""The middleware around all endpoints, without a server."""

import asyncio

import pytest

from jaxtrain.serve.guard import Guard
from jaxtrain.serve.limits import ABORT, PERMITS, Admission, Limits
from jaxtrain.serve.metrics import ServerMetrics

pytest.importorskip("starlette")


def ask(app, path="/v1/models", headers=(), limits=None, send=None, **scope):
    """The messages that `app` sends behind a guard with the key "secret", and what all calls hold afterwards."""
    limits, sent = limits or Limits(), []
    admission = Admission(limits)

    async def keep(message):
        sent.append(message)

    guard = Guard(app, admission, ServerMetrics(admission, 1), "secret")
    call = {"type": "http", "path": path, "method": "GET", "headers": list(headers), **scope}
    asyncio.run(guard(call, None, send or keep))
    return sent, admission


async def hello(scope, receive, send):
    scope[PERMITS].acquire(3)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"hello"})


@pytest.mark.parametrize("given", [[], [b"Bearer wrong"], [b"secret"], [b"Bearer secret"]])
def test_a_call_needs_the_key(given):
    sent, admission = ask(hello, headers=[(b"authorization", value) for value in given])
    assert sent[0]["status"] == (200 if given == [b"Bearer secret"] else 401)
    assert admission.samples == 0


def test_the_health_needs_no_key():
    assert ask(hello, path="/health")[0][0]["status"] == 200


def test_permits_are_given_back_after_an_exception():
    async def fail(scope, receive, send):
        scope[PERMITS].acquire(3)
        assert scope[PERMITS]._admission.samples == 3
        raise KeyError("no such thing")

    admissions = []

    async def outer(scope, receive, send):
        admissions.append(scope[PERMITS]._admission)
        await fail(scope, receive, send)

    with pytest.raises(KeyError):
        ask(outer, path="/health")
    assert admissions[0].samples == 0


def test_a_client_that_takes_nothing_is_disconnected():
    aborted = []

    async def never(message):
        await asyncio.Event().wait()

    _, admission = ask(
        hello, "/health", limits=Limits(stalled_seconds=0.01), send=never, **{ABORT: lambda: aborted.append(True)}
    )
    assert aborted == [True] and admission.samples == 0
