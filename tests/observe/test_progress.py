import io
import re

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


def test_plain_lines_where_there_is_no_terminal():
    first, second, third = run(terminal=False).splitlines()
    assert first.startswith(
        "step 10/20  loss 1.2346  grad_norm 0.5  lr 2.00e-05  12,346 tokens/s  mfu 41.2%  eta 0:00:"
    )
    assert second.startswith("step 20/20  loss 1.2346")
    assert third == "eval_loss [bold]2.0"


def test_a_plain_line_is_one_line_however_narrow_the_console():
    out = io.StringIO()
    with Progress(20, console=Console(file=out, force_terminal=False, width=20)) as progress:
        progress.update(1, METRICS)
    assert len(out.getvalue().splitlines()) == 1


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
    assert out.getvalue() == "step 1/20  loss 1.0000\n"


def test_silent_on_other_processes(monkeypatch, capsys):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    with Progress(20) as progress:
        progress.update(1, METRICS)
        progress.print("text")
    assert capsys.readouterr().out == ""
