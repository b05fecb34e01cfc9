"""What is known of a run from the files in its folder, for `jaxtrain status`. Does not import JAX."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml

from jaxtrain.observe.heartbeat import DEAD_AFTER_SECONDS, read_heartbeats
from jaxtrain.observe.run_files import CHECKPOINTS, CONFIG, FINISHED, LOCK, METRICS

_TAIL_BYTES = 1 << 20  # of the metrics that are read: the newest ones
_SHOWN = ("loss", "reward", "grad_norm", "learning_rate", "epoch", "num_tokens", "mfu", "peak_memory_gib")


def read_status(run: Path) -> dict[str, Any]:
    """JSON-able. Times are in seconds; what is not known is None.

    Raises ValueError if the folder is not that of a run.
    """
    if not (run / CONFIG).is_file():
        inner = sorted(path.parent.name for path in run.glob(f"*/{CONFIG}"))
        found = f"; those in it are: {', '.join(inner)}" if inner else ""
        raise ValueError(f"{run} is not the folder of a run: it has no {CONFIG}{found}")
    now, beats = time.time(), read_heartbeats(run)
    first = beats[0] if beats and beats[0]["process"] == 0 else {}
    metrics, evaluations = _newest_metrics(run / METRICS)
    state = _state(run, first, now)
    step: Any = first.get("step", metrics.get("step"))
    of_steps: Any = first.get("of_steps")
    pace = first.get("seconds_per_step") if state == "running" else None
    seconds = first.get("seconds")
    return {
        "run": str(run),
        "recipe": _recipe(run),
        "state": state,
        "error": first.get("error"),
        "heartbeat_age": max(now - first["time"], 0.0) if first else None,
        "step": step,
        "of_steps": of_steps,
        "tokens_per_second": metrics.get("tokens_per_second"),
        "seconds_per_step": pace,
        "eta": None if pace is None else max(of_steps - step, 0) * pace,
        "activity": first.get("activity") if state == "running" else None,
        "seconds": seconds,
        "goodput": seconds and seconds["steps"] / (sum(seconds.values()) or 1.0),
        "checkpoint": _newest_checkpoint(run / CHECKPOINTS),
        "metrics": metrics,
        "evaluations": evaluations,
        "processes": [_process(beat, now) for beat in beats],
    }


def status_text(status: Mapping[str, Any]) -> str:
    """Lines for a terminal."""
    lines = status_facts(status)
    width = max(len(name) for name, _ in lines)
    return "".join(f"{name:<{width}}  {text}\n" for name, text in lines)


def status_facts(status: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and texts; a text without a name belongs to the name before."""
    age = status["heartbeat_age"]
    state = status["state"] + (f" ({status['activity']})" if status["activity"] else "")
    if age is not None:
        state += f", last heartbeat {duration_text(age)} ago"
    lines = [("run", status["run"]), ("recipe", status["recipe"]), ("state", state)]
    if status["error"]:
        lines.append(("error", status["error"]))
    if status["step"] is not None:
        lines.append(("step", f"{status['step']}" + (f" of {status['of_steps']}" if status["of_steps"] else "")))
    if status["seconds_per_step"] is not None:
        lines.append(("speed", f"{status['seconds_per_step']:.3g} s per step"))
    if status["tokens_per_second"] is not None:
        lines.append(("", f"{status['tokens_per_second']:,.0f} tokens/s"))
    if status["eta"] is not None:
        lines.append(("eta", duration_text(status["eta"])))
    lines.append(("checkpoint", _checkpoint_text(status["checkpoint"])))
    for title in ("metrics", "evaluations"):
        values = status[title]
        shown = values if title == "evaluations" else {name: values[name] for name in _SHOWN if name in values}
        text = "  ".join(f"{name} {_number(value)}" for name, value in shown.items() if name != "step")
        if text:
            lines.append((title, f"step {values['step']}: {text}"))
    if status["seconds"]:
        total = sum(status["seconds"].values()) or 1.0
        lines.append(("goodput", f"{status['goodput']:.1%} of {duration_text(total)} in steps"))
        others = [(name, value) for name, value in status["seconds"].items() if name != "steps" and value > 0]
        for name, value in sorted(others, key=lambda pair: -pair[1]):
            lines.append(("", f"{value / total:6.1%}  {name} ({duration_text(value)})"))
    if len(status["processes"]) > 1:
        lines += [
            ("process" if not number else "", _process_text(each)) for number, each in enumerate(status["processes"])
        ]
    return lines


