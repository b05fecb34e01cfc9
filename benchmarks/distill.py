"""Distils the first layers of SmolLM2-135M from the whole model on GSM8K: on texts of the data, and on its own samples.

Usage: python benchmarks/distill.py MODEL_FOLDER GSM8K_FOLDER [--steps 18] [--seeds 3] [--work FOLDER]

The student begins as the first 4 layers of the teacher, with its embedding, final norm and head. It is first distilled
on the reference solutions (recipe distill, forward KL); its held-out KL must fall from each checkpoint to the next.
From there every seed continues in three ways, with the same learning rate: off-policy as before, and on-policy with the
algorithms gkd and on_policy_distillation on the same questions. At checkpoints, measured on held-out questions: the
forward KL(teacher || student) on the reference solutions, and the reverse KL(student || teacher) on fresh samples of
the student, both exact, in nats per token; and at the end the accuracy of greedy answers. The runs are compared at
equal tokens (of the trained rows, prompts included) and at equal seconds (the median time of a step times the steps, so
that compilation does not count), by linear interpolation between checkpoints. With --work an interrupted benchmark is
resumed. Writes its section of benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from gsm8k_answers import greedy_accuracy
from results import machine, write_section
from safetensors.numpy import load_file, save_file

import jaxtrain as jt
from jaxtrain.data.formats import Encoder
from jaxtrain.data.packing import BestFit, make_row, stack_rows
from jaxtrain.objectives.distill import Distill
from jaxtrain.objectives.objective import TEACHER_HIDDEN
from jaxtrain.roles.role import Role
from jaxtrain.session.export import export_run
from jaxtrain.train.evaluate import make_eval_step
from jaxtrain.types import Batch, Example

LAYERS, POINTS, LENGTH, RATE = 4, 3, 512, 3e-4
PROMPTS, GENERATIONS, ANSWER_TOKENS = 4, 1, 160
VARIANTS = ("off-policy", "gkd", "on_policy_distillation")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="Hugging Face folder of SmolLM2-135M-Instruct, the teacher")
    parser.add_argument("data", type=Path, help="folder with GSM8K's train.jsonl and test.jsonl")
    parser.add_argument("--warm-up", type=int, default=60, help="off-policy steps before the comparison")
    parser.add_argument("--steps", type=int, default=18, help="of each compared run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=2, help="packed rows of an off-policy step")
    parser.add_argument("--completion", type=int, default=96, help="tokens of a sample")
    parser.add_argument("--held-out", type=int, default=24, help="questions")
    parser.add_argument("--work", type=Path, help="folder for the runs; default: one that is deleted at the end")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        Benchmark(arguments, arguments.work or Path(temporary)).measure()


def write_student(teacher: Path, student: Path) -> None:
    """The first layers of the teacher as a Hugging Face folder."""
    if (student / "model.safetensors").exists():
        return
    shutil.copytree(teacher, student, ignore=shutil.ignore_patterns("*.safetensors*"), dirs_exist_ok=True)
    config = json.loads((teacher / "config.json").read_text())
    (student / "config.json").write_text(json.dumps(config | {"num_hidden_layers": LAYERS}))
    weights = {name: array for file in teacher.glob("*.safetensors") for name, array in load_file(file).items()}
    removed = tuple(f"model.layers.{number}." for number in range(LAYERS, config["num_hidden_layers"]))
    kept = {name: array for name, array in weights.items() if not name.startswith(removed)}
    save_file(kept, student / "model.safetensors", {"format": "pt"})


class Point(NamedTuple):
    tokens: float  # trained on since the beginning of the run
    seconds: float
    forward_kl: float
    reverse_kl: float


class HeldOut:
    """Measures students on held-out questions."""

    def __init__(self, teacher: Path, rows: list[dict[str, str]], completion: int):
        self.rows, self._completion = rows, completion
        self.teacher = jt.load(teacher, dtype="float32")
        self._student: Role | None = None
        self._encode = Encoder(self.teacher.tokenizer)
        texts = [self._encode({"prompt": row["question"], "completion": row["answer"]}) for row in rows]
        self._texts = self._with_teacher([text for text in texts if isinstance(text, Example)])

    def kls(self, folder: Path) -> tuple[float, float]:
        """The forward KL on the reference solutions, and the reverse KL on samples of the student."""
        student = self._loaded(folder)
        answers = self._answers(student, jt.SamplingParams(max_tokens=self._completion, temperature=1.0, seed=0))
        samples = []
        for row, (answer,) in zip(self.rows, answers, strict=True):
            prompt, _ = self._encode.question({"prompt": row["question"]})
            weights = np.repeat(np.array([0, 1], np.float32), [len(prompt), len(answer.ids)])
            samples.append(Example(np.concatenate([prompt, answer.ids]).astype(np.int32), weights))
        reverse = self._divergence(student, self._reverse, self._with_teacher(samples))
        return self._divergence(student, self._forward, self._texts), reverse

    def accuracy(self, role: Role) -> float:
        """The share of greedy answers with the right final number."""
        return greedy_accuracy(role, self.rows, ANSWER_TOKENS, LENGTH)

    def student_accuracy(self, folder: Path) -> float:
        return self.accuracy(self._loaded(folder))

    def _loaded(self, folder: Path) -> Role:
        """The student with the weights in `folder`. All have one compiled program."""
        role = jt.load(folder, dtype="float32")
        if self._student is None:
            self._student = role
            self._forward, self._reverse = (
                jax.jit(make_eval_step(role.model, Distill(kind=kind))) for kind in ("forward_kl", "reverse_kl")
            )
        return role

    def _answers(self, role: Role, params: jt.SamplingParams) -> list[Any]:
        return jt.generate(role, [row["question"] for row in self.rows], params, max_length=LENGTH)

    def _divergence(self, student: Role, step: Any, batches: list[Batch]) -> float:
        means = [
            jax.device_get(step(student.params, {}, batch, self.teacher.head())["divergence"]) for batch in batches
        ]
        return float(sum(mean.total for mean in means) / sum(mean.weight for mean in means))

    def _with_teacher(self, examples: list[Example]) -> list[Batch]:
        """Packed batches of one shape, with the teacher's hidden states."""
        packer: BestFit[Example] = BestFit(LENGTH, max_open=len(examples))
        rows = [row for example in examples if (row := packer.add(example, len(example.input_ids)))]
        while (row := packer.pop()) is not None:
            rows.append(row)
        shares = len(jax.devices())
        rows += [[]] * (-len(rows) % shares)
        batches = []
        for start in range(0, len(rows), shares):
            batch = self.teacher.place(stack_rows([make_row(row, LENGTH, {}) for row in rows[start : start + shares]]))
            batches.append(batch._replace(signals={TEACHER_HIDDEN: self.teacher.hidden(batch)}))
        return batches


