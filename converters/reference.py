"""The same checkpoint under transformers and torch, on the CPU: the reference that the verifier compares with.

This is the only file that imports torch, and only when it is used.
"""

import inspect
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError

from converters.errors import ConversionError
from converters.families.registry import has_scalar_head
from converters.import_hf import read_json_config
from converters.quantization import QUANTIZATION, without_quantization
from converters.towers import text_names, tower_of

_GATE_OF_ONE = 1.2784645427610738  # x sigmoid(x) = 1


class ModuleCall(NamedTuple):
    """One call of a module of transformers."""

    input: np.ndarray | None  # its first array
    output: np.ndarray | None
    keywords: dict[str, Any]  # its keyword arguments: masks, rope tables


class Reference:
    """A model of transformers. Keep only one at a time: it takes the memory of the checkpoint in `dtype`.

    Its logits are [B, T, V]; those of a reward model are the scores of all tokens, [B, T, 1].

    Raises ValueError if torch is not installed, ConversionError if transformers cannot load the folder.
    """

    def __init__(self, folder: Path, dtype: str):
        torch, transformers = _import()
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        config = read_json_config(folder)
        if config.get(QUANTIZATION) and without_quantization(config) != config:
            raise ConversionError(
                f"{folder} is quantised, and transformers rounds its weights otherwise: compare the folder that "
                "`jaxtrain convert` writes of it"
            )
        self._scalar = has_scalar_head(config)
        self._beside_others = tower_of(config) is not None
        kind = transformers.AutoModelForSequenceClassification if self._scalar else transformers.AutoModelForCausalLM
        kind = transformers.AutoModelForImageTextToText if self._beside_others else kind
        try:
            self._model, info = kind.from_pretrained(
                folder,
                dtype=getattr(torch, dtype),
                attn_implementation="eager",
                experts_implementation="eager",
                output_loading_info=True,
            )
        except (ValueError, OSError, KeyError, RuntimeError, SafetensorError) as error:
            raise ConversionError(f"transformers cannot load {folder}: {error}") from error
        self._torch = torch
        token_by_token(self._model)
        self._model.eval()
        # torch drops the gradient of the padding token's row; rows are packed here, so no token is padding.
        for module in self._model.modules():
            if isinstance(module, torch.nn.Embedding):
                module.padding_idx = None
        if self._scalar and self._model.config.pad_token_id is None:
            self._model.config.pad_token_id = 0  # without one, a classifier takes single rows only
        self.version: str = transformers.__version__
        kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
        self.loading_problems = [
            f"{kind.replace('_', ' ')}: {', '.join(map(str, info[kind]))}" for kind in kinds if info[kind]
        ]

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """tokens [B, T] -> [B, T, V], in float32, or float64 if the model is."""
        with self._torch.no_grad():
            return np.concatenate([_array(self._forward(row[None])) for row in tokens])

    def logits_with_perturbed_rope(self, tokens: np.ndarray) -> np.ndarray:
        """Logits with every frequency of rope increased by one unit in the last place.

        The frequencies are float32 even in a float64 model. Any two implementations differ by as much, and over long
        contexts this exceeds all other rounding.
        """
        frequencies = [buffer for name, buffer in self._model.named_buffers() if name.endswith("inv_freq")]
        kept = [buffer.clone() for buffer in frequencies]
        for buffer in frequencies:
            single = buffer.float()
            buffer.copy_(self._torch.nextafter(single, single * 2))
        try:
            return self.logits(tokens)
        finally:
            for buffer, old in zip(frequencies, kept, strict=True):
                buffer.copy_(old)

    def record(self, tokens: np.ndarray, modules: Collection[str]) -> tuple[dict[str, ModuleCall], np.ndarray]:
        """The inputs and outputs of those of `modules` (`model.layers.3.mlp`) that ran, and the logits."""
        calls: dict[str, ModuleCall] = {}
        hooks = []
        for name, module in self._model.named_modules():
            if name in modules:

                def hook(_: Any, args: tuple, keywords: dict[str, Any], result: Any, name: str = name) -> None:
                    first = next((value for value in (*args, *keywords.values()) if self._is_float(value)), None)
                    output = result if self._is_float(result) else next(filter(self._is_float, result), None)
                    calls[name] = ModuleCall(_maybe_array(first), _maybe_array(output), keywords)

                hooks.append(module.register_forward_hook(hook, with_kwargs=True))
        try:
            with self._torch.no_grad():
                logits = _array(self._forward(tokens))
        finally:
            for each in hooks:
                each.remove()
        return calls, logits

    def apply(self, module: str, x: np.ndarray) -> np.ndarray:
        """The output of one module (`model.norm`) for an input of float32, cast to the model's dtype.

        A norm that is multiplied by the SiLU of a gate gets a gate whose SiLU is 1.
        """
        found, tensor = self._model.get_submodule(module), self._torch.from_numpy(x)
        gated = "gate" in inspect.signature(found.forward).parameters
        gates = [self._torch.full_like(tensor, _GATE_OF_ONE)] if gated else []
        with self._torch.no_grad():
            return _array(found(tensor.to(self._model.dtype), *gates))

    def rope_tables(self, length: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each layer the cosines and sines of positions 0 to length - 1, [T, R] or [T, R/2]: those that the model
        uses for a sequence of `length` tokens. Empty if the model's ropes are not modules."""
        config = self._model.config.get_text_config()
        decoder = self._model.get_decoder() if self._beside_others else self._model
        rope = next((m for m in decoder.modules() if type(m).__name__.endswith("RotaryEmbedding")), None)
        if rope is None:
            return []
        types = config.layer_types if hasattr(rope, "layer_types") else [None] * config.num_hidden_layers
        positions, tables = self._torch.arange(length)[None], {}
        with self._torch.no_grad():
            for kind in set(types):
                halves = rope(self._torch.zeros(1), positions, *([] if kind is None else [kind]))
                tables[kind] = tuple(_array(half)[0] for half in halves)
        return [tables[kind] for kind in types]

    def gradients(self, tokens: np.ndarray) -> dict[str, np.ndarray]:
        """Gradients of the mean negative log-likelihood of the next tokens, or of the mean score of a reward model, by
        the checkpoint's tensor names."""
        if self._scalar:
            self._forward(tokens).mean().backward()
        else:
            logits = self._forward(tokens)[:, :-1]
            targets = self._torch.from_numpy(tokens[:, 1:]).long()
            self._torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        parameters = self._model.state_dict(keep_vars=True)  # tied ones under both names; with the biases of routers
        grads = {name: p.grad if p.grad is not None else self._torch.zeros_like(p) for name, p in parameters.items()}
        self._model.zero_grad(set_to_none=True)
        return {name: _array(grad) for name, grad in self._as_stored(grads).items()}

    def owners(self) -> dict[str, str]:
        """The parameter of the loaded model that holds each tensor of the checkpoint (transformers joins some)."""
        parameters = self._model.state_dict(keep_vars=True)
        first_names = {
            id(parameter): name for name, parameter in reversed(parameters.items())
        }  # tied ones have several
        names = [first_names[id(parameter)] for parameter in parameters.values()]
        marked = {
            name: self._torch.full((), float(number), dtype=self._torch.float64).expand(parameter.shape)
            for number, (name, parameter) in enumerate(parameters.items())
        }
        return {tensor: names[int(mark.flatten()[0])] for tensor, mark in self._as_stored(marked).items()}

    def _forward(self, tokens: np.ndarray) -> Any:
        ids = self._torch.from_numpy(tokens).long()
        if not self._scalar:
            return self._model(ids, use_cache=False).logits
        # A classifier returns the score of one token of each row.
        hidden = self._model.base_model(ids, use_cache=False).last_hidden_state
        return self._model.score(hidden)

    def _as_stored(self, state: dict[str, Any]) -> dict[str, Any]:
        """Map values by parameter name to the names and shapes of the checkpoint's tensors; of a language model beside
        other models, to the names of its family."""
        from transformers.core_model_loading import revert_weight_conversion

        stored = revert_weight_conversion(self._model, state)
        if not self._beside_others:
            return stored
        names = text_names(stored)
        return {plain: value for name, value in stored.items() if (plain := names.plain(name)) is not None}

    def _is_float(self, value: Any) -> bool:
        return isinstance(value, self._torch.Tensor) and value.is_floating_point()


def token_by_token(model: Any) -> None:
    """Let the gated delta nets of `model`'s family in transformers process one token after the other, in this process.

    Their chunked form takes differences of sums of decays, in float32 also in a float64 model: where a head forgets
    fast, its logits differ from those of the recurrence by 2e-4.
    """
    modeling = sys.modules[type(model).__module__]
    chunked, recurrent = (f"torch_{kind}_gated_delta_rule" for kind in ("chunk", "recurrent"))
    if hasattr(modeling, chunked):
        setattr(modeling, chunked, getattr(modeling, recurrent))


def _import() -> tuple[Any, Any]:
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ValueError(
            f"the verifier needs transformers and torch, and {error.name} is not installed: "
            "pip install 'jaxtrain[verify]'"
        ) from error
    return torch, transformers


def _maybe_array(tensor: Any) -> np.ndarray | None:
    return None if tensor is None else _array(tensor)


def _array(tensor: Any) -> np.ndarray:
    tensor = tensor.detach()
    return (tensor if tensor.dtype.itemsize > 2 else tensor.float()).numpy()