def _state(run: Path, beat: Mapping[str, Any], now: float) -> str:
    """running, finished, stopped (by a signal), failed (by an error), dead, starting or not started.

    unknown: a run without a heartbeat that has not finished.
    """
    lock = run / LOCK
    held_since = lock.stat().st_mtime if lock.is_file() and lock.stat().st_size else -math.inf  # empty: released
    ended = beat.get("state") != "running"
    if beat and not ended and now - beat["time"] <= DEAD_AFTER_SECONDS:
        return "running"
    if held_since > beat.get("time", -math.inf):
        return "starting"
    if not beat:
        return "finished" if (run / FINISHED).exists() else "unknown" if (run / METRICS).exists() else "not started"
    return beat["state"] if ended else "dead"


def _recipe(run: Path) -> str | None:
    tree = yaml.safe_load((run / CONFIG).read_text(encoding="utf-8"))
    return tree.get("recipe") if isinstance(tree, dict) else None


def _newest_metrics(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The newest lines of training and of evaluation."""
    newest: dict[bool, dict[str, Any]] = {}
    for line in reversed(_last_lines(path)):
        try:
            values = json.loads(line)
        except ValueError:  # half written, or cut off by the limit
            continue
        evaluates = any(name.startswith("eval_") for name in values)
        newest.setdefault(evaluates, values)
        if len(newest) == 2:
            break
    return newest.get(False, {}), newest.get(True, {})


def _last_lines(path: Path) -> list[bytes]:
    try:
        with path.open("rb") as file:
            file.seek(max(os.fstat(file.fileno()).st_size - _TAIL_BYTES, 0))
            return file.read().splitlines()
    except FileNotFoundError:
        return []


def _newest_checkpoint(folder: Path) -> dict[str, Any] | None:
    steps = [path for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []
    if not steps:
        return None
    newest = max(steps, key=lambda path: int(path.name))
    return {"step": int(newest.name), "age": max(time.time() - newest.stat().st_mtime, 0.0), "kept": len(steps)}


def _process(beat: Mapping[str, Any], now: float) -> dict[str, Any]:
    alive = beat["state"] != "running" or now - beat["time"] <= DEAD_AFTER_SECONDS
    times = beat.get("host_times") or {}
    return {
        **{key: beat.get(key) for key in ("process", "host", "pid", "step")},
        "state": beat["state"] if alive else "dead",
        "heartbeat_age": max(now - beat["time"], 0.0),
        "own_seconds_per_step": times.get("own"),
        "data_seconds_per_step": times.get("data"),
    }


def _process_text(process: Mapping[str, Any]) -> str:
    text = f"{process['process']} on {process['host']}: {process['state']}, step {process['step']}"
    if process["own_seconds_per_step"] is not None:
        text += f", busy {process['own_seconds_per_step']:.3g} s per step"
        text += f" (waiting for data {process['data_seconds_per_step']:.3g} s)"
    return text + f", heartbeat {duration_text(process['heartbeat_age'])} ago"


def _checkpoint_text(checkpoint: Mapping[str, Any] | None) -> str:
    if checkpoint is None:
        return "none yet"
    return f"step {checkpoint['step']}, {duration_text(checkpoint['age'])} ago; {checkpoint['kept']} kept"


def _number(value: Any) -> str:
    if not isinstance(value, float) or value.is_integer():
        return f"{value:,.0f}" if isinstance(value, (int, float)) else "not finite"
    return f"{value:.4g}"


def duration_text(seconds: float) -> str:
    """Hours, minutes and seconds."""
    return str(timedelta(seconds=round(seconds)))
