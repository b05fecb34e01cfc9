"""Records every sample of a run in Parquet, one file per rollout and process, and replays them.

`pyarrow.parquet.read_table("runs/x/trajectories/")` (or pandas, or DuckDB) reads a complete run: a row per sample, with
its ids, text, rewards by part, and advantages.
"""

import json
import os
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.table import Table
from rich.text import Text

from jaxtrain.observe.run_files import TRAJECTORIES
from jaxtrain.rl.collect import Collected, rollout_metrics
from jaxtrain.rl.dealing import Deal
from jaxtrain.rl.rollouts import EXTRA, Prompt, Trajectory
from jaxtrain.types import Params

_TOKENS = {  # per token of the completion
    "completion_ids": np.int32,
    "loss_mask": np.bool_,
    "sampler_logps": np.float32,
    "raw_logps": np.float32,
    "versions": np.int32,
    "token_rewards": np.float32,
    "advantages": np.float32,
}
_PARTS = pa.map_(pa.string(), pa.float64())
_SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("prompt", pa.int64()),  # its number
        ("sample", pa.int64()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("columns", pa.string()),  # the row of the prompt data, as JSON
        ("text", pa.string()),
        ("finish_reason", pa.string()),
        ("reward", pa.float64()),
        ("rewards", _PARTS),
        ("timings", _PARTS),
        ("left_out", pa.bool_()),
        *((name, pa.list_(pa.from_numpy_dtype(kind))) for name, kind in _TOKENS.items()),
        ("supports", pa.list_(pa.list_(pa.int32()))),
        ("info", pa.string()),  # JSON
    ]
)


def write_step(
    run_dir: str | Path,
    step: int,
    trajectories: Sequence[Trajectory],
    deal: Deal = Deal(),  # noqa: B008 - immutable
) -> Path:
    """Write this process's samples of a step atomically. A step that is repeated after a resume replaces its files."""
    folder = Path(run_dir) / TRAJECTORIES
    folder.mkdir(parents=True, exist_ok=True)
    part = "" if deal.processes == 1 else f".{deal.process}-of-{deal.processes}"
    path = folder / f"step_{step:08d}{part}.parquet"
    table = pa.Table.from_pylist([_row(step, t) for t in trajectories], _SCHEMA)
    temporary = path.with_name(f".{path.stem}.tmp")  # hidden, so that readers of the folder ignore what a kill leaves
    pq.write_table(table, temporary, compression="zstd")
    os.replace(temporary, path)
    if deal.process == 0:
        for other in _paths(folder, step):
            if _processes(other) != deal.processes:  # of before a resume
                other.unlink()
    return path


def read_step(run_dir: str | Path, step: int) -> list[Trajectory]:
    """Read the samples of a step, of all processes. Raises ValueError if there is no such file."""
    paths = _paths(Path(run_dir) / TRAJECTORIES, step)
    if not paths:
        raise ValueError(f"{run_dir} has no recorded trajectories of step {step}")
    rows = [row for path in paths for row in pq.read_table(path, schema=_SCHEMA).to_pylist()]
    if len(paths) > 1:
        rows.sort(key=lambda row: (row["prompt"], row["sample"]))
    return [_trajectory(row) for row in rows]


def recorded_steps(run_dir: str | Path) -> list[int]:
    names = [path.name.partition(".")[0] for path in (Path(run_dir) / TRAJECTORIES).glob("step_*.parquet")]
    return sorted({int(name.removeprefix("step_")) for name in names})