@dataclass
class Benchmark:
    arguments: argparse.Namespace
    work: Path

    def measure(self) -> None:
        arguments, work = self.arguments, self.work
        work.mkdir(parents=True, exist_ok=True)
        write_student(arguments.model, work / "student")
        lines = (arguments.data / "test.jsonl").read_text().splitlines()[: arguments.held_out]
        held_out = HeldOut(arguments.model, [json.loads(line) for line in lines], arguments.completion)
        before = held_out.kls(work / "student")
        warm, start = self.run("off-policy", "warm-up", work / "student", arguments.warm_up, 0, held_out)
        falls = np.array([before[0], *(point.forward_kl for point in warm)])
        curves: dict[str, list[list[Point]]] = {variant: [] for variant in VARIANTS}
        accuracies: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
        for seed in range(arguments.seeds):
            for variant in VARIANTS:
                points, last = self.run(variant, f"{variant}-{seed}", start, arguments.steps, seed, held_out)
                first = Point(0.0, 0.0, warm[-1].forward_kl, warm[-1].reverse_kl)
                curves[variant].append([first, *points])
                accuracies[variant].append(held_out.student_accuracy(last))
        text = self.report(before, warm, curves, accuracies, held_out.accuracy(held_out.teacher))
        print(text)
        write_section("distill", "A 4-layer student of SmolLM2-135M on GSM8K, off-policy and on-policy", text)
        if not (np.diff(falls) < 0).all():
            raise SystemExit(f"the held-out KL of the warm-up does not fall steadily: {falls.round(4).tolist()}")

    def run(
        self, variant: str, name: str, model: Path, steps: int, seed: int, held_out: HeldOut
    ) -> tuple[list[Point], Path]:
        """Train, and measure the checkpoints. Returns their points and the export of the last one."""
        folder, every = self.work / name, max(steps // POINTS, 1)
        checkpoints = {"checkpoint": {"every": every, "keep": steps}}
        jt.run(jt.parse_config(self.tree(variant, folder, model, steps, seed) | checkpoints))
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        lines = [line for line in lines if "num_tokens" in line]
        tokens = [0, *(line["num_tokens"] for line in lines)]
        times = [float(n) / line["tokens_per_second"] for n, line in zip(np.diff(tokens), lines, strict=True)]
        second = statistics.median(times[1:] or times)
        points = []
        for step in sorted({*range(every, steps + 1, every), steps}):
            export = self.work / f"{name}-{step}"
            if not export.exists():
                export_run(folder, export, step=step)
            points.append(Point(tokens[step], second * step, *held_out.kls(export)))
            print(f"{name} step {step}: {points[-1]}", flush=True)
        return points, export

    def tree(self, variant: str, folder: Path, model: Path, steps: int, seed: int) -> dict[str, Any]:
        arguments = self.arguments
        columns = {"prompt": "question"} | ({"completion": "answer"} if variant == "off-policy" else {})
        common = {
            "run": {"dir": str(folder), "seed": seed},
            "model": {"path": str(model), "compute_dtype": "float32", "remat": "none"},
            "teacher": {"path": str(arguments.model)},
            "data": {"train": {"path": str(arguments.data / "train.jsonl"), "columns": columns}, "max_length": LENGTH},
            "optimizer": {"learning_rate": RATE, "schedule": "constant"},
            "log": {"every": 1, "to": []},
        }
        if variant == "off-policy":
            return common | {"recipe": "distill", "train": {"steps": steps, "batch_size": arguments.rows}}
        section = {
            "algorithm": variant,
            "prompts": PROMPTS,
            "generations": GENERATIONS,
            "max_completion_length": arguments.completion,
            "slots": PROMPTS * GENERATIONS,
        }
        return common | {"recipe": "rl", "train": {"steps": steps}, "rl": section}

    def report(
        self,
        before: tuple[float, float],
        warm: list[Point],
        curves: dict[str, list[list[Point]]],
        accuracies: dict[str, list[float]],
        of_teacher: float,
    ) -> str:
        ends = {
            axis: min(getattr(c[-1], axis) for each in curves.values() for c in each) for axis in ("tokens", "seconds")
        }

        def at(variant: str, axis: str, measure: str) -> str:
            values = [
                np.interp(ends[axis], [getattr(p, axis) for p in curve], [getattr(p, measure) for p in curve])
                for curve in curves[variant]
            ]
            return f"{np.mean(values):.3f} ± {np.std(values, ddof=1) if len(values) > 1 else 0:.3f}"

        columns = [f"forward KL at {ends['tokens']:.0f} tokens", "reverse KL"]
        columns += [f"forward KL at {ends['seconds']:.0f} s", "reverse KL", "accuracy", "tokens/s"]
        rows = [
            f"| run | {' | '.join(columns)} |",
            "|---|---|---|---|---|---|---|",
        ]
        for variant, of in curves.items():
            measured = [at(variant, axis, kl) for axis in ends for kl in ("forward_kl", "reverse_kl")]
            speed = statistics.median(curve[-1].tokens / curve[-1].seconds for curve in of)
            rows.append(f"| {variant} | {' | '.join(measured)} | {np.mean(accuracies[variant]):.3f} | {speed:.0f} |")
        arguments = self.arguments
        falling = ", ".join(f"{kl:.3f}" for kl in (before[0], *(point.forward_kl for point in warm)))
        return "\n".join(
            [
                *rows,
                "",
                f"Nats per token on {arguments.held_out} held-out questions, mean and standard deviation of "
                f"{arguments.seeds} seeds: the forward KL on the reference solutions, the reverse KL on samples of up "
                f"to {arguments.completion} tokens. Accuracy: greedy, of up to {ANSWER_TOKENS} tokens, after "
                f"{arguments.steps} steps; the teacher's is {of_teacher:.3f}.",
                f"All start after {arguments.warm_up} off-policy steps, over which the forward KL went {falling} and "
                f"the reverse KL {before[1]:.3f} to {warm[-1].reverse_kl:.3f}. Steps of {arguments.rows} rows of "
                f"{LENGTH} tokens off-policy, of {PROMPTS} questions x {GENERATIONS} samples on-policy; float32, "
                f"learning rate {RATE:g}.",
                f"{machine('jax')}. Load average {os.getloadavg()[2]:.1f}.",
            ]
        )


if __name__ == "__main__":
    main()
