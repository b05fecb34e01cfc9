"""Assistant masks: `«` and `»` in the expected texts stand around what carries weight."""

import pytest
from chat_templates import (
    BY_INDEX,
    CHATML,
    EOS_ONCE,
    GEMMA,
    GENERATION,
    LLAMA3,
    MISTRAL,
    QWEN3,
    QWEN25,
    tokenizer,
)

from jaxtrain.data.chat import ChatTokenizer

CHAT = [
    {"role": "user", "content": "What is the capital?"},
    {"role": "assistant", "content": "Paris"},
    {"role": "user", "content": "assistant\n"},
    {"role": "assistant", "content": "The user is Paris. "},
]
CHATML_TURNS = (
    "<|im_start|>user\nWhat is the capital?<|im_end|>\n<|im_start|>assistant\n«Paris<|im_end|>»\n"
    "<|im_start|>user\nassistant\n<|im_end|>\n<|im_start|>assistant\n«The user is Paris. <|im_end|>»\n"
)
STOCK = {
    "smollm2": (CHATML, {}, "<|im_start|>system\nYou are helpful<|im_end|>\n" + CHATML_TURNS),
    "llama3": (
        LLAMA3,
        {"bos_token": "<|begin_of_text|>"},
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhat is the capital?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«Paris<|eot_id|>»"
        "<|start_header_id|>user<|end_header_id|>\n\nassistant<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«The user is Paris.<|eot_id|>»",
    ),
    "qwen25": (QWEN25, {}, CHATML_TURNS),
    "qwen3": (QWEN3, {}, CHATML_TURNS.replace("«The user", "«<think>\n\n</think>\n\nThe user")),
    "gemma": (
        GEMMA,
        {"bos_token": "<bos>"},
        "<bos><start_of_turn>user\nWhat is the capital?<end_of_turn>\n<start_of_turn>model\n«Paris<end_of_turn>»\n"
        "<start_of_turn>user\nassistant<end_of_turn>\n<start_of_turn>model\n«The user is Paris.<end_of_turn>»\n",
    ),
    "mistral": (
        MISTRAL,
        {},
        "<s>[INST] What is the capital?[/INST]« Paris</s>»[INST] assistant\n[/INST]« The user is Paris.</s>»",
    ),
    "generation marks": (GENERATION, {}, CHATML_TURNS),
    "prefix difference": (BY_INDEX, {}, CHATML_TURNS),
    "no token ends a turn": (
        EOS_ONCE,
        {},
        "### user:\nWhat is the capital?\n### assistant:\n«Paris»\n### user:\nassistant\n\n"
        "### assistant:\n«The user is Paris. \n</s>»",
    ),
}


def marked(tok, chat) -> str:
    """The decoded text with marks around every run of masked tokens."""
    runs, inside = "", False
    for token, masked in zip(chat.input_ids, chat.loss_weights > 0, strict=True):
        if masked != inside:
            runs += "«" if masked else "»"
            inside = masked
        runs += tok.decode([token], clean_up_tokenization_spaces=False)
    return runs + ("»" if inside else "")


@pytest.mark.parametrize("name", STOCK)
def test_exactly_the_assistants_words_and_their_end_carry_weight(name):
    template, special, expected = STOCK[name]
    tok = tokenizer(template, **special)
    chat = ChatTokenizer(tok)(CHAT)
    assert marked(tok, chat) == expected
    assert chat.input_ids.tolist() == tok.apply_chat_template(CHAT)["input_ids"]


@pytest.mark.parametrize("name", STOCK)
def test_with_a_system_turn_the_mask_moves_along(name):
    template, special, expected = STOCK[name]
    if name == "gemma":
        pytest.skip("Gemma has no system turn")
    tok = tokenizer(template, **special)
    with_system = [{"role": "system", "content": "You are Paris"}, *CHAT]
    chat = ChatTokenizer(tok)(with_system)
    spoken = [part.split("»")[0] for part in expected.split("«")[1:]]
    assert [part.split("»")[0] for part in marked(tok, chat).split("«")[1:]] == spoken
    assert chat.input_ids.tolist() == tok.apply_chat_template(with_system)["input_ids"]


@pytest.mark.parametrize("name", STOCK)
def test_turns_of_the_prompt_stay_out_of_the_mask(name):
    template, special, expected = STOCK[name]
    tok = tokenizer(template, **special)
    chat = ChatTokenizer(tok)(CHAT, weights=[0, 0, 0, 1])
    assert marked(tok, chat) == expected.replace("«", "", 1).replace("»", "", 1)


def test_the_prompt_is_what_stands_before_the_last_answer():
    for template, special, expected in STOCK.values():
        tok = tokenizer(template, **special)
        prompt = tok.decode(ChatTokenizer(tok).prompt(CHAT[:3]), clean_up_tokenization_spaces=False)
        assert prompt == expected.rpartition("«")[0].replace("«", "").replace("»", "")


