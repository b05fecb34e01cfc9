"""The search keeps what fits and is fastest, and says what would fit where nothing does."""

from types import SimpleNamespace

import pytest
import yaml

from jaxtrain.config import RunConfig
from jaxtrain.plan import search as module
from jaxtrain.plan.compile import Compiled
from jaxtrain.plan.estimate import StateEstimate
from jaxtrain.plan.reading import Reading, TimedPart
from jaxtrain.plan.report import Phase, RunPlan
from jaxtrain.plan.search import candidate_text, changed, nearest_fit, remat_values, search, search_text
from jaxtrain.plan.target import parse_target

CONFIG = RunConfig.model_validate(
    {
        "recipe": "sft",
        "model": {"config": {"model_type": "qwen3"}, "remat": "full"},
        "data": {"train": {"path": "data.jsonl"}, "max_length": 64},
        "train": {"steps": 1, "batch_size": 16},
    }
)
FOUND = StateEstimate(10**9, 10**9, {"fsdp": 8}, 4e9, 4e9, 8e9, 1024, 1e15, 1.0)


def made(seconds: float, used: float) -> RunPlan:
    mesh = SimpleNamespace(size=8)
    program = SimpleNamespace(name="update", times=1, flops=1e15, mesh=mesh, inputs={}, gradients=None, tokens=1)
    phase = Phase(program, Compiled("", 1.0, peak=int(used)), Reading([TimedPart(seconds, 1, "", "")]))
    return RunPlan("sft", parse_target("v5p:2x2x2"), FOUND, [phase], step_tokens=1)


def fake_plan(config, on, **given):
    """Less remat is faster and larger; a tensor axis is slower and smaller; 8 does not divide the heads."""
    if config.mesh.tensor == 8:
        raise ValueError("heads do not divide")
    used = {"none": 200e9, "dots": 90e9}.get(config.model.remat, 50e9) / config.mesh.tensor
    seconds = {"none": 1.0, "dots": 2.0}.get(config.model.remat, 3.0) * config.mesh.tensor
    return made(seconds, used / config.train.microbatches)


def test_the_fastest_that_fits_is_kept(monkeypatch):
    monkeypatch.setattr(module, "plan", fake_plan)
    seen = []
    found = search(CONFIG, "v5p:2x2x2", report=seen.append)
    assert found.best.values["mesh.tensor"] == 1
    assert found.best.values["model.remat"] == "dots"  # none needs 200 of 95.7 GB
    assert found.best.plan.fits
    assert seen == found.tried
    assert any(candidate.problem == "heads do not divide" for candidate in found.tried)
    assert "does not fit" in next(candidate_text(c) for c in found.tried if c.values["model.remat"] == "none")
    changes = yaml.safe_load(found.yaml)
    assert changes["model"]["remat"] == "dots"
    assert changes["mesh"] == {"preset": "fsdp", "tensor": 1}


def test_where_nothing_fits_the_chips_that_would_are_named(monkeypatch):
    monkeypatch.setattr(module, "plan", lambda config, on, **given: made(1.0, 105e9))
    text = search_text(search(CONFIG, "v5p:2x2x2"))
    assert "32 chips would hold it" in text  # 89 GB beside a state of 16 GB, of which 6.7 GB have room
    assert "activations alone are too large" in nearest_fit(made(1.0, 120e9))


def test_a_config_that_no_plan_can_be_made_of_is_an_error(monkeypatch):
    def refuse(config, on, **given):
        raise ValueError("no libtpu")

    monkeypatch.setattr(module, "plan", refuse)
    with pytest.raises(ValueError, match="no plan can be made: no libtpu"):
        search(CONFIG, "v5p:2x2x2")


def test_values_change_their_keys_alone():
    other = changed(CONFIG, {"mesh.tensor": 4, "model.remat": "none"})
    assert (other.mesh.tensor, other.model.remat) == (4, "none")
    assert other.train == CONFIG.train


def test_all_presets_of_remat_are_known():
    assert {"none", "full"} <= set(remat_values())
