"""What a template leaves out of a conversation is an error that names the message and the part."""

import json

import pytest
from chat_templates import CHATML, LLAMA3, tokenizer
from stock_templates import STOCK

from jaxtrain.config import SourceSection
from jaxtrain.data.chat import ChatTokenizer
from jaxtrain.data.formats import Encoder
from jaxtrain.data.sources import Source

USER = {"role": "user", "content": "What?"}
PARIS = {"role": "assistant", "content": "Paris"}
THOUGHTFUL = {"role": "assistant", "content": "Paris", "reasoning_content": "I wonder"}
INLINE = {"role": "assistant", "content": "<think>\nI wonder\n</think>\n\nParis"}
RESULT = {"role": "tool", "tool_call_id": "abcdefghi", "content": "seven"}


def call(name="add"):
    return {"id": "abcdefghi", "type": "function", "function": {"name": name, "arguments": {"a": 1}}}


def calling(*names, **more):
    return {"role": "assistant", "content": "", "tool_calls": [call(name) for name in names], **more}


def made(name):
    stock = STOCK[name]
    return ChatTokenizer(tokenizer(stock.template, tokens=stock.tokens, **stock.special))


@pytest.mark.parametrize("template", [CHATML, LLAMA3, STOCK["phi4"].template], ids=["smollm2", "llama3", "phi"])
def test_calls_that_are_not_written_train_no_empty_answer(template):
    with pytest.raises(ValueError, match=r"messages\[1\]: the chat template does not write its tool_calls"):
        ChatTokenizer(tokenizer(template))([USER, calling("add")])


def test_a_call_beside_another_that_is_not_written():
    with pytest.raises(ValueError, match=r"messages\[1\]: .* does not write its tool_calls\[1\]"):
        made("gpt-oss")([USER, calling("add", "find")])
    made("qwen2.5")([USER, calling("add", "find")])


def test_calls_beside_content():
    with pytest.raises(ValueError, match=r"messages\[1\]: .* does not write its tool_calls beside content"):
        made("r1-distill")([USER, calling("add", content="I look.")], thoughts="accept")


@pytest.mark.parametrize("name", ["llama3.2", "gpt-oss"])
def test_content_beside_a_call(name):
    chat = [USER, calling("add", content="I look."), RESULT, PARIS]
    with pytest.raises(ValueError, match=r"messages\[1\]: .* does not write its content beside its tool_calls"):
        made(name)(chat)
    assert made(name)(chat, weights=[0, 0, 0, 1]).loss_weights.any()  # a prompt is what the template makes of it
    if name == "gpt-oss":  # it writes it where the turn is the last
        made(name)(chat[:2])


@pytest.mark.parametrize("message", [THOUGHTFUL, INLINE], ids=["key", "inline"])
@pytest.mark.parametrize("name", ["qwen3", "qwen3.5", "glm4.5", "nemotron3"])
def test_thoughts_of_earlier_turns(name, message):
    chat, talk = made(name), [USER, message, USER, message]
    with pytest.raises(ValueError, match=r"messages\[1\]: .* thoughts of earlier turns.*data\.split_turns=true"):
        chat(talk)
    assert chat(talk, thoughts="accept").thoughts_left_out
    assert not chat(talk, weights=[0, 0, 0, 1]).thoughts_left_out
    assert not chat(talk[:2]).thoughts_left_out


def test_a_template_may_be_told_to_keep_them():
    chat = made("nemotron3")
    kept = chat([USER, THOUGHTFUL, USER, THOUGHTFUL], template_kwargs={"truncate_history_thinking": False})
    assert not kept.thoughts_left_out


def test_thoughts_that_are_never_written_are_refused_in_any_case():
    for thoughts in ("check", "accept", "prompted"):
        with pytest.raises(ValueError, match="does not write its reasoning"):
            made("qwen2.5")([USER, THOUGHTFUL], thoughts=thoughts)


def test_one_system_message_of_two():
    first = "{{ messages[0].content }}{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    system = {"role": "system", "content": "Be kind."}
    chat = ChatTokenizer(tokenizer(first))
    chat([system, USER, PARIS])
    with pytest.raises(ValueError, match=r"messages\[1\]: .* writes nothing for a message of the role 'system'"):
        chat([system, system | {"content": "Be brief."}, USER, PARIS])


def test_words_that_occur_elsewhere_do_not_hide_what_is_left_out():
    silent = CHATML.replace("message['content']", "(message['content'] if message['role'] != 'assistant' else '')")
    with pytest.raises(
        ValueError, match=r"writes nothing of this assistant's turn|does not write the assistant's words"
    ):
        ChatTokenizer(tokenizer(silent))([USER, {"role": "assistant", "content": "What?"}])


def test_a_thought_that_other_rows_show_is_missed_where_its_words_occur_in_the_same_turn():
    """GPT-OSS writes the thought of a call unless an answer follows. Arguments, or a template argument, decide too."""
    chat, thought = made("gpt-oss"), {"reasoning_content": "add"}
    chat([USER, calling("add", reasoning_content="I wonder"), RESULT, calling("add", reasoning_content="I wonder")])
    with pytest.raises(ValueError, match=r"messages\[1\]: .* thoughts of earlier turns"):
        chat([USER, calling("add", **thought), RESULT, PARIS])
    chat, talk = made("nemotron3"), [USER, PARIS | {"reasoning_content": "Paris"}, USER, THOUGHTFUL]
    chat(talk, template_kwargs={"truncate_history_thinking": False})
    with pytest.raises(ValueError, match=r"messages\[1\]: .* thoughts of earlier turns"):
        chat(talk)


