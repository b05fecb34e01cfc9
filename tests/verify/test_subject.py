"""Our side of a comparison: the same logits in either precision, of the same ids every time."""

import hf_folders
import jax.numpy as jnp
import numpy as np
import pytest

from converters.tokenizer import load_tokenizer, write_byte_tokenizer
from jaxtrain.verify import load_subject
from jaxtrain.verify.subject import TEXT, our_logits, params_as, precise, token_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return hf_folders.save(tmp_path_factory.mktemp("subject"), "qwen3", vocab_size=259)


def test_logits_in_float32_are_those_in_float64_to_rounding(folder):
    subject = load_subject(folder)
    ids = np.stack(list(token_rows(subject, 24).values()))
    single, double = (our_logits(subject, ids, dtype) for dtype in ("float32", "float64"))
    assert single.dtype == double.dtype == np.float32
    assert single.shape == (len(ids), 24, 259)
    np.testing.assert_allclose(single, double, atol=1e-4)
    assert np.abs(single - double).max() > 0


def test_double_precision_is_on_inside_alone():
    with precise("float64"):
        assert jnp.ones(1, jnp.float64).dtype == np.float64
    with precise("float32"):
        assert jnp.ones(1).dtype == np.float32
    assert jnp.arange(1.0).dtype == np.float32


def test_parameters_are_copied_for_float64_alone(folder):
    subject = load_subject(folder)
    assert params_as(subject, "float32") is params_as(subject, "bfloat16") is subject.params
    with precise("float64"):
        assert params_as(subject, "float64")["embed"]["weight"].dtype == np.float64


def test_rows_of_ids_are_the_same_every_time_and_a_text_where_there_is_a_tokenizer(folder, tmp_path):
    subject = load_subject(folder)
    (row,) = token_rows(subject, 30).values()
    assert row.tolist() == token_rows(subject, 30)["random ids"].tolist() and row.max() < 259
    write_byte_tokenizer(folder)
    ids = load_tokenizer(folder)(TEXT).input_ids
    text = token_rows(subject, 3000)["text"].tolist()
    assert text == (ids * 9)[:3000]  # a short text is repeated
