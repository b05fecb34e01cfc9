"""What the files of a run were when its data state was saved, so that a resumed run notices that they changed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtrain.data.sources import DataError, Source

_BLOCK, _BLOCKS = 1 << 16, 16


def fingerprints(sources: Sequence[Source]) -> list[list[dict[str, Any]]]:
    """JSON-able: of every file of every source its path, rows, bytes and a hash.

    The hash covers all of a file of up to 1 MiB, else 16 blocks of 64 KiB spread over it, the first and the last among
    them: reading terabytes before the first step is out of the question, so an edit that keeps a large file's size may
    go unnoticed.
    """
    return [
        [
            {"path": str(path), "rows": rows, "bytes": path.stat().st_size, "hash": _hash(path)}
            if source.section.rows is None
            else {"path": str(path), "rows": rows, "bytes": 0, "hash": source.section.path}
            for path, rows in source.files
        ]
        for source in sources
    ]


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


def _hash(path: Path) -> str:
    size = path.stat().st_size
    last = max(size - _BLOCK, 0)
    starts = sorted({last * block // (_BLOCKS - 1) for block in range(_BLOCKS)})
    if size <= _BLOCK * _BLOCKS:
        starts = list(range(0, size, _BLOCK))
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for start in starts:
            file.seek(start)
            digest.update(file.read(_BLOCK))
    return digest.hexdigest()[:16]
