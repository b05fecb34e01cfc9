"""What a run will train on, before any model is built: rows as tokens, their lengths, the packing and the steps."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.text import Text

from converters.import_hf import read_config, read_json_config
from jaxtrain.config import MeshSection, OptimizerSection, RunConfig, SourceSection
from jaxtrain.config.data import source_name
from jaxtrain.data.encoder import RowEncoder
from jaxtrain.data.formats import Encoder
from jaxtrain.data.lengths import Count, row_counts
from jaxtrain.data.packing import RowExamples, as_bundle, fit
from jaxtrain.data.pairs import answer_encoder
from jaxtrain.data.pipeline import TrainStream, count_shards
from jaxtrain.data.prompts import PromptStream, question_within
from jaxtrain.data.sources import DataError, Row, Source, StreamEndError
from jaxtrain.data.tokens import runs_of_weight
from jaxtrain.hub import local_folder
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.roles.declare import declare
from jaxtrain.roles.tokenizer import make_tokenizer
from jaxtrain.session.data import checked_length, warn_of_positions
from jaxtrain.session.reference import reference_section
from jaxtrain.types import Example

_BARS, _WIDTH = 10, 40  # of the histogram
_FILES = 10  # of a source that are named
_TRAINED, _OTHER = ("green", "bold green"), ("dim", "none")  # neighbouring tokens alternate
_NOTHING = Example(np.zeros(0, np.int32), np.zeros(0, np.float32))
_TURNS = {
    True: "each trained turn of the assistant is a separate example, with its thought",
    False: "a conversation is one example, also where the chat template leaves out the thoughts of earlier turns",
}
_OPEN, _CLOSE = "⟦", "⟧"  # around what is trained, where there are no colours


def preview(config: RunConfig, *, rows: int = 5, console: Console | None = None) -> None:
    """Print the first `rows` rows of every source of `data.train` and their totals.

    Every row is read once; the lengths are cached for the run. Rows that cannot be trained on are shown as such.
    Raises ValueError for what the run would refuse before its first step.
    """
    config.check_length()
    console = console or Console(highlight=False, soft_wrap=True)
    tokenizer = make_tokenizer(config.model)
    origin = config.model.config if config.model.path is None else config.model.path
    assert origin is not None
    if not isinstance(origin, Mapping):
        origin = local_folder(origin, weights=False)
    if config.model.backend == "torchax":
        hf = dict(origin) if isinstance(origin, Mapping) else read_json_config(origin)
        vocab_size = (hf.get("text_config") or hf)["vocab_size"]
    else:
        model, hf = read_config(origin)
        vocab_size = model.vocab_size
    if config.model.add_tokens:
        vocab_size = max(vocab_size, len(tokenizer))
    encode = Encoder.configured(tokenizer, config.data, vocab_size=vocab_size)
    warn_of_positions(hf, config.data.max_length)
    printer = _Printer(console, tokenizer)
    if config.rl is not None:
        _preview_rl(config, encode, printer, rows)
    else:
        answers = config.recipe in ("preference", "reward")
        _preview_examples(config, answer_encoder(config, encode) if answers else encode, printer, rows)


def _preview_examples(config: RunConfig, encode: RowEncoder, printer: _Printer, rows: int) -> None:
    data = config.data

    def pieces(row: Row) -> list[tuple[str, Example]]:
        made = encode(row)
        items, events = (made.items, made.events) if isinstance(made, RowExamples) else ([made], ())
        noted = [name.replace("_", " ") for name in events]
        shown: list[tuple[str, Example]] = [] if items else [(f"no example: {', '.join(noted)}", _NOTHING)]
        for item in items:
            found, tokens = (
                fit(item, data.max_length, data.overlong),
                sum(len(each.input_ids) for each in as_bundle(item)),
            )
            if not found.items:
                shown += [
                    (f"{len(each.input_ids)} tokens, dropped", each._replace(loss_weights=np.zeros(0)))
                    for each in as_bundle(item)
                ]
            for piece in [example for bundle in found.items for example in as_bundle(bundle)]:
                what = "".join(f", {name}" for name in noted)
                what += f", {found.event} from {tokens}" if found.event else ""
                what += "".join(f", {name} {values[0]:g}" for name, values in piece.signals.items() if values.ndim == 1)
                trained = np.count_nonzero(piece.loss_weights)
                shown.append((f"{len(piece.input_ids)} tokens, {trained} trained{what}", piece))
        return shown

    if config.model.chat_template is not None:
        printer.line(f"chat template: {config.model.chat_template}")
    if data.split_turns is not None:
        printer.line(f"data.split_turns={str(data.split_turns).lower()}: {_TURNS[data.split_turns]}")
    printer.rows(data.train_sources, rows, pieces, keep_columns=False)
    # Bad rows are counted here, whatever the run does with them.
    lenient = data.model_copy(update={"on_bad_row": "skip"})
    batch, shards = config.train.batch_size, count_shards(data, config.train.batch_size)
    length = data.tokens_per_row(encode.bundle_size)
    stream = TrainStream(
        data.train_sources,
        lenient,
        encode,
        rows=batch,
        seed=config.run.seed,
        shards=range(shards),
        num_shards=shards,
        bundle_size=encode.bundle_size,
    )
    if encode.bundle_size == 2:
        shared = _prompts_once(config)
        times = "once" if shared else "twice"
        printer.line(
            f"lengths and steps: a pair's prompt is in a row {times}, as with this model on {jax.default_backend()}"
        )
        if shared:
            stream.share_prefixes()
    with stream:
        if stream.has_streams:
            printer.stream(config, stream)
            return
        lengths = stream.lengths(encode.fingerprint)
        counts = row_counts(lengths)
        printer.lengths(np.concatenate([each.sizes for each in lengths]), "examples")
        counted = [f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items() if count]
        printer.line(f"of all rows: {', '.join(counted) or 'none cut or refused'}")
        printer.warn_of_bad_rows(counts["bad_rows"], data.on_bad_row)
        finite, steps = stream.finite, config.train.steps
        if config.train.epochs is not None:
            stream.end_after(config.train.epochs)
        if config.train.epochs is not None or finite:
            count = stream.count(lengths)
            steps = checked_length(config, count.steps)
            printer.count("the run" if steps == count.steps else "the data", count, batch, length)
            printer.shorter(steps, count.steps)
        else:
            stream.end_after(1)
            printer.count("an epoch", stream.count(lengths), batch, length)
    assert steps is not None
    printer.line(_schedule(config.optimizer, steps))


def _prompts_once(config: RunConfig) -> bool:
    """Whether a run on devices like this one has the prompt of a pair in a row once."""
    readers = [config.model]
    if config.reference is not None and config.reference.path is not None:
        readers.append(reference_section(config.model, config.reference.path))
    mesh = make_mesh(MeshSection(), jax.devices()[:1])
    elsewhere = {"compiler_options": {}}  # may be for devices that this machine lacks
    declared = (declare(section.model_copy(update=elsewhere), mesh, config.mesh.preset) for section in readers)
    return config.mesh.context == 1 and all(each.model.shares_prefixes for each in declared)


def _preview_rl(config: RunConfig, encode: Encoder, printer: _Printer, rows: int) -> None:
    assert config.rl is not None
    limit, data = config.data.max_length - config.rl.max_completion_length, config.data
    sizes: list[int] = []

    def make(number: int, row: Row) -> None:
        sizes.append(len(question_within(encode, limit, row)[0]))

    def prompt(row: Row) -> list[tuple[str, Example]]:
        ids, _ = question_within(encode, limit, row)
        return [(f"{len(ids)} tokens of a prompt", Example(ids, np.zeros(len(ids), np.float32)))]

    printer.rows(data.train_sources, rows, prompt, keep_columns=True)
    lenient = data.model_copy(update={"on_bad_row": "skip"})
    stream = PromptStream(data.train_sources, lenient, make, seed=config.run.seed)
    if stream.has_streams:
        printer.stream(config, stream)
        return
    finite, steps = stream.finite, config.train.steps
    if not finite:
        stream.end_after(config.train.epochs or 1)
    prompts = stream.count()
    printer.lengths(np.array(sizes), "prompts")
    bad = sum(len(Source(section, keep_columns=True)) for section in data.train_sources) - len(sizes)
    printer.warn_of_bad_rows(bad, data.on_bad_row)
    counted = -(-prompts // config.rl.prompts) * config.rl.updates
    what = "the run" if finite or config.train.epochs is not None else "an epoch"
    if what == "the run" and steps is not None and steps < counted:
        what = "the data"
    printer.line(f"{what}: {prompts:,} prompts, {counted:,} steps")
    samples = f"{config.rl.prompts} prompts x {config.rl.generations} samples"
    printer.line(f"  {samples} make {config.rl.updates} steps")
    if config.algorithm.max_refills:
        printer.line("dynamic sampling: further prompts are drawn in place of groups that give no signal")
    elif what != "an epoch":
        steps = checked_length(config, counted)
        printer.shorter(steps, counted)
    if steps is not None:
        printer.line(_schedule(config.optimizer, steps))


class _Printer:
    def __init__(self, console: Console, tokenizer: Any):
        self._console, self._tokenizer = console, tokenizer

    def line(self, text: str) -> None:
        self._console.print(Text(text))

    def stream(self, config: RunConfig, stream: TrainStream | PromptStream[Any]) -> None:
        """What is known of a run on a stream. Raises ValueError where its length is not given."""
        stream.check_length(config.train.steps)
        assert config.train.steps is not None
        self.line("lengths, density and epochs are not known in advance: a source is a stream")
        self.line(_schedule(config.optimizer, config.train.steps))

    def rows(
        self,
        sections: Sequence[SourceSection],
        count: int,
        examples: Callable[[Row], list[tuple[str, Example]]],
        *,
        keep_columns: bool,
    ) -> None:
        """The first `count` rows of every source: what `examples` makes of each, or why it makes nothing."""
        for section in sections:
            source = Source(section, keep_columns=keep_columns)
            name = section.name or source_name(section.path)
            rows = f"{len(source):,} rows" if source.stream is None else "a stream"
            self._console.print(Text(f"{name}: {rows}, weight {section.weight:g}", style="bold"))
            if source.files != [section.path]:
                shown = [*source.files[:_FILES], *(["..."] if len(source.files) > _FILES else [])]
                for line in [f"{len(source.files):,} files:", *shown] if source.files else []:
                    self.line(f"  {line}")
            for row in itertools.islice(source.indices(), count):
                try:
                    self._row(source, row, examples)
                except StreamEndError:
                    break

    def _row(self, source: Source, row: int, examples: Callable[[Row], list[tuple[str, Example]]]) -> None:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                shown = source.make(row, examples)
            except DataError as error:
                self._console.print(Text(f"\nrefused: {error}", style="red"))
                return
        for title, example in shown:
            self._console.print(Text(f"\n{source.place(row)}: {title}", style="bold"))
            if len(example.loss_weights):
                self._console.print(self._tokens(example))
        for warning in said:
            self._console.print(Text(f"warning: {warning.message}", style="yellow"))

    def _tokens(self, example: Example) -> Text:
        """The tokens, runs of equal weight in turn."""
        text = Text()
        for run, weight in runs_of_weight(np.asarray(example.loss_weights)):
            mark = "" if weight in (0, 1) else f"{weight:g}: "
            pieces = self._pieces(example.input_ids[run].tolist())
            if not self._console.is_terminal:
                text.append(f"{_OPEN}{mark}{''.join(pieces)}{_CLOSE}" if weight else "".join(pieces))
                continue
            text.append(mark, style="magenta")
            styles = _TRAINED if weight else _OTHER
            for number, piece in enumerate(pieces):
                text.append(piece, style=styles[number % 2])
        return text

    def _pieces(self, ids: list[int]) -> list[str]:
        """The text of each token, or of all where tokens hold parts of a character."""
        if self._tokenizer is None:
            return [f"{token} " for token in ids]
        text = self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        pieces = [self._tokenizer.decode([token], clean_up_tokenization_spaces=False) for token in ids]
        return pieces if "".join(pieces) == text else [text]

    def lengths(self, sizes: np.ndarray, what: str) -> None:
        """A histogram."""
        if not len(sizes):
            return
        low, median, high, largest = (int(np.quantile(sizes, q, method="nearest")) for q in (0, 0.5, 0.99, 1))
        self.line(f"\n{len(sizes):,} {what} of {low} to {largest} tokens")
        self.line(f"  mean {sizes.mean():.0f}, median {median}, 99% up to {high}")
        width = -(-(largest + 1 - low) // _BARS)
        counts = np.bincount((sizes - low) // width)
        for start, count in zip(range(low, largest + 1, width), counts.tolist(), strict=True):
            bar = "#" * math.ceil(_WIDTH * count / counts.max())
            self.line(f"{start:>8,}-{start + width - 1:<8,} {count:>10,} {bar}")

    def shorter(self, steps: int, counted: int) -> None:
        """That a run takes fewer steps than its data makes."""
        if steps < counted:
            self.line(f"the run: {steps:,} of these {counted:,} steps (train.steps)")

    def warn_of_bad_rows(self, bad: int, on_bad_row: str) -> None:
        if bad and on_bad_row == "error":
            self._console.print(
                Text(
                    f"{bad:,} rows are refused: the run ends at the first (data.on_bad_row=skip leaves them out)", "red"
                )
            )

    def count(self, what: str, count: Count, rows: int, length: int) -> None:
        tokens = count.totals["tokens"]
        self.line(f"{what}: {count.totals['rows']:,} rows, {count.totals['examples']:,} examples, {tokens:,} tokens")
        self.line(
            f"  packed to {count.density:.0%}: {count.steps:,} steps of {rows} x {length} tokens, "
            f"{tokens // max(count.steps, 1):,} of them not padding"
        )


def _schedule(section: OptimizerSection, steps: int) -> str:
    """How the learning rate goes, in words."""
    section = section.for_steps(steps)
    known = ":" not in section.schedule
    share = 1.0 if section.schedule == "constant" else section.final_learning_rate
    end = f", {share * section.learning_rate:g} at the end, step {steps:,}" if known else f" over {steps:,} steps"
    warm = f" after {section.warmup_steps:,} steps of warm-up" if section.warmup_steps else ""
    return f"learning rate: {section.schedule}, {section.learning_rate:g}{warm}{end}"
