import json

import numpy as np
import pytest
from chat_templates import CHATML, GEMMA, QWEN25, tokenizer

from jaxtrain.data.formats import Encoder

CHAT = [{"role": "user", "content": "What"}, {"role": "assistant", "content": "Paris"}]
PREFIX = "<|im_start|>system\nYou are helpful<|im_end|>\n"
TURNS = PREFIX + "<|im_start|>user\nWhat<|im_end|>\n<|im_start|>assistant\nParis<|im_end|>\n"


def chat_encoder(**options):
    tok = tokenizer(CHATML)
    return tok, Encoder(tok, **options)


def learned(tok, example):
    return tok.decode(example.input_ids[example.loss_weights > 0])


@pytest.mark.parametrize(
    "row",
    [
        {"messages": CHAT},
        {"conversations": [{"from": "human", "value": "What"}, {"from": "gpt", "value": "Paris"}]},
        {"messages": [{"from": "user", "value": "What"}, {"role": "assistant", "content": "Paris", "name": None}]},
        {"prompt": CHAT[:1], "completion": CHAT[1:]},
        {"prompt": "What", "completion": "Paris"},
        {"instruction": "What", "input": "", "output": "Paris", "text": "rendered", "history": None},
        {"messages": json.dumps(CHAT)},
        {"conversations": json.dumps([{"from": "human", "value": "What"}, {"from": "gpt", "value": "Paris"}])},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Wh"}, {"type": "text", "text": "at"}]},
                CHAT[1],
            ]
        },
        {"messages": CHAT, "text": "other", "prompt": "other"},
    ],
    ids=["messages", "sharegpt", "mixed", "lists", "strings", "alpaca", "json", "sharegpt json", "parts", "several"],
)
def test_ways_to_write_one_conversation(row):
    tok, encode = chat_encoder()
    example = encode(row)
    assert tok.decode(example.input_ids) == TURNS
    assert learned(tok, example) == "Paris<|im_end|>"
    assert example.input_ids.dtype == np.int32 and example.loss_weights.dtype == np.float32


def test_only_the_completion_is_learned_of_a_longer_conversation():
    tok, encode = chat_encoder()
    second = [{"role": "user", "content": "user"}, {"role": "assistant", "content": "tool"}]
    assert learned(tok, encode({"prompt": [*CHAT, second[0]], "completion": second[1:]})) == "tool<|im_end|>"
    assert learned(tok, encode({"messages": CHAT + second})) == "Paris<|im_end|>tool<|im_end|>"


def test_loss_on_all_learns_the_prompt_too():
    tok, encode = chat_encoder(loss_on="all")
    assert learned(tok, encode({"messages": CHAT})) == TURNS


def test_plain_text_ends_with_the_end_of_sequence_which_is_learned_though_it_pads():
    tok, encode = chat_encoder()
    assert tok.pad_token_id == tok.eos_token_id
    example = encode({"text": "The capital"})
    assert tok.decode(example.input_ids) == "The capital</s>"
    assert example.loss_weights.tolist() == [1] * len(example.input_ids)
    assert tok.decode(encode({"text": "The capital</s>"}).input_ids) == "The capital</s>"


@pytest.mark.parametrize("add_bos", [False, True])
def test_plain_prompt_and_completion_are_joined_as_they_are(add_bos):
    tok = tokenizer(None, add_bos=add_bos)
    encode = Encoder(tok, prompt_format="plain")
    example = encode({"prompt": "The capital", "completion": " is Paris"})
    assert tok.decode(example.input_ids) == "<s>" * add_bos + "The capital is Paris</s>"
    assert learned(tok, example) == " is Paris</s>"
    assert (
        encode.prompt({"prompt": "The capital", "completion": "x"}).input_ids.tolist() == tok("The capital").input_ids
    )


def test_a_prompt_to_ask_and_its_answer():
    tok, encode = chat_encoder()
    for row in ({"messages": CHAT}, {"prompt": "What", "completion": "Paris"}):
        prompt = encode.prompt(row)
        assert tok.decode(prompt.input_ids) == TURNS.partition("Paris")[0]
        assert prompt.answer == "Paris"


def test_token_ids_need_no_tokenizer():
    encode = Encoder(None)
    assert encode({"input_ids": [3, 1, 2]}).loss_weights.tolist() == [1, 1, 1]
    example = encode({"input_ids": [3, 1, 2], "labels": [-100, -100, 2], "text": "ignored"})
    assert example.input_ids.tolist() == [3, 1, 2] and example.loss_weights.tolist() == [0, 0, 1]


