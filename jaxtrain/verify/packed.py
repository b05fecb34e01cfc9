"""The check of packed rows: each document of a row must compute what it computes alone."""

import jax
import jax.numpy as jnp
import numpy as np

from converters.reference import Reference
from converters.verify import compare_values
from jaxtrain.types import Array, Batch
from jaxtrain.verify.checks import Check
from jaxtrain.verify.probes import boundaries
from jaxtrain.verify.subject import Subject, our_logits, params_as, precise

_LEAK = 1e-4  # relative change of a token that another document causes; rounding may depend on the order of experts


def packed_check(subject: Subject, reference: Reference, ids: np.ndarray, dtype: str, tolerance: float) -> Check:
    """Pack the tokens ids [T] as several documents of one row, and compare with transformers, which computes each
    alone. If they differ, say whether a document depends on another one, and from which module on."""
    name, sizes = "packed rows", _sizes(subject, len(ids))
    if min(sizes) < 1:
        return Check(name, True, f"not compared: {len(ids)} tokens are too few for {len(sizes)} documents")
    batch = _pack(ids, sizes)
    ours = our_logits(subject, ids[None], dtype, batch)[0]
    documents = np.split(ids, np.cumsum(sizes)[:-1])
    theirs = np.concatenate([reference.logits(document[None])[0] for document in documents])
    differences = np.abs(ours - theirs).max(-1)
    summary = f"documents of {', '.join(map(str, sizes))} tokens: logits differ by at most {differences.max():.1e}"
    if differences.max() < tolerance:
        return Check(name, True, f"{summary} from those of transformers for each alone")
    if place := _leak(subject, batch, sizes, dtype):
        return Check(name, False, f"{summary}; {place}")
    first = int(np.argmax(differences >= tolerance))
    document = int(np.searchsorted(np.cumsum(sizes), first, side="right"))
    return Check(
        name,
        False,
        f"{summary} (tolerance {tolerance:.1e}), from token {first - sum(sizes[:document])} of document "
        f"{document + 1} on, which depends on no other: its positions, its length (rope), or what differs alone too",
    )


def _sizes(subject: Subject, tokens: int) -> list[int]:
    """A short, a longer and a long document; documents about the lengths where a rope changes if these fit."""
    edges = boundaries(subject.config)
    if edges and sum(edges[:2]) < tokens:
        return [*edges[:2], tokens - sum(edges[:2])]
    return [tokens // 6, tokens // 3, tokens - tokens // 6 - tokens // 3]


def _pack(ids: np.ndarray, sizes: list[int]) -> Batch:
    """One row [1, T] of documents of these sizes."""
    segments = np.repeat(np.arange(1, len(sizes) + 1, dtype=np.int32), sizes)[None]
    positions = np.concatenate([np.arange(size, dtype=np.int32) for size in sizes])[None]
    return Batch(ids[None], positions, segments, np.ones(segments.shape, np.float32))


def _leak(subject: Subject, batch: Batch, sizes: list[int], dtype: str) -> str:
    """Change the tokens of one document at a time, which must not change the others: the first module that does, or an
    empty text."""
    before, ends = _values(subject, batch, dtype), np.cumsum(sizes)
    for document in range(len(sizes)):
        own = np.asarray(batch.segment_ids == document + 1)
        changed = np.where(own, (batch.tokens + 1) % subject.config.vocab_size, batch.tokens).astype(np.int32)
        after = _values(subject, batch._replace(tokens=changed), dtype)
        for (path, old), (_, new) in zip(before, after, strict=True):
            errors = compare_values(new, old, own.shape)
            assert errors is not None
            differ = (errors > _LEAK) & ~own
            if differ.any():
                reader = int(np.searchsorted(ends, int(np.argmax(differ)), side="right"))
                return f"document {reader + 1} depends on document {document + 1}, first at {path}"
    return ""


def _values(subject: Subject, batch: Batch, dtype: str) -> list[tuple[str, np.ndarray]]:
    """The outputs of the embedding, of attention and feed-forward layers and of whole layers, in order: [1, T, D]."""
    values: list[tuple[str, np.ndarray]] = []

    def on_value(path: str, side: str, value: Array) -> None:
        if side == "out" and path.count(".") <= 2 and value.shape[:2] == batch.tokens.shape:
            values.append((path, np.asarray(value)))

    with precise(dtype):
        subject.model(dtype).watch(params_as(subject, dtype), jax.tree.map(jnp.asarray, batch), on_value)
    return values
