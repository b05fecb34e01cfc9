"""Commands on runs and their configs."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from annotated_types import Ge
from typing_extensions import Doc

from jaxtrain.cli.options import ConfigArgument, OutArgument, OverridesArgument, fields_of, with_field_options
from jaxtrain.launch import BackendName

QUICKSTART = Path("configs/quickstart/sft.yaml")


@dataclass(frozen=True)
class LaunchOptions:
    """Options of `launch`, for every backend."""

    nodes: Annotated[int | None, Ge(1), Doc("processes: one per host of a cluster, or several on this machine")] = None
    retries: Annotated[int, Ge(0), Doc("restarts from the last checkpoint after failures")] = 3
    name: Annotated[str | None, Doc("of the job; default: the last part of run.dir")] = None
    cluster: Annotated[Path | None, Doc("YAML file with the backend's options")] = None
    option: Annotated[list[str] | None, Doc("key=value, an option of the backend; repeatable")] = None


@dataclass(frozen=True)
class PlanOptions:
    """Options of `plan`."""

    on: Annotated[str | None, Doc("the devices: v5p:4x4x8, v5e:8x8, v6e:16x16, tpu7x:4x4x4 or cpu:8")] = None
    slices: Annotated[int, Ge(1), Doc("TPU slices of that size, which mesh.data combines")] = 1
    price: Annotated[float | None, Doc("of a chip and hour: gives the cost of the run")] = None
    save: Annotated[Path | None, Doc("folder for the HLO of every program")] = None


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


@with_field_options(LaunchOptions)
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

    options = LaunchOptions(**fields_of(LaunchOptions, given))
    chosen = backend_class(backend).from_options(options.cluster, options.option or ())
    job = make_job(config, overrides or (), nodes=options.nodes, retries=options.retries, name=options.name)
    if dry_run:
        typer.echo(chosen.render(job), nl=False)
        return
    sys.exit(chosen.submit(job))


def status(
    run: Annotated[str, typer.Argument(help="folder of a run, which may be on another machine, or a URL")],
    as_json: Annotated[bool, typer.Option("--json", help="print everything as JSON")] = False,
) -> None:
    """Show how a run is doing: state, step, speed, goodput, newest checkpoint and metrics, and its processes.

    Of a run at a URL it knows what was uploaded, with its last checkpoint or at its end, and no processes.
    """
    import json

    from jaxtrain.observe.status import read_status, status_text
    from jaxtrain.session.mirror import local_run

    found = read_status(local_run(run, checkpoints=False)) | {"run": run}
    typer.echo(json.dumps(found, indent=1) if as_json else status_text(found), nl=as_json)


def report(
    runs: Annotated[list[str], typer.Argument(help="folders of runs, or URLs; several are compared")],
    out: Annotated[Path | None, typer.Option(help="file to write; default: report.html in the first folder")] = None,
) -> None:
    """Write the curves, samples and config of runs as one HTML file, which needs no network."""
    from jaxtrain.observe.report_page import write_page
    from jaxtrain.remote import is_url
    from jaxtrain.session.mirror import local_run, push_file

    if out is None and len(runs) > 1:
        raise ValueError("give --out FILE.html: report.html in a run's folder is the report of that run alone")
    written = write_page([local_run(run, checkpoints=False) for run in runs], out)
    typer.echo(f"wrote {push_file(written, runs[0]) if out is None and is_url(runs[0]) else written}")


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


@with_field_options(PlanOptions)
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

    options = {**fields_of(PlanOptions, given), "compiled": not only_estimate, "tries": try_others}
    print_plan(load_config(config, overrides), profile=10 if profile else 0, as_json=as_json, **options)


@dataclass(frozen=True)
class ExportOptions:
    """Options of `export` and `push`."""

    step: Annotated[int | None, Ge(0), Doc("step of the checkpoint; default: the newest")] = None
    dtype: Annotated[str | None, Doc("float32, bfloat16 or float16; default: the model's dtype")] = None


RunArgument = Annotated[str, typer.Argument(help="folder of a run, local or a URL")]
AdapterOption = Annotated[bool, typer.Option("--adapter", help="write only the adapters, as a PEFT folder")]
BestOption = Annotated[bool, typer.Option("--best", help="the checkpoint with the best eval.best.metric")]


@with_field_options(ExportOptions)
def export(
    run: RunArgument, out: OutArgument, adapter: AdapterOption = False, best: BestOption = False, **given: Any
) -> None:
    """Write a run's model as a Hugging Face folder, with merged adapters and a model card."""
    from jaxtrain.session.export import export_run

    export_run(**_exported(run, best, ExportOptions(**fields_of(ExportOptions, given))), out=out, adapter=adapter)
    typer.echo(f"wrote {out}")


