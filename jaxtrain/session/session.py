"""`Session`: one open run. Its roles, data, folder, checkpoints, metrics and signals are the same for every recipe.

    with Session.open(config) as session:
        policy = session.trained_role("policy", SFT())
        batches = session.training_data(policy)
        session.restore(policy, data=batches)
        for batch in session.steps(batches):
            session.report(policy=policy.update(batch))

All methods are called on the main thread, in the order of the loop, and in the same order on every host.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from typing import Any, NamedTuple, TypeVar

import jax

from jaxtrain.config import RunConfig, config_tree
from jaxtrain.data.fingerprints import tokenizer_fingerprint
from jaxtrain.data.formats import Encoder
from jaxtrain.data.pipeline import TrainStream
from jaxtrain.observe.environment import environment
from jaxtrain.observe.logs import RunLog
from jaxtrain.observe.metrics import MetricLog
from jaxtrain.observe.profile import StepProfile
from jaxtrain.observe.progress import Progress
from jaxtrain.observe.report_page import ReportPage
from jaxtrain.observe.trackers import TENSORBOARD, check_trackers, open_trackers
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.roles.role import Role, TrainedRole, shares_prefixes
from jaxtrain.roles.tokenizer import make_tokenizer, stop_ids
from jaxtrain.session.actions import Scheduled, actions_by_name, callback_name, load_callback, mark_done, run_once
from jaxtrain.session.best import BestEvaluation
from jaxtrain.session.data import Resumable, data_metrics, open_stream, run_length, warn_of_positions
from jaxtrain.session.ending import end_facts, trained_text, warn_of_early_end
from jaxtrain.session.first_rows import write_first_rows
from jaxtrain.session.folder import RunFolder, open_run
from jaxtrain.session.monitor import RunMonitor
from jaxtrain.session.report import MetricWindow
from jaxtrain.session.roles import RunRoles
from jaxtrain.session.startup import RunLength, start_facts
from jaxtrain.train.agree import gather_values
from jaxtrain.train.guard import FiniteChecks, warn_of_recompilation
from jaxtrain.train.job import Job
from jaxtrain.train.lockstep import Agreement, in_step
from jaxtrain.train.preemption import Interrupted, Preemption, exit_code
from jaxtrain.train.state import saved_tree
from jaxtrain.train.step import StepReport
from jaxtrain.types import Batch, TrainState

log = logging.getLogger(__name__)

MetricValues = dict[str, float]
T = TypeVar("T")


class Outcome(NamedTuple):
    exit_code: int  # 0, or 128 + the number of the signal that ended the run
    metrics: MetricValues  # the last value of each metric


class _CompletedError(Exception):
    """The run was already complete when it was opened. Ends the `with` block of `Session.open`."""


class Session(RunRoles):
    """One open run: its roles, data, folder, checkpoints, metrics and signals. Open it with `Session.open`."""

    def __init__(self, folder: RunFolder, mesh: jax.sharding.Mesh, job: Job, stack: ExitStack, log: RunLog):
        config = folder.config  # with what the run has settled, such as its date
        super().__init__(config, mesh, jax.devices())
        check_trackers(config.log.to)
        self.folder, self.preemption = folder, job.preemption
        self.tokenizer = make_tokenizer(config.model)
        self._stack = stack  # closed with the run
        self._monitor = RunMonitor(folder.path, job.watchdog)
        wall, self._log_file = self._monitor.wall, log
        self.progress = stack.enter_context(Progress(activity=self._monitor.activity, record=log.line))
        self._checkpoints = stack.enter_context(folder.checkpoints())
        stack.enter_context(job.reporting())  # left first
        self.step = self._signal = 0  # dispatched steps of the first role; the signal that ended the run
        self.metrics: MetricValues = {}
        self._agreement = Agreement(job.preemption, mesh, self._checkpoints.overdue, job.watchdog)
        self._roles: tuple[TrainedRole, ...] = ()
        self._data: Any = None  # a `Resumable`, from `restore` on
        self._started = self._save_now = False  # the latter: since `checkpoint.minutes` have passed
        self._row_length: int | None = None  # of `training_data`
        # The latter by the checkpoint: the last steps of the evaluation and of the functions of `every`, by name.
        self._start, self._num_tokens, self._done_at = 0, 0, dict[str, int]()
        self._reports: dict[str, StepReport] = {}
        self._finite = FiniteChecks(config.train.max_skipped_in_a_row, folder.path / "inspection", job.watchdog)
        self._best = BestEvaluation(config.eval.best)
        self._evaluators: dict[str, Callable[[], MetricValues]] = {}
        self._every: list[Scheduled] = []
        for callback in config.callbacks:
            self.every(callback.every, load_callback(callback))
        # The order of `_actions` makes a resumed run log the same as an uninterrupted one.
        self._report_action = Scheduled("report", self._report_is_due, self._report)
        evaluate, save = wall.during("evaluating", self._evaluate), wall.during("saving", self._save)
        self._evaluate_action = Scheduled("evaluation", lambda step: step % config.eval.every == 0, evaluate)
        self._save_action = Scheduled("save", lambda step: self._is_saved(step) or step == self._best.step, save)

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
        """Open the run that `config` describes, in `run.dir`.

        An existing run is resumed from its newest checkpoint unless `resume` is False. When the block ends without an
        exception, the final actions run: report, evaluate, save. A signal saves the last completed step and ends the
        block.

        `allow_change`: keys that may differ from the run's config although that changes its numbers.
        `preemption`: an active one, so that signals are handled from the start of the process.
        `devices`: called after all processes have joined; returns the devices to train on.

        Raises ValueError for a config, data or a checkpoint that cannot be used, NonFiniteError if training diverges,
        Interrupted if a signal arrives before the first step.
        """
        config.check_length()
        with ExitStack() as stack:
            log = stack.enter_context(RunLog())
            job = stack.enter_context(Job(stack.enter_context(preemption or Preemption()), config.distributed))
            folder = stack.enter_context(open_run(config, resume=resume, allow_change=allow_change))
            session = cls(folder, make_mesh(config.mesh, devices()), job, stack.enter_context(ExitStack()), log)
            try:
                yield session
                session._finish()
            except _CompletedError:
                return
            except Interrupted:
                if session.step == session._start:
                    raise
                session._signal = max(gather_values(session._agreement.signal()))
                session._finish()
            if not session._signal:
                session._stack.close()
                if session._started:
                    folder.finish(session.num_steps, session._early_end)

    def encoder(self, role: Role) -> Encoder:
        """The encoder of data rows to examples for `role`."""
        return Encoder.configured(self.tokenizer, self.config.data, vocab_size=role.model.config.vocab_size)

    def stop_ids(self, role: Role) -> list[int]:
        """Tokens that end an answer of `role`."""
        return stop_ids(role.section, role.declared.hf, self.tokenizer)

    def training_data(
        self, role: Role, encode: Callable[[Any], Any] | None = None, bundle_size: int = 1, other: Role | None = None
    ) -> TrainStream:
        """This host's part of `data.train`, packed.

        `encode` makes a row's example (default: `encoder(role)`), or a bundle of `bundle_size` examples that the
        objective reads together. `other` reads the batches too. The prompt of a pair is in a row once, if
        `Model.shares_prefixes` of both. Where the data ends by itself, its steps are counted here: `num_steps`.

        Raises ValueError if the rows of a microbatch cannot be divided over the devices, or the data ends before
        `train.steps`.
        """
        encode = encode or self.encoder(role)
        self._row_length = self.config.data.tokens_per_row(bundle_size)
        stream = self.enter(closing(open_stream(self.config, self.mesh, encode, bundle_size)))
        if shares_prefixes(bundle_size, role, other):
            stream.share_prefixes()
        self.num_steps = run_length(self.config, stream, encode)
        return stream

    def enter(self, manager: AbstractContextManager[T]) -> T:
        """Enter a context manager that exits with the run, after its final actions."""
        return self._stack.enter_context(manager)

    def saved_steps(self) -> list[int]:
        """The steps that have a checkpoint."""
        return self._checkpoints.steps()

    def evaluator(self, name: str, evaluate: Callable[[], MetricValues] | None) -> None:
        """Call `evaluate` every `eval.every` steps and log its metrics. `name` must be unique; None is ignored."""
        assert name not in self._evaluators, f"two evaluators are named {name}"
        if evaluate is not None:
            self._evaluators[name] = evaluate

    def every(self, steps: int, function: Callable[[Session], None]) -> None:
        """Call `function(session)` after every `steps` steps, and after the last one."""
        call = self._monitor.wall.during("other", lambda: function(self))
        self._every.append(Scheduled(callback_name(function), lambda step: step % steps == 0, call))

    def restore(self, *roles: TrainedRole, data: Resumable) -> None:
        """Load all trained roles and the data's state from one checkpoint, or start at step 0.

        Uses the newest intact checkpoint and reports damaged ones. `step` counts the updates of the first role, whose
        parameters are also those of an export.
        """
        self._roles, self._data = roles, data
        warn_of_positions(roles[0].declared.hf, self.config.data.max_length)
        restored = self._checkpoints.restore(saved_tree({role.name: role.abstract_state() for role in roles}))
        if restored is None:
            for role in roles:
                role.load()
        else:
            self.folder.check_meta(restored.meta, self.tokenizer)
            first, *others = roles
            first.load(TrainState(**{name: restored.state[name] for name in TrainState._fields}))
            for role in others:
                role.load(restored.state[role.name])
            data.set_state(restored.data_state)
            self._num_tokens = restored.meta["num_tokens"]
            self._done_at = restored.meta.get("done_at", {})  # earlier versions did not save it
            self._best.restore(restored.meta.get("best"))
            self._monitor.carry_over(restored.meta.get("wall_time"), restored.step)
        self.step = self._start = roles[0].step
        pending = any(self._done_at.get(name, self.step) < self.step for name in self._repeatable)
        if self.folder.finished(self.step, self.num_steps, pending=pending):
            raise _CompletedError

    def begin(self) -> None:
        """Write the config and open the metrics. `steps` calls it; further calls do nothing."""
        if self._started:
            return
        self._started = True
        self.folder.start(self.step)
        config, stack = self.config, self._stack
        self._log_file.begin(self.folder.path, jax.process_index(), environment())
        self.window = MetricWindow(self._roles[0].model, self._num_tokens, config.rl.updates if config.rl else None)
        mark_done(self._actions, self.step, self._done_at)
        evaluated = self._evaluate_action.done_at == self.step
        shown, first = config.log.to, jax.process_index() == 0
        trackers = open_trackers(shown, self.folder.path, config_tree(config)) if first else []
        board = TENSORBOARD in shown
        log = MetricLog(self.folder.path, board, self.step or None, evaluated=evaluated, trackers=trackers)
        self._log = stack.enter_context(log)
        self.progress.begin(self.num_steps, self.step)
        if first:
            length = RunLength(self.step, self.num_steps, self._row_length)
            self.progress.facts(start_facts(config, self._roles, self._data, length))
        self._profile = stack.enter_context(StepProfile(self.folder.path, config.log.profile, self.window.wait))
        self._page = ReportPage(self.folder.path) if first else None
        if self._page is not None:
            stack.callback(self._page.write)  # after the last heartbeat, which records how the run ended
        stack.enter_context(self._monitor.running(self.step, self.num_steps))
        run_once((each for each in self._repeatable.values() if each.due(self.step)), self.step)  # after a signal

    @property
    def ended(self) -> bool:
        """Whether the run has taken its last step."""
        return bool(self._signal) or self.step >= self.num_steps or self._best.ends_run

    def steps(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield placed batches, one per optimizer step, until `num_steps`, the end of `batches` or a signal.

        After each step the due actions run. The host dispatches one step before the device has completed the previous
        one: a step's report is checked after the next step was dispatched. With several hosts, a host whose data is
        exhausted adds batches of padding until the data of all is exhausted.
        """
        self.begin()
        wall, iterator = self._monitor.wall, in_step(batches, self._agreement)
        while not self.ended:
            wall.become("waiting")
            batch = next(iterator, None)
            wall.become("steps")
            if batch is None:
                return
            self._finite.recent.append(batch)
            self._profile.before(self.step + 1)
            if self.step == 0:
                write_first_rows(self.folder.path, batch, self._roles[0].tokenizer)
            started = time.perf_counter()
            yield self._roles[0].place(batch)
            self._after_step(batch, time.perf_counter() - started)

    def sampling(self) -> AbstractContextManager[None]:
        """A context in which samples are drawn, or waited for: the progress shows it."""
        return self._monitor.wall.sampling()

    def report(self, **reports: StepReport | None) -> None:
        """Pass on the reports of a step, by role name. None is ignored."""
        self._reports = {name: report for name, report in reports.items() if report is not None}

    def record(self, metrics: Mapping[str, float]) -> None:
        """Add metrics, whose means are in the next line of metrics.jsonl."""
        self.window.record(metrics)

    def check(self) -> None:
        """Raise Interrupted if the run was asked to stop.

        For long work between two steps, such as an evaluation. All hosts must call it the same number of times.
        """
        self._agreement.check()

    def _after_step(self, batch: Batch, seconds: float) -> None:
        self.step += 1
        self._monitor.stepped(self.step)
        self._agreement.started()
        if self.step == self._start + 2:
            warn_of_recompilation(self._roles[0].compilations(), batch)
        self._finite.check()
        self._finite.stepped(self.step, self._reports)
        self.window.add(self._reports, batch, seconds)
        self._profile.after(self.step)
        self.progress.update(self.step)
        self._signal, self._save_now = self._agreement.stopping(), self._agreement.saving()
        if not self._signal:
            # The last step is saved by `_finish`, after all other actions: a complete run is not resumed.
            actions = self._actions if self.step < self.num_steps else self._actions[:-1]
            run_once((action for action in actions if action.due(self.step)), self.step)

    def _finish(self) -> None:
        """Run the final actions: all of them if the run is complete, report and save after a signal."""
        if not self._started:
            return
        self._finite.check()
        run_once([self._report_action, self._save_action] if self._signal else self._actions, self.step)
        if self._signal:
            with self._monitor.wall.spent("saving"):
                self._checkpoints.wait()
            self._monitor.end = "stopped"
            self.progress.print(f"{signal.Signals(self._signal).name}: stopped after step {self.step}, which was saved")
        else:
            warn_of_early_end(self.step, self.num_steps, self.metrics, self._early_end)
            self.progress.facts([("finished", trained_text(self.step, self.num_steps, self.metrics))])
            self._checkpoints.wait()  # so that the newest one is named
            if jax.process_index() == 0:
                seconds = self._monitor.wall.seconds()
                ended = end_facts(self.config, self.folder.path, seconds, self.saved_steps(), self._best.step)
                self.progress.facts(ended)

    @property
    def _early_end(self) -> str:  # why a run that was not stopped ends before its last step
        return self._best.reason if self._best.ends_run else "the data was exhausted"

    @property
    def _repeatable(self) -> dict[str, Scheduled]:  # after a signal they may be due again at the step of the checkpoint
        return actions_by_name((self._evaluate_action, *self._every))

    @property
    def _actions(self) -> list[Scheduled]:
        return [self._report_action, self._evaluate_action, *self._every, self._save_action]

    def _report_is_due(self, step: int) -> bool:
        return step % self.config.log.every == 0 or step == 1 or self._is_saved(step)

    def _is_saved(self, step: int) -> bool:
        return self._checkpoints.due(step) or self._save_now

    def _report(self) -> None:
        with self._agreement.watchdog.waits(f"the report of step {self.step}"):
            metrics = self.window.close()
        metrics |= self._monitor.metrics()
        if isinstance(self._data, TrainStream):
            metrics |= data_metrics(self._data, is_last=self.step >= self.num_steps)
        self._log.log(self.step, metrics)
        if self._page is not None:
            self._page.update()
        self.progress.update(self.step, metrics)
        self.metrics |= metrics

    def _evaluate(self) -> None:
        if not self._evaluators:
            return
        with self.window.paused():
            metrics = {key: value for run in self._evaluators.values() for key, value in run().items()}
            self._log.log(self.step, metrics)
            self.progress.values(f"step {self.step}", metrics)
            self.metrics |= metrics
            self._best.update(self.step, metrics)

    def _save(self) -> None:
        """Save a checkpoint, without frozen weights: they are read, or initialized, again."""
        run_once([self._report_action], self.step)  # not due at the best step: a resumed run knows no steps before it
        self._checkpoints.wait()  # so that `saved_steps` includes the previous one
        data_state = self._data.get_state()  # may write files, as recipe rl does
        self.folder.publish()  # before the checkpoint: a resumed run has the metrics of all steps before it
        meta = {
            "num_tokens": self.window.num_tokens,
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "done_at": {name: action.done_at for name, action in self._repeatable.items()},
            "best": self._best.state(),
            "wall_time": self._monitor.wall.seconds(),
            **self.folder.meta(),
        }
        tree = saved_tree({role.name: role.state for role in self._roles})
        self._checkpoints.kept[:] = [] if self._best.step is None else [self._best.step]
        self._checkpoints.save(self.step, tree, data_state, meta)

    @property
    def outcome(self) -> Outcome:
        return Outcome(exit_code(self._signal) if self._signal else 0, self.metrics)
