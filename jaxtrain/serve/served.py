"""Loads a Hugging Face folder for serving: an engine and a tokenizer."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from converters.import_hf import import_params, read_config
from converters.tokenizer import load_tokenizer
from jaxtrain.config import MeshSection, ModelSection
from jaxtrain.data.chat import ChatTokenizer
from jaxtrain.data.sources import Row
from jaxtrain.hub import local_folder
from jaxtrain.nn.block import Execution
from jaxtrain.nn.model import Model
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.parallel.sharding import row_shares, with_shardings
from jaxtrain.roles.tokenizer import stop_ids
from jaxtrain.sample.capacity import serving_shardings, slots_that_fit
from jaxtrain.sample.engine import Engine
from jaxtrain.sample.requests import EngineLimits, FieldError, Request, SamplingParams, ids_problem, shown

_SLOTS = 32


class Served(NamedTuple):
    """A model with its engine and tokenizer."""

    name: str
    engine: Engine
    tokenizer: Any
    chat: ChatTokenizer | None  # None: the tokenizer has no chat template
    stop_ids: list[int]  # tokens that end an answer

    def prompt_ids(self, row: Row, plain: bool = False) -> np.ndarray:
        """The prompt of a row with `prompt_ids`, `messages` or `prompt`; `prompt` is a user message unless `plain`.

        Thread-safe. Raises ValueError for a row without any of them, and for values of another type.
        """
        if "prompt_ids" in row:
            if problem := ids_problem("prompt_ids", row["prompt_ids"]):
                raise ValueError(problem)
            return np.asarray(row["prompt_ids"], np.int32)
        if "messages" not in row and "prompt" not in row:
            raise ValueError(
                f"a prompt row must have prompt, messages or prompt_ids; this one has {', '.join(row) or 'no columns'}"
            )
        if "messages" not in row and not isinstance(row["prompt"], str):
            raise ValueError(f"prompt must be a string, not {shown(row['prompt'])}")
        if "messages" not in row and plain:
            return np.asarray(self.tokenizer.encode(row["prompt"]), np.int32)
        messages = row["messages"] if "messages" in row else [{"role": "user", "content": row["prompt"]}]
        chat = self.chat or ChatTokenizer(self.tokenizer)  # raises ValueError without a template
        return chat.prompt(messages, tools=row.get("tools"), template_kwargs=row.get("chat_template_kwargs"))

    def requests(self, rows: Sequence[Row], params: SamplingParams, what: str, plain: bool = False) -> list[Request]:
        """The requests of prompt rows, which also end at the model's own end tokens.

        Raises ValueError, naming `what` and the number of the row, for one that is no prompt or that cannot be served.
        """
        params, requests = self.ending(params), []
        for number, row in enumerate(rows, 1):
            try:
                requests.append(Request(self.prompt_ids(row, plain), params))
                self.engine.check(requests[-1:])
            except ValueError as error:
                problem = error.problem if isinstance(error, FieldError) else error
                raise ValueError(f"{what} {number}: {problem}") from error
        return requests

    def ending(self, params: SamplingParams) -> SamplingParams:
        """`params` with the model's end tokens among `stop_ids`, and stop strings that are special tokens, which no
        text contains."""
        special = set(self.tokenizer.all_special_tokens)
        stops = [self.tokenizer.convert_tokens_to_ids(stop) for stop in params.stop if stop in special]
        return replace(params, stop_ids=list(dict.fromkeys([*params.stop_ids, *stops, *self.stop_ids])))


def load_served(
    folder: str | Path,
    *,
    dtype: str,
    max_length: int,
    slots: int | None = None,
    cache_gib: float | None = None,
    tensor: int = 1,
    limits: EngineLimits = EngineLimits(),  # noqa: B008 - immutable
) -> Served:
    """Load a model from a folder or the hub onto all devices: heads over `tensor` of them, slots over the others.

    Without `slots` and `cache_gib` there are 32 slots per group of `tensor` devices; `slots` is rounded up to a
    multiple of the number of groups. `limits` are those of the engine.

    Raises ValueError for a folder that cannot be read, and for a cache that is too small for one sample.
    """
    name, folder = Path(folder).name, local_folder(folder)
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
        target = with_shardings(target, serving_shardings(model))
    stops = stop_ids(ModelSection(path=str(folder)), hf, tokenizer)
    shares = row_shares(mesh)
    if slots is not None and cache_gib is not None:
        raise ValueError("give only one of --slots and --cache-gib")
    if cache_gib is not None:
        slots = slots_that_fit(model, max_length, int(cache_gib * 2**30))
    slots = -(-(_SLOTS * shares if slots is None else slots) // shares) * shares
    engine = Engine(
        model,
        import_params(folder, config, target),
        max_length=max_length,
        slots=slots,
        tokenizer=tokenizer,
        limits=limits,
    )
    chat = ChatTokenizer(tokenizer) if tokenizer.chat_template else None
    return Served(name, engine, tokenizer, chat, stops)
