"""Compares packed with padded preference training (DPO) on pairs of skewed lengths, with the same step.

Usage: python benchmarks/pair_packing.py [--batches 4]

Model and lengths are those of benchmarks/packing.py, with answers and their prompts clipped at 2048 tokens, so that a
pair fits into a row of 4096. Half of an example is its prompt. Padded: the 64 examples of 32 pairs are padded to the
longest, rounded up to a multiple of 128, and computed in microbatches of 8 rows. Packed: 4 rows of 4096. Both include
the forward pass of the reference and take turns, step by step; programs are compiled before timing. The padded batches
are representative, as in benchmarks/packing.py. Writes its section of benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
import packing
from packing import LENGTH, LLAMA, MEDIAN, MICROBATCH, PACKED_ROWS, PADDED_ROWS, SIGMA, density_of, pad, typical
from results import machine, write_section
from trainer import Trainer

from jaxtrain.config import DataSection
from jaxtrain.data.packing import BestFit, make_row, stack_rows
from jaxtrain.objectives.objective import Correct, Entropy, Logp, ScoreRequest
from jaxtrain.objectives.preference import DPO
from jaxtrain.types import REF_LOGPS, SIGN, Array, Batch, Bundle, Example, Mean, Metric, Norm, Scores

LONGEST = LENGTH // 2


@dataclass(frozen=True, kw_only=True)
class PaddedDPO:
    """DPO on padded rows: the first half are the chosen answers, the second half the rejected ones."""

    beta: float = 0.1
    separable: bool = False
    needs: tuple[ScoreRequest, ...] = (Logp(), Entropy(), Correct())
    signals: tuple[str, ...] = (REF_LOGPS,)

    def __call__(self, scores: Scores, batch: Batch, norm: Norm) -> tuple[Array, Mapping[str, Metric]]:
        ratios = jnp.sum((scores.logp - batch.signals[REF_LOGPS]) * batch.loss_weights, 1)
        chosen, rejected = jnp.split(ratios, 2)
        pairs = norm.segments / 2
        value = jnp.sum(-jax.nn.log_sigmoid(self.beta * (chosen - rejected))) / pairs
        return value, {"loss": Mean(value * pairs, jnp.float32(len(chosen)))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=4, help="timed steps of each side")
    count = parser.parse_args().batches

    examples = make_examples()
    padded, packed = (new_trainer(*each) for each in ((PaddedDPO(), PADDED_ROWS // MICROBATCH), (DPO(), 1)))
    padded_batches = [pad_pairs(each) for each in typical(examples, count)]
    packed_batches = list(islice(pack(examples), count + 1))
    start = time.perf_counter()
    for batch in padded_batches:
        padded.compile(batch)
    padded.step(min(padded_batches, key=lambda batch: batch.tokens.size))
    packed.compile(packed_batches[0])
    packed.step(packed_batches.pop())
    print(f"compiled and warm after {time.perf_counter() - start:.0f} s", flush=True)

    tokens, seconds = np.zeros(2), np.zeros(2)
    for batches in zip(padded_batches, packed_batches, strict=True):
        times = [trainer.step(batch)[1] for trainer, batch in zip((padded, packed), batches, strict=True)]
        tokens += [np.count_nonzero(batch.segment_ids) for batch in batches]
        seconds += times
        print(f"padded to {batches[0].tokens.shape[1]}: {times[0]:.2f} s; packed: {times[1]:.2f} s", flush=True)
    speeds = tokens / seconds
    densities = density_of(padded_batches), density_of(packed_batches)
    text = "\n".join(
        [
            "| | padded | packed | ours is faster by | goal |",
            "|---|---|---|---|---|",
            f"| tokens/s without padding | {speeds[0]:,.0f} | {speeds[1]:,.0f} | {speeds[1] / speeds[0]:.2f}x | 3.0x |",
            f"| density of the rows | {densities[0]:.4f} | {densities[1]:.4f} | | |",
            "",
            f"Lengths of the examples of a pair: log-normal, median {MEDIAN}, sigma {SIGMA:.3f}, clipped at {LONGEST}. "
            f"Model: {LLAMA['num_hidden_layers']} layer, width {LLAMA['hidden_size']}, float32. Padded: "
            f"{PADDED_ROWS // 2} pairs in microbatches of {MICROBATCH} rows. Packed: {PACKED_ROWS} rows of {LENGTH}. "
            f"{count} steps of each side in turn, sums of tokens over sums of seconds.",
            f"{machine('jax')}. Load average {os.getloadavg()[2]:.1f}.",
        ]
    )
    print(text)
    write_section("pair_packing", "Packed against padded preference training", text)


def make_examples() -> list[Example]:
    """Neighbours are a pair: the chosen and the rejected one."""
    found = []
    for number, example in enumerate(packing.make_examples()):
        ids = example.input_ids[:LONGEST]
        weights = (np.arange(len(ids)) >= max(len(ids) // 2, 1)).astype(np.float32)
        found.append(Example(ids, weights, {SIGN: np.full(len(ids), 1 - 2 * (number % 2), np.int32)}))
    return found


def pad_pairs(examples: Sequence[Example]) -> Batch:
    return pad([*examples[::2], *examples[1::2]])


def pack(examples: Sequence[Example]) -> Iterator[Batch]:
    packer: BestFit[Bundle] = BestFit(LENGTH, DataSection.model_fields["packing_bins"].default)
    rows = []
    for pair in zip(examples[::2], examples[1::2], strict=True):
        if row := packer.add(pair, sum(len(each.input_ids) for each in pair)):
            rows.append(make_row(row, LENGTH))
        if len(rows) == PACKED_ROWS:
            yield stack_rows(rows)
            rows = []


def new_trainer(objective: PaddedDPO | DPO, microbatches: int) -> Trainer:
    rows = PADDED_ROWS if microbatches > 1 else PACKED_ROWS
    tree = {
        "recipe": "preference",
        "model": {"config": LLAMA, "tokenizer": "none", "compute_dtype": "float32", "remat": "none"},
        "data": {"train": {"path": "none"}},
        "train": {"microbatches": microbatches, "batch_size": rows},
    }
    return Trainer(tree, objective)


if __name__ == "__main__":
    main()
