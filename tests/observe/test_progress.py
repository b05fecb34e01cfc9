import io
import re
import time

import pytest
from rich.console import Console

from jaxtrain.observe.progress import Progress

METRICS = {"loss": 1.23456, "grad_norm": 0.5, "learning_rate": 2e-5, "tokens_per_second": 12345.6, "mfu": 0.412}


def run(terminal, **console):
    out = io.StringIO()
    with Progress(20, console=Console(file=out, force_terminal=terminal, width=160, **console)) as progress:
        for step in range(1, 21):
            progress.update(step, METRICS if step % 10 == 0 else None)
        progress.print("eval_loss [bold]2.0")
    return out.getvalue()


def plain(text):
    """The lines without the time that each begins with."""
    lines = [re.fullmatch(r"\d\d:\d\d:\d\d (.*)", line) for line in text.splitlines()]
    assert all(lines), text
    return [line[1] for line in lines]


def test_plain_lines_where_there_is_no_terminal():
    first, second, third = plain(run(terminal=False))
    assert first.startswith(
        "step 10/20  loss 1.2346  grad_norm 0.5  lr 2.00e-05  12,346 tokens/s  mfu 41.2%  eta 0:00:"
    )
    assert second.startswith("step 20/20  loss 1.2346")
    assert third == "eval_loss [bold]2.0"


def test_a_plain_line_is_one_line_however_narrow_the_console():
    out = io.StringIO()
    with Progress(20, console=Console(file=out, force_terminal=False, width=20)) as progress:
        progress.update(1, METRICS)
    assert plain(out.getvalue()) == ["step 1/20  loss 1.2346"]


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("terminal", [True, False])
def test_lines_fit_and_what_is_recorded_is_whole(width, terminal):
    out, recorded = io.StringIO(), []
    console = Console(file=out, force_terminal=terminal, width=width, legacy_windows=False)
    with Progress(100_000, console=console, record=recorded.append, activity=lambda: "evaluating") as progress:
        progress.begin(100_000, 99_000)
        progress.facts([("a name", "and a text " * 20), ("nothing", "")])
        progress.update(99_998, METRICS)
        progress.update(99_999, METRICS | {"reward": 12.5, "loss": 1234.5678})
        progress.values("step 7", {f"eval_rewards/number_{number}": 1.0 for number in range(9)})
    shown = [line for line in re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())) if line]
    assert max(map(len, shown)) <= width, shown
    assert any("loss 1234.5678" in line for line in shown)
    assert sum("number_" in line for line in shown) > 1
    facts, *_, last, values = recorded
    assert facts == "a name  " + "and a text " * 20
    assert "lr 2.00e-05" in last and "mfu" in last and values.count("number_") == 9


def test_what_lasts_long_without_a_terminal_is_announced(monkeypatch):
    monkeypatch.setattr("jaxtrain.observe.progress._QUIET_SECONDS", 0.5)
    out = io.StringIO()
    with Progress(20, console=Console(file=out, force_terminal=False), activity=lambda: "compiling"):
        deadline = time.monotonic() + 30
        while not out.getvalue() and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(1.5)
    assert [line.partition(" (")[0] for line in plain(out.getvalue())] == ["step 0/20  compiling"]


def test_a_bar_on_a_terminal():
    shown = run(terminal=True)
    assert "20/20" in shown and "mfu 41.2%" in shown and "eta" in shown
    assert "\x1b[" in shown and "step 10/20  loss" not in shown


@pytest.mark.parametrize("no_color", [True, False])
def test_no_color_is_honoured(monkeypatch, no_color):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    assert bool(re.search(r"\x1b\[[39]\d", run(terminal=True))) != no_color


def test_metrics_that_are_absent_are_not_shown():
    out = io.StringIO()
    with Progress(20, console=Console(file=out, force_terminal=False)) as progress:
        progress.update(1, {"loss": 1.0})
    assert plain(out.getvalue()) == ["step 1/20  loss 1.0000"]


def test_silent_on_other_processes(monkeypatch, capsys):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    with Progress(20) as progress:
        progress.update(1, METRICS)
        progress.print("text")
    assert capsys.readouterr().out == ""
