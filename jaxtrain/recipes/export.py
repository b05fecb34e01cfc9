"""From a run's checkpoint to a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from converters.adapters import export_adapter
from converters.export_hf import TrainedText, convert, export_hf
from converters.families.registry import has_scalar_head
from converters.import_hf import read_config
from jaxtrain.config import MeshSection, RunConfig
from jaxtrain.data.turn_ends import turn_end_ids
from jaxtrain.lora import join
from jaxtrain.nn.heads import LANGUAGE, SCALAR
from jaxtrain.nn.model import Model
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.recipes.fallback import TorchModel, export_torch_model
from jaxtrain.recipes.run_folder import fingerprint, read_run_config
from jaxtrain.recipes.setup import Policy, base_params, make_policy, make_tokenizer, stop_ids, tokenizer_folder
from jaxtrain.train.checkpoint import Checkpoints


def export_run(
    run: Path, out: Path, *, step: int | None = None, dtype: str | None = None, adapter: bool = False
) -> None:
    """Write the model of a run's checkpoint to `out`, adapters merged, on whatever devices there are here.

    A base that the run held quantised is read again as it was, and the adapters are merged into that.

    `step` names the checkpoint; default: the newest.
    `dtype` casts the weights; default: the dtype of the checkpoint that the run began with, or the parameters' own.
    `adapter` writes the adapters alone, as a PEFT folder.
    The folder ends its texts where the run did and has the chat template of the run: see `_trained_text`.
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
    text = _trained_text(config, policy, restored.meta)
    tokenizer_from = config.model.tokenizer or config.model.path
    if adapter:
        others = sorted(params.keys() - {"layers"})
        if lora is None:
            raise ValueError(f"{run} trained no adapter: its config has no model.lora")
        if others:
            raise ValueError(f"{run} trained {others[0]} too, which an adapter folder leaves out: export it merged")
        export_adapter(
            params, policy.model.config, lora, out, config.model.path, tokenizer_from=tokenizer_from, text=text
        )
        return
    if isinstance(policy.model, TorchModel):
        assert config.model.path is not None
        dtype = dtype or policy.hf.get("dtype")
        export_torch_model(policy.model, params, tokenizer_from or config.model.path, out, dtype=dtype, text=text)
        return
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
        tokenizer_from=tokenizer_from,
        text=text,
    )


def _trained_text(config: RunConfig, policy: Policy, meta: dict[str, Any]) -> TrainedText:
    """The run's tokenizer if it has added tokens, its chat template if it is not the tokenizer's own, and every token
    that ends an answer: those of the model, and those that end a turn of the assistant under the template.

    Raises ValueError if the tokenizer or the template has changed since the run was trained.
    """
    tokenizer = make_tokenizer(config.model)
    if tokenizer is None:
        return TrainedText()
    if meta["tokenizer"] != fingerprint(tokenizer):
        template = config.model.chat_template
        raise ValueError(
            f"the tokenizer or chat template has changed since {config.run.dir} was trained: restore "
            f"{tokenizer_folder(config.model)}{f' and {template}' if template else ''} as it was"
        )
    generates = policy.model.output == LANGUAGE
    return TrainedText(
        tokenizer=tokenizer if config.model.add_tokens else None,
        chat_template=tokenizer.chat_template if config.model.chat_template is not None else None,
        end_ids=[*stop_ids(config.model, policy, tokenizer), *turn_end_ids(tokenizer)] if generates else [],
    )


def convert_checkpoint(source: Path, out: Path) -> None:
    """Import and export a Hugging Face folder without training: every tensor, name and dtype as it was."""
    config, hf = read_config(source)
    convert(source, config, hf, Model(config, output=SCALAR if has_scalar_head(hf) else LANGUAGE).abstract(), out)
