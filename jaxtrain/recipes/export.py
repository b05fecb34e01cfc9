"""From a run's checkpoint to a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from converters.adapters import export_adapter
from converters.export_hf import convert, export_hf
from converters.families.registry import has_scalar_head
from converters.import_hf import read_config
from jaxtrain.config import MeshSection
from jaxtrain.lora import join
from jaxtrain.nn.heads import LANGUAGE, SCALAR
from jaxtrain.nn.model import Model
from jaxtrain.nn.modules import check_exportable
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.recipes.fallback import TorchModel, export_torch_model
from jaxtrain.recipes.run_folder import read_run_config
from jaxtrain.recipes.setup import base_params, make_policy, make_tokenizer
from jaxtrain.train.checkpoint import Checkpoints


def export_run(
    run: Path, out: Path, *, step: int | None = None, dtype: str | None = None, adapter: bool = False
) -> None:
    """Write the model of a run's checkpoint to `out`, adapters merged, on whatever devices there are here.

    A base that the run held quantised is read again as it was, and the adapters are merged into that.

    `step` names the checkpoint; default: the newest.
    `dtype` casts the weights; default: the dtype of the checkpoint that the run began with, or the parameters' own.
    `adapter` writes the adapters alone, as a PEFT folder.
    Raises ValueError where `run` holds no run or no such checkpoint, or `out` is not empty.
    """
    config = read_run_config(run)
    policy = make_policy(config, make_mesh(MeshSection(preset=config.mesh.preset)))
    target: dict[str, Any] = {"params": policy.trained}
    with Checkpoints(str(run / "checkpoints"), config.checkpoint.every, config.checkpoint.keep) as checkpoints:
        restored = checkpoints.restore(target, partial=True, step=step)
    if restored is None:
        raise ValueError(f"{run} holds no checkpoint yet")
    params = restored.state["params"]
    lora = policy.model.lora
    if adapter:
        others = sorted(params.keys() - {"layers"})
        if lora is None:
            raise ValueError(f"{run} trained no adapter: its config has no model.lora")
        if others:
            raise ValueError(f"{run} trained {others[0]} too, which an adapter folder leaves out: export it merged")
        export_adapter(params, policy.model.config, lora, out, config.model.path)
        return
    if isinstance(policy.model, TorchModel):
        assert config.model.path is not None
        export_torch_model(policy.model, params, config.model.path, out, dtype or policy.hf.get("dtype"))
        return
    check_exportable(policy.model.config)
    if policy.model.base_frozen:
        # Adapters of a quantised base are merged into the weights as they were before they were quantised.
        base = base_params(config.model, policy._replace(quantize=None), config.run.seed)
        params = jax.jit(lambda trained, base: policy.model.merged(join(trained, base))[1])(params, base)
    export_hf(
        params,
        policy.model.config,
        policy.hf,
        out,
        dtype=dtype or policy.hf.get("dtype") or policy.hf.get("torch_dtype"),
        tokenizer_from=config.model.tokenizer or config.model.path,
        tokenizer=make_tokenizer(config.model) if config.model.add_tokens else None,
    )


def convert_checkpoint(source: Path, out: Path) -> None:
    """Import and export a Hugging Face folder without training: every tensor, name and dtype as it was."""
    config, hf = read_config(source)
    convert(source, config, hf, Model(config, output=SCALAR if has_scalar_head(hf) else LANGUAGE).abstract(), out)