@with_field_options(ExportOptions)
def push(
    run: RunArgument,
    name: Annotated[str, typer.Argument(help="owner/name on the Hugging Face hub")],
    adapter: AdapterOption = False,
    best: BestOption = False,
    private: Annotated[bool, typer.Option("--private", help="a private model, where it does not exist yet")] = False,
    **given: Any,
) -> None:
    """Export a run's model and upload it to the Hugging Face hub, with its model card; needs `hf auth login`."""
    from jaxtrain.session.export import push_run

    exported = _exported(run, best, ExportOptions(**fields_of(ExportOptions, given)))
    typer.echo(f"uploaded {push_run(**exported, name=name, adapter=adapter, private=private)}")


def _exported(run: str, best: bool, options: ExportOptions) -> dict[str, Any]:
    """The run, the step and the dtype to export."""
    from jaxtrain.session.mirror import local_run
    from jaxtrain.session.record import best_step

    if best and options.step is not None:
        raise ValueError("give either --best or --step")
    folder = local_run(run)
    return {"run": folder, "step": best_step(folder) if best else options.step, "dtype": options.dtype}


def replay(
    run: Annotated[str, typer.Argument(help="folder of a run of recipe rl, local or a URL")],
    out: Annotated[Path, typer.Argument(help="folder to write")],
    overrides: OverridesArgument = None,
) -> None:
    """Repeat the training of RUN from its recorded samples, and compare the losses."""
    from jaxtrain.recipes.replay import replay as replay_run

    steps, difference = replay_run(run, out, overrides)
    typer.echo(f"{steps} steps; the maximum difference between a loss and the recorded one is {difference:.3g}")


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

    if "=" in str(config) and not config.exists():  # an override alone
        config, overrides = QUICKSTART, [str(config), *(overrides or [])]
    loaded = load_quickstart(config, overrides)
    if loaded.recipe == "sft":
        sys.exit(run(loaded))
    sys.exit((run_distill if loaded.recipe == "distill" else run_from_first)(loaded, load_quickstart(QUICKSTART)))


def config(
    section: Annotated[str, typer.Argument(help="a section or a key, such as data.train; default: all")] = "",
    schema: Annotated[bool, typer.Option("--schema", help="print the JSON schema of a config, for editors")] = False,
) -> None:
    """Show the keys of a config: their types, defaults and meanings."""
    import json

    from jaxtrain.config import RunConfig, known_keys
    from jaxtrain.named import did_you_mean

    if schema:
        found = RunConfig.model_json_schema()
        found["properties"] |= {"extends": {"type": "string"}, "stages": {"type": "array"}}
        del found["required"]  # the extended file, or a stage, may have it
        typer.echo(json.dumps(found, indent=1))
        return
    keys = dict(known_keys())
    shown = {name: key for name, key in keys.items() if not section or f"{name}.".startswith(f"{section}.")}
    if not shown:
        raise ValueError(f"a config has no key {section}{did_you_mean(section, keys)}")
    for name, key in shown.items():
        default = f" = {key.default_text}" if key.default_text else ""
        typer.echo(f"{name}: {key.kind_text}{default}")
        if key.text:
            typer.echo(f"    {key.text}")
