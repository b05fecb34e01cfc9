"""The `jaxtrain` command: arguments in, a recipe called, errors on one line."""

from __future__ import annotations

import logging
import sys
import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="Post-train open-weight language models in JAX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class ComputeDtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


QUICKSTART = Path("configs/quickstart/sft.yaml")
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value, as often as needed")]


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML file of the run")],
    overrides: Overrides = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="print the resolved config and stop")] = False,
    resume: Annotated[bool, typer.Option(help="go on where the run folder's newest checkpoint ends")] = True,
) -> None:
    """Train, or go on training, as CONFIG says."""
    from jaxtrain.config import dump_config, load_config

    run = load_config(config, overrides)
    if print_config:
        typer.echo(dump_config(run), nl=False)
        return
    sys.exit(_recipe(run.recipe)(run, resume=resume).exit_code)


def _recipe(name: str) -> Any:
    from jaxtrain.recipes import rl, sft

    return {"sft": sft.run, "rl": rl.run}[name]


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="folder of a run")],
    out: Annotated[Path, typer.Argument(help="folder to write")],
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: the model's own")] = None,
    adapter: Annotated[bool, typer.Option("--adapter", help="write the adapters alone, as a PEFT folder")] = False,
) -> None:
    """Write a run's model as a Hugging Face folder, adapters merged."""
    from jaxtrain.recipes.export import export_run

    export_run(run, out, dtype=dtype, adapter=adapter)
    typer.echo(f"wrote {out}")


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="Hugging Face folder")],
    out: Annotated[Path, typer.Argument(help="folder to write")],
) -> None:
    """Import and export a checkpoint without training: a test that it survives, tensor by tensor."""
    from jaxtrain.recipes.export import convert_checkpoint

    convert_checkpoint(source, out)
    typer.echo(f"wrote {out}")


@app.command()
def verify(
    source: Annotated[str, typer.Argument(help="Hugging Face folder, or a model's name on the Hub")],
    tokens: Annotated[int, typer.Option(help="length of the sequences compared", min=2)] = 600,
    dtype: Annotated[ComputeDtype, typer.Option(help="the run's dtype, besides float32")] = ComputeDtype.bfloat16,
    layers: Annotated[bool, typer.Option("--layers", help="list every layer's difference")] = False,
    gradients: Annotated[bool, typer.Option("--gradients", help="compare the gradient of every tensor")] = False,
    decode: Annotated[bool, typer.Option("--decode", help="compare decoding token by token over a cache")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the report as JSON")] = False,
) -> None:
    """Compare a checkpoint under jaxtrain and under transformers. Exit code 1 where they differ, and the place said."""
    from jaxtrain.recipes.verify import print_report, verify

    report = verify(source, tokens=tokens, dtype=dtype.value, layers=layers, gradients=gradients, decode=decode)
    print_report(report, as_json)
    sys.exit(0 if report.passed else 1)


@app.command("new-family")
def new_family(
    name: Annotated[str, typer.Argument(help="what to call the family's file")],
    source: Annotated[Path, typer.Option("--from", help="Hugging Face folder of a model of that family")],
    out: Annotated[Path | None, typer.Option(help="file to write; default: NAME.py")] = None,
) -> None:
    """Draft a family's file: the rows and keys that can be guessed from a checkpoint, and a list of the others."""
    from jaxtrain.recipes.new_family import write_draft

    file = out or Path(f"{name}.py")
    draft = write_draft(name, source, file)
    typer.echo(f"wrote {file}, made from family {draft.relative}")
    for problem in draft.open:
        typer.echo(f"  look at: {problem}")


@app.command()
def replay(
    run: Annotated[Path, typer.Argument(help="folder of a run of recipe rl")],
    out: Annotated[Path, typer.Argument(help="folder to write")],
    overrides: Overrides = None,
) -> None:
    """Train once more from the samples that RUN recorded, without sampling, and compare the losses."""
    from jaxtrain.recipes.replay import replay as replay_run

    steps, difference = replay_run(run, out, overrides)
    typer.echo(f"{steps} steps; the largest difference between a loss and the recorded one is {difference:.3g}")


@app.command()
def quickstart(
    config: Annotated[Path, typer.Argument(help="YAML file of the run, supervised or rl")] = QUICKSTART,
    overrides: Overrides = None,
) -> None:
    """Teach a small model arithmetic, export it, load the export and ask it something. Needs no downloads.

    With configs/rl/quickstart.yaml (or one beside it) the model is taught half of it, and reinforcement does the rest.
    """
    from jaxtrain.config import load_config
    from jaxtrain.recipes.quickstart import run, run_rl

    loaded = load_config(config, overrides)
    sys.exit(run(loaded) if loaded.recipe == "sft" else run_rl(loaded, load_config(QUICKSTART)))


def main() -> None:
    """Entry point. A ValueError or an OSError is the user's to mend, so it is printed without a traceback."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for chatty in ("absl", "jax", "orbax"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    try:
        app()
    except (ValueError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
