"""Generation with a Hugging Face folder for a file of prompts."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from jaxtrain.config import SourceSection
from jaxtrain.data.sources import read_rows
from jaxtrain.observe.progress import Progress
from jaxtrain.sample.requests import Completion, SamplingParams
from jaxtrain.serve.served import Served


def generate_file(served: Served, prompts: str | Path, out: Path, params: SamplingParams, plain: bool = False) -> int:
    """Complete every row of `prompts` and write the rows, with `completions`, to `out`.

    Returns the number of generated tokens. Raises ValueError for a row that is not a valid prompt or does not fit.
    """
    rows = list(read_rows(SourceSection(path=str(prompts))))
    requests = served.requests(rows, params, f"{prompts}, row", plain)
    waiting: dict[int, list[Completion | None]] = {index: [None] * params.n for index in range(len(rows))}
    done = tokens = written = 0
    start = time.perf_counter()
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w") as file, Progress(len(requests) * params.n, activity=lambda: "generating") as progress:
        for chunk in served.engine.stream(requests):
            tokens += len(chunk.ids)
            if chunk.completion is None:
                continue
            waiting[chunk.request][chunk.sample] = chunk.completion
            done += 1
            shown = done % max(len(requests) * params.n // 20, 1) == 0
            progress.update(done, {"tokens_per_second": tokens / (time.perf_counter() - start)} if shown else None)
            # Rows are written in the order of the prompts.
            while written < len(rows) and all(waiting[written]):
                completions = [_as_json(each) for each in waiting.pop(written) if each is not None]
                file.write(json.dumps({**rows[written], "completions": completions}, default=_plain) + "\n")
                written += 1
    return tokens


def _as_json(completion: Completion) -> dict[str, Any]:
    return {
        "text": completion.text,
        "ids": completion.ids.tolist(),
        "logps": completion.raw_logps.tolist(),
        "finish_reason": completion.finish_reason,
        **({"error": completion.error} if completion.error else {}),
    }


def _plain(value: Any) -> Any:
    """Convert the values of a Parquet row that json does not support."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"a row's value of type {type(value).__name__} cannot be written as JSON")
