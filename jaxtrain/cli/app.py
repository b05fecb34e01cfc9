"""The `jaxtrain` command: parses arguments, calls a recipe, prints errors on one line."""

from __future__ import annotations

import sys
from importlib.metadata import version as version_of
from typing import Annotated

import typer

from jaxtrain.cli import environment, models, runs
from jaxtrain.config.aliases import ALIASES, VALUES, remark
from jaxtrain.observe.logs import log_to_stderr

app = typer.Typer(
    help="Post-train open-weight language models in JAX.", no_args_is_help=True, pretty_exceptions_enable=False
)
_WITH_OVERRIDES = (runs.train, runs.launch, runs.preview, runs.plan, runs.replay, runs.quickstart)
for command in (
    *(
        runs.train,
        runs.launch,
        runs.status,
        runs.report,
        runs.preview,
        runs.plan,
        runs.export,
        runs.push,
        models.convert,
        models.verify,
    ),
    *(
        models.new_family,
        runs.replay,
        models.generate,
        models.chat,
        models.serve,
        runs.quickstart,
        runs.config,
        environment.env,
    ),
):
    app.command(command.__name__.replace("_", "-"))(command)
app.command("eval")(models.evaluate)  # whose name is Python's


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"jaxtrain {version_of('jaxtrain')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="print the version and exit", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    pass


def _refuse_foreign_options(arguments: list[str]) -> None:
    """Raises ValueError for an option of another framework where an override is meant, with that override."""
    if not arguments or arguments[0] not in {command.__name__ for command in _WITH_OVERRIDES}:
        return
    for at, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        name = option.removeprefix("--").replace("-", "_")
        if not option.startswith("--") or name not in ALIASES:
            continue
        following = "".join(arguments[at + 1 : at + 2])
        value = value if equals or following.startswith("--") else following
        given = f"{ALIASES[name]}={VALUES.get(name) or value or 'VALUE'}"
        raise ValueError(f"no option {option}: values of the config are given without dashes, {given}{remark(name)}")


def main() -> None:
    """Entry point. Prints a ValueError or OSError, which the user can correct, without a traceback."""
    from jaxtrain.parallel.peers import report_error
    from jaxtrain.train.preemption import Interrupted, error_code

    log_to_stderr()
    try:
        _refuse_foreign_options(sys.argv[1:])
        app()
    except Exception as error:
        code = error_code(error)
        report_error(f"{type(error).__name__}: {error}", code)
        if code == 1:
            raise
        typer.echo(f"error: {error}", err=True)
        sys.exit(code)
    except Interrupted as stopped:
        typer.echo(str(stopped), err=True)
        sys.exit(stopped.exit_code)
