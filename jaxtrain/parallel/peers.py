"""Connections between the processes of a job, over which failures and requests to stop reach all of them at once.

Process 0 listens, and each other process keeps one connection to it. The kernel closes the connections of a process
that ends, however it ends, and answers for one that is busy: so a killed process is noticed immediately, and neither a
long garbage collection nor an overloaded host looks like a failure. TCP keepalive finds a host that is gone.

Does not import JAX. `jaxtrain.parallel.distributed` makes the connections, `jaxtrain.train.job` uses them.
"""

from __future__ import annotations

import atexit
import faulthandler
import hmac
import json
import os
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

KILLED = 128 + signal.SIGKILL
"""The exit code of a job of which a process was killed."""

_GRACE_SECONDS = 5.0  # for the failed process to close what it has opened and to print its error
_OTHERS_GRACE_SECONDS = 1.0
_LAST_SECONDS = 3.0  # that process 0 waits for the others to end first
_SEND_SECONDS = 5.0
_SHOW_CURSOR = "\x1b[?25h"  # a progress bar hides it


class JobFailure(NamedTuple):
    """Why a job ends."""

    process: int
    host: str
    error: str
    code: int  # with which all processes exit
    stacks: bool = False  # whether all processes print the stacks of their threads

    def __str__(self) -> str:
        return f"process {self.process} on {self.host} failed, so all processes of the job end: {self.error}"


class _Connection:
    def __init__(self, to: socket.socket) -> None:
        self.socket, self.unread = to, b""
        self.process = -1  # until it has sent its number
        self.host = "an unknown host"
        self.here = True  # False once it needs no other process any more
        self.busy = False