@pytest.mark.parametrize("as_json", [False, True])
def test_tools_and_template_arguments_reach_the_template(as_json):
    tok = tokenizer(QWEN25 + "{{ ending }}")
    tools = [{"type": "function", "function": {"name": "add"}}]
    arguments = json.dumps({"a": 1}) if as_json else {"a": 1}
    call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
    messages = [CHAT[0], {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "2"}, CHAT[1]]
    kwargs = {"ending": "model"}
    row = {
        "messages": messages,
        "tools": json.dumps(tools) if as_json else tools,
        "chat_template_kwargs": json.dumps(kwargs) if as_json else kwargs,
    }
    text = tok.decode(Encoder(tok)(row).input_ids)
    assert '"name": "add"}}\n</tools>' in text and text.endswith("model")
    assert '{"name": "add", "arguments": {"a": 1}}' in text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "x"}, "no columns to train on: this row has 'question'.*columns"),
        ({"prompt": "x"}, "no columns to train on"),
        ({"messages": []}, "not empty"),
        ({"messages": "hello"}, "messages: broken JSON"),
        ({"messages": "{}"}, "messages must be a list"),
        ({"messages": ["hello"]}, r"messages\[0\] must be a mapping"),
        ({"messages": [{"role": "User", "content": "x"}]}, r"messages\[0\]: unknown role 'User'; known: .*user"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "unknown role 'robot'"),
        ({"messages": CHAT[::-1]}, r"messages\[1\]: the last turn is the user's"),
        ({"messages": [*CHAT, CHAT[1]]}, r"messages\[2\]: wrong order of roles: 'assistant' follows 'assistant'"),
        ({"messages": [CHAT[0], *CHAT]}, r"messages\[1\]: wrong order of roles: 'user' follows 'user'"),
        ({"messages": [*CHAT, {"role": "system", "content": "x"}]}, r"messages\[2\]: wrong order.*'system' follows"),
        ({"messages": [CHAT[0], {"role": "tool", "content": "x"}, CHAT[1]]}, r"messages\[1\]: .*'tool' follows 'user'"),
        ({"prompt": CHAT, "completion": [CHAT[1]] * 2}, r"messages\[3\]: wrong order.*'assistant' follows 'assistant'"),
        (
            {"messages": [CHAT[0], CHAT[1] | {"tool_responses": [{"name": "f", "response": "x"}]}]},
            "tool_responses is not supported: write each as a message of the role tool",
        ),
        ({"messages": CHAT[:1]}, r"messages\[0\]: the last turn is the user's; it must be the assistant's"),
        (
            {"messages": [CHAT[0], {"role": "assistant", "content": " \n"}]},
            r"messages\[1\]: the assistant's turn is empty",
        ),
        (
            {"messages": [CHAT[0], {"role": "assistant", "content": None}]},
            r"messages\[1\]: the assistant's turn is empty",
        ),
        ({"messages": [CHAT[0], {"role": "assistant", "content": 5}]}, "content must be a string, not int"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "only text can be trained on"),
        ({"messages": CHAT, "tools": "[{"}, "tools: broken JSON"),
        ({"messages": CHAT, "tools": {"name": "x"}}, "tools must be a list"),
        ({"messages": CHAT, "chat_template_kwargs": [1]}, "chat_template_kwargs must be a mapping"),
        ({"prompt": "x", "completion": CHAT[1:]}, "both be strings or both be lists"),
        ({"prompt": "x", "completion": ""}, r"completion\[0\]: the assistant's turn is empty"),
        ({"prompt": 5, "completion": 6}, "prompt must be a list of messages"),
        ({"text": ""}, "there is no text to learn"),
        ({"text": None}, "text must be a string, not NoneType"),
        ({"input_ids": []}, "no token of this row carries loss"),
        ({"input_ids": [5]}, "no token of this row carries loss"),
        ({"input_ids": [5, 6], "labels": [-100, -100]}, "no token of this row carries loss"),
        ({"input_ids": [5, 6], "labels": [6, -100]}, r"labels\[0\] is 6, which must be input_ids\[0\] \(5\) or -100"),
        ({"input_ids": [5, 6], "labels": [5]}, "labels: 1 of them for 2 input_ids"),
        ({"input_ids": [5, -1]}, "-1 is not a token id"),
        ({"input_ids": [5, 1000]}, "token id 1000 is beyond the model's vocabulary of 500"),
        ({"input_ids": [[5], [6, 7]]}, "input_ids must be a list of integers"),
        ({"input_ids": [0.5]}, "input_ids must be a list of integers"),
        ({"input_ids": "5 6"}, "input_ids must be a list of integers"),
    ],
)
def test_what_is_wrong_with_a_row_is_said(row, message):
    _, encode = chat_encoder(vocab_size=500)
    with pytest.raises(ValueError, match=message):
        encode(row)


