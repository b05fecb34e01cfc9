"""The runs of the kill campaign: tiny ones of every recipe, and what two of the same must have in common."""

import json
import struct
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from recipe_runs import CLOCKS, logged, prepare, prepare_stages

from jaxtrain.config.stages import EXPORT
from jaxtrain.rl.trajectories import TRAJECTORIES, read_step, recorded_steps
from jaxtrain.session.folder import checkpoint_steps
from jaxtrain.session.record import CHECKPOINTS

STAGES = "stages"  # instead of a recipe: several in turn
SECTIONS = {"experience": "*", TRAJECTORIES: "*"}  # folders of a run whose files must be the same
SAMPLES = ("sampler_logps", "raw_logps", "versions", "token_rewards", "advantages")  # arrays of a trajectory
EQUAL = ("step", "num_tokens", "epoch", "learning_rate", "data/examples", "reward", "completions/mean_length")
CLOSE = ("loss", "grad_norm", "kl", "entropy", "critic/loss", "eval_loss", "eval_reward", "eval_calibration_error")
"""Metrics that are equal on another number of processes, and those that are so as nearly as float32 has them."""


class Case(NamedTuple):
    """A recipe of the campaign."""

    recipe: str
    overrides: tuple[str, ...]
    alone: bool = False  # it needs a single process, and its samples depend on the time that things take
    devices: int = 1  # of a process


_UPDATES = ("rl.minibatches=2", "objective.beta=0.1", "checkpoint.every=3")
_AHEAD = ("rl.placement.staleness=1", "objective.beta=0.1", "train.steps=6")
CASES = {
    "sft": Case("sft", ("train.steps=8", "eval.every=4")),
    "dpo": Case("preference", ("train.steps=8",)),
    "kto": Case("preference", ("train.steps=8", "objective=KTO")),
    "reward": Case("reward", ("train.steps=8",)),
    "distill": Case("distill", ("train.steps=8", "eval.every=4")),
    "sft then dpo": Case(STAGES, ()),
    "grpo": Case("rl", ("train.steps=8", "model.lora={rank: 4}", *_UPDATES)),
    "ppo": Case("rl", ("train.steps=8", "rl.algorithm=ppo", "rl.iterations=2", *_UPDATES)),
    "dapo": Case(
        "rl",
        (
            *("train.steps=8", "rl.algorithm={name: dapo, overlong_filter: false}", "rl.minibatches=2"),
            *("rl.support=8", "sampling.top_k=5", "sampling.temperature=0.9", "checkpoint.every=3"),
        ),
    ),
    "grpo ahead": Case("rl", _AHEAD, alone=True),
    "grpo ahead on 2 devices": Case(
        "rl", (*_AHEAD, "rl.placement.kind=disjoint", "rl.placement.rollout_devices=1"), alone=True, devices=2
    ),
    "grpo ahead in Ray": Case("rl", (*_AHEAD, "rl.placement.kind=ray", "rl.placement.workers=1"), alone=True),
}


def prepare_cases(folder: Path, names: list[str]) -> None:
    """Write the config and the data of each case's recipe."""
    for recipe in {CASES[name].recipe for name in names}:
        if not config_file(folder, recipe).exists():
            (folder / recipe).mkdir(parents=True)
            prepare_stages(folder / recipe) if recipe == STAGES else prepare(folder / recipe, recipe)


def config_file(folder: Path, recipe: str) -> Path:
    return folder / recipe / ("stages.yaml" if recipe == STAGES else "run.yaml")


def arguments(folder: Path, name: str, run: Path, *more: str) -> list[str]:
    """The config of a case's run in the folder `run`, and its overrides."""
    case = CASES[name]
    caches = {"dpo": "reference.cache", "distill": "teacher.cache"}
    evaluated = [
        f"data.eval={{path: {folder / 'rl' / 'eval.jsonl'}}}",
        "eval={every: 4, generate: 3, max_new_tokens: 8}",
    ]
    return [
        *(str(config_file(folder, case.recipe)), f"run.dir={run}", "log.to=[tensorboard]", *case.overrides),
        *([f"{caches[name]}={run}.cache"] if name in caches else []),
        *(evaluated if name in ("grpo", "ppo") else []),
        *more,
    ]


