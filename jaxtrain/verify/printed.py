"""Prints a report as tables or as JSON."""

import dataclasses
import json
import sys

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jaxtrain.verify.compare import Report


def print_report(report: Report, as_json: bool) -> None:
    """Print to standard output."""
    if as_json:
        print(json.dumps({"passed": report.passed, **dataclasses.asdict(report)}, indent=2))
        return
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    failed = [check.name for check in report.checks if not check.passed]
    verdict = "[green]PASSED[/]" if report.passed else f"[red]FAILED[/] ({', '.join(failed)})"
    console.print(f"{verdict}: {escape(report.source)}")
    if report.mismatch:
        console.print(f"first mismatch at [bold]{escape(str(report.mismatch))}[/]")
    _print(console, ["", "check", "result"], [[_mark(c.passed), c.name, c.summary] for c in report.checks])
    ranges = [
        [name.removeprefix("logits "), f"{s.start}-{s.stop}", f"{s.difference:.1e}", f"{s.kl:.1e}", f"{s.top1:.1%}"]
        for name, s in ((check.name, part) for check in report.checks for part in check.ranges[1:])
    ]
    if ranges:
        _print(console, ["logits", "positions", "max difference", "KL", "top-1 agreement"], ranges)
    if report.layers:
        layers = [[p.path, p.hf, p.side, f"{p.error:.1e}", str(p.position) * (p.position >= 0)] for p in report.layers]
        _print(console, ["ours", "transformers", "", "relative error", "from position"], layers)


def _mark(passed: bool) -> str:
    return "ok" if passed else "NO"


def _print(console: Console, columns: list[str], rows: list[list[str]]) -> None:
    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*map(escape, row))
    console.print()
    console.print(table)
