from functools import partial

import numpy as np
import pytest
from chat_templates import tokenizer
from tokenizers import AddedToken, normalizers, pre_tokenizers, processors

from jaxtrain.data.tokens import (
    LocatedTokens,
    TokenLocator,
    by_offsets,
    encode,
    locate_plain,
    token_weights,
    without_limits,
)

TEXT = "ab   cdef"
OFFSETS = [(0, 2), (2, 5), (5, 5), (5, 9)]


def weights_at(text, offsets, spans, outside):
    starts, ends = np.array(offsets, int).reshape(-1, 2).T
    return token_weights(LocatedTokens(np.zeros(len(starts), np.int32), starts, ends, text), spans, outside)


def test_a_token_has_the_weight_of_the_span_that_holds_its_first_character():
    assert weights_at(TEXT, OFFSETS, [(2, 9, 0.5)], 0.0).tolist() == [0, 0.5, 0.5, 0.5]
    assert weights_at(TEXT, OFFSETS, [(1, 5, 2.0), (5, 6, 0.0)], 1.0).tolist() == [2, 2, 1, 0]
    assert weights_at("", [], [(0, 9, 1.0)], 0.0).dtype == np.float32


def test_a_token_that_begins_in_the_prompt_is_learned_where_it_holds_words():
    text = "ASSISTANT: Paris\n\nA"
    words, white = [(0, 10), (10, 16)], [(0, 16), (16, 18), (18, 19)]
    assert weights_at(text, words, [(11, 16, 1.0)], 0.0).tolist() == [0, 1]
    assert weights_at(text, white, [(17, 19, 1.0)], 0.0).tolist() == [0, 0, 1]


@pytest.mark.parametrize("written", ["", "<s>"])
def test_a_first_token_that_the_text_holds_is_not_added_again(written):
    tok = tokenizer(None, add_bos=True)
    ids, starts, ends, _ = locate_plain(tok, TokenLocator(tok), written + "The capital")
    assert tok.decode(ids) == "<s>The capital" and len(ids) == len(starts)
    assert (starts[0], ends[0]) == (0, len(written)) and ends[-1] == len(written) + len("The capital")


def test_padding_and_cutting_of_the_tokenizers_file_are_switched_off():
    tok = tokenizer(None)
    tok.backend_tokenizer.enable_truncation(2)
    tok.backend_tokenizer.enable_padding(length=9)
    ids = encode(without_limits(tok), "The capital is Paris", add_special_tokens=False).ids
    assert len(ids) > 2 and tok.decode(ids) == "The capital is Paris"


@pytest.mark.parametrize("text", ["x \ud83d", "\udfff", "\ud83d y"])
def test_a_lone_surrogate_is_named(text):
    for encodes in (
        partial(encode, without_limits(tokenizer(None)), add_special_tokens=False),
        TokenLocator(tokenizer(None)),
    ):
        with pytest.raises(ValueError, match=r"lone surrogate, U\+D(83D|FFF)"):
            encodes(text)


UNICODE = "The café  is in Paris\u00a0<|end|> \U0001f600\n\n東京 e\u0301\u3000x<|end|>"


def untrimmed_tokenizer():
    """Whose own offsets are those of the tokens; the place of each can then be compared."""
    tok = tokenizer(None, tokens=("<|end|>",))
    tok.backend_tokenizer.post_processor = None
    return tok


@pytest.mark.parametrize("text", ["", "The capital is Paris<|end|>\n", UNICODE])
def test_the_places_of_byte_level_tokens_follow_from_their_lengths(text):
    tok = untrimmed_tokenizer()
    located = TokenLocator(tok)(text)
    encoding = encode(without_limits(tok), text, add_special_tokens=False)
    assert located.ids.tolist() == encoding.ids
    assert located.ends.tolist()[-1:] == ([len(text.encode())] if text else [])
    assert located.starts.tolist() == [0, *located.ends.tolist()][: len(located.ids)]
    places = range(len(text) + 1)
    for start, end in [(a, b) for a in places for b in places if a < b]:
        spans = [(start, end, 1.0)]
        assert (token_weights(located, spans, 0.0) == token_weights(by_offsets(text, encoding), spans, 0.0)).all()


def test_white_space_at_the_end_of_a_turn_is_learned_though_offsets_leave_it_out():
    tok = tokenizer(None)
    tok.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    text = "ab  "
    assert encode(without_limits(tok), text, add_special_tokens=False).offsets[-1] == (4, 4)
    assert token_weights(TokenLocator(tok)(text), [(0, len(text), 1.0)], 0.0).all()


@pytest.mark.parametrize("change", ["normalizer", "removed", "added", "unknown"])
def test_where_tokens_are_not_the_bytes_of_the_text_offsets_locate_them(change):
    tok = untrimmed_tokenizer()
    backend = tok.backend_tokenizer
    if change == "normalizer":
        backend.normalizer = normalizers.NFC()
    elif change == "removed":
        splits = [pre_tokenizers.Split("é", "removed"), backend.pre_tokenizer]
        backend.pre_tokenizer = pre_tokenizers.Sequence(splits)
    else:
        backend.add_tokens([AddedToken("東京", lstrip=True)])
    located = TokenLocator(tok)(UNICODE)
    expected = by_offsets(UNICODE, encode(without_limits(tok), UNICODE, add_special_tokens=False))
    assert located.text == UNICODE
    assert all((ours == theirs).all() for ours, theirs in zip(located[:3], expected[:3], strict=True))


def test_added_tokens_stand_for_no_part_of_the_text():
    tok = untrimmed_tokenizer()
    tok.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", tok.bos_token_id), ("</s>", tok.eos_token_id)]
    )
    text = f"é</s>{UNICODE} "
    ids, starts, ends, written = TokenLocator(tok)(text, add_special_tokens=True)
    assert written == text.encode()
    assert (ids[0], starts[0], ends[0]) == (tok.bos_token_id, 0, 0)
    assert (ids[-1], starts[-1], ends[-1]) == (tok.eos_token_id, len(written), len(written))
    assert (starts[1:] == ends[:-1]).all() and (ids == tok.eos_token_id).sum() == 2
