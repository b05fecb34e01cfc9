import numpy as np
import pytest
from chat_templates import tokenizer

from jaxtrain.data.tokens import encode, encode_plain, token_weights, without_limits

TEXT = "ab   cdef"
OFFSETS = [(0, 2), (2, 5), (5, 5), (5, 9)]


def test_a_token_has_the_weight_of_the_span_that_holds_its_first_character():
    assert token_weights(TEXT, OFFSETS, [(2, 9, 0.5)], 0.0).tolist() == [0, 0.5, 0.5, 0.5]
    assert token_weights(TEXT, OFFSETS, [(1, 5, 2.0), (5, 6, 0.0)], 1.0).tolist() == [2, 2, 1, 0]
    assert token_weights("", [], [(0, 9, 1.0)], 0.0).dtype == np.float32


def test_a_token_that_begins_in_the_prompt_is_learned_where_it_holds_words():
    text = "ASSISTANT: Paris\n\nA"
    words, white = [(0, 10), (10, 16)], [(0, 16), (16, 18), (18, 19)]
    assert token_weights(text, words, [(11, 16, 1.0)], 0.0).tolist() == [0, 1]
    assert token_weights(text, white, [(17, 19, 1.0)], 0.0).tolist() == [0, 0, 1]


@pytest.mark.parametrize("written", ["", "<s>"])
def test_a_first_token_that_the_text_holds_is_not_added_again(written):
    tok = tokenizer(None, add_bos=True)
    ids, offsets = encode_plain(tok, without_limits(tok), written + "The capital")
    assert tok.decode(ids) == "<s>The capital" and len(ids) == len(offsets)
    assert offsets[0] == (0, len(written)) and offsets[-1][1] == len(written) + len("The capital")


def test_padding_and_cutting_of_the_tokenizers_file_are_switched_off():
    tok = tokenizer(None)
    tok.backend_tokenizer.enable_truncation(2)
    tok.backend_tokenizer.enable_padding(length=9)
    ids = encode(without_limits(tok), "The capital is Paris", add_special_tokens=False).ids
    assert len(ids) > 2 and tok.decode(ids) == "The capital is Paris"


@pytest.mark.parametrize("text", ["x \ud83d", "\udfff", "\ud83d y"])
def test_a_lone_surrogate_is_named(text):
    with pytest.raises(ValueError, match=r"lone surrogate, U\+D(83D|FFF)"):
        encode(without_limits(tokenizer(None)), text, add_special_tokens=False)