@pytest.mark.parametrize("name", STOCK)
def test_a_reply_is_what_stands_between_two_turns_of_the_assistant(name):
    template, special, _ = STOCK[name]
    tok = tokenizer(template, **special)
    chat = ChatTokenizer(tok)
    ids, closing = chat.reply([CHAT[2]])
    answer = " Paris" if name == "mistral" else "Paris"  # the template writes the space
    whole = tok.decode(chat.prompt(CHAT[:1])) + answer + tok.decode(ids)
    assert whole == tok.decode(chat.prompt(CHAT[:3]))
    assert closing == (name != "no token ends a turn")


def test_a_reply_holds_several_tool_results_in_one_turn():
    tok = tokenizer(QWEN25)
    results = [{"role": "tool", "content": "Paris"}, {"role": "tool", "content": "Rome"}]
    ids, closing = ChatTokenizer(tok).reply(results)
    assert tok.decode(ids[:closing]) == "<|im_end|>"
    assert tok.decode(ids[closing:]) == (
        "\n<|im_start|>user\n<tool_response>\nParis\n</tool_response>\n<tool_response>\nRome\n</tool_response>"
        "<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_template_that_leaves_out_the_assistants_words_has_no_place_for_a_reply():
    chat = ChatTokenizer(tokenizer("{% for m in messages if m.role != 'assistant' %}{{ m.content }}{% endfor %}"))
    with pytest.raises(ValueError, match="does not write an assistant's turn"):
        chat.reply([CHAT[0]])


def test_a_templates_own_marks_are_taken_at_their_word():
    partial = GENERATION.replace(
        "message['content'] + '<|im_end|>' }}{% endgeneration %}{{ ",
        ("message['content'] }}{% endgeneration %}{{ '<|im_end|>' + "),
    )
    tok = tokenizer(partial)
    assert partial != GENERATION
    assert marked(tok, ChatTokenizer(tok)(CHAT)) == CHATML_TURNS.replace("<|im_end|>»", "»<|im_end|>")


THOUGHTS = [
    {"role": "user", "content": "2"},
    {"role": "assistant", "content": "<think>\nuser\n</think>\n\n3"},
    {"role": "user", "content": "4"},
    {"role": "assistant", "reasoning_content": "system", "content": "5"},
]


def test_qwen3_drops_earlier_thoughts_and_trains_the_last():
    tok = tokenizer(QWEN3)
    chat = ChatTokenizer(tok)(THOUGHTS, thoughts="accept")
    assert chat.thoughts_left_out
    assert marked(tok, chat) == (
        "<|im_start|>user\n2<|im_end|>\n<|im_start|>assistant\n«3<|im_end|>»\n"
        "<|im_start|>user\n4<|im_end|>\n<|im_start|>assistant\n«<think>\nsystem\n</think>\n\n5<|im_end|>»\n"
    )
    assert chat.input_ids.tolist() == tok.apply_chat_template(THOUGHTS)["input_ids"]


@pytest.mark.parametrize("name", ["thinking", "reasoning"])
def test_thoughts_go_by_several_names(name):
    renamed = [{name if key == "reasoning_content" else key: value for key, value in m.items()} for m in THOUGHTS]
    tok = tokenizer(QWEN3)
    chat = ChatTokenizer(tok)
    assert marked(tok, chat(renamed, thoughts="accept")) == marked(tok, chat(THOUGHTS, thoughts="accept"))


def test_qwen3_without_thinking_prompts_the_empty_thought():
    tok = tokenizer(QWEN3)
    chat = ChatTokenizer(tok)(CHAT, template_kwargs={"enable_thinking": False})
    assert marked(tok, chat) == CHATML_TURNS.replace("«The user", "<think>\n\n</think>\n\n«The user")


TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALLS = [
    {"role": "user", "content": "1"},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]},
    {"role": "tool", "content": "7"},
    {"role": "tool", "content": "8"},
    {"role": "assistant", "content": "9"},
]


@pytest.mark.parametrize("template", [QWEN25, QWEN3], ids=["qwen25", "qwen3"])
def test_tool_calls_are_learned_and_their_results_are_not(template):
    tok = tokenizer(template)
    chat = ChatTokenizer(tok)(CALLS, tools=TOOLS)
    thought = "<think>\n\n</think>\n\n" if template == QWEN3 else ""
    assert marked(tok, chat) == (
        '<|im_start|>system\n# Tools\n<tools>\n{"type": "function", "function": {"name": "add", "parameters": '
        '{"type": "object"}}}\n</tools><|im_end|>\n<|im_start|>user\n1<|im_end|>\n<|im_start|>assistant\n'
        f'«<tool_call>\n{{"name": "add", "arguments": {{"a": 1}}}}\n</tool_call><|im_end|>»\n'
        "<|im_start|>user\n<tool_response>\n7\n</tool_response>\n<tool_response>\n8\n</tool_response><|im_end|>\n"
        f"<|im_start|>assistant\n«{thought}9<|im_end|>»\n"
    )
    assert chat.input_ids.tolist() == tok.apply_chat_template(CALLS, tools=TOOLS)["input_ids"]


