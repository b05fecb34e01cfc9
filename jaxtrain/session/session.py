"""`Session`: one open run. Its roles, data, folder, checkpoints, metrics and signals are the same for every recipe.

    with Session.open(config) as session:
        policy = session.trained_role("policy", SFT())
        batches = session.training_data(policy)
        session.restore(policy, data=batches)
        for batch in session.steps(batches):
            session.report(policy=policy.update(batch))

Everything here runs on the main thread, in the order of the loop, and equally on every host.
"""

from __future__ import annotations

import logging
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import jax

from jaxtrain.config import ModelSection, OptimizerSection, RunConfig
from jaxtrain.data.formats import Encoder
from jaxtrain.data.pipeline import TrainStream, count_shards
from jaxtrain.objectives.objective import Objective
from jaxtrain.observe.metrics import MetricLog
from jaxtrain.observe.progress import Progress
from jaxtrain.optim import make_optimizer, make_schedule
from jaxtrain.parallel.batches import check_batch_size, local_shards
from jaxtrain.parallel.mesh import initialize_distributed, make_mesh
from jaxtrain.roles.declare import declare
from jaxtrain.roles.role import Role, TrainedRole, Update
from jaxtrain.roles.tokenizer import fingerprint, make_tokenizer, stop_ids
from jaxtrain.roles.torch_model import TorchModel
from jaxtrain.session.folder import RunFolder, open_run
from jaxtrain.session.record import CHECKPOINTS
from jaxtrain.session.report import MetricWindow
from jaxtrain.train.checkpoint import Checkpoints
from jaxtrain.train.guard import check_finite, warn_of_recompilation
from jaxtrain.train.lockstep import Agreement, Lockstep
from jaxtrain.train.preemption import Interrupted, Preemption, exit_code
from jaxtrain.train.step import StepReport
from jaxtrain.types import Batch, TrainState

log = logging.getLogger(__name__)

Metrics = dict[str, float]
T = TypeVar("T")


class Resumable(Protocol):
    """What a run reads its batches from: its state is saved with every checkpoint."""

    def get_state(self) -> dict[str, Any]:
        """JSON-able: where to go on after the last batch handed out."""
        ...

    def set_state(self, state: dict[str, Any]) -> None: ...


class Outcome(NamedTuple):
    exit_code: int  # 0; 128 + the signal's number where a signal ended the run after a last checkpoint
    metrics: Metrics  # the last value of each


@dataclass
class _Scheduled:
    """An action that is due every so many steps, and once more at the end of the run."""

    due: Callable[[int], bool]
    run: Callable[[], None]
    done_at: int = 0  # the last step after which it ran


class _FinishedError(Exception):
    """The run was finished before: nothing is left to train. Ends the `with` block of `Session.open`."""


