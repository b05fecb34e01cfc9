"""An imported checkpoint, and the logits of our model."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from converters.families.registry import has_scalar_head
from converters.import_hf import bind_checkpoint, import_params, read_config
from converters.safetensors_io import open_checkpoint
from converters.tokenizer import load_tokenizer
from converters.weight_rows import Tensor, flatten
from jaxtrain.nn.block import Execution
from jaxtrain.nn.config import ModelConfig
from jaxtrain.nn.heads import LANGUAGE, SCALAR
from jaxtrain.nn.model import Model
from jaxtrain.types import Array, Batch, Params

TEXT = """\
The history of the steam engine begins long before James Watt. In the first century Hero of Alexandria described a
hollow ball that turned by the jets of its own steam, and for sixteen hundred years nobody found a use for it. What
changed was the mines: by 1698 English coal lay deeper than men and horses could keep dry, and Thomas Savery sold his
"Miner's Friend", a pump with no moving parts but its valves (it burst, now and then, at 8 to 10 atmospheres). Thomas
Newcomen's engine of 1712 used a piston, 5.6 kilowatts of it, and wasted 99% of the heat in its coal. Watt asked where
the heat went. His separate condenser, patented in 1769, saved three quarters of the fuel; he and Matthew Boulton took
one third of the saving as their price. "I sell here, Sir, what all the world desires to have: power," said Boulton.
"""


@dataclass(frozen=True)
class Subject:
    """An imported checkpoint."""

    folder: Path
    hf: dict[str, Any]  # config.json
    config: ModelConfig
    params: Params  # float32
    tensors: list[Tensor]  # the family's rows bound to the folder

    @property
    def scalar(self) -> bool:
        """Whether it is a reward model."""
        return has_scalar_head(self.hf)

    def model(self, dtype: str, remat: str = "none") -> Model:
        return Model(self.config, run=Execution(jnp.dtype(dtype), remat), output=SCALAR if self.scalar else LANGUAGE)


def load_subject(folder: Path) -> Subject:
    """Import a folder. Raises ConversionError if our import fails."""
    config, hf = read_config(folder)
    target = Model(config, output=SCALAR if has_scalar_head(hf) else LANGUAGE).abstract()
    with open_checkpoint(folder) as checkpoint:
        tensors = bind_checkpoint(checkpoint, config, {ours: leaf.shape for ours, leaf in flatten(target).items()})
    return Subject(folder, hf, config, import_params(folder, config, target), tensors)


def token_rows(subject: Subject, length: int) -> dict[str, np.ndarray]:
    """Random ids, and the ids of a text if the folder has a tokenizer: [length] int32 each."""
    rows = {"random ids": np.random.default_rng(0).integers(0, subject.config.vocab_size, length, np.int32)}
    if (subject.folder / "tokenizer.json").is_file():
        ids = load_tokenizer(subject.folder)(TEXT).input_ids
        rows["text"] = np.resize(np.asarray(ids, np.int32), length)
    return rows


def our_logits(subject: Subject, ids: np.ndarray, dtype: str, batch: Batch | None = None) -> np.ndarray:
    """Logits of ids [B, T] (or of `batch`, packed) -> [B, T, V]; of a reward model the scores [B, T, 1]."""
    model = subject.model(dtype)
    with precise(dtype):

        @jax.jit
        def forward(params: Params, batch: Batch) -> Array:
            return outputs(model, params, model.hidden(params, batch))

        return np.asarray(forward(params_as(subject, dtype), as_batch(ids) if batch is None else batch))


def outputs(model: Model, params: Params, hidden: Array) -> Array:
    """Logits of hidden states [B, T, D] -> [B, T, V]; of a reward model the scores [B, T, 1]."""
    return model.values(params, hidden)[..., None] if model.output == SCALAR else model.logits(params, hidden)


@contextlib.contextmanager
def precise(dtype: str) -> Iterator[None]:
    """Full precision of matrix products on any device, and float64 enabled for that dtype."""
    with jax.default_matmul_precision("highest"), jax.enable_x64(dtype == "float64"):
        yield


def params_as(subject: Subject, dtype: str) -> Params:
    """The parameters in float64 for that dtype, else in float32: a model in bfloat16 casts them itself."""
    if dtype != "float64":
        return subject.params
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), subject.params)


def as_batch(ids: np.ndarray) -> Batch:
    """A batch with one segment per row."""
    positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    return Batch(ids, positions, np.ones_like(ids), np.ones(ids.shape, np.float32))
