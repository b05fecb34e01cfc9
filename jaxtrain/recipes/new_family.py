"""A draft of a family's file from a checkpoint of a model that no family reads."""

from __future__ import annotations

from pathlib import Path

from converters.import_hf import read_json_config
from converters.new_family import Draft, draft_family
from converters.rows import flatten
from converters.safetensors_io import open_checkpoint
from jaxtrain.nn.model import Model


def write_draft(name: str, source: Path, out: Path) -> Draft:
    """Write the draft for the folder `source` to `out`.

    Raises ValueError for a name that no Python module can have, a file that is there, and what `draft_family` refuses.
    """
    if not name.isidentifier() or not name.islower():
        raise ValueError(f"{name!r} cannot be the name of a family's file: lower-case letters, digits and _ only")
    if out.exists():
        raise ValueError(f"{out} is there already; remove it or name another with --out")
    checkpoint = open_checkpoint(source)
    stored = {tensor: entry.shape for tensor, entry in checkpoint.entries.items()}
    draft = draft_family(
        name,
        read_json_config(source),
        stored,
        lambda config: {ours: leaf.shape for ours, leaf in flatten(Model(config).abstract()).items()},
    )
    out.write_text(draft.text)
    return draft
