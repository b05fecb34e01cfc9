"""The `jaxtrain` command: parses arguments, calls a recipe, prints errors on one line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import typer
from annotated_types import Ge
from typing_extensions import Doc

from jaxtrain.launch import BackendName
from jaxtrain.observe.logs import log_to_stderr
from jaxtrain.sample.requests import EngineLimits, SamplingParams

app = typer.Typer(
    help="Post-train open-weight language models in JAX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_CHUNK_TOKENS = 8  # maximum tokens of a streamed chunk
QUICKSTART = Path("configs/quickstart/sft.yaml")
_MODEL = "Hugging Face folder, local or a URL, or owner/name[@revision] on the hub"
ModelArgument = Annotated[str, typer.Argument(help=_MODEL)]
ConfigArgument = Annotated[Path, typer.Argument(help="YAML file of the run")]
OutArgument = Annotated[str, typer.Argument(help="folder to write, local or a URL")]
FloatType = Literal["float32", "bfloat16", "float16"]
Command = Callable[..., None]
OverridesArgument = Annotated[list[str] | None, typer.Argument(help="section.key=value; repeatable")]

NO_OPTIONS = {
    "stop_ids": "an answer ends at the model's own end tokens",
    "logit_bias": "a mapping of token ids: for programs and the server",
    "allowed_ids": "token ids: for programs",
    "trie": "an object: for programs",
    "alternatives": "the file of answers has no place for them",
    "logprobs": "the file of answers always has them",
}
"""Fields of SamplingParams that are no options of a command, and why."""


@dataclass(frozen=True)
class _Serving:
    """Options of `load_served`."""

    max_length: Annotated[int, Ge(2), Doc("tokens of prompt and answer together")] = 2048
    slots: Annotated[int | None, Ge(1), Doc("answers generated together; default 32 for every device")] = None
    cache_gib: Annotated[float | None, Doc("instead of --slots: GiB of cache a device may hold")] = None
    tensor: Annotated[int, Ge(1), Doc("devices that share one copy of the model")] = 1
    dtype: Annotated[FloatType, Doc("of the weights and the cache")] = "bfloat16"


@dataclass(frozen=True)
class _Launching:
    """Options of `launch`, for every backend."""

    nodes: Annotated[int | None, Ge(1), Doc("processes: one per host of a cluster, or several on this machine")] = None
    retries: Annotated[int, Ge(0), Doc("restarts from the last checkpoint after failures")] = 3
    name: Annotated[str | None, Doc("of the job; default: the last part of run.dir")] = None
    cluster: Annotated[Path | None, Doc("YAML file with the backend's options")] = None
    option: Annotated[list[str] | None, Doc("key=value, an option of the backend; repeatable")] = None


@dataclass(frozen=True)
class _Planning:
    """Options of `plan`."""

    on: Annotated[str | None, Doc("the devices: v5p:4x4x8, v5e:8x8, v6e:16x16, tpu7x:4x4x4 or cpu:8")] = None
    slices: Annotated[int, Ge(1), Doc("TPU slices of that size, which mesh.data combines")] = 1
    price: Annotated[float | None, Doc("of a chip and hour: gives the cost of the run")] = None
    save: Annotated[Path | None, Doc("folder for the HLO of every program")] = None


def _with_options(*records: type, without: Collection[str] = ()) -> Callable[[Command], Command]:
    """Gives a command, in the place of its `**given`, an option for each field of the dataclasses `records`."""
    options = [
        _option(record, field.name)
        for record in records
        for field in fields(record)
        if field.name not in {*NO_OPTIONS, *without}
    ]

    def add(command: Command) -> Command:
        *written, _ = signature(command, eval_str=True).parameters.values()
        required = [each for each in written if each.default is each.empty]
        vars(command)["__signature__"] = Signature([*required, *options, *written[len(required) :]])
        return command

    return add


def _option(record: type, name: str) -> Parameter:
    kind, *marks = get_args(get_type_hints(record, include_extras=True)[name])
    text = next(mark.documentation for mark in marks if isinstance(mark, Doc))
    least: Any = next((mark.ge for mark in marks if isinstance(mark, Ge)), None)
    default = getattr(record, name)
    if name == "stop":
        kind, default = list[str] | None, None
    annotation = Annotated[kind, typer.Option(help=text, min=least)]
    return Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=annotation)


def _fields_of(record: type, given: dict[str, Any]) -> dict[str, Any]:
    """Those of the options `given` that are fields of `record`."""
    return {field.name: given[field.name] for field in fields(record) if given.get(field.name) is not None}


@app.command()
def train(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="print the resolved config and exit")] = False,
    resume: Annotated[bool, typer.Option(help="resume from the newest checkpoint in the run folder")] = True,
    allow_change: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="resume although KEY differs from the run's config; repeatable"),
    ] = None,
) -> None:
    """Train the run of CONFIG, or resume it."""
    from jaxtrain.train.preemption import Preemption

    with Preemption() as preemption:  # before the slow imports
        if print_config:
            typer.echo(_resolved(config, overrides or []), nl=False)
            return
        from jaxtrain.recipes.run import run_file

        options = {"resume": resume, "allow_change": allow_change or (), "preemption": preemption}
        sys.exit(run_file(config, overrides or (), **options))


def _resolved(config: Path, overrides: list[str]) -> str:
    """The config with every default, or those of its stages, as YAML."""
    from jaxtrain.config import dump_config, load_config
    from jaxtrain.config.stages import has_stages, load_stages

    if has_stages(config):
        return "---\n".join(dump_config(stage.config) for stage in load_stages(config, overrides))
    return dump_config(load_config(config, overrides))


@app.command()
@_with_options(_Launching)
def launch(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    backend: Annotated[BackendName, typer.Option(help="who starts the processes")] = "local",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print what would be submitted, and exit")] = False,
    **given: Any,
) -> None:
    """Train the run of CONFIG in several processes, which are restarted after a failure: docs/pods.md."""
    from jaxtrain.launch import backend_class
    from jaxtrain.launch.job import make_job

    options = _Launching(**_fields_of(_Launching, given))
    chosen = backend_class(backend).from_options(options.cluster, options.option or ())
    job = make_job(config, overrides or (), nodes=options.nodes, retries=options.retries, name=options.name)
    if dry_run:
        typer.echo(chosen.render(job), nl=False)
        return
    sys.exit(chosen.submit(job))


@app.command()
def status(
    run: Annotated[str, typer.Argument(help="local or mounted folder of a run, which may be on another machine")],
    as_json: Annotated[bool, typer.Option("--json", help="print everything as JSON")] = False,
) -> None:
    """Show how a run is doing: state, step, speed, goodput, newest checkpoint and metrics, and its processes."""
    import json

    from jaxtrain.observe.status import read_status, status_text

    if "://" in run:
        raise ValueError(f"{run} is a URL: status reads a local or mounted folder")
    found = read_status(Path(run))
    typer.echo(json.dumps(found, indent=1) if as_json else status_text(found), nl=as_json)


@app.command()
def preview(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    rows: Annotated[int, typer.Option(help="rows of each source that are shown", min=0)] = 5,
) -> None:
    """Show what CONFIG trains on, without the model: rows as tokens, lengths, packing, and the number of steps.

    Trained tokens are green on a terminal, and in brackets elsewhere.
    """
    from jaxtrain.config import load_config
    from jaxtrain.recipes.preview import preview as show

    show(load_config(config, overrides), rows=rows)


@app.command()
@_with_options(_Planning)
def plan(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    only_estimate: Annotated[bool, typer.Option("--estimate", help="compile nothing")] = False,
    profile: Annotated[bool, typer.Option("--profile", help="the ten dearest fusions by source line")] = False,
    try_others: Annotated[bool, typer.Option("--search", help="try other meshes, remat and microbatches")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print everything as JSON")] = False,
    **given: Any,
) -> None:
    """Predict memory and time of CONFIG on devices that need not be there: docs/plan.md."""
    from jaxtrain.config import load_config
    from jaxtrain.plan.printed import print_plan

    options = {**_fields_of(_Planning, given), "compiled": not only_estimate, "tries": try_others}
    print_plan(load_config(config, overrides), profile=10 if profile else 0, as_json=as_json, **options)


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="folder of a run, local or a URL")],
    out: OutArgument,
    step: Annotated[int | None, typer.Option(help="step of the checkpoint; default: the newest", min=0)] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: the model's dtype")] = None,
    adapter: Annotated[bool, typer.Option("--adapter", help="write only the adapters, as a PEFT folder")] = False,
    best: Annotated[bool, typer.Option("--best", help="the checkpoint with the best eval.best.metric")] = False,
) -> None:
    """Write a run's model as a Hugging Face folder, with merged adapters."""
    from jaxtrain.session.export import export_run
    from jaxtrain.session.mirror import local_run
    from jaxtrain.session.record import best_step

    if best and step is not None:
        raise ValueError("give either --best or --step")
    folder = local_run(run)
    step = best_step(folder) if best else step
    export_run(folder, out, step=step, dtype=dtype, adapter=adapter)
    typer.echo(f"wrote {out}")


