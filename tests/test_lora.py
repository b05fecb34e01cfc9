import jax
import pytest
import tiny

from converters.weight_rows import flatten
from jaxtrain.lora import check_targets, join, split_adapters


def test_split_and_join_are_inverse():
    params = tiny.model(lora=tiny.LORA).abstract()
    adapters, base = split_adapters(params)
    assert join(adapters, base) == params
    assert jax.tree.structure(base) == jax.tree.structure(tiny.model().abstract())
    assert len(jax.tree.leaves(adapters)) == 2 * len(tiny.LORA.targets)


def test_parameters_that_are_trained_in_full_are_split_off_by_their_paths():
    paths = ("embed.weight", "layers.input_norm.scale", "norm.scale")
    params = tiny.model(lora=tiny.LORA).abstract()
    trained, frozen = split_adapters(params, paths)
    assert flatten(trained).keys() == flatten(split_adapters(params)[0]).keys() | set(paths)
    assert join(trained, frozen) == params


def test_an_unknown_target_names_the_nearest_linear():
    shapes = tiny.model().abstract()
    check_targets(["q_proj", "down_proj"], shapes)
    with pytest.raises(ValueError, match="no linear 'qproj'; did you mean q_proj"):
        check_targets(["qproj"], shapes)
