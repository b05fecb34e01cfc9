"""The `jaxtrain` command: arguments in, a recipe called, errors on one line."""

from __future__ import annotations

import logging
import sys
import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Post-train open-weight language models in JAX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


_PIECE = 8  # tokens that are shown at a time


class ComputeDtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


QUICKSTART = Path("configs/quickstart/sft.yaml")
Model = Annotated[Path, typer.Argument(help="Hugging Face folder")]
Dtype = Annotated[ComputeDtype, typer.Option(help="of the weights and the cache")]
MaxLength = Annotated[int, typer.Option(help="tokens of prompt and answer together", min=2)]
MaxTokens = Annotated[int | None, typer.Option(help="new tokens; default: as many as --max-length leaves")]
Temperature = Annotated[float, typer.Option(help="0 is greedy")]
TopK = Annotated[int, typer.Option(help="0 keeps all")]
TopP = Annotated[float, typer.Option(help="1 keeps all")]
MinP = Annotated[float, typer.Option(help="0 keeps all")]
Seed = Annotated[int | None, typer.Option(help="decides what is sampled")]
Stop = Annotated[list[str] | None, typer.Option(help="text that ends an answer; as often as needed")]
CacheGib = Annotated[float | None, typer.Option(help="instead of --slots: GiB of cache a device may hold")]
Slots = Annotated[int | None, typer.Option(help="answers generated together; default 32 for every device", min=1)]
Tensor = Annotated[int, typer.Option(help="devices that share one copy of the model", min=1)]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value, as often as needed")]


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML file of the run")],
    overrides: Overrides = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="print the resolved config and stop")] = False,
    resume: Annotated[bool, typer.Option(help="go on where the run folder's newest checkpoint ends")] = True,
    allow_change: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="resume although KEY differs from the run's config; as often as needed"),
    ] = None,
) -> None:
    """Train, or go on training, as CONFIG says."""
    from jaxtrain.train.preemption import Preemption

    with Preemption() as preemption:  # before anything that takes long is imported
        from jaxtrain.config import dump_config, load_config
        from jaxtrain.recipes.run import run as run_recipe

        run = load_config(config, overrides)
        if print_config:
            typer.echo(dump_config(run), nl=False)
            return
        outcome = run_recipe(run, resume=resume, allow_change=allow_change or (), preemption=preemption)
        sys.exit(outcome.exit_code)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="folder of a run")],
    out: Annotated[Path, typer.Argument(help="folder to write")],
    step: Annotated[int | None, typer.Option(help="of which checkpoint; default: the newest", min=0)] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: the model's own")] = None,
    adapter: Annotated[bool, typer.Option("--adapter", help="write the adapters alone, as a PEFT folder")] = False,
) -> None:
    """Write a run's model as a Hugging Face folder, adapters merged."""
    from jaxtrain.session.export import export_run

    export_run(run, out, step=step, dtype=dtype, adapter=adapter)
    typer.echo(f"wrote {out}")


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="Hugging Face folder")],
    out: Annotated[Path, typer.Argument(help="folder to write")],
) -> None:
    """Import and export a checkpoint without training: a test that it survives, tensor by tensor."""
    from jaxtrain.session.export import convert_checkpoint

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
    from jaxtrain.verify import print_report, verify

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
def generate(
    model: Model,
    prompts: Annotated[
        Path,
        typer.Option(help=".jsonl or .parquet: rows with prompt, messages or prompt_ids", exists=True, dir_okay=False),
    ],
    out: Annotated[Path, typer.Option(help=".jsonl to write: the rows, with their completions")],
    max_tokens: MaxTokens = None,
    temperature: Temperature = 1.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    n: Annotated[int, typer.Option(help="completions of each prompt")] = 1,
    seed: Seed = None,
    stop: Stop = None,
    plain: Annotated[bool, typer.Option("--plain", help="a prompt is text to continue, not a user's turn")] = False,
    max_length: MaxLength = 2048,
    slots: Slots = None,
    cache_gib: CacheGib = None,
    tensor: Tensor = 1,
    dtype: Dtype = ComputeDtype.bfloat16,
) -> None:
    """Continue every prompt of a file."""
    from jaxtrain.recipes.generate import generate_file
    from jaxtrain.sample.requests import SamplingParams
    from jaxtrain.serve.load import load_served

    params = SamplingParams(max_tokens, temperature, top_k, top_p, min_p, stop=stop or (), seed=seed, n=n)
    served = load_served(
        model, dtype=dtype.value, max_length=max_length, slots=slots, cache_gib=cache_gib, tensor=tensor
    )
    tokens = generate_file(served, prompts, out, params, plain)
    typer.echo(f"wrote {out}: {tokens} tokens from {served.engine.slots} slots")


