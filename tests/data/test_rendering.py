import json

import pytest
from chat_templates import QWEN25, tokenizer
from stock_templates import STOCK, made

from jaxtrain.data.chat import ChatTokenizer
from jaxtrain.data.formats import Encoder
from jaxtrain.data.rendering import Template
from jaxtrain.types import Example

USER = {"role": "user", "content": "What?"}
WRITTEN = '{"a":  [1, "é"]}'  # with spaces that `json.dumps` would not write


def rendered(tok, *messages, kwargs=None, date=None, **run_kwargs):
    template = Template(tok, run_kwargs, date)
    return template.trace(template.chat(list(messages), None, kwargs)).text


def calling(arguments, **message):
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "add", "arguments": arguments}}
    return {"role": "assistant", **message, "tool_calls": [call]}


@pytest.mark.parametrize("arguments", [WRITTEN, json.loads(WRITTEN)], ids=["text", "mapping"])
@pytest.mark.parametrize("name", ["qwen2.5", "llama3.2", "gpt-oss", "mistral3", "granite4"])
def test_arguments_are_mappings_where_the_template_writes_them_as_json(name, arguments):
    assert '{"a": [1, "é"]}' in rendered(made(name), USER, calling(arguments))


@pytest.mark.parametrize(("arguments", "expected"), [(WRITTEN, WRITTEN), (json.loads(WRITTEN), '{"a": [1, "é"]}')])
@pytest.mark.parametrize("name", ["deepseek-v3", "r1-distill"])
def test_arguments_are_text_where_the_template_joins_them_to_text(name, arguments, expected):
    assert f"json\n{expected}\n" in rendered(made(name), USER, calling(arguments))


def test_arguments_are_text_where_a_mapping_would_be_written_as_python_shows_it():
    shown = QWEN25.replace("tool_call.arguments | tojson", "tool_call.arguments")
    assert '{"a": [1, "é"]}' in rendered(tokenizer(shown), USER, calling(json.loads(WRITTEN)))


@pytest.mark.parametrize("arguments", [{}, None, "", " ", "null", "{}"], ids=repr)
@pytest.mark.parametrize("name", ["qwen2.5", "llama3.2", "gpt-oss", "deepseek-v3", "gemma4", "qwen3.5"])
def test_a_call_without_arguments_has_an_empty_mapping(name, arguments):
    assert rendered(made(name), USER, calling(arguments)) == rendered(made(name), USER, calling({}))
    bare = calling(arguments)
    del bare["tool_calls"][0]["function"]["arguments"]
    assert rendered(made(name), USER, bare) == rendered(made(name), USER, calling({}))


def test_arguments_that_are_no_json_are_a_models_own_words():
    assert "{{broken" in rendered(made("qwen2.5"), USER, calling("{{broken"))


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}], ids=["none", "null", "empty"])
@pytest.mark.parametrize("name", STOCK)
def test_a_call_without_content_is_rendered_in_the_form_that_the_template_reads(name, content):
    if name in ("phi4", "smollm3", "gemma3"):
        pytest.skip("it writes no calls")
    text = rendered(made(name), USER, calling({"a": 1}, **content))
    assert "add" in text and not {"None", "null"} & set(text.replace("\n", " ").split())


@pytest.mark.parametrize(("name", "written"), [("llama3.2", "01 Feb 2024"), ("gpt-oss", "2024-02-01")])
def test_the_date_is_that_of_the_run(name, written):
    assert written in rendered(made(name), USER, date="2024-02-01")
    today = rendered(made(name), USER)
    assert written not in today
    assert today == made(name).apply_chat_template([USER], tokenize=False)


def test_a_conversations_arguments_override_those_of_the_run():
    tok = made("llama3.2")
    assert "Date: today" in rendered(tok, USER, date_string="today")
    assert "Date: now" in rendered(tok, USER, date_string="today", kwargs={"date_string": "now"})


def test_options_of_rendering_are_no_arguments_of_a_template():
    with pytest.raises(ValueError, match=r"data\.chat_template_kwargs: add_generation_prompt is an option"):
        ChatTokenizer(made("qwen3"), template_kwargs={"add_generation_prompt": True})
    with pytest.raises(ValueError, match="chat_template_kwargs: tokenize is an option of rendering"):
        ChatTokenizer(made("qwen3")).prompt([USER], template_kwargs={"tokenize": False})


READS = (
    "{% macro shown(text, style) %}{{ text if style else shout(text) }}{% endmacro %}{% set greeting = 'Hi' %}"
    "{% for m in messages %}{{ m.role + shown(m.content, loud) + greeting }}{% if enable_thinking is defined %}"
    "{{ bos_token }}{% endif %}{% endfor %}"
)


def test_the_variables_of_a_template_are_those_that_it_does_not_set():
    assert Template(tokenizer(READS), {}, None).reads == {"messages", "bos_token", "enable_thinking", "loud", "shout"}


def test_arguments_of_a_run_that_the_template_does_not_read_are_refused():
    Template(tokenizer(READS), {"loud": True}, None)
    message = "does not read greeting, style; its variables are: enable_thinking, loud, shout$"
    with pytest.raises(ValueError, match=message):
        Template(tokenizer(READS), {"loud": True, "style": 1, "greeting": "x"}, None)
    with pytest.raises(ValueError, match=message):  # before any row is read
        Encoder(tokenizer(READS), template_kwargs={"style": 1, "greeting": "x"})


def test_arguments_of_a_row_that_the_template_does_not_read_are_named_and_counted():
    encode, chat = Encoder(tokenizer(QWEN25)), [USER, {"role": "assistant", "content": "Paris"}]
    with pytest.warns(UserWarning, match="has enable_thinking, which the chat template does not read"):
        made = encode({"messages": chat, "chat_template_kwargs": {"enable_thinking": False, "xml_tools": []}})
    assert made.events == ("arguments_unread",)
    with pytest.warns(UserWarning, match="has style, which"):
        encode.question({"prompt": "What?", "chat_template_kwargs": '{"style": 1}'})
    assert isinstance(encode({"messages": chat, "chat_template_kwargs": {"xml_tools": []}}), Example)
