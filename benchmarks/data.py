"""How fast batches are made: the packer alone, and the whole pipeline beside grain's and that of datasets and TRL.

Usage: python benchmarks/data.py TOKENIZER WORK_FOLDER [DATASETS_PYTHON]
       [--gib 2] [--rows 1000000] [--seconds 8] [--rounds 3]

The pipeline reads, writes chats by the template, tokenises, masks and packs, on 1 and on 2 cores: many short rows, a
large JSON-lines file, and a Parquet file whose row groups are huge. TOKENIZER is a folder. The files are written to
WORK_FOLDER once. DATASETS_PYTHON is an interpreter with `datasets` and `trl`; without it that side is left out. With
the sizes as they are, RESULTS.md gets the table. In each round the sides run in turn; the table has the medians.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import grain
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from grain.experimental import BestFitPackIterDataset
from results import machine, write_section

from jaxtrain.data.packing import BestFit, Example, make_row
from jaxtrain.verify.subject import TEXT

T = 4096
GROUP_ROWS = 500_000  # of a row group of the Parquet file: about 700 MB of text
_CHUNK = 10_000


def log_normal_examples(count: int) -> list[Example]:
    """Lengths with median 150 and a tail up to T, the skewed distribution of chat data."""
    lengths = np.clip(np.random.default_rng(0).lognormal(np.log(150), 1.0, count), 1, T).astype(int)
    return [Example(np.ones(n, np.int32), np.ones(n, np.float32)) for n in lengths]


def ours(examples: list[Example], max_open: int):
    packer: BestFit[Example] = BestFit(T, max_open)
    for example in examples:
        if row := packer.add(example, len(example.input_ids)):
            yield make_row(row, T).segment_ids
    while row := packer.pop():
        yield make_row(row, T).segment_ids


def grains(examples: list[Example], max_open: int):
    rows = [{"tokens": example.input_ids, "loss_weights": example.loss_weights} for example in examples]
    lengths = {"tokens": T, "loss_weights": T}
    source = grain.MapDataset.source(rows).to_iter_dataset(grain.ReadOptions(num_threads=0))  # type: ignore[arg-type]
    for row in BestFitPackIterDataset(source, length_struct=lengths, num_packing_bins=max_open):
        yield row["tokens_segment_ids"]


def measure_packers() -> None:
    examples = log_normal_examples(20_000)
    print(f"{'packer':8}{'open rows':>10}{'tokens/s':>14}{'density':>10}")
    for max_open in (8, 16, 64):
        for name, packer in (("ours", ours), ("grain", grains)):
            start = time.perf_counter()
            used = [int(np.count_nonzero(segments)) for segments in packer(examples, max_open)]
            seconds = time.perf_counter() - start
            print(f"{name:8}{max_open:10}{sum(used) / seconds:14,.0f}{sum(used) / T / len(used):10.4f}")


def texts(rng: np.random.Generator, count: int, words: int) -> list[str]:
    """Texts of about `words` words of English, of log-normal lengths."""
    vocabulary = np.array(TEXT.split())
    lengths = np.clip(rng.lognormal(np.log(words), 0.6, count), 1, 20 * words).astype(int)
    return [" ".join(vocabulary[rng.integers(0, len(vocabulary), length)]) for length in lengths]


def rows(rng: np.random.Generator, count: int, words: int) -> list[dict[str, str]]:
    questions, answers = texts(rng, count, max(words // 3, 3)), texts(rng, count, words)
    return [{"prompt": q, "completion": a} for q, a in zip(questions, answers, strict=True)]


def write_lines(file: Path, words: int, *, max_rows: float = float("inf"), max_bytes: float = float("inf")) -> None:
    rng, written = np.random.default_rng(0), 0
    with file.open("w") as out:
        while written < max_rows and out.tell() < max_bytes:
            out.writelines(json.dumps(row) + "\n" for row in rows(rng, int(min(_CHUNK, max_rows - written)), words))
            written += _CHUNK


def write_parquet(file: Path, lines: Path) -> None:
    """The rows of `lines` in huge row groups."""
    schema = pa.schema([("prompt", pa.string()), ("completion", pa.string())])
    with lines.open() as source, pq.ParquetWriter(file, schema) as writer:
        while group := [json.loads(line) for _, line in zip(range(GROUP_ROWS), source, strict=False)]:
            writer.write_table(pa.Table.from_pylist(group, schema), row_group_size=GROUP_ROWS)


def measure(side: str, python: str, file: Path, tokenizer: str, cores: int, seconds: float) -> dict[str, float]:
    root = Path(__file__).resolve().parent
    environment = os.environ | {"PYTHONPATH": str(root.parent)} if side != "datasets" else dict(os.environ)
    command = [python, str(root / "data_sides.py"), side, str(file), tokenizer, str(cores), str(seconds)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{side} of {file.name} failed: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def line_of(side: str, file: Path, cores: int, rounds: list[dict[str, float]], others: dict[str, float]) -> str:
    """A line of the table: medians over the rounds. `others` are the tokens/s by side, to which ours is compared."""
    found = {key: float(np.median([one[key] for one in rounds])) for key in rounds[0]}
    speed = found["tokens_per_second"]
    ratios = ", ".join(f"{speed / other:.2f}x {name}" for name, other in others.items()) if side == "ours" else ""
    return (
        f"| {file.name} | {cores} | {side} | {speed:,.0f} | {found['tokens_per_cpu_second']:,.0f} "
        f"| {found['density']:.4f} | {found['first']:.1f} | {found['peak_mib']:,.0f} | {ratios} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("tokenizer")
    parser.add_argument("work", type=Path)
    parser.add_argument("datasets_python", nargs="?")
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    measure_packers()
    given.work.mkdir(parents=True, exist_ok=True)
    short, large = given.work / f"short-{given.rows}.jsonl", given.work / f"large-{given.gib}.jsonl"
    parquet = large.with_suffix(".parquet")
    for file, write in {
        short: lambda: write_lines(short, 12, max_rows=given.rows),
        large: lambda: write_lines(large, 150, max_bytes=given.gib * 2**30),
        parquet: lambda: write_parquet(parquet, large),
    }.items():
        if not file.exists():
            print(f"writing {file}", flush=True)
            write()
    sides = {"ours": sys.executable, "grain": sys.executable}
    sides |= {"datasets": given.datasets_python} if given.datasets_python else {}
    lines = [
        "| file | cores | side | tokens/s | tokens per CPU second | density | first batch, s | peak MiB | ours |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for file in (short, large, parquet):
        for cores in (1, 2):
            found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
            for _ in range(given.rounds):
                for side, python in sides.items():
                    found[side].append(measure(side, python, file, given.tokenizer, cores, given.seconds))
            speeds = {s: float(np.median([one["tokens_per_second"] for one in of])) for s, of in found.items()}
            others = {side: speed for side, speed in speeds.items() if side != "ours"}
            lines += [line_of(side, file, cores, rounds, others) for side, rounds in found.items()]
            print("\n".join(lines[-len(sides) :]), flush=True)
    notes = (
        "Goals: first batch within 10 s, under 1 GiB resident, 1.5x the tokens/s of the other sides. ours and grain "
        "shuffle the JSON lines of the whole file; of Parquet, ours shuffles blocks (`data.shuffle: blocks`) and grain "
        "a window of 10,000 rows; on 2 cores ours has 2 worker processes (`data.processes`). datasets: `first batch` "
        "is `load_dataset` alone, which writes a copy to disk; it then maps all rows before the first batch, of which "
        "40,000 stand for the rate. The peaks of worker processes are added, and the start of worker "
        "processes to their CPU seconds."
    )
    table = "\n".join(lines)
    if (given.gib, given.rows) == (2.0, 1_000_000):
        text = (
            f"{table}\n\n{notes}\n{given.rounds} rounds of {given.seconds:.0f} s for each side, in turn; medians. "
            f"{machine('grain', 'pyarrow', 'tokenizers')}. Load average {os.getloadavg()[0]:.1f}."
        )
        write_section("data", "The data pipeline: read, tokenise, pack", text)


if __name__ == "__main__":
    main()
