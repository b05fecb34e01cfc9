"""Loading a folder for serving."""

import pytest
from hf_folders import save

from converters.tokenizer import write_byte_tokenizer
from jaxtrain.serve.served import load_served


def test_a_cache_budget_determines_the_slots(tmp_path):
    folder = save(tmp_path / "tiny", "llama", vocab_size=259, num_hidden_layers=1)
    write_byte_tokenizer(folder)
    roomy = load_served(folder, dtype="float32", max_length=64, slots=None, cache_gib=0.001).engine
    # One layer, two heads of 16, keys and values of 64 tokens in float32, once more while it grows; 259 marks.
    each = 2 * 2 * 16 * 64 * 4 * 2 + 2 * 259
    assert roomy.slots == int(0.001 * 2**30) // each * 8
    with pytest.raises(ValueError, match=r"is too small: a sample of 64 tokens takes 0\.0 MiB"):
        load_served(folder, dtype="float32", max_length=64, slots=None, cache_gib=1e-6)
    with pytest.raises(ValueError, match="only one of --slots and --cache-gib"):
        load_served(folder, dtype="float32", max_length=64, slots=8, cache_gib=0.001)
