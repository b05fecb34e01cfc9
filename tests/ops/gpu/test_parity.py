"""`auto` trusts cuDNN's attention only where it equals XLA's. With a stand-in for its kernels: there is no GPU here."""

import cudnn_stand_in
import jax.numpy as jnp
import pytest

from jaxtrain.ops.gpu import cudnn
from jaxtrain.ops.gpu.parity import HeadShapes, agrees_with_xla

SHAPES = HeadShapes(4, 2, 16, window=None, softcap=None, sinks=False, dtype=jnp.dtype("bfloat16"))


@pytest.fixture(autouse=True)
def _fresh():
    agrees_with_xla.cache_clear()


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("window", [None, 37])
def test_right_kernels_are_trusted(monkeypatch, sinks, window):
    cudnn_stand_in.install(monkeypatch, cudnn.kernels)
    assert agrees_with_xla(SHAPES._replace(sinks=sinks, window=window))


def test_a_wrong_gradient_is_noticed(monkeypatch, caplog):
    cudnn_stand_in.install(monkeypatch, cudnn.kernels)

    def wrong(*arguments):
        d_q, d_k, d_v, *others = cudnn_stand_in.backward(*arguments)
        return d_q, d_k.at[:, 7].multiply(1.5), d_v, *others

    monkeypatch.setattr(cudnn.kernels, "_dot_product_attention_bwd_rule", wrong)
    assert not agrees_with_xla(SHAPES)
    assert "departs from XLA's (d k" in caplog.text and "XLA" in caplog.text


def test_kernels_that_fail_and_softcaps_leave_xla(monkeypatch, caplog):
    assert not agrees_with_xla(SHAPES)  # no cuDNN on this host
    assert "cuDNN attention failed" in caplog.text
    assert not agrees_with_xla(SHAPES._replace(softcap=30.0))
