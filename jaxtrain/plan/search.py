"""`jaxtrain plan --search`: other meshes, remat and microbatches, one key after the other, compiled and compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import yaml

from jaxtrain.config import ModelSection, RunConfig
from jaxtrain.parallel.sharding import bytes_text
from jaxtrain.plan.planner import plan
from jaxtrain.plan.report import RunPlan
from jaxtrain.plan.target import Target, parse_target

Values = Mapping[str, Any]
"""Values of keys, `section.key`."""

_TENSOR = (2, 4, 8)
_MICROBATCHES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Candidate:
    """One set of values that was tried."""

    values: Values
    plan: RunPlan | None = None
    problem: str = ""  # why there is no plan

    @property
    def rank(self) -> tuple[bool, bool, float]:
        """The larger the better: what fits before what does not, then the faster, or else the smaller."""
        if self.plan is None:
            return False, False, 0.0
        fits = self.plan.fits is not False
        cost = self.plan.seconds if fits and self.plan.seconds is not None else self.plan.used
        return True, fits, -float(cost)


@dataclass(frozen=True)
class Search:
    """What was tried, and the best of it."""

    best: Candidate
    tried: list[Candidate] = field(default_factory=list)

    @property
    def yaml(self) -> str:
        """The keys of the best candidate, to be put into the config."""
        tree: dict[str, dict[str, Any]] = {}
        for key, value in self.best.values.items():
            section, _, name = key.partition(".")
            tree.setdefault(section, {})[name] = value
        return yaml.safe_dump(tree, sort_keys=False)


def search(
    config: RunConfig,
    on: str,
    *,
    slices: int = 1,
    price: float | None = None,
    report: Callable[[Candidate], None] = lambda candidate: None,
) -> Search:
    """Try other values of mesh, `model.remat` and `train.microbatches`, and keep the fastest that fit.

    Each of the three is varied with the best values of the others, in this order, beginning with those of the config.
    `report` is called after each plan. The other arguments and the errors are those of `plan`.
    """
    target = parse_target(on, slices)
    tried: dict[tuple[tuple[str, Any], ...], Candidate] = {}

    def attempt(values: Values) -> Candidate:
        key = tuple(sorted(values.items()))
        if key not in tried:
            try:
                made = Candidate(values, plan(changed(config, values), on, slices=slices, price=price))
            except ValueError as error:
                made = Candidate(values, problem=str(error))
            tried[key] = made
            report(made)
        return tried[key]

    best = attempt(_own_values(config))
    for alternatives in (_meshes, _remats, _microbatches):
        found = [attempt({**best.values, **change}) for change in alternatives(config, target)]
        best = max([best, *found], key=lambda candidate: candidate.rank)
    if best.plan is None:
        raise ValueError(f"no plan can be made: {best.problem}")
    return Search(best, list(tried.values()))


def changed(config: RunConfig, values: Values) -> RunConfig:
    """The config with other values of its keys."""
    for key, value in values.items():
        section, _, name = key.partition(".")
        config = config.model_copy(update={section: getattr(config, section).model_copy(update={name: value})})
    return config


def search_text(found: Search) -> str:
    """The best values as YAML; if they do not fit, also the nearest change that would."""
    best = found.best.plan
    assert best is not None
    lines = [f"best of {len(found.tried)} plans:", found.yaml.rstrip()]
    if best.fits is False:
        lines.append(nearest_fit(best))
    return "\n".join(lines)


def candidate_text(candidate: Candidate) -> str:
    """One line."""
    values = " ".join(f"{key}={value}" for key, value in candidate.values.items())
    made = candidate.plan
    if made is None:
        return f"{values}: {candidate.problem}"
    seconds = "" if made.seconds is None else f", {made.seconds:.3f} s"
    return f"{values}: {bytes_text(made.used)}{', does not fit' if made.fits is False else ''}{seconds}"


def nearest_fit(best: RunPlan) -> str:
    """How many chips would hold it: the state is split over them, and what a device needs beside it stays."""
    assert best.target.chip is not None
    state, hbm = best.estimate.bytes, best.target.chip.hbm
    room = hbm - (best.used - state)
    if room <= 0:
        return (
            "nothing that was tried fits: a row's activations alone are too large. Split it with mesh.context (not for "
            "recipe rl or eval.generate), shorten data.max_length, or choose chips with more memory"
        )
    chips = best.target.chips
    while state * best.target.chips / chips > room:
        chips *= 2
    return (
        f"nothing that was tried fits; with the same rows on a device, {chips} chips would hold it (the state is split "
        "over them), as would model.lora, whose base has neither gradients nor moments"
    )


def _own_values(config: RunConfig) -> dict[str, Any]:
    return {
        "mesh.preset": config.mesh.preset,
        "mesh.tensor": config.mesh.tensor,
        "model.remat": config.model.remat,
        "train.microbatches": config.train.microbatches,
    }


def _meshes(config: RunConfig, target: Target) -> Iterator[Values]:
    if config.mesh.expert > 1:
        return  # experts over devices are a choice of the config
    yield {"mesh.preset": "fsdp", "mesh.tensor": 1}
    for tensor in _TENSOR:
        if target.devices % tensor == 0:
            yield {"mesh.preset": "fsdp_tensor", "mesh.tensor": tensor}


def _remats(config: RunConfig, target: Target) -> Iterator[Values]:
    for remat in remat_values():
        yield {"model.remat": remat}


def _microbatches(config: RunConfig, target: Target) -> Iterator[Values]:
    for count in _MICROBATCHES:
        if config.rl is not None or config.train.batch_size % count == 0:
            yield {"train.microbatches": count}


def remat_values() -> list[str]:
    """The presets of `model.remat`."""
    found: list[str] = []

    def collect(kind: Any) -> None:
        for part in get_args(kind):
            if isinstance(part, str):
                found.append(part)
            else:
                collect(part)

    collect(ModelSection.model_fields["remat"].annotation)
    return found
