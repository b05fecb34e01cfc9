"""`model.backend: torchax`: trains an architecture without a family file by running the transformers module in JAX.

`TorchModel` implements the part of `Model` that a training step needs: packed rows to hidden states, and the head's
kernel. Its parameters are a flat dict with transformers' names, replicated on every device. Packed segments are
separated by position ids and a mask [B, 1, T, T]; attention is eager, which accepts any mask. torch, transformers'
modules and torchax are imported only when a model is opened. docs/fallback.md lists what this mode does not support.
"""

import functools
import importlib
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from converters.errors import ConversionError
from converters.export_hf import TrainedText, empty_folder, temporary_folder, write_text_files
from jaxtrain.config import ModelSection, ModulesSection
from jaxtrain.hub import local_folder
from jaxtrain.nn.block import Execution
from jaxtrain.nn.model import Model
from jaxtrain.ops.head_chunks import Head
from jaxtrain.types import Array, Batch, Params, Routing, get_leaf

_NAMED = re.compile(r"torch\.ops\.aten\.(\w+)\.(\w*(?:[Dd]imname|names)\w*)")
_LIBRARIES: list[Any] = []  # keeps the library objects alive, and with them their declarations


@dataclass(frozen=True)
class TorchConfig:
    """The fields of a model's config that the recipes use."""

    vocab_size: int
    tied: bool = True  # the head has the layout of an embedding, [V, D]
    moe: None = None
    logit_softcap: None = None  # a model that caps its logits is refused


@dataclass(frozen=True, eq=False)
class TorchModel(Model):
    config: Any  # a TorchConfig
    module: Any = None  # transformers' model, on the host; its weights are the initial parameters
    head_name: str = ""

    def forward(
        self, params: Params, batch: Batch, dropout_key: Array | None = None
    ) -> tuple[Float[Array, "B T D"], Routing | None]:
        interop, torch = _torchax().interop, importlib.import_module("torch")
        dtype, view = self.run.dtype, interop.torch_view
        same = batch.segment_ids[:, :, None] == batch.segment_ids[:, None, :]
        seen = same & jnp.tril(jnp.ones((same.shape[1],) * 2, bool))
        mask = jnp.where(seen, 0, jnp.finfo(dtype).min).astype(dtype)[:, None]
        prefix = f"{self.module.base_model_prefix}."
        weights = {name: get_leaf(params, name).astype(dtype) for name in params}
        weights |= {name: jnp.asarray(leaf.numpy()) for name, leaf in self.module.named_buffers()}
        own = {name.removeprefix(prefix): view(leaf) for name, leaf in weights.items() if name.startswith(prefix)}
        inputs = {"input_ids": batch.tokens, "position_ids": batch.positions, "attention_mask": mask}
        with _torchax().default_env():
            call = {name: view(jnp.asarray(leaf)) for name, leaf in inputs.items()} | {"use_cache": False}
            out = torch.func.functional_call(self.module.base_model, own, kwargs=call)
            return interop.jax_view(out.last_hidden_state), None

    @property
    def shares_prefixes(self) -> bool:
        return False

    def head(self, params: Params) -> Head:
        return Head(get_leaf(params, self.head_name), self.config.vocab_size, self.tied)

    def abstract(self) -> Params:
        shapes: dict[str, Any] = {
            name: jax.ShapeDtypeStruct(tuple(p.shape), self.param_dtype) for name, p in self._parameters()
        }
        return shapes

    def axes(self) -> Params:
        return {name: (None,) * parameter.ndim for name, parameter in self._parameters()}

    def initial(self, target: dict[str, Any]) -> Params:
        """The checkpoint's parameters, placed by the shardings of `target`."""
        return {
            name: jax.device_put(parameter.detach().numpy().astype(self.param_dtype), target[name].sharding)
            for name, parameter in self._parameters()
        }

    def _parameters(self) -> list[tuple[str, Any]]:
        return list(self.module.named_parameters())  # tied parameters appear once


def open_torch_model(section: ModelSection, run: Execution) -> TorchModel:
    """Load transformers' model of the folder `model.path`.

    Raises ValueError for a key that this backend does not support, and ConversionError if the logits are not
    `hidden @ kernel` of a linear head.
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
        local_folder(section.path), dtype=torch.float32, attn_implementation="eager"
    ).eval()
    head = module.get_output_embeddings()
    tokens = torch.arange(7)[None]
    with torch.no_grad():
        logits = module(input_ids=tokens, use_cache=False).logits
        hidden = module.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    if not torch.allclose(logits, hidden @ head.weight.T, atol=1e-3, rtol=1e-3):
        raise ConversionError(f"{section.path}: the logits of {type(module).__name__} differ from hidden @ head")
    name = next(name for name, parameter in module.named_parameters() if parameter is head.weight)
    return TorchModel(
        TorchConfig(head.weight.shape[0]), None, run, np.dtype(section.param_dtype), module=module, head_name=name
    )


def export_torch_model(
    model: TorchModel, params: Params, source: str, out: Path, *, dtype: str | None, text: TrainedText
) -> None:
    """Write a folder that transformers loads; `dtype` casts, `text` changes the tokenizer's files of `source`.

    Raises ConversionError if `out` is not empty.
    """
    torch = importlib.import_module("torch")
    with torch.no_grad():
        for name, parameter in model.module.named_parameters():
            parameter.copy_(torch.from_numpy(np.array(params[name], np.float32)))
    with temporary_folder(empty_folder(out)) as partial:
        model.module.to(getattr(torch, dtype or "float32")).save_pretrained(partial)
        write_text_files(partial, model.module.config.to_dict(), source, text)


@functools.cache
def _torchax() -> Any:
    """Import torchax. It refers to operator overloads for named tensors that newer versions of torch have removed; they
    are declared here, without an implementation, since they are never called."""
    if importlib.util.find_spec("torch") is None or (spec := importlib.util.find_spec("torchax")) is None:
        raise ValueError('model.backend=torchax needs torch and torchax: pip install "jaxtrain[fallback]"')
    torch = importlib.import_module("torch")
    assert spec.origin is not None
    declared = torch.library.Library("aten", "FRAGMENT")
    _LIBRARIES.append(declared)
    for file in sorted(Path(spec.origin).parent.rglob("*.py")):
        for operator, overload in sorted(set(_NAMED.findall(file.read_text()))):
            if overload not in getattr(torch.ops.aten, operator).overloads():
                declared.define(f"{operator}.{overload}(Tensor self) -> Tensor")
    return importlib.import_module("torchax")