@pytest.mark.parametrize(
    "content", ["<think>a</think>so<think>c</think>Paris", "Sure. <think>hm</think>Paris"], ids=["two", "not at first"]
)
def test_words_and_thoughts_before_the_last_one(content):
    """Of which templates that read a thought in the content take one alone."""
    turn = {"role": "assistant", "content": content}
    for name in ("qwen3", "qwen3.5", "glm4.5", "nemotron3"):
        with pytest.raises(ValueError, match=r"messages\[1\]: the chat template does not write the assistant's words"):
            made(name)([USER, turn])
    with pytest.raises(ValueError, match=r"messages\[1\]: .* has words or another thought before its last thought"):
        made("r1-distill")([USER, turn], thoughts="prompted")
    assert made("qwen2.5")([USER, turn]).loss_weights.any()


def unread(template, *messages):
    return ChatTokenizer(tokenizer(template)).unread_keys(list(messages), ["name", "lang"], ())


def test_keys_that_change_nothing_are_unread_whatever_words_the_template_has():
    named = USER | {"name": "ann", "lang": "en"}
    assert unread(CHATML, named, PARIS) == {"messages[].name (user)", "messages[].lang (user)"}
    # `name` is that of a tool, and `lang` the word of a comment.
    calls = CHATML + "{# lang #}{% for call in messages[-1].tool_calls %}{{ call.function.name }}{% endfor %}"
    assert unread(calls, named, PARIS) == {"messages[].name (user)", "messages[].lang (user)"}
    by_role = CHATML + "{% for m in messages if m.role == 'assistant' %}{{ m.name }}{{ m['lang'] }}{% endfor %}"
    assert unread(by_role, named, PARIS | {"name": "x"}) == {"messages[].name (user)", "messages[].lang (user)"}
    of_one = CHATML + "{{ messages[0].name if messages[0].lang == 'de' }}{{ messages[0].get('lang') }}"
    assert unread(of_one, named, PARIS) == {"messages[].name (user)"}
    assert unread(of_one, named | {"lang": "de"}, PARIS) == set()
    refuses = CHATML + "{{ raise_exception('no names') if messages[0].name != 'ann' }}"
    assert unread(refuses, named, PARIS) == {"messages[].lang (user)"}


@pytest.mark.parametrize("as_text", [False, True])
def test_keys_of_tool_calls_that_change_nothing_are_reported(caplog, as_text):
    calls = [{**call(), "result": 7}, {**call("find"), "strict": None}]
    calls[1]["function"] = calls[1]["function"] | {"thought": "hm"}
    message = calling() | {"content": None, "tool_calls": json.dumps(calls) if as_text else calls}
    source = Source(SourceSection(rows=[{"messages": [USER, message]}]))
    for template, expected in (
        ("qwen2.5", ["result", "thought"]),
        (STOCK["qwen2.5"].template + "{{ messages[1].tool_calls[0].result }}", ["thought"]),
    ):
        caplog.clear()
        tok = tokenizer(STOCK[template].template if template in STOCK else template)
        Encoder(tok).note_ignored(source[0], source)
        named = ", ".join(f"messages[].tool_calls[].{key} (assistant)" for key in expected)
        assert caplog.messages == [f"{source.section.path}: columns ignored: {named}"]


NAMES_ALONE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS_OF_THE_SYSTEM = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% if m.role == 'system' and tools %}{{ tools | tojson }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_arguments_that_are_not_written():
    with pytest.raises(ValueError, match=r"messages\[1\]: the chat template does not write its tool_calls"):
        ChatTokenizer(tokenizer(NAMES_ALONE))([USER, calling("add")])


def test_schemas_that_only_some_rows_show_are_refused_in_the_others_in_any_order():
    chat, system = ChatTokenizer(tokenizer(TOOLS_OF_THE_SYSTEM)), {"role": "system", "content": "Help."}
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    chat([system, USER, PARIS], tools=tools)
    with pytest.raises(ValueError, match="never writes the schemas of tools, so the model would not see add"):
        chat([USER, PARIS], tools=tools)


def test_arguments_that_are_not_written_after_a_call_without_any():
    chat = ChatTokenizer(tokenizer(NAMES_ALONE))
    without = call("add") | {"function": {"name": "add", "arguments": {}}}
    chat([USER, {"role": "assistant", "content": "", "tool_calls": [without]}])
    with pytest.raises(ValueError, match=r"messages\[1\]: the chat template does not write its tool_calls"):
        chat([USER, calling("add")])


def test_the_second_of_two_results_that_say_the_same():
    template = (
        "{% for m in messages %}{% if m.role != 'tool' or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>"
        "{{ m.role }}\n{{ m.content }}{{ m.tool_calls }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    chat = ChatTokenizer(tokenizer(template))
    assert chat([USER, calling("add"), RESULT, PARIS], weights=[0, 0, 0, 1]).loss_weights.any()
    with pytest.raises(ValueError, match=r"messages\[3\]: .* writes nothing for a message of the role 'tool'"):
        chat([USER, calling("add", "add"), RESULT, RESULT, PARIS], weights=[0, 0, 0, 0, 1])