@pytest.mark.parametrize("template", [CHATML, LLAMA3], ids=["smollm2", "llama3"])
def test_a_template_that_never_writes_tools_refuses_them_by_name(template):
    chat = ChatTokenizer(tokenizer(template, bos_token="<|begin_of_text|>"))
    question = [{"role": "user", "content": "What is 1 + 1?"}]
    with pytest.raises(ValueError, match=r"never writes the schemas of tools.* not see add: .*model\.chat_template"):
        chat.prompt(question, tools=TOOLS)
    with pytest.raises(ValueError, match="never writes the schemas of tools"):
        chat([*question, {"role": "assistant", "content": "2"}], tools=TOOLS)
    assert len(chat.prompt(question, tools=[])) == len(chat.prompt(question))


def test_a_template_that_never_writes_a_role_refuses_it_as_a_reply():
    """Mistral's writes the user's and the assistant's messages and ignores all others."""
    with pytest.raises(ValueError, match="writes nothing for a message of the role 'tool'"):
        ChatTokenizer(tokenizer(MISTRAL)).reply([{"role": "tool", "content": "1786"}])
    ids, _ = ChatTokenizer(tokenizer(CHATML)).reply([{"role": "tool", "content": "1786"}])
    assert "tool\n1786" in tokenizer(CHATML).decode(ids)


def test_a_role_that_a_template_never_writes_is_refused_and_not_trained_past():
    chat = ChatTokenizer(tokenizer(MISTRAL))
    with pytest.raises(ValueError, match=r"messages\[2\]: .* writes nothing for a message of the role 'tool'"):
        chat([*CHAT[:2], {"role": "tool", "content": "7"}, CHAT[1]])
    default = [{"role": "system", "content": "You are helpful"}, *CHAT]  # as the template writes on its own
    assert len(ChatTokenizer(tokenizer(CHATML))(default).input_ids) == len(ChatTokenizer(tokenizer(CHATML))(CHAT)[0])


def test_generation_marks_outside_of_a_loop_belong_to_turns_in_order():
    marks = "".join(
        f"{{{{ messages[{n}].content }}}}{{% generation %}}{{{{ messages[{n + 1}].content }}}}{{% endgeneration %}}"
        for n in (0, 2)
    )
    tok = tokenizer(marks)
    assert marked(tok, ChatTokenizer(tok)(CHAT, weights=[0, 0, 0, 1])).count("«") == 1
    twice = tokenizer(marks + "{% generation %}{{ messages[3].content }}{% endgeneration %}")
    with pytest.raises(ValueError, match="cannot be distinguished"):
        ChatTokenizer(twice)(CHAT, weights=[0, 0, 0, 1])
    assert ChatTokenizer(twice)(CHAT).loss_weights.any()


def test_a_token_that_straddles_the_prompt_is_not_learned():
    tok = tokenizer(CHATML)
    chat = ChatTokenizer(tok)([{"role": "user", "content": "1"}, {"role": "assistant", "content": "\n\nParis"}])
    assert marked(tok, chat).endswith("<|im_start|>assistant\n\n«\nParis<|im_end|>»\n")


def test_characters_of_several_tokens_stay_whole():
    tok = tokenizer(CHATML)
    messages = [{"role": "user", "content": "é"}, {"role": "assistant", "content": "日本 🙂é"}]
    chat = ChatTokenizer(tok)(messages)
    assert tok.decode(chat.input_ids[chat.loss_weights > 0]) == "日本 🙂é<|im_end|>"


def test_a_template_that_rewrites_turns_without_a_loop_over_them_is_an_error():
    rewriting = BY_INDEX.replace(
        "messages[i]['content']",
        "(messages[i]['content'] if i == messages|length - 1 or messages[i]['role'] == 'user' else '')",
    )
    with pytest.raises(ValueError, match=r"messages\[1\].*generation"):
        ChatTokenizer(tokenizer(rewriting))(CHAT)


def test_a_header_unlike_the_generation_prompt_is_an_error():
    # The answer is headed by a count, so the prompt cannot be what stands before it.
    unlike = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + loop.index | string + '\\n' + m.content + '<|im_end|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    with pytest.raises(ValueError, match=r"begins an assistant turn with.*generation"):
        ChatTokenizer(tokenizer(unlike))(CHAT)


def test_what_the_template_refuses_is_an_error_with_its_words():
    with pytest.raises(ValueError, match="System role not supported"):
        ChatTokenizer(tokenizer(GEMMA))([{"role": "system", "content": "x"}, *CHAT])


def test_a_tokenizer_without_template_is_an_error():
    with pytest.raises(ValueError, match=r"no chat template.*model\.chat_template"):
        ChatTokenizer(tokenizer(None))
