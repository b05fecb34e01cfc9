"""`model.backend: torchax`: an architecture without a family file, as transformers' own module run under JAX.

`TorchModel` is a `Model` as far as a training step asks: packed rows to hidden states, and the head's kernel. Its
parameters are a flat dict of transformers' names, all of them on every device. Packing is kept right by position ids
and a mask [B, 1, T, T] under which a token sees its own segment only; eager attention, because it adds any mask. torch,
transformers' modules and torchax are imported when a model is opened, never before. What is not available in this mode
is listed in docs/fallback.md.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from converters.errors import CheckpointError
from converters.export_hf import TrainedText, empty_folder, write_text_files, written_aside
from jaxtrain.config import ModelSection, ModulesSection
from jaxtrain.nn.config import ModelConfig
from jaxtrain.nn.decoder import Execution
from jaxtrain.nn.model import Model
from jaxtrain.types import Array, Batch, Params, Routing

_NAMED = re.compile(r"torch\.ops\.aten\.(\w+)\.(\w*(?:[Dd]imname|names)\w*)")
_KEPT: list[Any] = []  # a declaration lasts as long as its library object


@dataclass(frozen=True)
class TorchConfig:
    """What the recipes ask of a model's config."""

    vocab_size: int
    tied: bool = True  # the head lies as [V, D], like an embedding
    moe: None = None
    logit_softcap: None = None  # a model that caps its logits is refused


@dataclass(frozen=True, eq=False)
class TorchModel(Model):
    module: Any = None  # transformers' model, on the host; its weights are the run's first parameters
    head_name: str = ""

    def forward(self, params: Params, batch: Batch, dropout_key: Array | None = None) -> tuple[Array, Routing | None]:
        interop, torch = _torchax().interop, importlib.import_module("torch")
        dtype, view = self.run.dtype, interop.torch_view
        same = batch.segment_ids[:, :, None] == batch.segment_ids[:, None, :]
        seen = same & jnp.tril(jnp.ones((same.shape[1],) * 2, bool))
        mask = jnp.where(seen, 0, jnp.finfo(dtype).min).astype(dtype)[:, None]
        prefix = f"{self.module.base_model_prefix}."
        weights = {name: leaf.astype(dtype) for name, leaf in params.items()}
        weights |= {name: jnp.asarray(leaf.numpy()) for name, leaf in self.module.named_buffers()}
        own = {name.removeprefix(prefix): view(leaf) for name, leaf in weights.items() if name.startswith(prefix)}
        inputs = {"input_ids": batch.tokens, "position_ids": batch.positions, "attention_mask": mask}
        with _torchax().default_env():
            call = {name: view(jnp.asarray(leaf)) for name, leaf in inputs.items()} | {"use_cache": False}
            out = torch.func.functional_call(self.module.base_model, own, kwargs=call)
            return interop.jax_view(out.last_hidden_state), None

    def head(self, params: Params) -> Array:
        return params[self.head_name]

    def abstract(self) -> Params:
        return {name: jax.ShapeDtypeStruct(tuple(p.shape), self.param_dtype) for name, p in self._parameters()}

    def axes(self) -> Params:
        return {name: (None,) * parameter.ndim for name, parameter in self._parameters()}

    def initial(self, target: Params) -> Params:
        """The checkpoint's parameters, where `target` says."""
        return {
            name: jax.device_put(parameter.detach().numpy().astype(self.param_dtype), target[name].sharding)
            for name, parameter in self._parameters()
        }

    def _parameters(self) -> list[tuple[str, Any]]:
        return list(self.module.named_parameters())  # those of tied names once


def open_torch_model(section: ModelSection, run: Execution) -> TorchModel:
    """transformers' model of the folder `model.path`.

    Raises ValueError for a key that this backend does not honour, and CheckpointError where the logits are more than
    `hidden @ kernel` of a plain linear head.
    """
    unavailable: dict[str, Any] = {"lora": None, "quantize": None, "add_tokens": None, "config": None}
    unavailable |= {"head": "lm", "modules": ModulesSection()}
    for key, default in unavailable.items():
        if getattr(section, key) != default:
            raise ValueError(f"model.{key} is not available with model.backend=torchax")
    _torchax()
    torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
    assert section.path is not None
    module = transformers.AutoModelForCausalLM.from_pretrained(
        section.path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    head = module.get_output_embeddings()
    tokens = torch.arange(7)[None]
    with torch.no_grad():
        logits = module(input_ids=tokens, use_cache=False).logits
        hidden = module.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    if not torch.allclose(logits, hidden @ head.weight.T, atol=1e-3, rtol=1e-3):
        raise CheckpointError(f"{section.path}: the logits of {type(module).__name__} are more than hidden @ head")
    name = next(name for name, parameter in module.named_parameters() if parameter is head.weight)
    config = cast(ModelConfig, TorchConfig(head.weight.shape[0]))
    return TorchModel(config, None, run, np.dtype(section.param_dtype), module=module, head_name=name)


def export_torch_model(
    model: TorchModel, params: Params, source: str, out: Path, *, dtype: str | None, text: TrainedText
) -> None:
    """Write a folder that transformers loads; `dtype` casts, `text` changes the tokenizer's files of `source`.

    Raises CheckpointError if `out` is not empty.
    """
    torch = importlib.import_module("torch")
    with torch.no_grad():
        for name, parameter in model.module.named_parameters():
            parameter.copy_(torch.from_numpy(np.array(params[name], np.float32)))
    with written_aside(empty_folder(out)) as partial:
        model.module.to(getattr(torch, dtype or "float32")).save_pretrained(partial)
        write_text_files(partial, model.module.config.to_dict(), source, text)


@functools.cache
def _torchax() -> Any:
    """torchax. It names overloads of torch's operators for named tensors, which torch has given up since: they are
    declared, so that their names exist; nobody calls them."""
    if importlib.util.find_spec("torch") is None or (spec := importlib.util.find_spec("torchax")) is None:
        raise ValueError('model.backend=torchax needs torch and torchax: pip install "jaxtrain[fallback]"')
    torch = importlib.import_module("torch")
    assert spec.origin is not None
    declared = torch.library.Library("aten", "FRAGMENT")
    _KEPT.append(declared)
    for file in sorted(Path(spec.origin).parent.rglob("*.py")):
        for operator, overload in sorted(set(_NAMED.findall(file.read_text()))):
            if overload not in getattr(torch.ops.aten, operator).overloads():
                declared.define(f"{operator}.{overload}(Tensor self) -> Tensor")
    return importlib.import_module("torchax")
