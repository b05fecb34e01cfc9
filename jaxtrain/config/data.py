"""The section `data`: sources of rows, and what becomes of rows."""

from __future__ import annotations

import re
from collections import Counter
from datetime import date
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    PositiveFloat,
    PositiveInt,
    Tag,
    model_validator,
)
from pydantic_core import PydanticKnownError

from jaxtrain.config.marks import IN_HOME, INPUT_PATH, MAY_CHANGE, MayChange
from jaxtrain.config.python_values import ROWS_PREFIX, Given, plain_rows, rows_path, source_path
from jaxtrain.config.sections import NonNegativeInt, Section


def _not_missing(path: str) -> str:
    if not path:
        raise PydanticKnownError("missing")
    return path


class SourceSection(Section):
    """Where rows of data are read from: files under `path`, a function `source`, or `rows` that a program gives.

    A run with `rows` records their fingerprint as its `path`, and is resumed only with equal ones.
    """

    path: Annotated[str, INPUT_PATH, IN_HOME, AfterValidator(_not_missing)] = Field(default="", validate_default=True)
    """.jsonl .json .csv (.gz, .zst) .parquet .arrow .array_record: a file, a folder of them or a glob, local or a
    URL; or hf:owner/name[@revision], a data set on the Hugging Face hub."""
    config: str | None = None
    """Of a data set on the hub: the configuration."""
    split: str | None = None
    """Of a data set on the hub: the split, such as train."""
    source: Given | None = None
    """Instead of `path`: package.module:function, which returns a sequence, a grain data set or an iterable of rows."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of `source`."""
    rows: Annotated[Any, MAY_CHANGE] = Field(default=None, exclude=True, repr=False)
    """Instead of `path`, in a program: dicts with the columns of a file's row."""
    name: Annotated[str | None, MAY_CHANGE] = None
    """In eval_NAME_loss; default: the file's or folder's."""
    columns: dict[str, str | None] = Field(default_factory=dict)
    """Our column name -> the file's, e.g. {prompt: question, completion: answer}; {weight: null} does not read the
    file's column of that name, which has another meaning."""
    weight: PositiveFloat = 1.0
    """Share of the mixture, over the sum of the weights."""
    epochs: PositiveInt | None = None
    """Passes over this source, after which it ends; default: as long as the run."""
    limit: PositiveInt | None = None
    """Use only the first rows."""

    @property
    def rows_key(self) -> str:
        """Equal for sections that have the same rows under the same column names."""
        return repr((self.path, self.config, self.split, self.limit, sorted(self.columns.items())))

    @model_validator(mode="before")
    @classmethod
    def _one_origin(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        source, rows = values.get("source"), values.get("rows")
        if source is None and values.get("args"):
            raise ValueError("`args` are for a function that `source` names")
        if source is not None and values.get("path") == source_path(source):  # as a run's config records it
            return values
        if sum(values.get(key) is not None for key in ("path", "source", "rows")) > 1:
            raise ValueError("give only one of `path` (files), `source` (a function) and `rows` (a list of dicts)")
        if source is not None:
            return {**values, "path": source_path(source)}
        if "rows" not in values:
            return values
        rows = plain_rows(rows)  # type: ignore[arg-type]
        return {**values, "rows": rows, "path": rows_path(rows)}


_PACKED = (".gz", ".zst")
_FILES = (".jsonl", ".json", ".csv", ".parquet", ".arrow", ".feather", ".array_record")


def source_name(path: str) -> str:
    """What a source is called by default: its file or folder without suffixes, or the folder above a glob."""
    if path.startswith(ROWS_PREFIX):
        return "rows"
    if path.startswith(("http://", "https://")):
        path = path.partition("?")[0]
    parts = [part for part in path.split("/") if part and not set(part) & set("*?[")]
    name = re.sub(r"-\d+-of-\d+$", "", parts[-1]) if parts else "data"  # a shard's number, as of ArrayRecord files
    for suffix in (*_PACKED, *_FILES):
        name = name.removesuffix(suffix)
    return name


# The tag picks one branch, so that a fault is reported for what the user wrote and not for both.
Sources = Annotated[
    Annotated[SourceSection, Tag("<one>")] | Annotated[list[SourceSection], Tag("<mixture>")],
    Discriminator(lambda value: "<mixture>" if isinstance(value, list) else "<one>"),
]


def _iso_date(value: Any) -> Any:
    return date.fromisoformat(value).isoformat() if isinstance(value, str) else value and value.isoformat()


class DataSection(Section):
    train: Sources
    """A source, or a list of sources, which is a mixture."""
    eval: Sources | None = None
    """Held-out sources, each with a loss of its own."""
    max_length: PositiveInt = 2048
    """Tokens of the longest example."""
    row_length: PositiveInt | None = None
    """T: tokens of a packed row; default: max_length for each example of a bundle."""
    overlong: Literal["truncate", "drop", "split", "keep_completion"] = "truncate"
    """What becomes of an example that is too long; keep_completion cuts prompts on the left."""
    on_bad_row: Literal["error", "skip"] = "error"
    """Whether a row that cannot be read ends the run, or is skipped and counted."""
    loss_on: Literal["assistant", "last", "all"] = "assistant"
    """The assistant's turns, its last turn alone, or all tokens, prompts included."""
    merge: list[Literal["turns", "system"]] = Field(default_factory=list)
    """Join turns of one role in a row; join system messages to the user's."""
    prompt_format: Literal["chat", "plain"] = "chat"
    """What a prompt and a completion that are strings become."""
    split_turns: bool | None = None
    """Whether each turn of the assistant is an example of its own; false: one example, also where the chat template
    leaves out the thoughts of earlier turns, which is an error by default."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the chat template, which a row's own override."""
    date: Annotated[str | None, BeforeValidator(_iso_date), MayChange(lambda old, new, config: new is None)] = None
    """Year-month-day: today for chat templates that write it; default: the day on which the run began."""
    packing: bool = True
    """Whether several examples share a row; false: one example a row, padded."""
    packing_bins: PositiveInt = 16
    """Open rows of a virtual shard: more pack denser and start later."""
    virtual_shards: PositiveInt | None = None
    """Default: the largest power of two up to 8 that divides train.batch_size."""
    shuffle: bool | Literal["blocks"] = True
    """`blocks`: blocks of neighbouring rows, and the rows of a few of them, for Parquet and compressed or remote
    files that are larger than memory."""
    workers: Annotated[PositiveInt, MAY_CHANGE] = 2
    """Threads that read and tokenise."""
    processes: Annotated[NonNegativeInt, MAY_CHANGE] = 0
    """Worker processes that tokenise in place of the threads, which share one interpreter lock; 0: none."""

    @model_validator(mode="after")
    def _a_completion_to_keep(self) -> DataSection:
        if self.overlong == "keep_completion" and self.loss_on == "all":
            raise ValueError(
                "overlong=keep_completion cuts prompts, and loss_on=all trains on them: there is no completion"
            )
        return self

    def tokens_per_row(self, bundle_size: int = 1) -> int:
        """T, where an objective reads `bundle_size` examples together. Raises ValueError if the longest do not fit."""
        needed = self.max_length * bundle_size
        if self.row_length is not None and self.row_length < needed:
            raise ValueError(
                f"data.row_length={self.row_length} is less than {needed}: a row must have room for {bundle_size} of "
                f"data.max_length={self.max_length} tokens"
            )
        return self.row_length or needed

    @property
    def train_sources(self) -> list[SourceSection]:
        return self.train if isinstance(self.train, list) else [self.train]

    @property
    def eval_sources(self) -> list[SourceSection]:
        """None at all where there is no `eval`."""
        return self.eval if isinstance(self.eval, list) else [] if self.eval is None else [self.eval]

    @property
    def eval_names(self) -> list[str]:
        """Of the sources of `eval`, each once."""
        return [source.name or source_name(source.path) for source in self.eval_sources]

    @model_validator(mode="after")
    def _names_tell_apart(self) -> DataSection:
        if twice := [name for name, count in Counter(self.eval_names).items() if count > 1]:
            raise ValueError(f"two sources of data.eval are called {twice[0]!r}: give each a `name`")
        return self
