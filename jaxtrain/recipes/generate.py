"""Generating with a Hugging Face folder: for a file of prompts, or in a conversation on the terminal."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from converters.import_hf import import_params, read_config
from converters.tokenizer import load_tokenizer
from jaxtrain.config import MeshSection, ModelSection, SourceSection
from jaxtrain.data.chat import ChatTokenizer
from jaxtrain.data.sources import Row, read_rows
from jaxtrain.nn.decoder import Execution
from jaxtrain.nn.model import Model
from jaxtrain.observe.progress import Progress
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.recipes.setup import Policy, stop_ids
from jaxtrain.sample.engine import Engine
from jaxtrain.sample.placement import row_shares, serving_shardings
from jaxtrain.sample.requests import Completion, Request, SamplingParams

_SLOTS = 32


class Served(NamedTuple):
    """A model that answers."""

    name: str
    engine: Engine
    tokenizer: Any
    stop_ids: list[int]  # what ends an answer

    def prompt_ids(self, row: Row, plain: bool = False) -> np.ndarray:
        """The prompt of a row with `prompt_ids`, `messages` or `prompt`; a `prompt` is a user's turn unless `plain`.

        Raises ValueError for a row with none of them.
        """
        if "prompt_ids" in row:
            return np.asarray(row["prompt_ids"], np.int32)
        if "messages" in row or ("prompt" in row and not plain):
            messages = row["messages"] if "messages" in row else [{"role": "user", "content": row["prompt"]}]
            return ChatTokenizer(self.tokenizer).prompt(messages, tools=row.get("tools"))
        if "prompt" in row:
            return np.asarray(self.tokenizer.encode(row["prompt"]), np.int32)
        raise ValueError(
            f"a prompt is a row with prompt, messages or prompt_ids; this one has {', '.join(row) or 'none'}"
        )


def load_served(
    folder: str | Path,
    *,
    dtype: str,
    max_length: int,
    slots: int | None = None,
    cache_gib: float | None = None,
    tensor: int = 1,
    steps: int = 32,
    alternatives: int = 0,
) -> Served:
    """The model of a Hugging Face folder on all devices: heads over `tensor` of them, slots over the rest.

    With neither `slots` nor `cache_gib`, 32 slots for each of the rest; `slots` are rounded up so that all have as
    many. `steps` are the tokens of a streamed piece, `alternatives` the most that a request may ask for.

    Raises ValueError for what cannot be read, and for a cache that holds no sample.
    """
    config, hf = read_config(folder)
    tokenizer = load_tokenizer(folder)
    count = len(jax.devices())
    mesh = None
    if count > 1:
        preset = "fsdp_tensor" if tensor > 1 else "fsdp"
        mesh = make_mesh(MeshSection(data=count // tensor, fsdp=1, tensor=tensor, preset=preset))
    model = Model(config, run=Execution(jnp.dtype(dtype), mesh=mesh), param_dtype=jnp.dtype(dtype))
    target = model.abstract()
    if mesh is not None:
        target = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            target,
            serving_shardings(model),
        )
    stops = stop_ids(ModelSection(path=str(folder)), Policy(model, hf, target), tokenizer)
    shares = row_shares(model)
    if slots is None and cache_gib is None:
        slots = _SLOTS * shares
    if slots is not None:
        slots = -(-slots // shares) * shares
    engine = Engine(
        model,
        import_params(folder, config, target),
        max_length=max_length,
        slots=slots,
        cache_bytes=None if cache_gib is None else int(cache_gib * 2**30),
        tokenizer=tokenizer,
        steps=steps,
        alternatives=alternatives,
    )
    return Served(Path(folder).name, engine, tokenizer, stops)


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