@app.command()
def convert(
    source: ModelArgument,
    out: OutArgument,
) -> None:
    """Import and export a checkpoint without training; checks every tensor."""
    from jaxtrain.session.export import convert_checkpoint

    convert_checkpoint(source, out)
    typer.echo(f"wrote {out}")


@app.command()
def verify(
    source: ModelArgument,
    tokens: Annotated[int, typer.Option(help="length of the compared sequences", min=2)] = 600,
    dtype: Annotated[FloatType, typer.Option(help="dtype, in addition to float32")] = "bfloat16",
    layers: Annotated[bool, typer.Option("--layers", help="list the differences of all layers")] = False,
    gradients: Annotated[bool, typer.Option("--gradients", help="compare the gradient of every tensor")] = False,
    decode: Annotated[bool, typer.Option("--decode", help="compare decoding with a cache")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the report as JSON")] = False,
) -> None:
    """Compare a checkpoint in jaxtrain and in transformers. If they differ, name the place and exit with 1."""
    from jaxtrain.verify import print_report, verify

    report = verify(source, tokens=tokens, dtype=dtype, layers=layers, gradients=gradients, decode=decode)
    print_report(report, as_json)
    sys.exit(0 if report.passed else 1)


@app.command("new-family")
def new_family(
    name: Annotated[str, typer.Argument(help="name of the family's file")],
    source: Annotated[str, typer.Option("--from", help=f"a model of that family: {_MODEL}")],
    out: Annotated[Path | None, typer.Option(help="file to write; default: NAME.py")] = None,
) -> None:
    """Draft the file of a model family from a checkpoint, with a list of unresolved rows and keys."""
    from jaxtrain.recipes.new_family import write_draft

    file = out or Path(f"{name}.py")
    draft = write_draft(name, source, file)
    typer.echo(f"wrote {file}, made from family {draft.template}")
    for problem in draft.problems:
        typer.echo(f"  look at: {problem}")


@app.command()
def replay(
    run: Annotated[str, typer.Argument(help="folder of a run of recipe rl, local or a URL")],
    out: Annotated[Path, typer.Argument(help="folder to write")],
    overrides: OverridesArgument = None,
) -> None:
    """Repeat the training of RUN from its recorded samples, and compare the losses."""
    from jaxtrain.recipes.replay import replay as replay_run

    steps, difference = replay_run(run, out, overrides)
    typer.echo(f"{steps} steps; the maximum difference between a loss and the recorded one is {difference:.3g}")


@app.command()
@_with_options(SamplingParams, _Serving)
def generate(
    model: ModelArgument,
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

    params = SamplingParams(**_fields_of(SamplingParams, given))  # whose faults are found before a model is loaded
    served = load_served(model, **_fields_of(_Serving, given))
    tokens = generate_file(served, prompts, out, params, plain)
    typer.echo(f"wrote {out}: {tokens} tokens from {served.engine.slots} slots")


@app.command()
@_with_options(SamplingParams, _Serving, without=("n", "slots", "cache_gib"))  # one answer at a time
def chat(model: ModelArgument, **given: Any) -> None:
    """Chat with a model; exit with Ctrl-D."""
    from jaxtrain.recipes.generate import chat as converse
    from jaxtrain.serve.served import load_served

    params = SamplingParams(**_fields_of(SamplingParams, given))
    served = load_served(model, slots=1, limits=EngineLimits(_CHUNK_TOKENS), **_fields_of(_Serving, given))
    prompt = "> " if sys.stdin.isatty() else ""
    converse(served, params, lambda: input(prompt), lambda text: print(text, end="", flush=True))
    if prompt:
        print()  # Ctrl-D leaves the cursor behind the prompt


@app.command()
@_with_options(_Serving)
def serve(
    model: ModelArgument,
    host: Annotated[str, typer.Option()] = "127.0.0.1",
    port: Annotated[int, typer.Option()] = 8000,
    **given: Any,
) -> None:
    """Serve a model over HTTP with OpenAI's API. Needs the extra `serve`."""
    from jaxtrain.serve.app import listen
    from jaxtrain.serve.app import serve as serve_model
    from jaxtrain.serve.protocol import ALTERNATIVES
    from jaxtrain.serve.served import load_served

    listening = listen(host, port)
    limits = EngineLimits(_CHUNK_TOKENS, alternatives=ALTERNATIVES)
    served = load_served(model, limits=limits, **_fields_of(_Serving, given))
    engine = served.engine
    typer.echo(f"{served.name} at http://{host}:{port}/v1, {engine.slots} slots of {engine.max_length} tokens")
    serve_model(served, listening)


@app.command()
def quickstart(
    config: Annotated[Path, typer.Argument(help="YAML file of the run; or preference, reward or distill")] = QUICKSTART,
    overrides: OverridesArgument = None,
) -> None:
    """Train a small model on arithmetic, export it, load the export and ask it a question. Needs no downloads.

    `preference` and `reward` (configs/quickstart/) fine-tune the model first and then train it on pairs of a right and
    a wrong answer; configs/rl/quickstart.yaml (or one next to it) then trains it on rewards. With `distill` a smaller
    model is distilled from one that was fine-tuned.
    """
    from jaxtrain.recipes.quickstart import load_quickstart, run, run_distill, run_from_first

    loaded = load_quickstart(config, overrides)
    if loaded.recipe == "sft":
        sys.exit(run(loaded))
    sys.exit((run_distill if loaded.recipe == "distill" else run_from_first)(loaded, load_quickstart(QUICKSTART)))


def main() -> None:
    """Entry point. Prints a ValueError or OSError, which the user can correct, without a traceback."""
    from jaxtrain.parallel.peers import report_error
    from jaxtrain.train.preemption import Interrupted, error_code

    log_to_stderr()
    try:
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


if __name__ == "__main__":
    main()
