"""Arguments and options that several commands share, and options made of the fields of dataclasses."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import typer
from annotated_types import Ge
from typing_extensions import Doc

MODEL = "Hugging Face folder, local or a URL, or owner/name[@revision] on the hub"
ModelArgument = Annotated[str, typer.Argument(help=MODEL)]
AnyModelArgument = Annotated[str, typer.Argument(help=f"{MODEL}; or a run, or a PEFT folder")]
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
    "grammar": "an object: for programs",
    "alternatives": "the file of answers has no place for them",
    "skip_special_tokens": "an answer is text for people",
    "logprobs": "the file of answers always has them",
}
"""Fields of SamplingParams that are no options of a command, and why."""


@dataclass(frozen=True)
class ServingOptions:
    """Options of `load_served`."""

    max_length: Annotated[int, Ge(2), Doc("tokens of prompt and answer together")] = 2048
    slots: Annotated[int | None, Ge(1), Doc("answers generated together; default 32 for every device")] = None
    cache_gib: Annotated[float | None, Doc("instead of --slots: GiB of cache a device may hold")] = None
    tensor: Annotated[int, Ge(1), Doc("devices that share one copy of the model")] = 1
    dtype: Annotated[FloatType, Doc("of the weights and the cache")] = "bfloat16"


def with_field_options(*records: type, without: Collection[str] = ()) -> Callable[[Command], Command]:
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


def fields_of(record: type, given: dict[str, Any]) -> dict[str, Any]:
    """Those of the options `given` that are fields of `record`."""
    return {field.name: given[field.name] for field in fields(record) if given.get(field.name) is not None}
