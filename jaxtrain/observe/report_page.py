"""`report.html`: the curves, samples and config of runs in one file that needs no network. Does not import JAX."""

from __future__ import annotations

import datetime
import html
import importlib.resources
import json
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from jaxtrain.observe.history import Series, better, read_series
from jaxtrain.observe.run_files import FIRST_ROWS, REPORT, TRAJECTORIES, recorded_config, recorded_sources
from jaxtrain.observe.status import read_status, status_facts

_MAX_POINTS = 600  # of a curve
_MAX_SAMPLES, _MAX_CHARACTERS = 8, 1500  # of a step, and of a text
_REFRESH_SECONDS = 60
_UPDATE_SECONDS, _PART = 60.0, 50.0  # between two reports: at least so long, and so many times as one takes

log = logging.getLogger(__name__)


class ReportPage:
    """The report of a run that goes on: it is rewritten at most once a minute, and takes a small part of its time."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._next = -math.inf
        self._warned = False

    def update(self) -> None:
        """Write it, unless that was done just now."""
        if time.monotonic() >= self._next:
            self.write()

    def write(self) -> None:
        """Write it now. A full disk, or files that cannot be read, are only warned of."""
        started = time.monotonic()
        try:
            write_page([self._run])
        except (OSError, ValueError) as error:
            if not self._warned:
                log.warning("%s cannot be written: %s", self._run / REPORT, error)
            self._warned = True
        now = time.monotonic()
        self._next = now + max(_UPDATE_SECONDS, _PART * (now - started))


def write_page(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Write the report of one run, by default into its folder, or that of several, compared. Returns its path.

    Raises ValueError for a folder that is not that of a run.
    """
    out = out or runs[0] / REPORT
    found = [_run(run, name) for run, name in zip(runs, _names(runs), strict=True)]
    title = found[0]["name"] if len(found) == 1 else ", ".join(run["name"] for run in found)
    running = any(run["running"] for run in found)
    refresh = f'<meta http-equiv="refresh" content="{_REFRESH_SECONDS}">' if running else ""
    here = importlib.resources.files("jaxtrain.observe")
    parts = {
        "__TITLE__": html.escape(title),
        "__REFRESH__": refresh,
        "__SCRIPT__": (here / "report.js").read_text(encoding="utf-8"),
        "__DATA__": json.dumps(found, allow_nan=False).replace("<", "\\u003c"),  # so that no text ends the block
    }
    text = (here / "report.html").read_text(encoding="utf-8")
    for mark, part in parts.items():  # the data last: it may hold any text
        before, _, after = text.partition(mark)
        text = before + part + after
    partial = out.with_name(f".{out.name}.tmp")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, out)
    return out


def _run(run: Path, name: str) -> dict[str, Any]:
    """JSON-able."""
    status, series = read_status(run), read_series(run)
    config = recorded_config(run)
    best = {each: values.best(mode) for each, values in series.items() if (mode := better(each))}
    return {
        "name": name,
        "written": datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
        "running": status["state"] == "running",
        "facts": [*_text_facts(status), *_data_facts(config, series)],
        "series": {each: _thinned(values) for each, values in series.items()},
        "best": best,
        "rows": json.loads((run / FIRST_ROWS).read_text()) if (run / FIRST_ROWS).is_file() else [],
        "samples": _samples(run),
        "config": yaml.safe_dump(config, sort_keys=False, allow_unicode=True),
        "keys": _flat(config),
    }


def _names(runs: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as tell the runs apart."""
    parts = [run.resolve().parts for run in runs]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"{runs[0]} is given twice")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: json.dumps(value)}
    return flat


def _text_facts(status: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Of the status, without what the curves show, and what is only true now."""
    facts = status_facts({**status, "heartbeat_age": None})
    return [(name, text) for name, text in facts if name not in ("metrics", "evaluations")]


def _data_facts(config: Mapping[str, Any], series: Mapping[str, Series]) -> list[tuple[str, str]]:
    counts = {name: values.values[-1] for name, values in series.items() if name.startswith("data/")}
    texts = [f"{count:,.0f} {name.removeprefix('data/').replace('_', ' ')}" for name, count in counts.items() if count]
    paths: dict[str, list[str]] = {}
    for use, path in recorded_sources(config):
        paths.setdefault(use, []).append(path)
    facts = [(f"{use} data", ", ".join(each)) for use, each in paths.items()]
    return [*facts, ("rows", ", ".join(texts))] if texts else facts


def _thinned(series: Series) -> tuple[list[int], list[float]]:
    """At most `_MAX_POINTS` points: means of as many equal parts, at their last steps."""
    size = -(-len(series.steps) // _MAX_POINTS)
    if size <= 1:
        return series.steps, series.values
    starts = range(0, len(series.steps), size)
    steps = [series.steps[min(start + size, len(series.steps)) - 1] for start in starts]
    parts = [series.values[start : start + size] for start in starts]
    return steps, [sum(part) / len(part) for part in parts]


def _samples(run: Path) -> list[dict[str, Any]]:
    """Recorded samples of the last and of the first step of a run of recipe rl."""
    files = sorted((run / TRAJECTORIES).glob("step_*.parquet"))
    return [_samples_of(file) for file in dict.fromkeys([*files[-1:], *files[:1]])]


def _samples_of(file: Path) -> dict[str, Any]:
    import pyarrow.parquet as pq  # only of such runs

    columns = ["step", "columns", "text", "reward", "rewards", "advantages", "loss_mask", "finish_reason"]
    rows = pq.read_table(file, columns=columns).slice(0, _MAX_SAMPLES).to_pylist()
    return {"step": rows[0]["step"] if rows else 0, "rows": [_sample(row) for row in rows]}


def _sample(row: Mapping[str, Any]) -> dict[str, Any]:
    advantages = row["advantages"] or []  # of each token, as the mask; empty until they are computed
    mask = (row["loss_mask"] or []) if advantages else []
    advantages = [value for value, trained in zip(advantages, mask, strict=True) if trained]
    parts = [f"{name} {value:.3g}" for name, value in row["rewards"] or [] if value is not None]
    return {
        "prompt": _cut(_question(json.loads(row["columns"]))),
        "text": _cut(row["text"] or ""),
        "reward": _finite(row["reward"]),
        "advantage": _finite(sum(advantages) / len(advantages)) if advantages else None,
        "parts": "\n".join(parts),
        "tokens": f"{sum(mask)} trained of {len(mask)}, {row['finish_reason']}",
    }


def _question(columns: Mapping[str, Any]) -> str:
    asked = columns.get("prompt") or columns.get("messages") or ""
    if isinstance(asked, list):
        return "\n".join(f"{message.get('role')}: {message.get('content')}" for message in asked)
    return str(asked)


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_CHARACTERS else text[:_MAX_CHARACTERS] + " …"


def _finite(value: float | None) -> float | None:
    return None if value is None or value - value != 0 else value
