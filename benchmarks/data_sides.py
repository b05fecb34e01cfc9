"""One side of benchmarks/data.py, in a process of its own: prints a line of JSON with what it measured.

Usage: python data_sides.py SIDE FILE TOKENIZER CORES SECONDS; SIDE is ours, grain or datasets.

All sides do the same work: rows with `prompt` and `completion` are read in shuffled order, written by the chat
template, tokenised with a mask of the answer, and packed best-fit into rows of 1024 tokens. Only what a side needs is
imported, so that `datasets` may run in another environment.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Iterator
from typing import Any

T, ROWS, OPEN_ROWS = 1024, 8, 16
DATASETS_ROWS = (
    40_000  # that `datasets` maps: it prepares all rows before the first batch, so a part stands for the rate
)


def ours(file: str, tokenizer: str, cores: int) -> Iterator[int]:
    """Tokens of every batch that are no padding."""
    from converters.tokenizer import load_tokenizer
    from jaxtrain.config import DataSection, SourceSection
    from jaxtrain.data.formats import Encoder
    from jaxtrain.data.pipeline import TrainStream

    source = SourceSection(path=file)
    shuffle: Any = "blocks" if file.endswith(".parquet") else True
    processes = cores if cores > 1 else 0
    data = DataSection(
        train=source, max_length=T, workers=cores, processes=processes, packing_bins=OPEN_ROWS, shuffle=shuffle
    )
    encode = Encoder(load_tokenizer(tokenizer))
    with TrainStream([source], data, encode, rows=ROWS, seed=0, shards=range(8), num_shards=8) as stream:
        for batch in stream:
            yield int((batch.segment_ids > 0).sum())


def grain(file: str, tokenizer: str, cores: int) -> Iterator[int]:
    import grain
    import numpy as np
    from grain.experimental import BestFitPackIterDataset, ParquetIterDataset, WindowShuffleIterDataset
    from transformers import PreTrainedTokenizerFast

    chat = PreTrainedTokenizerFast.from_pretrained(tokenizer)
    options = grain.ReadOptions(num_threads=cores, prefetch_buffer_size=500)

    def encode(row: dict[str, Any]) -> dict[str, np.ndarray]:
        ids, start = tokenise(chat, row)
        return {
            "tokens": np.asarray(ids[:T], np.int32),
            "weights": (np.arange(len(ids)) >= start)[:T].astype(np.float32),
        }

    if file.endswith(".parquet"):
        rows = WindowShuffleIterDataset(ParquetIterDataset(file), window_size=10_000, seed=0)
        encoded: Any = rows.map(encode)
    else:
        lines: Any = Lines(file)
        encoded = grain.MapDataset.source(lines).shuffle(seed=0).map(json.loads).map(encode).to_iter_dataset(options)
    packed = BestFitPackIterDataset(encoded, length_struct={"tokens": T, "weights": T}, num_packing_bins=OPEN_ROWS)
    for batch in packed.batch(ROWS):
        yield int((batch["tokens_segment_ids"] > 0).sum())


def datasets(file: str, tokenizer: str, cores: int) -> Iterator[int]:
    """What TRL does: `load_dataset`, `map` over all rows, packing, and only then the first batch."""
    import datasets as hf
    from transformers import PreTrainedTokenizerFast
    from trl import pack_dataset

    chat = PreTrainedTokenizerFast.from_pretrained(tokenizer)

    def encode(row: dict[str, Any]) -> dict[str, list[int]]:
        ids, start = tokenise(chat, row)
        return {"input_ids": ids[:T], "completion_mask": ([0] * start + [1] * (len(ids) - start))[:T]}

    kind = "parquet" if file.endswith(".parquet") else "json"
    rows = hf.load_dataset(kind, data_files=file, split="train", cache_dir=f"{file}.cache")
    yield 0  # loaded
    rows = rows.shuffle(seed=0).select(range(min(DATASETS_ROWS, len(rows))))
    encoded = rows.map(encode, num_proc=cores, remove_columns=rows.column_names, load_from_cache_file=False)
    packed = pack_dataset(encoded, T, strategy="bfd").with_format("numpy")
    for batch in packed.iter(ROWS):
        yield sum(map(len, batch["input_ids"]))


def tokenise(chat: Any, row: dict[str, Any]) -> tuple[list[int], int]:
    """The ids of a row, and where its answer begins, as TRL finds it: the template is applied twice."""
    question = [{"role": "user", "content": row["prompt"]}]
    answer = [{"role": "assistant", "content": row["completion"]}]
    asked = chat.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    whole = chat.apply_chat_template(question + answer, tokenize=False)
    prompt = chat(asked, add_special_tokens=False).input_ids
    return chat(whole, add_special_tokens=False).input_ids, len(prompt)


class Lines:
    """The lines of a file by number, as users of grain write it: the offsets in memory, a seek per line."""

    def __init__(self, file: str):
        self._file, self._starts, at = file, [0], 0
        with open(file, "rb") as lines:
            for line in lines:
                at += len(line)
                self._starts.append(at)
        self._opened = os.open(file, os.O_RDONLY)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> bytes:
        start = self._starts[index]
        return os.pread(self._opened, self._starts[index + 1] - start, start)

    def __repr__(self) -> str:
        return f"Lines({self._file})"


def peak_kib(process: int | str = "self") -> int:
    """Of a process; `ru_maxrss` would begin with that of the process that started it."""
    status = dict(line.split(":", 1) for line in open(f"/proc/{process}/status"))  # noqa: SIM115
    return int(status["VmHWM"].split()[0])


def cpu_seconds() -> float:
    """Of this process, and of those that it has waited for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def main() -> None:
    side, file, tokenizer, cores, seconds = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), float(sys.argv[5])
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    begun = time.perf_counter()
    batches = {"ours": ours, "grain": grain, "datasets": datasets}[side](file, tokenizer, cores)
    next(batches)
    first = since = time.perf_counter()
    used = cpu_seconds()
    tokens = count = 0
    for made in batches:
        tokens, count = tokens + made, count + 1
        if time.perf_counter() - since > seconds and side != "datasets":
            break
    taken = time.perf_counter() - since
    workers = [peak_kib(process.pid) for process in multiprocessing.active_children() if process.pid]
    batches.close()
    for process in multiprocessing.active_children():  # whose time counts once they have ended
        process.join()
    used = cpu_seconds() - used
    measured = {
        "first": first - begun,
        "tokens_per_second": tokens / taken,
        "tokens_per_cpu_second": tokens / used,
        "density": tokens / (count * ROWS * T),
        "peak_mib": (peak_kib() + sum(workers)) / 1024,
    }
    print(json.dumps(measured), flush=True)


if __name__ == "__main__":
    main()
