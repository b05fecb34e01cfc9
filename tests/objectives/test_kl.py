import numpy as np
import pytest

from jaxtrain.objectives.kl import check_kl_in_loss, divergence

RNG = np.random.default_rng(0)
LOG_P, LOG_REF = (np.log(RNG.dirichlet(np.ones(5))).astype(np.float32) for _ in range(2))


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_the_mean_under_the_policy_is_the_kl(kind):
    p = np.exp(LOG_P)
    np.testing.assert_allclose(p @ divergence(kind, LOG_P, LOG_REF), p @ (LOG_P - LOG_REF), rtol=1e-5)


def test_k2_is_half_the_squared_log_ratio_and_no_estimate_but_k1_is_negative():
    np.testing.assert_allclose(divergence("k2", LOG_P, LOG_REF), (LOG_P - LOG_REF) ** 2 / 2, rtol=1e-5)
    assert np.all(divergence("k2", LOG_P, LOG_REF) >= 0) and np.all(divergence("k3", LOG_P, LOG_REF) >= 0)
    assert np.any(divergence("k1", LOG_P, LOG_REF) < 0)


@pytest.mark.parametrize(
    ("kind", "bias_correction", "message"),
    [("k1", False, "expected gradient of 0"), ("k2", True, "is for k1 and k3"), ("k2", False, ""), ("k1", True, "")],
)
def test_estimates_with_another_gradient_are_refused(kind, bias_correction, message):
    if not message:
        check_kl_in_loss(kind, bias_correction)
        return
    with pytest.raises(ValueError, match=message):
        check_kl_in_loss(kind, bias_correction)