class Replay:
    """A `SampleSource` of the recorded samples of a run, which ignores the weights."""

    def __init__(self, run_dir: str | Path):
        """Raises ValueError for a folder without recorded samples."""
        self._run_dir = run_dir
        self._steps = deque(recorded_steps(run_dir))
        if not self._steps:
            raise ValueError(
                f"{run_dir} has no recorded samples to replay: {Path(run_dir) / TRAJECTORIES} is missing or empty"
            )

    def __call__(self, params: Params, number: int) -> Collected | None:
        if not self._steps:
            return None
        trajectories = [t._replace(advantages=None) for t in read_step(self._run_dir, self._steps.popleft())]
        prompts = len({t.prompt.number for t in trajectories})
        return Collected(trajectories, rollout_metrics(trajectories), prompts)

    def state(self) -> None:
        """None, since no prompts are drawn."""

    def close(self) -> None:
        """Does nothing."""


def sample_table(step: int, trajectories: Sequence[Trajectory], rows: int = 4, width: int = 300) -> Table:
    """A table of the first samples, with long texts truncated."""
    table = Table(title=f"samples of step {step}", show_lines=True, title_justify="left")
    table.add_column("prompt", ratio=1, overflow="fold")
    table.add_column("completion", ratio=2, overflow="fold")
    table.add_column("reward", justify="right", overflow="fold", max_width=30)
    for t in trajectories[:rows]:
        numbers = [f"reward {t.reward:.2f}", *(f"{name} {value:.2f}" for name, value in t.rewards.items())]
        if t.advantages is not None and t.trained_mask.any():
            numbers.append(f"advantage {t.advantages[t.trained_mask].mean():.2f}")
        numbers += [f"{column} {_truncated(str(given), 100)}" for column, given in t.info.get(EXTRA, {}).items()]
        numbers.append(f"{len(t.completion_ids)} tokens, {t.finish_reason}")
        texts = (_question(t.prompt.columns.get("prompt", "")), t.text)
        # As `Text`, so that brackets in a model's text are not interpreted as markup.
        table.add_row(*(Text(_truncated(text, width)) for text in texts), Text("\n".join(numbers)))
    return table


def _row(step: int, t: Trajectory) -> dict[str, Any]:
    tokens = {name: getattr(t, name) for name in _TOKENS}
    return {
        "step": step,
        "prompt": t.prompt.number,
        "sample": t.sample,
        "prompt_ids": t.prompt.ids,
        "columns": json.dumps(dict(t.prompt.columns), default=str),
        "text": t.text,
        "finish_reason": t.finish_reason,
        "reward": t.reward,
        "rewards": list(t.rewards.items()),
        "timings": list(t.timings.items()),
        "left_out": t.left_out,
        **tokens,
        "supports": None if t.supports is None else t.supports.tolist(),
        "info": json.dumps(dict(t.info), default=str),
    }


def _trajectory(row: Mapping[str, Any]) -> Trajectory:
    def array(name: str) -> np.ndarray | None:
        return None if row[name] is None else np.array(row[name], _TOKENS[name])

    prompt = Prompt(row["prompt"], np.array(row["prompt_ids"], np.int32), json.loads(row["columns"]))
    supports = None if row["supports"] is None else np.array(row["supports"], np.int32)
    tokens: dict[str, Any] = {name: array(name) for name in _TOKENS}
    return Trajectory(
        prompt=prompt,
        sample=row["sample"],
        text=row["text"],
        finish_reason=row["finish_reason"],
        reward=row["reward"],
        rewards=dict(row["rewards"]),
        timings=dict(row["timings"]),
        left_out=bool(row["left_out"]),  # null in the records of older versions, which have an empty `loss_mask`
        supports=supports,
        info=json.loads(row["info"]),
        **tokens,
    )


def _paths(folder: Path, step: int) -> list[Path]:
    """The files of a step: one, or one of each process."""
    return sorted(folder.glob(f"step_{step:08d}.*parquet"))


def _processes(path: Path) -> int:
    """The number of processes that wrote the files of the step of `path`."""
    _, _, count = path.name.removesuffix(".parquet").partition("-of-")
    return int(count or 1)


def _question(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(str(message.get("content")) for message in prompt or [])


def _truncated(text: str, width: int) -> str:
    return text if len(text) <= width else text[:width] + " …"
