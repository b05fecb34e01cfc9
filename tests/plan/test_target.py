"""Names of devices are read, and a wrong one is an error that says what to write instead."""

import importlib.util
from types import SimpleNamespace

import jax
import pytest

from jaxtrain.config import MeshSection
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.plan import target as module
from jaxtrain.plan.target import parse_target, target_devices


@pytest.mark.parametrize(
    ("name", "slices", "chips", "devices"),
    [
        ("v5p:4x4x8", 1, 128, 128),
        ("v5e:8x8", 2, 128, 128),
        ("v6e:16x16", 1, 256, 256),
        ("tpu7x:4x4x4", 1, 64, 128),
        ("h100:8", 1, 8, 8),
        ("h200:1", 1, 1, 1),
    ],
)
def test_a_topology_has_chips_and_devices(name, slices, chips, devices):
    target = parse_target(name, slices)
    assert (target.chips, target.devices) == (chips, devices)
    assert target.peak is not None


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("v4:2x2x2", "unknown devices 'v4'"),
        ("v5p:2x2", "a v5p slice has 3 axes"),
        ("v5e:8", "a v5e slice has 2 axes"),
        ("v6e:0x4", "number of chips along each axis"),
        ("v5p", "number of chips along each axis"),
        ("cpu:2x2", "no axes"),
        ("h100:16", "GPUs are planned within a node"),
        ("h200:2x4", "GPUs are planned within a node"),
    ],
)
def test_a_wrong_name_says_what_to_write(name, words):
    with pytest.raises(ValueError, match=words) as error:
        parse_target(name)
    assert name in str(error.value)


@pytest.mark.parametrize(("name", "extra"), [("v5p:2x2x2", "tpu"), ("h100:8", "cuda")])
def test_without_a_compiler_the_error_names_the_extra_and_the_estimate(monkeypatch, name, extra):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rf'pip install "jaxtrain\[{extra}\]".*--estimate'):
        target_devices(parse_target(name))


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no libtpu: install jax[tpu]")
def test_a_topology_that_libtpu_does_not_know_is_an_error(monkeypatch):
    from jax.experimental import topologies

    def refuse(**given):
        raise RuntimeError(f"no {given['topology_name']}")

    monkeypatch.setattr(topologies, "get_topology_desc", refuse)
    with pytest.raises(ValueError, match="libtpu has no such topology: no v5p:3x5x7"):
        target_devices(parse_target("v5p:3x5x7"))


def test_cpu_devices_are_those_of_the_process():
    assert len(target_devices(parse_target("cpu:4"))) == 4
    with pytest.raises(ValueError, match="already has 8 CPU devices"):
        target_devices(parse_target("cpu:16"))


def test_an_axis_that_is_a_ring_gives_two_links():
    mesh = make_mesh(MeshSection(), jax.devices())
    one = SimpleNamespace(shape=mesh.shape)
    link = 9e10
    assert parse_target("v5p:4x4x8").network(one).links == pytest.approx(6 * link)
    assert parse_target("v5p:2x2x2").network(one).links == pytest.approx(3 * link)
    assert parse_target("v6e:4x4").network(one).links == pytest.approx(2 * 1.5 * link)
