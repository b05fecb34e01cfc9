"""The command `env`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from jaxtrain.observe.environment import environment


def env(as_json: Annotated[bool, typer.Option("--json", help="print everything as JSON")] = False) -> None:
    """Show versions, devices, memory, and which optional packages are missing: for reports of bugs."""
    found = environment()
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    for title, entries in found.items():
        typer.echo(f"{title}:")
        for name, value in entries.items():
            typer.echo(f"  {name:26} {value}")
