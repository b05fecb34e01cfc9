import pytest
from chat_templates import BY_INDEX, CHATML, GENERATION, QWEN3, tokenizer

from jaxtrain.data.tracing import trace

CHAT = [{"role": "user", "content": "What"}, {"role": "assistant", "content": "Paris"}]


@pytest.mark.parametrize("template", [CHATML, QWEN3, GENERATION, BY_INDEX], ids=["chatml", "qwen3", "marks", "index"])
def test_tracing_does_not_change_the_text(template):
    expected = tokenizer(template).apply_chat_template(CHAT, tokenize=False)
    assert trace(template, CHAT, {"tools": None}).text == expected


def test_blocks_are_what_the_loop_writes_for_each_message():
    found = trace(CHATML, CHAT, {})
    written = {number: found.text[start:end] for number, (start, end) in found.blocks.items()}
    assert written[1] == "<|im_start|>assistant\nParis<|im_end|>\n"
    assert written[0].endswith("<|im_start|>user\nWhat<|im_end|>\n")
    assert trace(BY_INDEX, CHAT, {}).blocks == {}


def test_generation_marks_name_the_message_where_a_loop_tells_it():
    found = trace(GENERATION, CHAT, {})
    ((number, (start, end)),) = found.generated
    assert number == 1 and found.text[start:end].startswith("Paris")
    alone = "{% generation %}{{ messages[1].content }}{% endgeneration %}"
    assert trace(alone, CHAT, {}).generated == [(None, (0, 5))]


def test_a_loop_over_messages_within_a_turn_does_not_end_it():
    ahead = (
        "{% for m in messages %}{{ '<' }}{% for later in messages[loop.index:] %}{% if later.role == 'x' %}{% endif %}"
        "{% endfor %}{{ m.content + '>' }}{% endfor %}"
    )
    found = trace(ahead, CHAT, {})
    assert {number: found.text[start:end] for number, (start, end) in found.blocks.items()} == {
        0: "<What>",
        1: "<Paris>",
    }
    inside = ahead.replace("{% endif %}", "{% endif %}{{ later.content }}")
    assert set(trace(inside, CHAT, {}).blocks) == set()  # each is written in two places


def test_what_follows_the_messages_is_the_prompt():
    assert trace(CHATML, CHAT[:1], {"add_generation_prompt": True}).after_messages() == "<|im_start|>assistant\n"
    assert trace(CHATML, CHAT, {}).after_messages() == ""
    assert trace(BY_INDEX, CHAT, {}).after_messages() == ""


def test_whatever_fails_in_a_template_is_a_refusal():
    for source in ("{{ 1 / 0 }}", "{{ nothing.at.all }}", "{{ messages + 1 }}", "{{ raise_exception('no') }}"):
        with pytest.raises(ValueError, match="the chat template refuses the conversation"):
            trace(source, CHAT, {})