class Session:
    """One open run: its roles, data, folder, checkpoints, metrics and signals. Open it with `Session.open`."""

    def __init__(
        self, config: RunConfig, mesh: jax.sharding.Mesh, folder: RunFolder, preemption: Preemption, stack: ExitStack
    ):
        self.config, self.mesh, self.folder, self.preemption = config, mesh, folder, preemption
        self.tokenizer = make_tokenizer(config.model)
        self._stack = stack  # what is closed with the run
        checkpoints = Checkpoints(str(folder.path / CHECKPOINTS), config.checkpoint.every, config.checkpoint.keep)
        self._checkpoints = stack.enter_context(checkpoints)
        self.step = 0  # optimizer steps of the first role that were dispatched
        self.metrics: Metrics = {}
        self._agreement = Agreement(preemption, mesh)
        self._signal = 0  # that asked the run to end
        self._roles: tuple[TrainedRole, ...] = ()
        self._data: Resumable | None = None
        self._begun = False
        self._start, self._num_tokens, self._evaluated_at = 0, 0, 0
        self._recent: deque[Batch] = deque(maxlen=config.train.max_skipped_in_a_row + 1)
        self._reports: dict[str, StepReport] = {}
        self._unchecked: tuple[int, Mapping[str, StepReport]] | None = None
        self._evaluators: dict[str, Callable[[], Metrics]] = {}
        self._every: list[_Scheduled] = []
        # In this order, so that a resumed run logs what the uninterrupted one would have.
        self._report_action = _Scheduled(self._report_is_due, self._report)
        self._evaluate_action = _Scheduled(lambda step: step % config.eval.every == 0, self._evaluate)
        self._save_action = _Scheduled(lambda step: self._checkpoints.due(step), self._save)

    @classmethod
    @contextmanager
    def open(
        cls,
        config: RunConfig,
        *,
        resume: bool = True,
        allow_change: Sequence[str] = (),
        preemption: Preemption | None = None,
        devices: Callable[[], Sequence[Any]] = jax.devices,
    ) -> Iterator[Session]:
        """The run that `config` describes, in `run.dir`.

        A run that is there already goes on from its newest checkpoint unless `resume` is False. On leaving without an
        exception, what is due at the end of a run is done: report, evaluate, save. A signal saves the last finished
        step and ends the `with` block.

        `allow_change`: keys that may differ from the config that the run began with, though that changes its numbers.
        `preemption`: one that is in force already, so that signals are handled from the start of the process on.
        `devices`: called once the processes have joined, for those to train on.

        Raises ValueError for a config, data or a checkpoint that cannot be used; NonFiniteError where training
        diverges; Interrupted where a signal asks to stop before the first step.
        """
        with ExitStack() as stack:
            requests = stack.enter_context(preemption or Preemption())
            initialize_distributed()
            folder = stack.enter_context(open_run(config, resume=resume, allow_change=allow_change))
            session = cls(config, make_mesh(config.mesh, devices()), folder, requests, stack.enter_context(ExitStack()))
            try:
                yield session
                session._finish()
            except _FinishedError:
                return
            except Interrupted:
                if session.step == session._start:
                    raise
                session._signal = session._agreement.signal()
                session._finish()
            if not session._signal:
                session._stack.close()
                folder.finish()

    # Declaring

    def trained_role(
        self,
        name: str,
        objective: Objective,
        *,
        model: ModelSection | None = None,
        optimizer: OptimizerSection | None = None,
    ) -> TrainedRole:
        """A role that is trained by `objective`; `model` and `optimizer` default to the config's sections."""
        section, optimizer = model or self.config.model, optimizer or self.config.optimizer
        declared = declare(section, self.mesh, self.config.mesh.preset)
        if isinstance(declared.model, TorchModel) and (self.config.recipe != "sft" or self.config.eval.generate):
            raise ValueError("model.backend=torchax has no decoding: only recipe sft without eval.generate runs on it")
        schedule = make_schedule(optimizer, self.config.train.steps)
        tx = make_optimizer(optimizer, schedule, declared.trained_axes)
        update = Update(objective, tx, schedule, self.config.train)
        return TrainedRole(name, section, declared, self.config.run.seed, update)

    def role(self, name: str, model: ModelSection) -> Role:
        """A role whose parameters stay as they are read."""
        return Role(name, model, declare(model, self.mesh, self.config.mesh.preset), self.config.run.seed)

    def encoder(self, role: Role) -> Encoder:
        """Rows of data -> examples for `role`."""
        data = self.config.data
        return Encoder(
            self.tokenizer,
            loss_on=data.loss_on,
            prompt_format=data.prompt_format,
            vocab_size=role.model.config.vocab_size,
        )

    def stop_ids(self, role: Role) -> list[int]:
        """Tokens that end an answer of `role`."""
        return stop_ids(role.section, role.declared.hf, self.tokenizer)

    def training_data(
        self, role: Role, encode: Callable[[Any], Any] | None = None, bundle_size: int = 1
    ) -> TrainStream:
        """This host's part of `data.train`, packed.

        `encode` makes a row's example (default: `encoder(role)`), or a bundle of `bundle_size` examples that the
        objective reads together.

        Raises ValueError where the rows of a microbatch cannot be dealt to the devices.
        """
        config, rows = self.config, self.config.train.batch_size
        check_batch_size(rows, config.train.microbatches, self.mesh)
        shards = count_shards(config.data, rows)
        stream = TrainStream(
            config.data.train_sources,
            config.data,
            encode or self.encoder(role),
            rows=rows,
            seed=config.run.seed,
            shards=local_shards(self.mesh, rows, shards),
            num_shards=shards,
            bundle_size=bundle_size,
        )
        return self.enter(closing(stream))

    def enter(self, manager: AbstractContextManager[T]) -> T:
        """Enter a context manager that is left with the run, after what is due at the end of the run."""
        return self._stack.enter_context(manager)

    def saved_steps(self) -> list[int]:
        """The steps that have a checkpoint."""
        return self._checkpoints.steps()

    def evaluator(self, name: str, evaluate: Callable[[], Metrics] | None) -> None:
        """Call `evaluate` every `eval.every` steps and log what it returns. `name` is unique; None: there is none."""
        assert name not in self._evaluators, f"two evaluators are named {name}"
        if evaluate is not None:
            self._evaluators[name] = evaluate

    def every(self, steps: int, function: Callable[[Session], None]) -> None:
        """Call `function(session)` after every `steps` steps, and after the last one."""
        self._every.append(_Scheduled(lambda step: step % steps == 0, lambda: function(self)))

    # Restoring

    def restore(self, *roles: TrainedRole, data: Resumable) -> None:
        """Load all trained roles and the data's state from one checkpoint, or begin at step 0.

        The newest intact checkpoint is taken; damaged ones are reported and passed over. The first role is the one
        whose steps are counted, and whose parameters an export reads.
        """
        self._roles, self._data = roles, data
        restored = self._checkpoints.restore(_tree({role.name: role.abstract_state() for role in roles}))
        if restored is None:
            for role in roles:
                role.load()
        else:
            self.folder.check_tokenizer(restored.meta, self.tokenizer)
            first, *others = roles
            first.load(TrainState(**{name: restored.state[name] for name in TrainState._fields}))
            for role in others:
                role.load(restored.state[role.name])
            data.set_state(restored.data_state)
            self._num_tokens = restored.meta["num_tokens"]
            self._evaluated_at = restored.meta["evaluated_at"]
        self.step = self._start = roles[0].step
        if self.folder.finished(self.step):
            raise _FinishedError
        for action in self._actions:
            action.done_at = self.step

    def begin(self) -> None:
        """Take the folder into use: write the config, open the metrics. `steps` calls it; later calls do nothing."""
        if self._begun:
            return
        self._begun = True
        self.folder.start(self.step)
        updates = None if self.config.rl is None else self.config.rl.updates
        self.window = MetricWindow(self._roles[0].model, self._num_tokens, updates)
        log = MetricLog(self.config.run.dir, self.config.log.tensorboard, self.step or None)
        self._log = self._stack.enter_context(log)
        self.progress = self._stack.enter_context(Progress(self.config.train.steps, self.step))
        if self._evaluate_action.due(self.step) and self._evaluated_at < self.step:
            self._evaluate()  # a signal interrupted the evaluation after this step

    # The loop

    @property
    def ended(self) -> bool:
        """Whether the run takes no further step."""
        return bool(self._signal) or self.step >= self.config.train.steps

    def steps(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Placed batches, one per optimizer step, until `train.steps` are taken, `batches` end or a signal arrives.

        After each step, what is due is done. The host runs one step ahead of the device: a step's report is checked
        once the next step has been dispatched. Of several hosts, one whose data is exhausted adds batches of padding
        until all are.
        """
        self.begin()
        iterator = Lockstep(batches, self._agreement) if isinstance(batches, TrainStream) else iter(batches)
        while not self.ended and (batch := next(iterator, None)) is not None:
            self._recent.append(batch)
            started = time.perf_counter()
            yield self._roles[0].place(batch)
            self._after_step(batch, time.perf_counter() - started)
        if not self.ended and isinstance(batches, TrainStream):
            log.warning("the training data is exhausted after step %d of %d", self.step, self.config.train.steps)

    def report(self, **reports: StepReport | None) -> None:
        """The reports of a step, by the role's name; None: the run has no such role."""
        self._reports = {name: report for name, report in reports.items() if report is not None}

    def record(self, metrics: Mapping[str, float]) -> None:
        """Metrics that the next line of metrics.jsonl has the mean of."""
        self.window.record(metrics)

    def check(self) -> None:
        """Raise Interrupted where the run was asked to stop.

        For long work between two steps, such as an evaluation; called equally often on all hosts.
        """
        self._agreement.check()

    def _after_step(self, batch: Batch, seconds: float) -> None:
        self.step += 1
        self._agreement.started()
        if self.step == self._start + 2:
            warn_of_recompilation(self._roles[0].compilations(), batch)
        self._check_finite()
        self._unchecked = (self.step, self._reports)
        self.window.add(self._reports, batch, seconds)
        self.progress.update(self.step)
        self._signal = self._agreement.stopping()
        if not self._signal:
            self._run(action for action in self._actions if action.due(self.step))

    def _check_finite(self) -> None:
        """Raise NonFiniteError where too many steps in a row, up to the one before, had no finite update."""
        if self._unchecked is None:
            return
        (step, reports), self._unchecked = self._unchecked, None
        limit = self.config.train.max_skipped_in_a_row
        for name, report in reports.items():
            check_finite(report, self._recent, limit, step, self.folder.path / "inspection", name)

    def _finish(self) -> None:
        """What is due at the end: all actions where the run ended by itself, report and save after a signal."""
        if not self._begun:
            return
        self._check_finite()
        self._run((self._report_action, self._save_action) if self._signal else self._actions)
        if self._signal:
            self._checkpoints.wait()
            name = signal.Signals(self._signal).name
            self.progress.print(f"{name}: stopped after step {self.step}, which is saved")

    @property
    def _actions(self) -> list[_Scheduled]:
        return [self._report_action, self._evaluate_action, *self._every, self._save_action]

    def _run(self, actions: Iterable[_Scheduled]) -> None:
        for action in actions:
            if action.done_at < self.step:
                action.run()
                action.done_at = self.step

    def _report_is_due(self, step: int) -> bool:
        return step % self.config.log.every == 0 or step == 1 or self._checkpoints.due(step)

    def _report(self) -> None:
        metrics = self.window.close()
        self._log.log(self.step, metrics)
        self.progress.update(self.step, metrics)
        self.metrics |= metrics

    def _evaluate(self) -> None:
        if not self._evaluators:
            return
        with self.window.paused():
            metrics = {key: value for run in self._evaluators.values() for key, value in run().items()}
            self._log.log(self.step, metrics)
            self.progress.print(f"step {self.step}  " + "  ".join(f"{k} {v:.4f}" for k, v in metrics.items()))
            self.metrics |= metrics

    def _save(self) -> None:
        """Frozen weights are left out of a checkpoint: they are read, or drawn, again."""
        assert self._data is not None
        self._checkpoints.wait()  # so that `saved_steps` has the one before
        meta = {
            "num_tokens": self.window.num_tokens,
            "tokenizer": fingerprint(self.tokenizer),
            "evaluated_at": self._evaluate_action.done_at,
            **self.folder.meta(),
        }
        tree = _tree({role.name: role.state for role in self._roles})
        self._checkpoints.save(self.step, tree, self._data.get_state(), meta)

    @property
    def outcome(self) -> Outcome:
        return Outcome(exit_code(self._signal) if self._signal else 0, self.metrics)


def _tree(states: Mapping[str, TrainState]) -> dict[str, Any]:
    """The first role's leaves without a prefix, as an export reads them; the others' under their names."""
    first, *others = states
    return {**states[first]._asdict(), **{name: states[name] for name in others}}
