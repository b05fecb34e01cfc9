"""The tokens that end a turn of the assistant under a chat template."""

from typing import Any

from transformers import PreTrainedTokenizerFast

from jaxtrain.data.chat import ChatTokenizer, EncodedChat
from jaxtrain.data.packing import trained_spans
from jaxtrain.data.rendering import probe_call

_USER = {"role": "user", "content": "What is it?"}
_ANSWER = {"role": "assistant", "content": "It is this."}
_PROBES: tuple[list[dict[str, Any]], ...] = (
    [_USER, _ANSWER],
    [_USER, _ANSWER, _USER, _ANSWER],
    [_USER, {"role": "assistant", "content": "", "tool_calls": [probe_call()]}],
    [_USER, {**_ANSWER, "reasoning_content": "It may be this."}],
)


def turn_end_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The special tokens that a model learns to end its turns with: of answers, calls of tools and answers after
    thoughts, as far as the template has them. None without a chat template.

    A token that also occurs within a turn is left out: GPT-OSS ends a thought and an earlier turn with the same one,
    and generation that stops there would never reach the answer.
    """
    if not tokenizer.chat_template:
        return []
    chat = ChatTokenizer(tokenizer)
    ends: dict[int, None] = {}
    within: set[int] = set()
    for probe in _PROBES:
        try:
            encoded = chat(probe, thoughts="accept")
        except ValueError:  # the template has no tools, or cannot say where its turns are
            continue
        for turn in _turns(encoded):
            ends[turn[-1]] = None
            within |= set(turn[:-1])
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return [token for token in ends if token in special - within]


def closing_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """What a conversation ends with after the words of its last answer: the token that ends the turn, where the
    template has one, and what it writes after that, such as the line break of ChatML. Empty without a chat template.
    """
    if not tokenizer.chat_template:
        return []
    encoded = ChatTokenizer(tokenizer)(_PROBES[0], thoughts="accept")
    _, stop = trained_spans(encoded.loss_weights)[-1]
    start = stop - (encoded.input_ids[stop - 1] in turn_end_ids(tokenizer))
    return encoded.input_ids[start:].tolist()


def _turns(encoded: EncodedChat) -> list[list[int]]:
    """The ids of each run of tokens that are trained."""
    return [encoded.input_ids[start:stop].tolist() for start, stop in trained_spans(encoded.loss_weights)]