SECOND = [{"role": "user", "content": "user"}, {"role": "assistant", "content": "tool"}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOL = {"type": "function", "function": {"name": "add"}}


@pytest.mark.parametrize("content", [None, "Paris"])
def test_what_a_template_leaves_out_is_an_error(content):
    calling = {"role": "assistant", "content": content, "tool_calls": [CALL]}
    messages = [CHAT[0], calling, {"role": "tool", "content": "2"}, CHAT[1]]
    ignoring = tokenizer(CHATML.replace("message['content']", "(message['content'] or '')"))
    with pytest.raises(ValueError, match=r"messages\[1\]: the chat template does not write its tool_calls"):
        Encoder(ignoring)({"messages": messages})
    with pytest.raises(ValueError, match="never writes the schemas of tools"):
        Encoder(ignoring)({"messages": CHAT, "tools": [TOOL]})
    with pytest.raises(ValueError, match="never writes the schemas of tools"):
        Encoder(ignoring).question({"prompt": "What", "tools": [TOOL]})
    thinking = [CHAT[0], CHAT[1] | {"reasoning_content": "2 and 2"}]
    with pytest.raises(ValueError, match=r"messages\[1\]: the chat template does not write its reasoning"):
        Encoder(ignoring)({"messages": thinking})
    whole = tokenizer("{{ messages | tojson }}{{ tools | tojson }}")  # names none of them, and writes all of them
    assert "add" in tok_prompt(whole, messages, [TOOL])


def tok_prompt(tok, messages, tools):
    return tok.decode(Encoder(tok).question({"prompt": messages, "tools": tools})[0])


def test_a_turn_that_renders_to_nothing_but_its_end_is_an_error():
    cleaning = tokenizer(CHATML.replace("message['content']", "message['content'] | replace('[x]', '')"))
    with pytest.raises(ValueError, match=r"messages\[1\].*nothing of this assistant's turn but its end"):
        Encoder(cleaning)({"messages": [CHAT[0], {"role": "assistant", "content": "[x]"}, *SECOND]})
    row = {"messages": [CHAT[0], {"role": "assistant", "content": "[x]", "weight": 0}, *SECOND]}
    assert learned(cleaning, Encoder(cleaning)(row)) == "tool<|im_end|>"  # it is not trained, so it may be empty


def test_a_row_that_cannot_be_walked_or_written_is_a_fault_of_the_row():
    tok = tokenizer(QWEN25)
    deep = "[" * 100_000
    with pytest.raises(ValueError, match="nested too deeply"):
        Encoder(tok)({"messages": CHAT, "tools": deep})
    with pytest.raises(ValueError, match=r"lone surrogate, U\+D83D"):
        Encoder(tok)({"prompt": "x \ud83d", "completion": "y"})
    with pytest.raises(ValueError, match="lone surrogate"):
        Encoder(tok).question({"prompt": "x \ud83d"})
    with pytest.raises(ValueError, match="lone surrogate"):
        Encoder(tokenizer(None), prompt_format="plain")({"prompt": "x", "completion": "\udfff"})
    failing = tokenizer("{% for m in messages %}{{ [][1].x.y }}{{ 1 / 0 }}{% endfor %}")
    with pytest.raises(ValueError, match="the chat template refuses the conversation"):
        Encoder(failing)({"messages": CHAT})


@pytest.mark.parametrize(
    "row",
    [
        {"messages": None, "prompt": "What", "completion": "Paris"},
        {"messages": CHAT, "input_ids": None, "labels": None, "tools": "", "images": None, "system": ""},
        {"text": None, "messages": None, "conversations": CHAT, "images": []},
    ],
)
def test_null_columns_beside_a_good_format_are_absent(row):
    tok, encode = chat_encoder()
    assert tok.decode(encode(row).input_ids) == TURNS


def test_a_question_without_a_prompt_is_an_error_with_its_reason():
    _, encode = chat_encoder()
    for row in ({"text": "x"}, {"input_ids": [1]}, {"prompt": None}, {"answer": "x"}):
        with pytest.raises(ValueError, match="there is no prompt"):
            encode.question(row)


def test_what_is_wrong_with_a_tokenizer_is_said():
    with pytest.raises(ValueError, match="needs a tokenizer"):
        Encoder(None)({"text": "x"})
    with pytest.raises(ValueError, match=r"no chat template.*model\.chat_template"):
        Encoder(tokenizer(None))({"messages": CHAT})
    with pytest.raises(ValueError, match="prompt_format"):
        Encoder(tokenizer(None))({"prompt": "x", "completion": "y"})
    with pytest.raises(ValueError, match="no eos_token"):
        Encoder(tokenizer(None, eos_token=None))({"text": "What"})


def test_a_template_that_leaves_the_answer_out_is_an_error():
    silent = "{% for m in messages %}{% if m.role != 'assistant' %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    with pytest.raises(ValueError, match="assistant"):
        Encoder(tokenizer(silent))({"messages": CHAT})


def test_loss_on_last_learns_the_last_turn_alone():
    tok, encode = chat_encoder(loss_on="last")
    assert learned(tok, encode({"messages": CHAT + SECOND})) == "tool<|im_end|>"
    assert learned(tok, encode({"prompt": "What", "completion": "Paris"})) == "Paris<|im_end|>"
    plain = Encoder(tokenizer(None), loss_on="last", prompt_format="plain")
    assert learned(tok, plain({"prompt": "What", "completion": " is"})) == " is</s>"
    masked = encode({"input_ids": [3, 1, 2, 9, 5], "completion_mask": [0, 1, 0, 1, 1]})
    assert masked.loss_weights.tolist() == [0, 0, 0, 1, 1]
    assert encode({"input_ids": [3, 1, 2]}).loss_weights.tolist() == [1, 1, 1]


def test_a_plain_prompt_and_completion_may_be_alpacas():
    encode = Encoder(tokenizer(None), prompt_format="plain")
    row = {"instruction": "What", "input": "of", "output": " is"}
    same = {"prompt": "What\nof", "completion": " is"}
    for one, other in [(encode(row), encode(same)), (encode.prompt(row), encode.prompt(same))]:
        np.testing.assert_array_equal(one.input_ids, other.input_ids)
    with pytest.raises(ValueError, match="'history' needs a chat template"):
        encode(row | {"history": [["a", "b"]]})
    with pytest.raises(ValueError, match="the column 'system' is for a chat template"):
        encode(row | {"system": "You are"})


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"prompt": CHAT[:1], "reward_model": {"style": "rule", "ground_truth": "Paris"}, "data_source": "d"}, "Paris"),
        ({"prompt": json.dumps(CHAT[:1]), "answer": "Rome"}, "Rome"),
        ({"instruction": "What", "input": None, "output": "Paris"}, "Paris"),
        ({"conversations": [{"from": "human", "value": "What"}, {"from": "gpt", "value": "Paris"}]}, "Paris"),
    ],
    ids=["verl", "json", "alpaca", "sharegpt"],
)
def test_a_question_of_other_formats(row, answer):
    tok, encode = chat_encoder()
    ids, columns = encode.question(row)
    assert tok.decode(ids) == TURNS.partition("Paris")[0]
    assert columns["answer"] == answer and columns.items() >= {k: v for k, v in row.items() if k != "prompt"}.items()
    assert columns["prompt"] in ("What", CHAT[:1])


