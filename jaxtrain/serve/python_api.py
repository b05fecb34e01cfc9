"""The Python API for a model: load it from a folder, and sample from it or from a role that is being trained."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxtrain.config import MeshSection, ModelSection
from jaxtrain.data.chat import ChatTokenizer
from jaxtrain.data.sources import Row
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.parallel.sharding import row_shares
from jaxtrain.roles.declare import declare
from jaxtrain.roles.role import Role
from jaxtrain.roles.tokenizer import stop_ids
from jaxtrain.sample.engine import Engine
from jaxtrain.sample.requests import Completion, SamplingParams
from jaxtrain.serve.served import Served

_SLOTS = 32
DEFAULT_PARAMS = SamplingParams()


def load(folder: str | Path, *, dtype: str = "bfloat16", mesh: MeshSection | None = None) -> Role:
    """Load the model of a Hugging Face folder for `generate` and `save`.

    Its parameters have `dtype` and are sharded over `mesh`, by default over all devices. Raises ValueError for a folder
    that cannot be read.
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
    """Sample `params.n` completions, each with its `text` and token `ids`, for each of `prompts`.

    A prompt is a string, which becomes a user message unless `plain`, or a row with `messages` or `prompt_ids`. A
    prompt and its completion have at most `max_length` tokens. The model's end tokens end a completion, too.

    Raises ValueError for a prompt that cannot be rendered or does not fit, and for a model without a tokenizer.
    """
    tokenizer, shares = role.tokenizer, row_shares(role.model.run.mesh)
    if isinstance(prompts, str | Mapping):
        raise ValueError(f"prompts must be a list of strings or rows, not one {type(prompts).__name__}")
    if tokenizer is None:
        raise ValueError(f"{role.name} has no tokenizer, which prompts need; set model.tokenizer")
    slots = -(-min(max(len(prompts), 1) * params.n, _SLOTS) // shares) * shares
    # Created for each call, so that its copy of the weights is not kept; its compiled programs are.
    engine = Engine(role.model, role.params, slots=slots, max_length=max_length, tokenizer=tokenizer)
    chat = ChatTokenizer(tokenizer) if tokenizer.chat_template else None
    served = Served(role.name, engine, tokenizer, chat, stop_ids(role.section, role.declared.hf, tokenizer))
    rows = [{"prompt": prompt} if isinstance(prompt, str) else prompt for prompt in prompts]
    return engine.generate(served.requests(rows, params, "prompt", plain))
