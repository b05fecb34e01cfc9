"""A turn begins behind its prompt, and the tokens that end it are those that the mask of trained tokens ends with."""

import chat_templates
import pytest
from stock_templates import STOCK, made, trained

from jaxtrain.data.chat import ChatTokenizer
from jaxtrain.data.formats import Encoder
from jaxtrain.data.turn_ends import closing_ids, turn_end_ids

CASES = {
    "CHATML": ["<|im_end|>"],
    "LLAMA3": ["<|eot_id|>"],
    "GEMMA": ["<end_of_turn>"],
    "MISTRAL": ["</s>"],
    "QWEN25": ["<|im_end|>"],
    "QWEN3": ["<|im_end|>"],
    "GENERATION": ["<|im_end|>"],
    "BY_INDEX": ["<|im_end|>"],
    "EOS_ONCE": ["</s>"],
}
# As GPT-OSS: a thought and an earlier turn end alike, the last answer and a call each in a way of its own.
CHANNELS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.reasoning_content %}{{ m.reasoning_content + '<|im_end|><|im_start|>assistant\\n' }}{% endif %}"
    "{{ m.content or '' }}{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson + '<|eot_id|>' }}"
    "{% else %}{{ '</s>' if loop.last else '<|im_end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def ends(template):
    tokenizer = chat_templates.tokenizer(template)
    return tokenizer.convert_ids_to_tokens(turn_end_ids(tokenizer))


@pytest.mark.parametrize("name", CASES)
def test_known_templates(name):
    assert ends(getattr(chat_templates, name)) == CASES[name]


STOCK_ENDS = {
    "gemma4": ["<turn|>", "<|tool_response>"],
    "gpt-oss": ["<|return|>", "<|call|>"],
    "glm4.5": ["<|user|>", "<|observation|>"],
    "r1-distill": ["<|end_of_sentence|>", "<|tool_outputs_begin|>"],
    "mistral3": ["</s>"],
    "nemotron3": ["<|im_end|>"],
    "smollm3": ["<|im_end|>"],
}


@pytest.mark.parametrize("name", STOCK_ENDS)
def test_tokens_that_a_model_must_stop_at(name):
    stock = STOCK[name]
    tokenizer = chat_templates.tokenizer(stock.template, tokens=stock.tokens, **stock.special)
    assert tokenizer.convert_ids_to_tokens(turn_end_ids(tokenizer)) == STOCK_ENDS[name]


def test_several_ends_but_none_that_is_also_within_a_turn():
    assert ends(CHANNELS) == ["</s>", "<|eot_id|>"]


def test_a_template_without_an_end_is_given_the_end_of_the_sequence():
    assert ends("{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}") == ["</s>"]


def test_without_a_template():
    assert ends(None) == []


@pytest.mark.parametrize("name", CASES)
def test_a_conversation_ends_with_its_closing(name):
    """The rendered text of any answer ends with it, and it begins with the token that ends the turn."""
    tokenizer = chat_templates.tokenizer(getattr(chat_templates, name))
    closing = closing_ids(tokenizer)
    assert tokenizer.convert_ids_to_tokens(closing[:1]) == CASES[name]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}], tokenize=False
    )
    assert text.endswith(tokenizer.decode(closing)) and "So." not in tokenizer.decode(closing)


def test_nothing_closes_a_text_without_a_template():
    assert closing_ids(chat_templates.tokenizer(None)) == []


USER = {"role": "user", "content": "What?"}
PAR, IS = ({"role": "assistant", "content": word} for word in ("Par", "is"))
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
RESULTS = [
    USER,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "abcdefghi", "content": "seven"},
    IS,
]


@pytest.mark.parametrize("name", ["qwen2.5", "gpt-oss"])
def test_a_completion_behind_a_turn_of_the_assistant_is_a_turn_of_its_own(name):
    """As TRL renders it: the template's generation prompt stands between the two."""
    tok = made(name)
    example = Encoder(tok)({"prompt": [USER, PAR], "completion": [IS]})
    asked = tok.apply_chat_template([USER, PAR], add_generation_prompt=True, tokenize=False)
    (run,) = trained(tok, example)
    assert tok.decode(example.input_ids).startswith(asked + run) and "is<|" in run
    with pytest.raises(ValueError, match="begins an assistant turn with 'is<turn"):
        Encoder(made("gemma4"))({"prompt": [USER, PAR], "completion": [IS]})


def test_a_header_that_the_prompt_lacks_is_not_trained():
    """As a template of Gemma 4 writes the turn after the results of a tool."""
    template = STOCK["gemma4"].template.replace(
        "{%- if m.role != 'tool' %}", "{%- if m.role == 'tool' %}{% set ns.before = '' %}{% else %}"
    )
    tok = made("gemma4")
    tok.chat_template = template
    with pytest.raises(
        ValueError, match=r"messages\[3\]: .* begins this turn with '<\|turn>model\\n' and prompts .* without"
    ):
        ChatTokenizer(tok)(RESULTS)
    assert trained(tok, ChatTokenizer(tok)(RESULTS, weights=[0, 1, 0, 0]))
