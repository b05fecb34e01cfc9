"""A model that answers: a Hugging Face folder, its engine and its tokenizer."""

from __future__ import annotations

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
from jaxtrain.nn.decoder import Execution
from jaxtrain.nn.model import Model
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.roles.tokenizer import stop_ids
from jaxtrain.sample.engine import Engine
from jaxtrain.sample.placement import row_shares, serving_shardings
from jaxtrain.sample.requests import ids_problem, shown

_SLOTS = 32


class Served(NamedTuple):
    """A model that answers."""

    name: str
    engine: Engine
    tokenizer: Any
    chat: ChatTokenizer | None  # None: the tokenizer has no chat template
    stop_ids: list[int]  # what ends an answer

    def prompt_ids(self, row: Row, plain: bool = False) -> np.ndarray:
        """The prompt of a row with `prompt_ids`, `messages` or `prompt`; a `prompt` is a user's turn unless `plain`.

        Safe to call from several threads. Raises ValueError for a row with none of them, or with something else there.
        """
        if "prompt_ids" in row:
            if problem := ids_problem("prompt_ids", row["prompt_ids"]):
                raise ValueError(problem)
            return np.asarray(row["prompt_ids"], np.int32)
        if "messages" not in row and "prompt" not in row:
            raise ValueError(
                f"a prompt is a row with prompt, messages or prompt_ids; this one has {', '.join(row) or 'none'}"
            )
        if "messages" not in row and not isinstance(row["prompt"], str):
            raise ValueError(f"prompt must be a text, not {shown(row['prompt'])}")
        if "messages" not in row and plain:
            return np.asarray(self.tokenizer.encode(row["prompt"]), np.int32)
        messages = row["messages"] if "messages" in row else [{"role": "user", "content": row["prompt"]}]
        chat = self.chat or ChatTokenizer(self.tokenizer)  # which raises ValueError
        return chat.prompt(messages, tools=row.get("tools"))


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
    stops = stop_ids(ModelSection(path=str(folder)), hf, tokenizer)
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
    chat = ChatTokenizer(tokenizer) if tokenizer.chat_template else None
    return Served(Path(folder).name, engine, tokenizer, chat, stops)
