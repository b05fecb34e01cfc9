"""How fast batches are made: the packer alone, beside grain's, and the whole pipeline with a tokenizer.

Usage: python benchmarks/data.py [TOKENIZER_FOLDER FILE.jsonl ours=theirs ...]
e.g.   python benchmarks/data.py SmolLM2-135M-Instruct gsm8k/train.jsonl prompt=question completion=answer
Without arguments only the packers are measured.
"""

from __future__ import annotations

import sys
import time
from itertools import islice

import grain
import numpy as np
from grain.experimental import BestFitPackIterDataset

from converters.tokenizer import load_tokenizer
from jaxtrain.config import DataSection, SourceSection
from jaxtrain.data.formats import Encoder
from jaxtrain.data.packing import BestFit, Example, make_row
from jaxtrain.data.pipeline import TrainStream

T = 4096


def log_normal_examples(count: int) -> list[Example]:
    """Lengths with median 150 and a tail up to T, the skewed distribution of chat data."""
    lengths = np.clip(np.random.default_rng(0).lognormal(np.log(150), 1.0, count), 1, T).astype(int)
    return [Example(np.ones(n, np.int32), np.ones(n, np.float32)) for n in lengths]


def ours(examples: list[Example], most_open: int):
    packer: BestFit[Example] = BestFit(T, most_open)
    for example in examples:
        if row := packer.add(example, len(example.input_ids)):
            yield make_row(row, T).segment_ids
    while row := packer.take():
        yield make_row(row, T).segment_ids


def grains(examples: list[Example], most_open: int):
    rows = [{"tokens": example.input_ids, "loss_weights": example.loss_weights} for example in examples]
    lengths = {"tokens": T, "loss_weights": T}
    source = grain.MapDataset.source(rows).to_iter_dataset(grain.ReadOptions(num_threads=0))  # type: ignore[arg-type]
    for row in BestFitPackIterDataset(source, length_struct=lengths, num_packing_bins=most_open):
        yield row["tokens_segment_ids"]


def measure_packers() -> None:
    examples = log_normal_examples(20_000)
    print(f"{'packer':8}{'open rows':>10}{'tokens/s':>14}{'density':>10}")
    for most_open in (8, 16, 64):
        for name, packer in (("ours", ours), ("grain", grains)):
            start = time.perf_counter()
            used = [int(np.count_nonzero(segments)) for segments in packer(examples, most_open)]
            seconds = time.perf_counter() - start
            print(f"{name:8}{most_open:10}{sum(used) / seconds:14,.0f}{sum(used) / T / len(used):10.4f}")


def measure_pipeline(tokenizer: str, path: str, columns: dict[str, str], batches: int = 60) -> None:
    source = SourceSection(path=path, columns=columns)
    encode = Encoder(load_tokenizer(tokenizer))
    for workers in (1, 2, 4):
        data = DataSection(train=source, max_length=1024, workers=workers)
        with TrainStream([source], data, encode, rows=8, seed=0, shards=range(8), num_shards=8) as stream:
            start = time.perf_counter()
            next(stream)
            first = time.perf_counter() - start
            ahead = stream.stats["tokens"]
            start, start_cpu = time.perf_counter(), time.process_time()
            for _ in islice(stream, batches):
                pass
            seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
            stats = stream.stats
        made = stats["tokens"] - ahead
        print(
            f"pipeline, {workers} workers: {made / seconds:,.0f} tokens/s, {made / cpu_seconds:,.0f} per CPU second, "
            f"first batch after {first:.2f} s, density {stats['packing_density']:.4f}"
        )


if __name__ == "__main__":
    measure_packers()
    if len(sys.argv) > 2:
        measure_pipeline(sys.argv[1], sys.argv[2], dict(pair.split("=") for pair in sys.argv[3:]))
