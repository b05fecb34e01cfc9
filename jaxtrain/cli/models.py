"""Commands on models."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from jaxtrain.cli.options import (
    MODEL,
    AnyModelArgument,
    FloatType,
    ModelArgument,
    OutArgument,
    ServingOptions,
    fields_of,
    with_field_options,
)
from jaxtrain.sample.requests import EngineLimits, SamplingParams
from jaxtrain.serve.limits import Limits

_CHUNK_TOKENS = 8  # maximum tokens of a streamed chunk


def convert(
    source: ModelArgument,
    out: OutArgument,
) -> None:
    """Import and export a checkpoint without training; checks every tensor."""
    from jaxtrain.session.export import convert_checkpoint

    convert_checkpoint(source, out)
    typer.echo(f"wrote {out}")


def verify(
    source: AnyModelArgument,
    tokens: Annotated[int, typer.Option(help="length of the compared sequences", min=2)] = 600,
    dtype: Annotated[FloatType, typer.Option(help="dtype, in addition to float32")] = "bfloat16",
    layers: Annotated[bool, typer.Option("--layers", help="list the differences of all layers")] = False,
    gradients: Annotated[bool, typer.Option("--gradients", help="compare the gradient of every tensor")] = False,
    decode: Annotated[bool, typer.Option("--decode", help="compare decoding with a cache")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the report as JSON")] = False,
) -> None:
    """Compare a checkpoint in jaxtrain and in transformers. If they differ, name the place and exit with 1."""
    from jaxtrain.session.model_folder import model_folder
    from jaxtrain.verify import print_report, verify

    report = verify(model_folder(source), tokens=tokens, dtype=dtype, layers=layers, gradients=gradients, decode=decode)
    print_report(report, as_json)
    sys.exit(0 if report.passed else 1)


def new_family(
    name: Annotated[str, typer.Argument(help="name of the family's file")],
    source: Annotated[str, typer.Option("--from", help=f"a model of that family: {MODEL}")],
    out: Annotated[Path | None, typer.Option(help="file to write; default: NAME.py")] = None,
) -> None:
    """Draft the file of a model family from a checkpoint, with a list of unresolved rows and keys."""
    from jaxtrain.recipes.new_family import write_draft

    file = out or Path(f"{name}.py")
    draft = write_draft(name, source, file)
    typer.echo(f"wrote {file}, made from family {draft.template}")
    for problem in draft.problems:
        typer.echo(f"  look at: {problem}")


@with_field_options(SamplingParams, ServingOptions)
def generate(
    model: AnyModelArgument,
    prompts: Annotated[
        str, typer.Option(help="a file or URL, as data.train.path: rows with prompt, messages or prompt_ids")
    ],
    out: Annotated[Path, typer.Option(help=".jsonl file to write: the rows with their completions")],
    plain: Annotated[bool, typer.Option("--plain", help="a prompt is text to continue, not a user message")] = False,
    **given: Any,
) -> None:
    """Complete every prompt of a file."""
    from jaxtrain.recipes.generate import generate_file
    from jaxtrain.serve.served import load_served
    from jaxtrain.session.model_folder import model_folder

    params = SamplingParams(**fields_of(SamplingParams, given))  # whose faults are found before a model is loaded
    served = load_served(model_folder(model), **fields_of(ServingOptions, given))
    tokens = generate_file(served, prompts, out, params, plain)
    typer.echo(f"wrote {out}: {tokens} tokens from {served.engine.slots} slots")


@with_field_options(SamplingParams, ServingOptions, without=("n", "slots", "cache_gib"))  # one answer at a time
def chat(
    model: AnyModelArgument,
    system: Annotated[str | None, typer.Option(help="the system prompt")] = None,
    **given: Any,
) -> None:
    """Chat with a model. On a terminal /help lists commands, Ctrl-C ends an answer and Ctrl-D the conversation."""
    from jaxtrain.recipes.chat import PlainDisplay, TerminalDisplay
    from jaxtrain.recipes.chat import chat as converse
    from jaxtrain.serve.served import load_served
    from jaxtrain.session.model_folder import model_folder

    params = SamplingParams(**fields_of(SamplingParams, given))
    options = fields_of(ServingOptions, given)
    served = load_served(model_folder(model), slots=1, limits=EngineLimits(_CHUNK_TOKENS), **options)
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    converse(served, params, TerminalDisplay() if terminal else PlainDisplay(), system)
    if terminal:
        typer.echo()  # Ctrl-D leaves the cursor after the prompt


@with_field_options(ServingOptions)
def evaluate(
    model: AnyModelArgument,
    task: Annotated[Path, typer.Option(help="YAML file with the keys of the section `eval`: docs/evaluation.md")],
    as_json: Annotated[bool, typer.Option("--json", help="print everything as JSON")] = False,
    **given: Any,
) -> None:
    """Answer the questions of a task and judge the answers: exact match or rewards, pass@k, maj@k, lengths."""
    import json

    from jaxtrain.recipes.task import load_task, run_task, task_rows
    from jaxtrain.serve.served import load_served
    from jaxtrain.session.model_folder import model_folder

    loaded = load_task(task)  # whose faults are found before a model is loaded
    metrics = run_task(load_served(model_folder(model), **fields_of(ServingOptions, given)), loaded)
    if as_json:
        typer.echo(json.dumps({"model": model, "task": str(task), "metrics": metrics}, indent=1, allow_nan=False))
        return
    rows = task_rows(metrics)
    width = max(len(name) for name, _, _ in rows)
    for name, value, error in rows:
        typer.echo(f"{name:<{width}}  {value:10.4f}" + ("" if error is None else f" ± {error:.4f}"))


@with_field_options(ServingOptions, Limits)
def serve(
    model: AnyModelArgument,
    host: Annotated[str, typer.Option()] = "127.0.0.1",
    port: Annotated[int, typer.Option()] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="JAXTRAIN_API_KEY", help="what clients must send; default: nothing")
    ] = None,
    **given: Any,
) -> None:
    """Serve a model over HTTP with OpenAI's API. Needs the extra `serve`."""
    from jaxtrain.serve.schema import ALTERNATIVES
    from jaxtrain.serve.served import load_served
    from jaxtrain.serve.server import listen
    from jaxtrain.serve.server import serve as serve_model
    from jaxtrain.session.model_folder import model_folder

    listening = listen(host, port)
    limits = EngineLimits(_CHUNK_TOKENS, alternatives=ALTERNATIVES)
    served = load_served(model_folder(model), limits=limits, **fields_of(ServingOptions, given))
    engine = served.engine
    typer.echo(f"{served.name} at http://{host}:{port}/v1, {engine.slots} slots of {engine.max_length} tokens")
    serve_model(served, listening, Limits(**fields_of(Limits, given)), api_key)
