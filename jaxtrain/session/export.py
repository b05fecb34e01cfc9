"""Exports a run's checkpoint, or a role in memory, to a Hugging Face folder."""

import logging
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from converters.adapters import export_adapter
from converters.export_hf import MAX_SHARD_BYTES, TrainedText, convert, declared_dtype, empty_folder, export_hf
from converters.export_towers import export_towers, has_others, has_towers
from converters.families.registry import has_scalar_head
from converters.import_hf import read_config
from converters.weight_rows import flatten
from jaxtrain.config import MeshSection, ModelSection
from jaxtrain.data.fingerprints import tokenizer_fingerprint
from jaxtrain.hub import HubError, is_hub_name, local_folder, upload
from jaxtrain.lora import join
from jaxtrain.nn.heads import LANGUAGE, SCALAR
from jaxtrain.nn.model import Model
from jaxtrain.nn.modules import check_exportable
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.remote import written_folder
from jaxtrain.roles.declare import Declaration, declare
from jaxtrain.roles.initial import base_params
from jaxtrain.roles.role import Role
from jaxtrain.roles.tokenizer import make_tokenizer, stop_ids, tokenizer_folder
from jaxtrain.roles.torch_model import TorchModel, export_torch_model
from jaxtrain.session.inputs import changed_file, fingerprint_path
from jaxtrain.session.mirror import local_run
from jaxtrain.session.model_card import model_card
from jaxtrain.session.record import SavedRun, checkpoint_folder, parse_model, read_saved_run
from jaxtrain.train.checkpoint import Checkpoints
from jaxtrain.types import Params

log = logging.getLogger(__name__)


def export_run(
    run: str | Path, out: str | Path, *, step: int | None = None, dtype: str | None = None, adapter: bool = False
) -> None:
    """Write the model of a run's checkpoint to `out`, a folder or a URL, with merged adapters. Works on any devices.

    `run` is a folder or a URL. The config is the one in the checkpoint. Adapters of a quantised base are merged into
    the original base, which is read again.

    `step` selects the checkpoint; default: the newest.
    `dtype` casts the weights; default: the dtype of the base checkpoint, or that of the parameters.
    `adapter` writes only the adapters, as a PEFT folder.
    The folder has the run's chat template, its end tokens in generation_config.json, and a model card, README.md.
    Raises ValueError if `run` is not a run or has no such checkpoint, if the base has changed since the run started, or
    if `out` is not empty.
    """
    run = local_run(run)
    saved, declared, params = _restore(run, step)
    section = saved.config.model
    tokenizer = make_tokenizer(section)
    if tokenizer is not None and saved.tokenizer not in (None, tokenizer_fingerprint(tokenizer)):
        template = section.chat_template
        raise ValueError(
            f"the tokenizer or chat template has changed since {saved.config.run.dir} was trained: restore "
            f"{tokenizer_folder(section)}{f' and {template}' if template else ''}"
        )
    role = Role(str(run), section, declared, saved.config.run.seed, params)
    assert saved.step is not None
    with written_folder(out) as folder:
        _write(role, params, tokenizer, folder, dtype, adapter)
        if jax.process_index() == 0:
            (folder / "README.md").write_text(model_card(run, saved.step, adapter=adapter), encoding="utf-8")


def push_run(
    run: str | Path,
    name: str,
    *,
    step: int | None = None,
    dtype: str | None = None,
    adapter: bool = False,
    private: bool = False,
) -> str:
    """Export a run as `export_run` does and upload it to the Hugging Face hub as `owner/name`; the URL of its page.

    `private`: whether the model is private if it is created. Raises ValueError as `export_run` does, and HubError.
    """
    if not is_hub_name(name):
        raise HubError(f"{name!r} is not a name on the hub: it must be owner/name, and no folder here")
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "export"
        export_run(run, folder, step=step, dtype=dtype, adapter=adapter)
        return upload(folder, name, private=private, message=f"Trained by jaxtrain: {Path(run).name}")


def save(role: Role, out: str | Path, *, dtype: str | None = None, adapter: bool = False) -> None:
    """Write the current parameters of `role` to `out`, a folder or a URL, as `export_run` does for a checkpoint.

    Raises ValueError if `out` is not empty.
    """
    trained = role.model.split(role.params)[0] if role.model.base_frozen else role.params
    with written_folder(out) as folder:
        _write(role, trained, role.tokenizer, folder, dtype, adapter)