@app.command()
def chat(
    model: Model,
    max_tokens: MaxTokens = None,
    temperature: Temperature = 1.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    seed: Seed = None,
    max_length: MaxLength = 2048,
    tensor: Tensor = 1,
    dtype: Dtype = ComputeDtype.bfloat16,
) -> None:
    """Talk to a model; end with Ctrl-D."""
    from jaxtrain.recipes.generate import chat as converse
    from jaxtrain.sample.requests import SamplingParams
    from jaxtrain.serve.load import load_served

    params = SamplingParams(max_tokens, temperature, top_k, top_p, min_p, seed=seed)
    served = load_served(model, dtype=dtype.value, max_length=max_length, slots=1, tensor=tensor, steps=_PIECE)
    mark = "> " if sys.stdin.isatty() else ""
    converse(served, params, lambda: input(mark), lambda text: print(text, end="", flush=True))
    if mark:
        print()  # Ctrl-D leaves the cursor behind the mark


@app.command()
def serve(
    model: Model,
    host: Annotated[str, typer.Option()] = "127.0.0.1",
    port: Annotated[int, typer.Option()] = 8000,
    max_length: MaxLength = 2048,
    slots: Slots = None,
    cache_gib: CacheGib = None,
    tensor: Tensor = 1,
    dtype: Dtype = ComputeDtype.bfloat16,
) -> None:
    """Answer over HTTP as OpenAI's API does. Needs the extra `serve`."""
    from jaxtrain.serve.app import listen
    from jaxtrain.serve.app import serve as serve_model
    from jaxtrain.serve.load import load_served
    from jaxtrain.serve.protocol import ALTERNATIVES

    listening = listen(host, port)
    served = load_served(
        model,
        dtype=dtype.value,
        max_length=max_length,
        slots=slots,
        cache_gib=cache_gib,
        tensor=tensor,
        steps=_PIECE,
        alternatives=ALTERNATIVES,
    )
    typer.echo(f"{served.name} at http://{host}:{port}/v1, {served.engine.slots} slots of {max_length} tokens")
    serve_model(served, listening)


@app.command()
def quickstart(
    config: Annotated[Path, typer.Argument(help="YAML file of the run, supervised or rl")] = QUICKSTART,
    overrides: Overrides = None,
) -> None:
    """Teach a small model arithmetic, export it, load the export and ask it something. Needs no downloads.

    With configs/rl/quickstart.yaml (or one beside it) the model is taught half of it, and reinforcement does the rest.
    """
    from jaxtrain.recipes.quickstart import load_quickstart, run, run_rl

    loaded = load_quickstart(config, overrides)
    sys.exit(run(loaded) if loaded.recipe == "sft" else run_rl(loaded, load_quickstart(QUICKSTART)))


def main() -> None:
    """Entry point. A ValueError or an OSError is for the user to correct, so it is printed without a traceback."""
    from jaxtrain.train.preemption import Interrupted

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for chatty in ("absl", "jax", "orbax"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    try:
        app()
    except (ValueError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except Interrupted as stopped:
        typer.echo(str(stopped), err=True)
        sys.exit(stopped.exit_code)


if __name__ == "__main__":
    main()
