import jax.numpy as jnp
import numpy as np
from dpo_objective import DPO

from jaxtrain.objectives import CISPO, SFT, ClippedValue, Objective
from jaxtrain.objectives.objective import Prepared, weighted_mean


def test_objectives_have_the_members_of_the_protocol():
    for objective in (SFT(), CISPO(), ClippedValue(0.2), DPO()):
        assert isinstance(objective, Objective)
    assert not isinstance(object(), Objective)


def test_only_an_objective_with_prepare_is_prepared():
    class WithReference(DPO):
        def prepare(self, score, batch):
            return {"ref_logps": score(*self.needs).logp}

    assert isinstance(WithReference(), Prepared) and not isinstance(DPO(), Prepared)


def test_a_weighted_mean_also_counts_truth_values():
    weights = jnp.asarray([[1.0, 0.5, 0.0]])
    mean = weighted_mean(jnp.asarray([[True, False, True]]), weights)
    assert (mean.total, mean.weight) == (1, 1.5)
    np.testing.assert_allclose(weighted_mean(2 * weights, weights).value, 2.5 / 1.5)
