"""What the files and the tokenizer of a run were, so that a resumed run and a cache notice that they changed."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from jaxtrain.data.sources import DataError, Source


def fingerprints(sources: Sequence[Source]) -> list[list[dict[str, Any]]]:
    """JSON-able: of every file of every source its path, rows, bytes and a hash.

    The hash covers all of a local file of up to 1 MiB, else 16 blocks of 64 KiB spread over it, the first and the last
    among them: reading terabytes before the first step would take too long, so an edit that keeps a large file's
    size may go unnoticed. Of a remote file it covers the version that the server names (ETag and the like), or the
    first and last bytes; of a sequence 16 rows spread over it; of a stream the first row.
    """
    return [source.fingerprint() for source in sources]


def check_unchanged(saved: list[list[dict[str, Any]]], now: list[list[dict[str, Any]]]) -> None:
    """Raise DataError naming the first file that is not what it was. Files may have moved as long as they are in the
    same order."""
    advice = "A data state holds row numbers, so bring the file back as it was, or start a run in another run.dir"
    for number, (before, after) in enumerate(zip(saved, now, strict=True)):
        if len(before) != len(after):
            names = [{Path(file["path"]).name for file in files} for files in (before, after)]
            changes = [f"{name} is gone" for name in sorted(names[0] - names[1])]
            changes += [f"{name} is new" for name in sorted(names[1] - names[0])]
            raise DataError(
                f"source {number} of data.train has {len(after)} files and had {len(before)} when the checkpoint was "
                f"saved: {', '.join(changes[:5])}. {advice}"
            )
        for old, new in zip(before, after, strict=True):
            faults = [f"{new[key]} {key} and had {old[key]}" for key in ("rows", "bytes") if new[key] != old[key]]
            fault = f"has {', '.join(faults)}" if faults else "has other content of the same length"
            if new["hash"] != old["hash"] or faults:
                raise DataError(f"{new['path']} was changed since the checkpoint was saved: it {fault}. {advice}")


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Changes with the ids, the special tokens or the chat template, not with padding and truncation, which encoding
    turns off."""
    if tokenizer is None:
        return ""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    special = json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)
    content = backend.to_str() + str(tokenizer.chat_template) + special
    return hashlib.sha256(content.encode()).hexdigest()[:16]
