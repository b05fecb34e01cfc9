"""Drafts a family's file from a checkpoint of an unsupported architecture."""

from pathlib import Path

from converters.import_hf import read_json_config
from converters.new_family import Draft, draft_family
from converters.quantization import without_quantization
from converters.safetensors_io import open_checkpoint
from converters.weight_rows import flatten
from jaxtrain.hub import local_folder
from jaxtrain.nn.model import Model


def write_draft(name: str, source: str | Path, out: Path) -> Draft:
    """Write the draft for the folder `source` to `out`.

    Raises ValueError for an invalid module name, for an existing file, and for what `draft_family` refuses.
    """
    if not name.isidentifier() or not name.islower():
        raise ValueError(f"{name!r} is not a valid family name: use lower-case letters, digits and _ only")
    if out.exists():
        raise ValueError(f"{out} already exists; remove it or choose another file with --out")
    folder = local_folder(source)
    checkpoint = open_checkpoint(folder)
    stored = {tensor: entry.shape for tensor, entry in checkpoint.entries.items()}
    draft = draft_family(
        name,
        without_quantization(read_json_config(folder)),
        stored,
        lambda config: {ours: leaf.shape for ours, leaf in flatten(Model(config).abstract()).items()},
    )
    out.write_text(draft.text)
    return draft
