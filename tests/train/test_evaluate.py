import functools

import jax
import numpy as np
import tiny

from jaxtrain.objectives.sft import SFT
from jaxtrain.train.evaluate import evaluate, make_eval_step


def test_the_means_are_those_over_all_tokens_of_all_batches():
    model = tiny.model(num_layers=1, pattern=(tiny.KIND,))
    params = tiny.random_params(model)
    step = jax.jit(make_eval_step(model, SFT()))
    together = tiny.packed_batch([[9, 20], [3], [14, 14], [31]], 32)
    batches = [together.map(lambda column, rows=rows: column[rows]) for rows in (slice(0, 2), slice(2, 4))]
    means = evaluate(step, params, {}, {"": batches})
    assert means.keys() == {"eval_loss", "eval_mean_token_accuracy", "eval_entropy"}
    logits = jax.jit(lambda params, batch: model.logits(params, model.hidden(params, batch)))(params, together)
    logp, targets = np.asarray(jax.nn.log_softmax(logits))[:, :-1], together.tokens[:, 1:]
    average = functools.partial(np.average, weights=together.loss_weights[:, 1:])
    loss = -average(np.take_along_axis(logp, targets[..., None], 2)[..., 0])
    np.testing.assert_allclose(means["eval_loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(means["eval_mean_token_accuracy"], average(logp.argmax(2) == targets), rtol=1e-5)
    np.testing.assert_allclose(means["eval_entropy"], average(-(np.exp(logp) * logp).sum(2)), rtol=1e-5)


def test_no_batches_give_no_metrics():
    assert evaluate(lambda *_: {}, {}, {}, {"": []}) == {}
