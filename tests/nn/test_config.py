from dataclasses import replace

import pytest
import tiny

from jaxtrain.nn.config import Lora, MoE, names_linear


@pytest.mark.parametrize(
    ("target", "path", "named"),
    [
        ("all-linear", "attn.q_proj", True),
        ("q_proj", "attn.q_proj", True),
        ("proj", "attn.q_proj", False),
        ("attn.*", "attn.q_proj", True),
        ("attn.*", "mlp.up_proj", False),
        ("layers.*.mlp.up_proj", "mlp.up_proj", True),
        ("mlp.experts.*", "mlp.experts.up_proj", True),
    ],
)
def test_targets_name_linears(target, path, named):
    assert names_linear(target, path) == named


def test_the_stored_vocabulary_is_a_multiple():
    assert tiny.CONFIG.padded_vocab == 128
    assert replace(tiny.CONFIG, vocab_size=128).padded_vocab == 128
    assert replace(tiny.CONFIG, vocab_size=129, vocab_multiple=3).padded_vocab == 129


def test_rslora_scales_by_the_root_of_the_rank():
    assert Lora(rank=16, alpha=8.0, dropout=0.0, targets=()).scale == 0.5
    assert Lora(rank=16, alpha=8.0, dropout=0.0, targets=(), rslora=True).scale == 2


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="num_heads=4 is not a multiple of num_kv_heads=3"):
        replace(tiny.CONFIG, num_kv_heads=3)
    with pytest.raises(ValueError, match="experts_per_token=9 of num_experts=8"):
        MoE(num_experts=8, experts_per_token=9, intermediate_size=4, renormalise=True)
