"""From a run's checkpoint, or a role in memory, to a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from converters.adapters import export_adapter
from converters.export_hf import TrainedText, convert, export_hf
from converters.families.registry import has_scalar_head
from converters.import_hf import read_config
from jaxtrain.config import MeshSection, ModelSection
from jaxtrain.lora import join, split_adapters
from jaxtrain.nn.heads import LANGUAGE, SCALAR
from jaxtrain.nn.model import Model
from jaxtrain.nn.modules import check_exportable
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.roles.declare import Declaration, declare
from jaxtrain.roles.initial import base_params
from jaxtrain.roles.role import Role
from jaxtrain.roles.tokenizer import fingerprint, make_tokenizer, stop_ids, tokenizer_folder
from jaxtrain.roles.torch_model import TorchModel, export_torch_model
from jaxtrain.session.inputs import changed_file, fingerprint_path
from jaxtrain.session.record import CHECKPOINTS, SavedRun, read_saved_run
from jaxtrain.train.checkpoint import Checkpoints
from jaxtrain.types import Params


def export_run(
    run: str | Path, out: str | Path, *, step: int | None = None, dtype: str | None = None, adapter: bool = False
) -> None:
    """Write the model of a run's checkpoint to `out`, adapters merged, on whatever devices there are here.

    The config is the one in the checkpoint. A base that the run held quantised is read again as it was, and the
    adapters are merged into that.

    `step` names the checkpoint; default: the newest.
    `dtype` casts the weights; default: the dtype of the checkpoint that the run began with, or the parameters' own.
    `adapter` writes the adapters alone, as a PEFT folder.
    The folder ends its texts where the run did and has the chat template of the run: see `_trained_text`.
    Raises ValueError where `run` holds no run or no such checkpoint, where the base is no longer what the run trained
    on, or `out` is not empty.
    """
    run = Path(run)
    saved, declared, params = _restore(run, step)
    section = saved.config.model
    tokenizer = make_tokenizer(section)
    if tokenizer is not None and saved.tokenizer not in (None, fingerprint(tokenizer)):
        template = section.chat_template
        raise ValueError(
            f"the tokenizer or chat template has changed since {saved.config.run.dir} was trained: restore "
            f"{tokenizer_folder(section)}{f' and {template}' if template else ''} as it was"
        )
    role = Role(str(run), section, declared, saved.config.run.seed, params)
    _write(role, params, tokenizer, Path(out), dtype, adapter)


def save(role: Role, out: str | Path, *, dtype: str | None = None, adapter: bool = False) -> None:
    """Write the present parameters of `role` to `out`, as `export_run` writes those of a checkpoint.

    Raises ValueError where `out` is not empty.
    """
    trained = split_adapters(role.params)[0] if role.model.base_frozen else role.params
    _write(role, trained, role.tokenizer, Path(out), dtype, adapter)


def _write(role: Role, params: Params, tokenizer: Any, out: Path, dtype: str | None, adapter: bool) -> None:
    """`params`: those that are trained. The base of adapters is read again."""
    section, declared = role.section, role.declared
    text = _trained_text(section, declared, tokenizer)
    tokenizer_from = section.tokenizer or section.path
    lora = declared.model.lora
    if adapter:
        others = sorted(params.keys() - {"layers"})
        if lora is None:
            raise ValueError(f"{role.name} trained no adapter: its config has no model.lora")
        if others:
            raise ValueError(
                f"{role.name} trained {others[0]} too, which an adapter folder leaves out: export it merged"
            )
        export_adapter(params, declared.model.config, lora, out, section.path, tokenizer_from=tokenizer_from, text=text)
        return
    if isinstance(declared.model, TorchModel):
        assert section.path is not None
        dtype = dtype or declared.hf.get("dtype")
        export_torch_model(declared.model, params, tokenizer_from or section.path, out, dtype=dtype, text=text)
        return
    check_exportable(declared.model.config)
    if declared.model.base_frozen:
        # Adapters of a quantised base are merged into the weights as they were before they were quantised.
        base = base_params(section, declared._replace(quantize=None), role.seed)
        params = jax.jit(lambda trained, base: declared.model.merged(join(trained, base))[1])(params, base)
    export_hf(
        params,
        declared.model.config,
        declared.hf,
        out,
        dtype=dtype or declared.hf.get("dtype") or declared.hf.get("torch_dtype"),
        tokenizer_from=tokenizer_from,
        text=text,
    )


def _trained_text(section: ModelSection, declared: Declaration, tokenizer: Any) -> TrainedText:
    """The tokenizer if it has added tokens, its chat template if it is not the folder's own, and every token that ends
    an answer: see `stop_ids`.
    """
    if tokenizer is None:
        return TrainedText()
    generates = declared.model.output == LANGUAGE
    return TrainedText(
        tokenizer=tokenizer if section.add_tokens else None,
        chat_template=tokenizer.chat_template if section.chat_template is not None else None,
        end_ids=stop_ids(section, declared.hf, tokenizer) if generates else [],
    )


def _restore(run: Path, step: int | None) -> tuple[SavedRun, Declaration, Params]:
    """What a checkpoint says of its run, the model that it describes, and its parameters on the devices here."""
    saved = read_saved_run(run, step)
    if saved.step is None:
        raise ValueError(f"{run} holds no checkpoint yet")
    declared = declare(
        saved.config.model, make_mesh(MeshSection(preset=saved.config.mesh.preset)), saved.config.mesh.preset
    )
    _check_base(run, saved, declared)
    target: dict[str, Any] = {"params": declared.trained}
    with Checkpoints(str(run / CHECKPOINTS), 1, 1) as checkpoints:
        restored = checkpoints.restore(target, partial=True, step=step)
    assert restored is not None
    if restored.step != saved.step:  # the newest is damaged, and an older one may have another config
        return _restore(run, restored.step)
    return saved, declared, restored.state["params"]


def _check_base(run: Path, saved: SavedRun, declared: Declaration) -> None:
    """Raise ValueError where what the export reads again of the base checkpoint is not what the run began with."""
    if saved.config.model.path is None:
        return
    # Without frozen weights the base gives the export its config.json alone.
    needed = ("config.json", ".safetensors") if declared.model.base_frozen else ("config.json",)
    files = (saved.inputs.get("model.path", {}), fingerprint_path("model.path", saved.config.model.path))
    before, now = ({name: each[name] for name in each if name.endswith(needed)} for each in files)
    how = changed_file(before, now)
    if before and now and how:
        raise ValueError(
            f"{run} trained on model.path={saved.config.model.path}, which has changed since: {how}. Bring back the "
            "files that the run began with"
        )


def convert_checkpoint(source: Path, out: Path) -> None:
    """Import and export a Hugging Face folder without training: every tensor, name and dtype as it was."""
    config, hf = read_config(source)
    convert(source, config, hf, Model(config, output=SCALAR if has_scalar_head(hf) else LANGUAGE).abstract(), out)
