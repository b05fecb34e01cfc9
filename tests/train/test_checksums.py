import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtrain.train.checksums import array_checksums


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
def test_the_change_of_any_element_and_the_exchange_of_two_are_detected(dtype):
    values = np.arange(24).reshape(4, 6).astype(dtype) if dtype != "bool" else np.arange(24).reshape(4, 6) % 5 == 0
    changed = {"as it is": values}
    for row in range(4):
        for column in range(6):
            other = values.copy()
            other[row, column] = not other[row, column]
            changed[f"{row} {column}"] = other
    sums = array_checksums(changed)
    different = [name for name, array in changed.items() if not np.array_equal(array, values)]
    assert len(different) > 20
    assert all(sums[name] != sums["as it is"] for name in different)
    swapped = array_checksums({"rows": values[::-1].copy(), "columns": values[:, ::-1].copy()})
    assert sums["as it is"] not in swapped.values()


def test_they_do_not_depend_on_the_sharding():
    values = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("a", "b"))
    specs = {str(spec): spec for spec in (PartitionSpec(), PartitionSpec("a"), PartitionSpec("b", "a"))}
    placed = {name: jax.device_put(values, NamedSharding(mesh, spec)) for name, spec in specs.items()}
    assert len(set(array_checksums(placed).values())) == 1
