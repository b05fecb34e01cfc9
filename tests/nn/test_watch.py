import numpy as np
import tiny


def test_an_observer_gets_every_submodule_in_order_and_the_result_is_unchanged():
    model, batch = tiny.model(), tiny.packed_batch([[9, 3]], 12)
    params = tiny.random_params(model)
    seen = []
    hidden = model.watch(params, batch, lambda path, side, value: seen.append((path, side, value.shape)))
    np.testing.assert_allclose(hidden, model.hidden(params, batch), atol=1e-5)
    paths = [path for path, side, _ in seen if side == "out"]
    assert paths[0] == "embed" and paths[-1] == "norm"
    assert [path for path in paths if path.endswith("q_proj")] == [f"layers.{i}.attn.q_proj" for i in range(3)]
    assert ("layers.1.mlp.down_proj", "in", (1, 12, 96)) in seen
    assert ("layers.1.mlp.down_proj", "out", (1, 12, 64)) in seen
