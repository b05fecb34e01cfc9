"""Every sample of a run in Parquet, one file a step, and a source that plays them again.

`pyarrow.parquet.read_table("runs/x/trajectories/")` (or pandas, or DuckDB) reads a whole run: a row per sample, with
the ids, the text, the rewards by part and what the trainer made of them.
"""

from __future__ import annotations

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

from jaxtrain.rl.collect import Collected, rollout_metrics
from jaxtrain.rl.rollouts import Prompt, Trajectory
from jaxtrain.types import Params

FOLDER = "trajectories"

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
        *((name, pa.list_(pa.from_numpy_dtype(kind))) for name, kind in _TOKENS.items()),
        ("supports", pa.list_(pa.list_(pa.int32()))),
        ("info", pa.string()),  # JSON
    ]
)


def write_step(run_dir: str | Path, step: int, trajectories: Sequence[Trajectory]) -> Path:
    """Write the samples of a step, atomically; a step that is taken again after a resume replaces its file."""
    path = _path(Path(run_dir) / FOLDER, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist([_row(step, t) for t in trajectories], _SCHEMA)
    temporary = path.with_suffix(".tmp")
    pq.write_table(table, temporary, compression="zstd")
    os.replace(temporary, path)
    return path


def read_step(run_dir: str | Path, step: int) -> list[Trajectory]:
    """The samples of a step as they were written. Raises ValueError where there is no such file."""
    path = _path(Path(run_dir) / FOLDER, step)
    if not path.is_file():
        raise ValueError(f"{run_dir}: no trajectories of step {step} are recorded in it")
    return [_trajectory(row) for row in pq.read_table(path, schema=_SCHEMA).to_pylist()]


def recorded_steps(run_dir: str | Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("step_")) for path in (Path(run_dir) / FOLDER).glob("step_*.parquet"))


class Replay:
    """A `SampleSource` of what a run recorded, step by step, whatever the weights are."""

    def __init__(self, run_dir: str | Path):
        """Raises ValueError for a folder without recorded samples."""
        self._run_dir = run_dir
        self._steps = deque(recorded_steps(run_dir))
        if not self._steps:
            raise ValueError(
                f"{run_dir}: no samples are recorded in {Path(run_dir) / FOLDER}: there is nothing to replay"
            )

    def __call__(self, params: Params, number: int) -> Collected | None:
        if not self._steps:
            return None
        trajectories = [t._replace(advantages=None) for t in read_step(self._run_dir, self._steps.popleft())]
        prompts = len({t.prompt.number for t in trajectories})
        return Collected(trajectories, rollout_metrics(trajectories), prompts)

    def state(self) -> None:
        """No prompts are drawn."""

    def close(self) -> None:
        """Nothing is held."""


def sample_table(step: int, trajectories: Sequence[Trajectory], rows: int = 4, width: int = 300) -> Table:
    """The first samples for a person to read, the end of long texts left out."""
    table = Table(title=f"samples of step {step}", show_lines=True, title_justify="left")
    table.add_column("prompt", ratio=1, overflow="fold")
    table.add_column("completion", ratio=2, overflow="fold")
    table.add_column("worth", justify="right", overflow="fold", max_width=30)
    for t in trajectories[:rows]:
        worth = [f"reward {t.reward:.2f}", *(f"{name} {value:.2f}" for name, value in t.rewards.items())]
        if t.advantages is not None and t.loss_mask.any():
            worth.append(f"advantage {t.advantages[t.loss_mask].mean():.2f}")
        worth.append(f"{len(t.completion_ids)} tokens, {t.finish_reason}")
        texts = (_question(t.prompt.columns.get("prompt", "")), t.text)
        # As `Text`: brackets in what a model writes are no markup.
        table.add_row(*(Text(_cut(text, width)) for text in texts), Text("\n".join(worth)))
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
        supports=supports,
        info=json.loads(row["info"]),
        **tokens,
    )


def _path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}.parquet"


def _question(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(str(message.get("content")) for message in prompt or [])


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[:width] + " …"
