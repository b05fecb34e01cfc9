"""A model in a program: loading it from a folder, and sampling from it or from a role that is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from jaxtrain.config import MeshSection, ModelSection
from jaxtrain.data.chat import ChatTokenizer
from jaxtrain.data.sources import Row
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.roles.declare import declare
from jaxtrain.roles.role import Role
from jaxtrain.roles.tokenizer import stop_ids
from jaxtrain.sample.engine import Engine
from jaxtrain.sample.placement import row_shares
from jaxtrain.sample.requests import Completion, Request, SamplingParams
from jaxtrain.serve.load import Served

_SLOTS = 32
DEFAULT_PARAMS = SamplingParams()


def load(folder: str | Path, *, dtype: str = "bfloat16", mesh: MeshSection | None = None) -> Role:
    """The model of a Hugging Face folder, ready for `generate` and `save`, its parameters of `dtype` split over `mesh`.

    Without `mesh` they are split over all devices. Raises ValueError for a folder that cannot be read.
    """
    section = ModelSection.model_validate({"path": str(folder), "param_dtype": dtype, "compute_dtype": dtype})
    mesh = mesh or MeshSection()
    role = Role(str(folder), section, declare(section, make_mesh(mesh), mesh.preset), seed=0)
    role.load()
    return role


def generate(
    role: Role,
    prompts: Sequence[str | Row],
    params: SamplingParams = DEFAULT_PARAMS,
    *,
    plain: bool = False,
    max_length: int = 2048,
) -> list[list[Completion]]:
    """Answers to each of `prompts`: `params.n` of them, each of a `text` and its token `ids`.

    A prompt is a text, which becomes a user's turn unless `plain`, or a row with `messages` or `prompt_ids`. A prompt
    and its answer have at most `max_length` tokens. Answers end at the model's own end tokens too.

    Raises ValueError, naming the prompt, for one that cannot be rendered or does not fit, and where the model has no
    tokenizer.
    """
    tokenizer, shares = role.tokenizer, row_shares(role.model)
    if isinstance(prompts, str | Mapping):
        raise ValueError(f"prompts must be a list of texts or rows, not one {type(prompts).__name__}")
    if tokenizer is None:
        raise ValueError(f"{role.name} has no tokenizer, so it cannot be asked in text; name one by model.tokenizer")
    slots = -(-min(max(len(prompts), 1) * params.n, _SLOTS) // shares) * shares
    # Created for each call, so that its copy of the weights is not kept; its compiled programs are.
    engine = Engine(role.model, role.params, slots=slots, max_length=max_length, tokenizer=tokenizer)
    chat = ChatTokenizer(tokenizer) if tokenizer.chat_template else None
    served = Served(role.name, engine, tokenizer, chat, stop_ids(role.section, role.declared.hf, tokenizer))
    params = replace(params, stop_ids=[*params.stop_ids, *served.stop_ids])
    requests = []
    for number, prompt in enumerate(prompts, 1):
        try:
            row = {"prompt": prompt} if isinstance(prompt, str) else prompt
            requests.append(Request(served.prompt_ids(row, plain), params))
            engine.check(requests[-1:])
        except ValueError as error:
            raise ValueError(f"prompt {number}: {str(error).removeprefix('request 0: ')}") from error
    return engine.generate(requests)