def test_keys_of_a_questions_messages_that_are_not_read_are_reported_once():
    tok, encode = chat_encoder()
    row = {"prompt": [CHAT[0] | {"name": "Ann", "weight": 1.0}]}
    with pytest.warns(UserWarning, match=r"does not read messages\[\]\.name \(user\) of prompts") as caught:
        for _ in range(2):
            assert tok.decode(encode.question(row)[0]) == TURNS.partition("Paris")[0]
    assert len(caught) == 1


def test_a_template_without_a_system_role_names_what_to_do():
    tok = tokenizer(GEMMA, bos_token="<bos>")
    row = {"messages": CHAT, "system": "You are"}
    with pytest.raises(ValueError, match=r"System role not supported; data\.merge=\[system\] joins"):
        Encoder(tok)(row)
    assert "You are\n\nWhat" in tok.decode(Encoder(tok, merge=["system"])(row).input_ids)


def test_an_instruction_is_a_question_without_an_output_and_no_example():
    tok, encode = chat_encoder()
    ids, columns = encode.question({"instruction": "What"})
    assert tok.decode(ids) == TURNS.partition("Paris")[0] and columns.get("answer") is None
    with pytest.raises(ValueError, match="the column 'output' is null"):
        encode({"instruction": "What", "output": None})


def test_turns_are_joined_in_questions_and_answers():
    _, encode = chat_encoder(merge=["turns", "system"])
    user = {"role": "user", "content": "is"}
    row = {"messages": [CHAT[0], user, CHAT[1]], "system": "You are"}
    joined = [{"role": "user", "content": "You are\n\nWhat\n\nis"}, CHAT[1]]
    np.testing.assert_array_equal(encode(row).input_ids, encode({"messages": joined}).input_ids)
    for question in (
        encode.prompt(row).input_ids,
        encode.question({"prompt": [CHAT[0], user], "system": "You are"})[0],
    ):
        np.testing.assert_array_equal(question, encode.prompt({"messages": joined}).input_ids)


def test_alpacas_history_is_the_conversation_of_its_messages():
    _, encode = chat_encoder()
    row = {"instruction": "Name", "input": "one", "output": "tool", "history": [["What", "Paris"]], "system": "You are"}
    messages = [{"role": "system", "content": "You are"}, *CHAT, {"role": "user", "content": "Name\none"}, SECOND[1]]
    np.testing.assert_array_equal(encode(row)[:2], encode({"messages": messages})[:2])