class Peers:
    """This process's connections to the others of the job.

    After a failure of any process, `failed` is set, and this process ends with the exit code of the failure within
    seconds: the failed one after it has printed its error, the others whatever they do.
    """

    def __init__(self, process: int, count: int, within: float, unreachable: float) -> None:
        self.process, self.host = process, socket.gethostname()
        self.failed = threading.Event()
        self.others_busy = False  # whether another process does something that may take long
        self.on_stop: Callable[[int], None] = lambda number: None
        self._count, self._unreachable = count, unreachable
        self._deadline = time.monotonic() + within
        self._lock = threading.RLock()
        self._selector = selectors.DefaultSelector()
        self._connections: dict[socket.socket, _Connection] = {}
        self._failure: JobFailure | None = None
        self._gone: JobFailure | None = None  # of a process that had left: a failure for those that still need it
        self._details = ""
        self._here = self._busy = False
        self._stop = 0
        self._token = ""
        self._listener: socket.socket | None = None
        os.register_at_fork(after_in_child=self._close)  # or a child would keep the connections of a killed parent
        atexit.register(self._at_exit)

    @classmethod
    def listen(cls, count: int, token: str, port: int, within: float, unreachable: float) -> tuple[Peers, int]:
        """Process 0's, and the port on which it listens (`port`, or any free one for 0).

        The job fails if the others have not connected `within` seconds, or a host does not answer for `unreachable`.
        """
        self = cls(0, count, within, unreachable)
        self._token = token
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        listener = socket.create_server(("", port), family=family, backlog=count, dualstack_ipv6=dual)
        self._listener = listener
        self._selector.register(listener, selectors.EVENT_READ)
        self._start()
        return self, listener.getsockname()[1]

    @classmethod
    def connect(cls, process: int, address: tuple[str, int], token: str, within: float, unreachable: float) -> Peers:
        """Another process's. Raises OSError if process 0 cannot be reached at `address`."""
        self = cls(process, 1, within, unreachable)
        connection = self._add(socket.create_connection(address, timeout=within))
        connection.process, connection.host = 0, address[0]
        connection.socket.sendall(f"{token} {process} {self.host}\n".encode())
        self._start()
        return self

    def arrive(self, on_stop: Callable[[int], None]) -> None:
        """From now on this process needs the others; `on_stop` is called with a signal that one of them received."""
        self.on_stop = on_stop
        self._here = True
        self._broadcast({"kind": "here", "here": True})
        if self._gone is not None:
            self.fail(self._gone)

    def leave(self) -> None:
        """This process needs no other any more, and may end."""
        self._here = False
        self._broadcast({"kind": "here", "here": False})

    def stop(self, number: int) -> None:
        """This process received the signal `number`."""
        if self._first_stop(number):
            self._broadcast({"kind": "stop", "number": number})

    def busy(self, busy: bool) -> None:
        """This process does something that may take long, or no longer."""
        if busy != self._busy:
            self._busy = busy
            if self.process == 0:
                self._forward_busy()
            else:
                self._broadcast({"kind": "busy", "busy": busy})

    def error(self, error: str, code: int, *, stacks: bool = False, details: str = "") -> None:
        """This process has failed. `details` are printed if it has not ended by itself after a few seconds."""
        self._details = details
        self.fail(JobFailure(self.process, self.host, error, code, stacks))

    def fail(self, failure: JobFailure) -> None:
        """End the job. Only the first failure counts."""
        with self._lock:
            if self._failure is not None:
                return
            self._failure = failure
        self._broadcast({"kind": "failed", "failure": failure._asdict()})
        print(failure, file=sys.stderr, flush=True)
        if failure.stacks:
            faulthandler.dump_traceback(sys.__stderr__ or 2)
        self.failed.set()
        threading.Thread(target=self._end_after_grace, args=(failure,), name="failure", daemon=True).start()

    def _end_after_grace(self, failure: JobFailure) -> None:
        if failure.process == self.process and not failure.stacks:
            time.sleep(_GRACE_SECONDS)
            if self._details:
                print(self._details, file=sys.stderr, flush=True)
        else:
            time.sleep(_OTHERS_GRACE_SECONDS)
        self._end(failure)

    def _end(self, failure: JobFailure) -> None:
        # JAX ends the other processes with SIGABRT if process 0 ends before them.
        deadline = time.monotonic() + _LAST_SECONDS
        if self.process == 0:
            while self._connections and time.monotonic() < deadline:
                time.sleep(0.05)
            for each in list(self._connections.values()):
                print(f"process {each.process} on {each.host} does not answer", file=sys.stderr)
        end_process(failure.code)

    def _at_exit(self) -> None:
        if self._failure is not None:
            self._end(self._failure)  # without JAX's barrier, which waits for all processes

    def _start(self) -> None:
        threading.Thread(target=self._run, name="peers", daemon=True).start()

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select(1.0):
                if self._listener is not None and key.fileobj is self._listener:
                    self._add(self._listener.accept()[0])
                else:
                    self._read(key.data)
            if self._listener is None:
                continue
            missing = {*range(1, self._count)} - {each.process for each in self._connections.values()}
            if not missing:
                self._selector.unregister(self._listener)
                self._listener.close()
                self._listener = None
            elif time.monotonic() > self._deadline:
                text = f"the processes {', '.join(map(str, sorted(missing)))} have not connected to it"
                self.fail(JobFailure(self.process, self.host, text, 1))

    def _add(self, to: socket.socket) -> _Connection:
        to.settimeout(_SEND_SECONDS)
        to.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        idle = max(int(self._unreachable / 2), 1)
        for option, value in (
            ("TCP_KEEPIDLE", idle),
            ("TCP_KEEPALIVE", idle),  # as macOS calls it
            ("TCP_KEEPINTVL", 1),
            ("TCP_KEEPCNT", max(int(self._unreachable) - idle, 1)),
            ("TCP_USER_TIMEOUT", int(self._unreachable * 1000)),
        ):
            if hasattr(socket, option):
                to.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        connection = _Connection(to)
        self._connections[to] = connection
        self._selector.register(to, selectors.EVENT_READ, connection)
        return connection

    def _read(self, connection: _Connection) -> None:
        try:
            data = connection.socket.recv(1 << 16)
        except OSError as error:
            self._drop(connection, f"its connection failed: {error}")
            return
        if not data:
            self._drop(connection, "it was killed or crashed")
            return
        *lines, connection.unread = (connection.unread + data).split(b"\n")
        for line in lines:
            if connection.process >= 0:
                self._receive(connection, json.loads(line))
            elif not self._introduces(connection, line):
                self._drop(connection, "it does not belong to the job")
                return

    def _introduces(self, connection: _Connection, line: bytes) -> bool:
        """Whether `line` is the first one of a process of this job. Anything may connect to an open port."""
        token, _, process_and_host = line.decode(errors="replace").partition(" ")
        if not hmac.compare_digest(token.encode(), self._token.encode()):
            return False
        process, _, connection.host = process_and_host.partition(" ")
        connection.process = int(process)
        self._send(connection, {"kind": "host", "host": self.host})
        if self._stop:
            self._send(connection, {"kind": "stop", "number": self._stop})
        if self._failure is not None:
            self._send(connection, {"kind": "failed", "failure": self._failure._asdict()})
        return True

    def _receive(self, connection: _Connection, message: dict[str, Any]) -> None:
        match message:
            case {"kind": "failed", "failure": failure}:
                self.fail(JobFailure(**failure))
            case {"kind": "gone", "failure": failure}:
                self._is_gone(JobFailure(**failure))
            case {"kind": "stop", "number": number}:
                if self._first_stop(number):
                    if self.process == 0:
                        self._broadcast(message)
                    self.on_stop(number)
            case {"kind": "host", "host": host}:
                connection.host = host
            case {"kind": "here", "here": here}:
                connection.here = here
            case {"kind": "busy", "busy": busy} if self.process == 0:
                connection.busy = busy
                self._forward_busy()
            case {"kind": "busy", "busy": busy}:
                self.others_busy = busy

    def _first_stop(self, number: int) -> bool:
        with self._lock:
            first, self._stop = not self._stop, self._stop or number
            return first

    def _forward_busy(self) -> None:
        """Tell every process whether another one is busy."""
        with self._lock:
            busy = [each for each in self._connections.values() if each.busy]
            self.others_busy = bool(busy)
            for each in [each for each in self._connections.values() if each.process >= 0]:
                self._send(each, {"kind": "busy", "busy": self._busy or busy not in ([], [each])})

    def _drop(self, connection: _Connection, reason: str) -> None:
        """The connection of a process that has ended, or that did not know the token."""
        self._selector.unregister(connection.socket)
        with self._lock:
            del self._connections[connection.socket]
        connection.socket.close()
        if connection.process < 0 or self._failure is not None:
            return
        code = 128 + self._stop if self._stop else KILLED
        if self._stop:
            reason = f"it ended after {signal.Signals(self._stop).name} without saving"
        failure = JobFailure(connection.process, connection.host, reason, code)
        if connection.here:
            self.fail(failure)
            return
        if self.process == 0:
            self._broadcast({"kind": "gone", "failure": failure._asdict()})
        self._is_gone(failure)

    def _is_gone(self, failure: JobFailure) -> None:
        self._gone = self._gone or failure
        if self._here:
            self.fail(failure)

    def _broadcast(self, message: dict[str, Any]) -> None:
        with self._lock:
            for connection in list(self._connections.values()):
                if connection.process >= 0:
                    self._send(connection, message)

    def _send(self, connection: _Connection, message: dict[str, Any]) -> None:
        try:
            with self._lock:
                connection.socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            pass  # it has ended, which `_read` finds

    def _close(self) -> None:
        for each in self._connections:
            each.close()
        if self._listener is not None:
            self._listener.close()


current: Peers | None = None
"""Those of this process; None in a job of one process, and before it has joined the others."""


def report_error(error: str, code: int) -> None:
    """This process ends with an error outside of a run: end the other processes too."""
    if current is not None:
        current.error(error, code)


def end_process(code: int, message: str = "") -> NoReturn:
    """End the process from any thread, without waiting for the others."""
    if sys.stdout.isatty():
        print(_SHOW_CURSOR, end="", flush=True)
    if message:
        print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)
