"""What `jaxtrain plan` prints: the estimate as soon as it is known, then the plan, or a search."""

from __future__ import annotations

import json
from typing import Any

import jax

from jaxtrain.config import RunConfig
from jaxtrain.plan.estimate import StateEstimate
from jaxtrain.plan.planner import plan
from jaxtrain.plan.report import estimate_text, plan_text
from jaxtrain.plan.search import Candidate, candidate_text, search, search_text
from jaxtrain.plan.target import Target


def print_plan(
    config: RunConfig,
    on: str | None = None,
    *,
    profile: int = 0,
    as_json: bool = False,
    tries: bool = False,
    **options: Any,
) -> None:
    """Print the plan, or with `tries` a search.

    `profile`: so many of the fusions that take longest. `options` are those of `plan`, which also has the errors.
    """
    if on is None:
        raise ValueError("give the devices to plan for, for example --on v5p:4x4x8 or --on cpu:8")
    jax.config.update("jax_platforms", "cpu")  # an accelerator of this machine is left alone
    if tries:
        if not options.pop("compiled", True) or options.pop("save", None):
            raise ValueError("--search compiles many programs: it goes neither with --estimate nor with --save")
        print_search(config, on, as_json=as_json, **options)
        return

    def show(target: Target, found: StateEstimate) -> None:
        if not as_json:
            print(estimate_text(config.recipe, target, found), flush=True)

    made = plan(config, on, first=show, **options)
    if as_json:
        print(json.dumps(made.as_json(profile), indent=1))
    elif made.phases:
        print(plan_text(made, profile))


def print_search(config: RunConfig, on: str, *, as_json: bool = False, **options: Any) -> None:
    """Print what is tried, and the best of it. `options` are those of `search`."""

    def show(candidate: Candidate) -> None:
        if not as_json:
            print(candidate_text(candidate), flush=True)

    found = search(config, on, report=show, **options)
    if not as_json:
        print(search_text(found))
        return
    best = found.best.plan
    assert best is not None
    tried = [
        {"values": dict(each.values), "problem": each.problem, "plan": each.plan and each.plan.as_json()}
        for each in found.tried
    ]
    print(json.dumps({"values": dict(found.best.values), "plan": best.as_json(), "tried": tried}, indent=1))
