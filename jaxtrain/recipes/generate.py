"""Generating with a Hugging Face folder: for a file of prompts, or in a conversation on the terminal."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxtrain.config import SourceSection
from jaxtrain.data.sources import read_rows
from jaxtrain.observe.progress import Progress
from jaxtrain.sample.requests import Completion, Request, SamplingParams
from jaxtrain.serve.load import Served


def generate_file(served: Served, prompts: Path, out: Path, params: SamplingParams, plain: bool = False) -> int:
    """Continue every row of `prompts` and write the rows, with `completions`, to `out`. Returns the tokens generated.

    Raises ValueError, naming the row, for one that is no prompt or can never fit.
    """
    rows = list(read_rows(SourceSection(path=str(prompts))))
    params = replace(params, stop_ids=[*params.stop_ids, *served.stop_ids])
    requests = []
    for number, row in enumerate(rows, 1):
        try:
            requests.append(Request(served.prompt_ids(row, plain), params))
            served.engine.check(requests[-1:])
        except ValueError as error:
            raise ValueError(f"{prompts}, row {number}: {str(error).removeprefix('request 0: ')}") from error
    waiting: dict[int, list[Completion | None]] = {index: [None] * params.n for index in range(len(rows))}
    done = tokens = written = 0
    start = time.perf_counter()
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w") as file, Progress(len(requests) * params.n) as progress:
        for chunk in served.engine.stream(requests):
            tokens += len(chunk.ids)
            if chunk.completion is None:
                continue
            waiting[chunk.request][chunk.sample] = chunk.completion
            done += 1
            shown = done % max(len(requests) * params.n // 20, 1) == 0
            progress.update(done, {"tokens_per_second": tokens / (time.perf_counter() - start)} if shown else None)
            # In the order of the prompts: a row waits for those before it.
            while written < len(rows) and all(waiting[written]):
                completions = [_as_json(each) for each in waiting.pop(written) if each is not None]
                file.write(json.dumps({**rows[written], "completions": completions}, default=_plain) + "\n")
                written += 1
    return tokens


def chat(served: Served, params: SamplingParams, ask: Callable[[], str], say: Callable[[str], None]) -> None:
    """A conversation: `ask` for the user's turn until it raises EOFError, `say` the answer as it comes.

    Answers end where the engine's `max_length` does. Raises ValueError once the conversation leaves no room for one.
    """
    messages: list[dict[str, str]] = []
    params = replace(params, stop_ids=[*params.stop_ids, *served.stop_ids])
    while True:
        try:
            messages.append({"role": "user", "content": ask()})
        except EOFError:
            return
        answer, prompt = "", served.prompt_ids({"messages": messages})
        room = served.engine.max_length - len(prompt)
        if room < 1:
            raise ValueError(
                f"the conversation has {len(prompt)} tokens by now, and max_length={served.engine.max_length} leaves "
                "no room for an answer: begin another, or give a larger --max-length"
            )
        request = Request(prompt, replace(params, max_tokens=min(params.max_tokens or room, room)))
        for chunk in served.engine.stream([request]):
            answer += chunk.text or ""
            say(chunk.text or "")
        say("\n")
        messages.append({"role": "assistant", "content": answer})


def _as_json(completion: Completion) -> dict[str, Any]:
    return {
        "text": completion.text,
        "ids": completion.ids.tolist(),
        "logps": completion.raw_logps.tolist(),
        "finish_reason": completion.finish_reason,
        **({"error": completion.error} if completion.error else {}),
    }


def _plain(value: Any) -> Any:
    """What JSON lacks of a Parquet row's values."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"a row's value of type {type(value).__name__} cannot be written as JSON")