def _write(role: Role, params: Params, tokenizer: Any, out: Path, dtype: str | None, adapter: bool) -> None:
    """Write the trained `params`. The base of adapters is read again."""
    section, declared = role.section, role.declared
    text = _trained_text(section, declared, tokenizer)
    tokenizer_from = section.tokenizer or section.path
    lora = declared.model.lora
    if adapter:
        if lora is None:
            raise ValueError(f"{role.name} has no adapter: its config has no model.lora")
        others = sorted({path.split(".")[0] for path in flatten(params).keys() - set(lora.full_paths)} - {"layers"})
        if declared.added is not None:
            others = ["the rows of model.add_tokens"]
        if section.path is not None and has_towers(local_folder(section.path)):
            raise ValueError(f"{section.path} holds other models beside its language model: export without --adapter")
        if others:
            raise ValueError(
                f"{role.name} also trained {others[0]}, which a PEFT folder cannot hold: export it without --adapter"
            )
        export_adapter(params, declared.model.config, lora, out, section.path, tokenizer_from=tokenizer_from, text=text)
        return
    if isinstance(declared.model, TorchModel):
        assert section.path is not None
        dtype = dtype or declared_dtype(declared.hf)
        export_torch_model(declared.model, params, tokenizer_from or section.path, out, dtype=dtype, text=text)
        return
    check_exportable(declared.model.config)
    if declared.model.base_frozen:
        # Adapters of a quantised base are merged into the original weights.
        base = declared.model.split(base_params(section, declared._replace(quantize=None), role.seed))[1]
        params = jax.jit(lambda trained, base: declared.model.merged(join(trained, base))[1])(params, base)
    with _beside_other_models(section.path, out, declared.model.output) as folder:
        export_hf(
            params,
            declared.model.config,
            declared.hf,
            folder,
            dtype=dtype or declared_dtype(declared.hf),
            tokenizer_from=tokenizer_from,
            text=text,
        )


@contextmanager
def _beside_other_models(source: str | Path | None, out: Path, output: str = LANGUAGE) -> Iterator[Path]:
    """The folder to write a model to: `out`, or if the model is the language model of a folder that holds others, one
    beside it, from which `out` is then written with the others. A model with another head is written alone."""
    base = None if source is None else local_folder(source)
    if base is None or output != LANGUAGE or not has_others(base):
        yield out
        return
    empty_folder(out)
    alone = out.parent / f".{out.name}.language-model"
    try:
        yield alone
        if jax.process_index() == 0:
            target = Model(read_config(alone)[0]).abstract()
            export_towers(alone, base, out, target, max_shard_bytes=MAX_SHARD_BYTES)
    finally:
        shutil.rmtree(alone, ignore_errors=True)


def _trained_text(section: ModelSection, declared: Declaration, tokenizer: Any) -> TrainedText:
    """What the run changed: added tokens, the chat template, and the tokens that end an answer (see `stop_ids`)."""
    if tokenizer is None:
        return TrainedText()
    generates, ends = declared.model.output == LANGUAGE, stop_ids(section, declared.hf, tokenizer)
    return TrainedText(
        tokenizer=tokenizer if section.add_tokens else None,
        chat_template=tokenizer.chat_template if section.chat_template is not None else None,
        end_ids=ends if generates else [],
        padding=_other_padding(declared.hf, tokenizer, ends) if declared.model.output == SCALAR else None,
    )


def _other_padding(hf: Mapping[str, Any], tokenizer: Any, ends: Collection[int]) -> tuple[str, int] | None:
    """A special token to pad the texts of a reward model with, where its padding token also ends texts, as that of
    SmolLM2 does: transformers reads the score at the last token that is no padding, which would be the one before."""
    if hf.get("pad_token_id", tokenizer.pad_token_id) not in ends:
        return None
    special = {
        added.content: token
        for token, added in sorted(tokenizer.added_tokens_decoder.items())
        if added.special and token not in ends
    }
    if not special:
        log.warning("no special token can pad texts: transformers scores a text that ends with the padding token wrong")
        return None
    name = tokenizer.unk_token if tokenizer.unk_token in special else next(iter(special))
    return name, special[name]


def _restore(run: Path, step: int | None) -> tuple[SavedRun, Declaration, Params]:
    """The record in a checkpoint, the declaration of its model, and its parameters on this machine's devices."""
    saved = read_saved_run(run, step, parse_model)
    if saved.step is None:
        raise ValueError(f"{run} has no checkpoint yet")
    declared = declare(
        saved.config.model, make_mesh(MeshSection(preset=saved.config.mesh.preset)), saved.config.mesh.preset
    )
    _check_base(run, saved, declared)
    target: dict[str, Any] = {"params": declared.trained}
    with Checkpoints(checkpoint_folder(run), 1, 1) as checkpoints:
        restored = checkpoints.restore(target, partial=True, step=step)
    assert restored is not None
    if restored.step != saved.step:  # the newest is damaged, and an older one may have another config
        return _restore(run, restored.step)
    return saved, declared, restored.state["params"]


def _check_base(run: Path, saved: SavedRun, declared: Declaration) -> None:
    """Raise ValueError if a file that the export reads from the base checkpoint has changed since the run started."""
    if saved.config.model.path is None:
        return
    # Without frozen weights only config.json is read from the base.
    needed = ("config.json", ".safetensors") if declared.model.base_frozen else ("config.json",)
    files = (saved.inputs.get("model.path", {}), fingerprint_path("model.path", saved.config.model.path))
    before, now = ({name: each[name] for name in each if name.endswith(needed)} for each in files)
    how = changed_file(before, now)
    if before and now and how:
        raise ValueError(
            f"{run} trained on model.path={saved.config.model.path}, which has changed since: {how}. Restore the "
            "original files"
        )


def convert_checkpoint(source: str | Path, out: str | Path) -> None:
    """Import and export a Hugging Face folder without training; tensors, names and dtypes are unchanged."""
    config, hf = read_config(source)
    target = Model(config, output=SCALAR if has_scalar_head(hf) else LANGUAGE).abstract()
    with written_folder(out) as written, _beside_other_models(source, written) as folder:
        convert(source, config, hf, target, folder)