def differences(run: Path, other: Path) -> list[str]:
    """What differs in a run from another one on as many processes, which has not been killed: nothing should."""
    found = _differing_lines(logged(run), logged(other))
    if scalars(run) != scalars(other):
        found.append("TensorBoard")
    ours, others = record(run), record(other)
    for part in ("checksums", "data_state"):
        if ours[part] != others[part]:
            keys = [key for key in others[part] if others[part][key] != ours[part].get(key)]
            found.append(f"the newest checkpoint's {part}: {', '.join(map(str, keys[:3]))}")
    for folder, pattern in SECTIONS.items():
        names = [{path.name for path in (each / folder).glob(pattern)} for each in (run, other)]
        if names[0] != names[1]:
            found.append(f"files of {folder}: {', '.join(sorted(names[0] ^ names[1]))}")
    if samples(run) != samples(other):
        found.append("trajectories")
    return found


def differences_in_samples(run: Path, other: Path) -> list[str]:
    """What differs in a run from another one on another number of processes, beyond the rounding of float32."""
    lines, expected = logged(run), logged(other)
    if [line["step"] for line in lines] != [line["step"] for line in expected]:
        return [f"steps of metrics.jsonl: {[line['step'] for line in lines]}"]
    found = []
    for name in EQUAL:
        if not _close([line.get(name) for line in lines], [line.get(name) for line in expected], 1e-9):
            found.append(f"metric {name}")
    for name in CLOSE:
        if not _close([line.get(name) for line in lines], [line.get(name) for line in expected], 1e-4):
            found.append(f"metric {name}")
    if tokens(run) != tokens(other):
        found.append("samples")
    return found + lost_or_repeated(run, other)


def differences_in_losses(run: Path, other: Path) -> list[str]:
    """What differs in the losses of two runs on the same samples, beyond the rounding of float32."""
    lines, expected = ([line for line in logged(each) if "loss" in line] for each in (run, other))
    names = [name for name in ("step", "num_tokens", *CLOSE) if not name.startswith("eval")]
    return [
        f"metric {name}"
        for name in names
        if not _close([line.get(name) for line in lines], [line.get(name) for line in expected], 1e-4)
    ]


def lost_or_repeated(run: Path, other: Path) -> list[str]:
    """Which steps, scalars and prompts a run has more or less often than another one with the same order of prompts."""
    found = lost_or_repeated_steps(run, other)
    if [each[:3] for each in tokens(run)] != [each[:3] for each in tokens(other)]:
        found.append("prompts of the trajectories")
    return found


def lost_or_repeated_steps(run: Path, other: Path) -> list[str]:
    """Which steps and scalars a run has more or less often than another one."""
    found = []
    if [line["step"] for line in logged(run)] != [line["step"] for line in logged(other)]:
        found.append("steps of metrics.jsonl")
    if sorted(scalars(run)) != sorted(scalars(other)):
        found.append("TensorBoard")
    return found


def lost_or_repeated_prompts(run: Path) -> list[str]:
    """What an asynchronous run has not sampled once: the prompts before its last state, and later ones that it names,
    were trained on or dropped."""
    state = record(run)["data_state"]["prompts"]["prompts"]
    used = set(range(state["number"])) | set(state["used"])
    recorded = [t for step in recorded_steps(run) for t in read_step(run, step)]
    trained = {t.prompt.number for t in recorded if not t.left_out}
    dropped = sum(line.get("dynamic_sampling/dropped_groups", 0) for line in logged(run))
    found = []
    if len({(t.prompt.number, t.sample) for t in recorded}) != len(recorded):
        found.append("repeated samples")
    if not trained <= used or len(trained) + dropped != len(used):
        found.append(f"prompts: {len(trained)} trained and {dropped:g} dropped, of {len(used)}")
    return found


