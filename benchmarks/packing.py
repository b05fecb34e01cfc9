"""Compares packed with padded training on conversations of skewed lengths, with the same step.

Usage: python benchmarks/packing.py [--batches 4]

Lengths are log-normal: median 150, the 99.9th percentile at 4096, clipped there. Padded: every global batch of 64
examples is padded to its longest, rounded up to a multiple of 128, and computed in microbatches of 8 rows. Packed: 4
rows of 4096, about as many tokens, from the training pipeline, which packs concurrently. Both take turns, step by
step; programs are compiled before timing. The timed padded batches are representative: sorted by length and divided
into equal parts, the middle batch of each part. Writes its section of benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from results import machine, write_section
from trainer import Trainer

from jaxtrain.config import DataSection, SourceSection
from jaxtrain.data.formats import Encoder
from jaxtrain.data.packing import BestFit, Example, make_row, stack_rows
from jaxtrain.data.pipeline import TrainStream, count_shards
from jaxtrain.types import Batch

LENGTH, MEDIAN, EXAMPLES = 4096, 150, 20_000
SIGMA = math.log(LENGTH / MEDIAN) / 3.0902  # the 99.9th percentile of a normal variable
PADDED_ROWS, MICROBATCH, ROUND_TO = 64, 8, 128
PACKED_ROWS, STREAM_BATCHES = 4, 100
VOCAB = 512
# Attention takes the share of a layer's arithmetic that it takes in Qwen3-0.6B at this length: two fifths.
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 192,
    "intermediate_size": 768,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": LENGTH,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=4, help="timed steps of each side")
    count = parser.parse_args().batches

    examples = make_examples()
    packer_speed = measure_packer(examples)
    print(f"packer {packer_speed:,.0f} tokens/s", flush=True)
    with tempfile.TemporaryDirectory() as folder, open_stream(examples, Path(folder)) as stream:
        start = time.perf_counter()
        density = density_of(islice(stream, STREAM_BATCHES))
        stream_speed = stream.stats["tokens"] / (time.perf_counter() - start)
        print(f"pipeline {stream_speed:,.0f} tokens/s, density {density:.4f}", flush=True)
        padded, packed, timed_density = measure_steps(examples, stream, count)

    ratio, packer_ratio = packed / padded, packer_speed / packed
    every = density_of(pad(each) for each in batched(examples))
    text = "\n".join(
        [
            "| | measured | goal |",
            "|---|---|---|",
            f"| padded: tokens/s without padding | {padded:,.0f} | |",
            f"| packed: tokens/s without padding | {packed:,.0f} | |",
            f"| packed is faster by | {ratio:.2f}x | > 4.7x |",
            f"| density of packed rows, {STREAM_BATCHES} batches | {density:.4f} | > 0.98 |",
            f"| density of padded rows, the {count} timed batches | {timed_density:.4f} | |",
            f"| density of padded rows, all {EXAMPLES // PADDED_ROWS} batches | {every:.4f} | |",
            f"| packer, tokens/s | {packer_speed:,.0f} | |",
            f"| packer relative to packed step | {packer_ratio:,.0f}x | >= 10x |",
            f"| pipeline (JSON lines, packing, stacking) relative to packed step | {stream_speed / packed:,.0f}x | |",
            "",
            f"Lengths: log-normal, median {MEDIAN}, sigma {SIGMA:.3f} (99.9th percentile {LENGTH}, clipped there). "
            f"Model: {LLAMA['num_hidden_layers']} layer, width {LLAMA['hidden_size']}, one head of "
            f"{LLAMA['head_dim']}, mlp {LLAMA['intermediate_size']}, float32. {count} steps of each side in turn, "
            f"sums of tokens over sums of seconds. The ratio depends on the model: attention here does not skip other "
            f"segments, so the larger its share of the step, the less packing gains.",
            f"{machine('jax')}. Load average {os.getloadavg()[2]:.1f}.",
        ]
    )
    print(text)
    write_section("packing", "Packed against padded training", text)


def make_examples() -> list[Example]:
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(math.log(MEDIAN), SIGMA, EXAMPLES), 2, LENGTH).astype(int)
    return [Example(random.integers(0, VOCAB, n, np.int32), np.array([0] + [1] * (n - 1), np.float32)) for n in lengths]


def measure_packer(examples: Sequence[Example]) -> float:
    """Tokens/s of packing and stacking, by one thread."""
    packer: BestFit[Example] = BestFit(LENGTH, DataSection.model_fields["packing_bins"].default)
    rows, tokens = [], 0
    start = time.perf_counter()
    for example in examples:
        if row := packer.add(example, len(example.input_ids)):
            rows.append(make_row(row, LENGTH))
            tokens += sum(len(each.input_ids) for each in row)
        if len(rows) == PACKED_ROWS:
            stack_rows(rows)
            rows = []
    return tokens / (time.perf_counter() - start)


def open_stream(examples: Sequence[Example], folder: Path) -> TrainStream:
    """The pipeline of a training run on the same examples."""
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps({"input_ids": each.input_ids.tolist()}) + "\n" for each in examples))
    source = SourceSection(path=str(path))
    data = DataSection(train=source, max_length=LENGTH)
    shards = count_shards(data, PACKED_ROWS)
    return TrainStream([source], data, Encoder(None), rows=PACKED_ROWS, seed=0, shards=range(shards), num_shards=shards)


def measure_steps(examples: Sequence[Example], stream: TrainStream, count: int) -> tuple[float, float, float]:
    """Tokens/s without padding, padded and packed, and the density of the padded batches."""
    padded, packed = new_trainer(PADDED_ROWS // MICROBATCH, PADDED_ROWS), new_trainer(1, PACKED_ROWS)
    padded_batches = [pad(each) for each in typical(examples, count)]
    packed_batch = next(stream)
    start = time.perf_counter()
    packed.compile(packed_batch)
    packed.step(packed_batch)
    for batch in padded_batches:
        padded.compile(batch)
    padded.step(min(padded_batches, key=lambda batch: batch.tokens.size))
    print(f"compiled and warm after {time.perf_counter() - start:.0f} s", flush=True)

    tokens, seconds = np.zeros(2), np.zeros(2)
    for batch in padded_batches:
        _, padded_seconds = padded.step(batch)
        start = time.perf_counter()
        packed_batch = next(stream)
        packed.step(packed_batch)
        packed_seconds = time.perf_counter() - start
        used = np.array([np.count_nonzero(each.segment_ids) for each in (batch, packed_batch)])
        tokens += used
        seconds += padded_seconds, packed_seconds
        print(
            f"padded to {batch.tokens.shape[1]}: {used[0]} tokens in {padded_seconds:.2f} s; "
            f"packed: {used[1]} tokens in {packed_seconds:.2f} s",
            flush=True,
        )
    return *(tokens / seconds), density_of(padded_batches)


def new_trainer(microbatches: int, rows: int) -> Trainer:
    return Trainer(
        {
            "recipe": "sft",
            "model": {"config": LLAMA, "tokenizer": "none", "compute_dtype": "float32", "remat": "none"},
            "data": {"train": {"path": "none"}},
            "train": {"microbatches": microbatches, "batch_size": rows},
        }
    )


def batched(examples: Sequence[Example]) -> Iterator[Sequence[Example]]:
    for start in range(0, len(examples) - PADDED_ROWS + 1, PADDED_ROWS):
        yield examples[start : start + PADDED_ROWS]


def typical(examples: Sequence[Example], count: int) -> list[Sequence[Example]]:
    """Representative batches: sorted by their longest examples, the middle ones of `count` equal parts."""
    ordered = sorted(batched(examples), key=longest)
    return [ordered[(2 * share + 1) * len(ordered) // (2 * count)] for share in range(count)]


def longest(examples: Sequence[Example]) -> int:
    return max(len(example.input_ids) for example in examples)


def pad(examples: Sequence[Example]) -> Batch:
    """One example per row, padded to the longest, rounded up."""
    length = -(-longest(examples) // ROUND_TO) * ROUND_TO
    return stack_rows([make_row([example], length) for example in examples])


def density_of(batches: Iterator[Batch] | Sequence[Batch]) -> float:
    counts = [(np.count_nonzero(batch.segment_ids), batch.segment_ids.size) for batch in batches]
    used, slots = np.sum(counts, axis=0)
    return float(used / slots)


if __name__ == "__main__":
    main()
