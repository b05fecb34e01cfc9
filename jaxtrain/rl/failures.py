"""Samples without a reward: logs each kind of failure once, and ends a run whose rewards fail repeatedly."""

import logging
import threading
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from jaxtrain.rl.rollouts import LOST_REWARD, Trajectory

log = logging.getLogger(__name__)

MAX_LOST_STEPS = 3  # consecutive rollouts without a usable reward, after which a run ends
_REASONS_SHOWN = 3


class FailureLog:
    """Logs a kind of failure when it first occurs, with the number of affected samples; metrics count the others.

    A reason is "what: ExceptionType: message"; its kind is the part before the message. Thread-safe.
    """

    def __init__(self) -> None:
        self._logged: set[str] = set()
        self._lock = threading.Lock()

    def report(self, reasons: Iterable[str], total: int) -> None:
        """`reasons`: one for each lost sample among `total`."""
        examples: dict[str, str] = {}
        counts: Counter[str] = Counter()
        for reason in reasons:
            kind = ":".join(reason.split(":")[:2])
            examples.setdefault(kind, reason)
            counts[kind] += 1
        for kind, example in examples.items():
            with self._lock:
                known = kind in self._logged
                self._logged.add(kind)
            if not known:
                log.warning(
                    "lost the reward of %d of %d samples (more of this kind are only counted in the metrics): %s",
                    counts[kind],
                    total,
                    example,
                )


class LostRewardGuard:
    """Raises ValueError after `MAX_LOST_STEPS` consecutive rollouts without a usable reward."""

    def __init__(self, samples_needed: int):
        """`samples_needed`: rewards that a group needs for an advantage, 2 if it is relative to the group."""
        self._samples_needed = samples_needed
        self._lost_in_a_row = 0

    def check(self, trajectories: Sequence[Trajectory]) -> bool:
        """Whether no group of this rollout has enough rewards because some were lost."""
        known = Counter(t.prompt.number for t in trajectories if np.isfinite(t.reward))
        if any(count >= self._samples_needed for count in known.values()):
            self._lost_in_a_row = 0
            return False
        reasons = Counter(str(t.info.get(LOST_REWARD, "unknown")) for t in trajectories if not np.isfinite(t.reward))
        if not reasons:
            return False  # no reward was lost: the groups themselves are too small
        self._lost_in_a_row += 1
        shown = "; ".join(f"{reason} ({count} samples)" for reason, count in reasons.most_common(_REASONS_SHOWN))
        if self._lost_in_a_row >= MAX_LOST_STEPS:
            raise ValueError(
                f"{self._lost_in_a_row} consecutive rollouts have no usable reward: {shown}; fix the rewards "
                "(rl.rewards, rl.environment) or the columns of data.train that they read"
            )
        log.warning(
            "a rollout has no usable reward, so its step changes nothing (%d of the %d in a row that end the run): %s",
            self._lost_in_a_row,
            MAX_LOST_STEPS,
            shown,
        )
        return True