def _close(values: list[float | None], expected: list[float | None], rtol: float) -> bool:
    if [value is None for value in values] != [value is None for value in expected]:
        return False
    pairs = [(a, b) for a, b in zip(values, expected, strict=True) if a is not None and b is not None]
    return all(a == pytest.approx(b, rel=rtol, abs=1e-6) for a, b in pairs)


def _differing_lines(lines: list[dict[str, Any]], expected: list[dict[str, Any]]) -> list[str]:
    if lines == expected:
        return []
    steps = [line["step"] for line in lines]
    if steps != [line["step"] for line in expected]:
        return [f"steps of metrics.jsonl: {steps}"]
    names = [
        f"{name} at {line['step']}"
        for line, there in zip(lines, expected, strict=True)
        for name in line.keys() | there.keys()
        if line.get(name) != there.get(name)
    ]
    return [f"metrics: {', '.join(names[:3])}"]


def record(run: Path) -> dict[str, Any]:
    """The record in the newest checkpoint."""
    from jaxtrain.train.checkpoint import Checkpoints

    with Checkpoints(str(run / CHECKPOINTS), 1, 1) as checkpoints:
        return checkpoints._read_record(checkpoint_steps(run)[-1])


def tokens(run: Path) -> list[tuple]:
    """Of each sample: where it belongs, and its tokens."""
    return [
        (step, t.prompt.number, t.sample, t.completion_ids.tolist(), t.reward, t.left_out)
        for step in recorded_steps(run)
        for t in read_step(run, step)
    ]


def samples(run: Path) -> list[tuple]:
    """`tokens`, with every number of a sample, bit for bit."""
    numbers = [
        tuple(None if getattr(t, name) is None else np.asarray(getattr(t, name)).tobytes() for name in SAMPLES)
        for step in recorded_steps(run)
        for t in read_step(run, step)
    ]
    return list(zip(tokens(run), numbers, strict=True))


def scalars(run: Path) -> dict[tuple[str, int], float]:
    """What TensorBoard shows of a run: by tag and step. A later file's first step ends what the earlier ones show."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    shown: dict[tuple[str, int], float] = {}
    seen: Counter[tuple[str, int]] = Counter()
    for file in sorted((run / "tensorboard").glob("events*")):
        for content in _records(file.read_bytes()):
            event = Event.FromString(content)
            if event.HasField("session_log") and event.session_log.status == SessionLog.START:
                shown = {key: value for key, value in shown.items() if key[1] < event.step}
                seen = Counter(shown.keys())
            for value in event.summary.value:
                if not any(word in value.tag for word in CLOCKS):
                    shown[value.tag, event.step] = value.simple_value
                    seen[value.tag, event.step] += 1
    twice = [key for key, count in seen.items() if count > 1]
    assert not twice, f"{run}: TensorBoard shows more than once: {twice[:3]}"
    return shown


def _records(content: bytes) -> list[bytes]:
    """The records of a TFRecord file. A kill may leave the last one incomplete."""
    found, at = [], 0
    while at + 12 <= len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        if at + 16 + length > len(content):
            break
        found.append(content[at + 12 : at + 12 + length])
        at += 16 + length
    return found


def write_result(work: str, run: Path, other: Path, file: Path) -> int:
    """Write what the comparison `work` of two runs has found, or the error that it raised."""
    comparisons = {
        "equal": differences,
        "samples": differences_in_samples,
        "losses": differences_in_losses,
        "prompts": lambda run, other: lost_or_repeated_steps(run, other) + lost_or_repeated_prompts(run),
    }
    parts = [path.parent.name for path in sorted(other.glob("*/config.yaml"))] or ["."]  # of several stages
    try:
        found = [each for part in parts for each in comparisons[work](run / part, other / part)]
        for export in sorted(other.glob(f"*/{EXPORT}/*.safetensors")) if work == "equal" else ():
            if (run / export.relative_to(other)).read_bytes() != export.read_bytes():
                found.append(str(export.relative_to(other)))
    except Exception as error:
        found = [f"{type(error).__name__}: {error}"]
    file.write_text(json.dumps(found))
    return 0
