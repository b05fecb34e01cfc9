"""The limits of the server, and the permits with which calls keep to them."""

from collections import Counter
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge
from typing_extensions import Doc

PERMITS, ABORT = "jaxtrain.permits", "jaxtrain.abort"
"""Keys of the ASGI scope: the `Permits` of the call, and a function that closes its connection at once."""


@dataclass(frozen=True)
class Limits:
    """The limits of a call, and of all pending calls together. Options of `jaxtrain serve`."""

    max_samples: Annotated[int, Ge(1), Doc("answers to one call: n times the number of prompts")] = 256
    max_logprobs: Annotated[int, Ge(1), Doc("log-probabilities that one response may hold")] = 2**20
    max_body: Annotated[int, Ge(1), Doc("bytes of a call's body")] = 8 * 2**20
    max_bodies: Annotated[int, Ge(1), Doc("bytes of all bodies that are being read")] = 256 * 2**20
    max_queue: Annotated[int, Ge(1), Doc("answers that run or wait; further calls are refused")] = 4096
    max_client_queue: Annotated[int | None, Ge(1), Doc("the same of one client's address; default: no limit")] = None
    call_seconds: Annotated[float, Ge(0), Doc("from the end of a call's body to the end of its response")] = 600.0
    stalled_seconds: Annotated[
        float, Ge(0), Doc("for a client to send its call, and to take each part of the response")
    ] = 30.0
    max_unread: Annotated[int, Ge(1), Doc("parts of a streamed answer that its client has not taken")] = 64
    drain_seconds: Annotated[int, Ge(1), Doc("for running calls to end after SIGTERM")] = 25


class RefusedError(Exception):
    """A call that is answered with an error status other than 400."""

    def __init__(self, status: int, kind: str, message: str):
        super().__init__(message)
        self.status, self.kind = status, kind


class Admission:
    """Counts what all calls hold. Used only on the event loop's thread."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self.samples = self.body_bytes = 0
        self.samples_of: Counter[str] = Counter()


class Permits:
    """What one call holds: samples that run or wait, and the bytes of its body while it is read."""

    def __init__(self, admission: Admission, client: str):
        self._admission, self._client = admission, client
        self._samples = self._bytes = 0

    def acquire(self, count: int) -> None:
        """Permits for `count` more samples. Raises RefusedError: 503 if the server is full, 429 if the client is."""
        admission, limits = self._admission, self._admission.limits
        own = admission.samples_of[self._client]
        if limits.max_client_queue is not None and own + count > limits.max_client_queue:
            raise RefusedError(
                429,
                "rate_limit_error",
                f"this client cannot have {count} more samples: {own} are running or waiting, and the maximum for a "
                f"client is {limits.max_client_queue}; try again later",
            )
        if admission.samples + count > limits.max_queue:
            raise RefusedError(
                503,
                "overloaded_error",
                f"the server cannot accept {count} more samples: {admission.samples} are running or waiting, and the "
                f"maximum is {limits.max_queue}; try again later",
            )
        self._samples += count
        admission.samples += count
        admission.samples_of[self._client] += count

    def hold_bytes(self, count: int) -> None:
        """Permits for `count` more bytes of the body, until `drop_bytes`. Raises RefusedError."""
        if self._admission.body_bytes + count > self._admission.limits.max_bodies:
            raise RefusedError(503, "overloaded_error", "the server is reading too many long calls; try again later")
        self._bytes += count
        self._admission.body_bytes += count

    def drop_bytes(self) -> None:
        self._admission.body_bytes -= self._bytes
        self._bytes = 0

    def release(self) -> None:
        """Give everything back, once the response has ended, normally or not."""
        self.drop_bytes()
        self._admission.samples -= self._samples
        self._admission.samples_of[self._client] -= self._samples
        if not self._admission.samples_of[self._client]:
            del self._admission.samples_of[self._client]
        self._samples = 0
