"""Calls that no client should make, and a run that sends them for minutes:

    python tests/server_fuzz.py PORT MINUTES [PID]

Beside the fuzz there are slow readers, silent and disconnecting clients, bursts of 1000 clients, and a control client
whose greedy answers must not change. Prints what was sent and answered, and the memory of process PID.
"""

import asyncio
import json
import random
import sys
import time
from collections import Counter
from itertools import count

PATHS = ("/v1/completions", "/v1/chat/completions")
VALUES = (
    *(None, True, False, 0, -1, 1, 2, 21, 257, 2**31, 2**32, 2**63, 2**64, -(2**63) - 1, 10**400),
    *(0.5, -0.0, 1e-320, 1e300, -1e300, float("nan"), float("inf"), float("-inf")),
    *("", "a", "\ud800", "\udfff\ud83d", "\x00", "\u202e", "no", "a" * 5000, "<|im_end|>", "{{ 7 * 7 }}", "{% raw %}"),
    *([], [None], [[]], [[[]]], ["a", 1], [1.5, True], [2**31], [-1], ["a"] * 300, {}, {"a": {}}, {"5": 1}, {"": None}),
    *({"type": "regex", "pattern": "("}, {"type": "json_object"}, {"include_usage": 1}, [{"role": "user"}]),
    *([{"role": "tool", "content": [{"type": "text"}]}], [{"type": "function", "function": {"name": "f" * 99}}]),
)
FIELDS = (
    *("prompt", "messages", "model", "max_tokens", "max_completion_tokens", "temperature", "top_k", "top_p", "min_p"),
    *("stop", "stop_token_ids", "min_tokens", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed"),
    *(
        "n",
        "logit_bias",
        "logprobs",
        "top_logprobs",
        "stream",
        "stream_options",
        "user",
        "metadata",
        "store",
        "best_of",
    ),
    *(
        "echo",
        "tools",
        "tool_choice",
        "response_format",
        "chat_template_kwargs",
        "reasoning_effort",
        "wanted",
        "\ud800",
    ),
)
BROKEN = (
    *(b"", b"null", b"[]", b"5", b'"a"', b"{", b"\xff\xfe", b'{"prompt": "\xed\xa0\x80"}', b'{"prompt": "\\ud800"}'),
    *(b'{"prompt": NaN}', b'{"prompt": 1e999}', b'{"prompt": ' + b"9" * 5000 + b"}", b'{"prompt": "a"}}'),
    *(b'{"prompt": ' + b"[" * depth + b"]" * depth + b"}" for depth in (100, 199, 1000, 100_000)),
    b'{"prompt": "a", "metadata": ' + b'{"a":' * 150 + b"1" + b"}" * 151,
    b"{" + b",".join(b'"k%d": 1' % number for number in range(50_000)) + b"}",
)


def calls(seed):
    """Endlessly, a path and the bytes of a body."""
    random_ = random.Random(seed)
    for number in count():
        path = random_.choice(PATHS)
        if number % 8 == 0:
            yield path, random_.choice(BROKEN)
            continue
        body = {"prompt": "hi"} if path == PATHS[0] else {"messages": [{"role": "user", "content": "hi"}]}
        body["max_tokens"] = 4
        for name in random_.sample(FIELDS, random_.randint(1, 3)):
            body[name] = random_.choice(VALUES)
        yield path, json.dumps(body).encode()


def problem(status, body):
    """What is wrong with a response, if anything is."""
    if status == 200:
        return None
    if not 400 <= status < 500 and status != 503:
        return f"status {status}"
    try:
        error = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        return f"status {status} without an error object"
    if not error["message"] or not error["type"] or "param" not in error or len(error["message"]) > 1000:
        return f"status {status} with the error {error}"
    return None


class _Attack:
    def __init__(self, port, minutes):
        self.port, self.end = port, time.monotonic() + 60 * minutes
        self.sent, self.answered, self.problems, self.waits = Counter(), Counter(), [], []

    @property
    def on(self):
        return time.monotonic() < self.end

    async def post(self, path, body, length=None):
        """Status and body of the response to a POST; (0, b"") if the server closed the connection."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {length or len(body)}\r\n\r\n"
        try:
            writer.write(head.encode() + body)
            response = await asyncio.wait_for(reader.read(), 300)
            head, _, answer = response.partition(b"\r\n\r\n")
            return (int(head.split()[1]), answer) if answer else (0, b"")
        except (ConnectionError, BrokenPipeError):
            return 0, b""
        finally:
            writer.close()

    def count(self, kind, status, answer):
        self.sent[kind] += 1
        self.answered[kind, status] += 1
        if found := problem(status, answer):
            self.problems.append((kind, found))

    async def fuzz(self, seed):
        for path, body in calls(seed):
            if not self.on:
                return
            status, answer = await self.post(path, body)
            self.count("fuzz", status, answer)
            if status not in (0, 200) and problem(status, answer):
                self.problems.append((path, body[:200]))

    async def large(self):
        while self.on:
            status, answer = await self.post(PATHS[0], b'{"prompt": "' + b"a" * (40 * 2**20) + b'"}')
            self.count("40 MB body", status, answer)
            await asyncio.sleep(5)

    async def slow_reader(self):
        body = json.dumps({"prompt": "ab", "n": 64, "stream": True, "logprobs": 5, "max_tokens": 200}).encode()
        while self.on:
            _, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=1024)
            head = f"POST {PATHS[0]} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            writer.transport.pause_reading()
            await asyncio.sleep(20)
            writer.close()
            self.sent["slow reader"] += 1

    async def leaver(self, kind, sent, seconds):
        while self.on:
            _, writer = await asyncio.open_connection("127.0.0.1", self.port)
            writer.write(sent)
            await asyncio.sleep(seconds)
            writer.transport.abort()
            self.sent[kind] += 1

    async def burst(self):
        body = json.dumps({"prompt": "hi", "max_tokens": 1, "temperature": 0}).encode()
        while self.on:
            for status, answer in await asyncio.gather(*(self.post(PATHS[0], body) for _ in range(1000))):
                self.count("one of 1000 at a time", status, answer)
            await asyncio.sleep(40)

    async def control(self):
        body = json.dumps({"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}).encode()
        expected = None
        while self.on:
            start = time.monotonic()
            status, answer = await self.post(PATHS[0], body)
            self.waits.append(time.monotonic() - start)
            self.count("control", status, answer)
            if status == 200:
                choice = json.loads(answer)["choices"]
                expected = expected or choice
                if choice != expected:
                    self.problems.append(("control", choice))
            await asyncio.sleep(1)

    async def watch(self, pid):
        while self.on:
            with open(f"/proc/{pid}/status") as file:
                memory = next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))
            print(f"{self.end - time.monotonic():6.0f} s left, {memory / 1024:.0f} MiB", flush=True)
            await asyncio.sleep(30)

    async def run(self, pid):
        hello = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n"
        wanted = json.dumps({"prompt": "ab", "n": 16, "max_tokens": 200}).encode()
        asked = hello.replace(b"99", str(len(wanted)).encode()) + wanted
        watching = [self.watch(pid)] if pid else []
        await asyncio.gather(
            *(self.fuzz(seed) for seed in range(4)),
            *(self.slow_reader() for _ in range(10)),
            *(self.leaver("silent after the head", hello, 10) for _ in range(10)),
            *(self.leaver("silent", b"", 10) for _ in range(10)),
            *(self.leaver("disconnected while answered", asked, 0.5) for _ in range(2)),
            *(self.large(), self.burst(), self.control(), *watching),
        )


def main(port, minutes, pid=None):
    attack = _Attack(int(port), float(minutes))
    asyncio.run(attack.run(pid))
    for kind, number in attack.sent.items():
        statuses = {status: times for (each, status), times in attack.answered.items() if each == kind}
        print(
            f"| {kind} | {number} | {', '.join(f'{status}: {count}' for status, count in sorted(statuses.items()))} |"
        )
    waits = sorted(attack.waits)
    print(f"control: median {waits[len(waits) // 2]:.2f} s, longest {waits[-1]:.2f} s")
    print(f"{len(attack.problems)} problems", *attack.problems[:20], sep="\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
