"""(Stock template) x (kind of conversation): the ids of `apply_chat_template`, and what the model must write.

Each cell of the table is the list of runs of tokens that are trained, in order, or the reason of a refusal after `!`.
"""

import warnings

import pytest
from chat_templates import ALPACA, CHATML, GENERATION, VICUNA, tokenizer
from stock_templates import STOCK, made, trained

from jaxtrain.data.chat import ChatTokenizer
from jaxtrain.data.formats import Encoder

USER = {"role": "user", "content": "What?"}
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "abcdefghi", "content": "seven"}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
NO_THOUGHT = {"enable_thinking": False}


def answer(content, **more):
    return {"role": "assistant", "content": content, **more}


CHATS = {
    "plain": [USER, answer("Paris")],
    "multi-turn": [USER, answer("Paris"), USER, answer("Rome")],
    "system": [{"role": "system", "content": "Be kind."}, USER, answer("Paris")],
    "tools": [USER, CALLING],
    "tool result": [USER, CALLING, RESULT, answer("Rome")],
    "reasoning": [USER, answer("Paris", reasoning_content="I wonder")],
}
REASONING = "!does not write its reasoning"
NO_TOOLS = "!never writes the schemas of tools"
OPENED = "!prompts for this turn with .*<think>.* and writes it otherwise"
HERMES = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
XML = "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>"
EMPTY = "<think>\n\n</think>\n\n"
DEEPSEEK_CALL = "<|tool_calls_begin|><|tool_call_begin|>function<|tool_sep|>add\n```json\n"
DEEPSEEK_CALL += '{"a": 1}\n```<|tool_call_end|><|tool_calls_end|><|end_of_sentence|>'
GLM = "\n<think></think>\n"


def row(end, call, *, before="", after_result=None, reasoning=REASONING):
    """The cells of a template whose turns are words and an end."""
    calls = [f"{before}{call}{end}"] if not call.startswith("!") else call
    last = after_result or f"{before}Rome{end}"
    return {
        "plain": [f"{before}Paris{end}"],
        "multi-turn": [f"{before}Paris{end}", f"{before}Rome{end}"],
        "system": [f"{before}Paris{end}"],
        "tools": calls,
        "tool result": calls if isinstance(calls, str) else [*calls, last],
        "reasoning": reasoning,
    }


OPENS_A_THOUGHT = dict.fromkeys(CHATS, OPENED + ".*whose prompt opens none as model.chat_template") | {
    **dict.fromkeys(("tools", "tool result"), NO_TOOLS),
    "reasoning": "!does not write its reasoning.*data.split_turns=true",
}

TABLE = {
    "qwen2.5": row("<|im_end|>", HERMES),
    "qwen3": row("<|im_end|>", HERMES, before=EMPTY, reasoning=["<think>\nI wonder\n</think>\n\nParis<|im_end|>"])
    | {
        "multi-turn": ["Paris<|im_end|>", f"{EMPTY}Rome<|im_end|>"],
        "tool result": [f"{HERMES}<|im_end|>", f"{EMPTY}Rome<|im_end|>"],
    },
    "qwen3.5": row("<|im_end|>", XML, before="</think>\n\n", reasoning=["I wonder\n</think>\n\nParis<|im_end|>"])
    | {"multi-turn": OPENED},
    "llama3.1": row("<|eot_id|>", '{"name": "add", "parameters": {"a": 1}}'),
    "llama3.2": row("<|eot_id|>", '{"name": "add", "parameters": {"a": 1}}'),
    "gemma3": row("<end_of_turn>", "!refuses the conversation|never writes"),
    "gemma4": row("<turn|>", "", reasoning=["<|channel>thought\nI wonder\n<channel|>Paris<turn|>"])
    | {
        "tools": ["<|tool_call>call:add{a:1}<tool_call|><|tool_response>"],
        "tool result": ["<|tool_call>call:add{a:1}<tool_call|><|tool_response>", "Rome<turn|>"],
    },
    "mistral3": row("</s>", '[TOOL_CALLS][{"name": "add", "arguments": {"a": 1}, "id": "abcdefghi"}]'),
    "mistral-v11": row("</s>", '[TOOL_CALLS]add[CALL_ID]abcdefghi[ARGS]{"a": 1}'),
    "mistral-v13": row("</s>", '[TOOL_CALLS]add[ARGS]{"a": 1}'),
    "phi4": row("<|im_end|>", NO_TOOLS) | {"tool result": "!writes nothing for a message|never writes the schemas"},
    "gpt-oss": {
        "plain": ["<|channel|>final<|message|>Paris<|return|>"],
        "multi-turn": ["<|channel|>final<|message|>Paris<|end|>", "<|channel|>final<|message|>Rome<|return|>"],
        "system": ["<|channel|>final<|message|>Paris<|return|>"],
        "tools": [' to=functions.add<|channel|>commentary json<|message|>{"a": 1}<|call|>'],
        "tool result": [
            ' to=functions.add<|channel|>commentary json<|message|>{"a": 1}<|call|>',
            "<|channel|>final<|message|>Rome<|return|>",
        ],
        "reasoning": [
            "<|channel|>analysis<|message|>I wonder<|end|><|start|>assistant<|channel|>final<|message|>Paris<|return|>"
        ],
    },
    "glm4.5": row("<|user|>", "", before=GLM, reasoning=["\n<think>I wonder</think>\nParis<|user|>"])
    | {
        "tools": [f"{GLM}<tool_call>add\na=1\n</tool_call><|observation|>"],
        "tool result": [f"{GLM}<tool_call>add\na=1\n</tool_call><|observation|>", f"{GLM}Rome<|user|>"],
    },
    "deepseek-v3": row("<|end_of_sentence|>", NO_TOOLS),
    "deepseek-r1": OPENS_A_THOUGHT,
    "r1-distill": OPENS_A_THOUGHT,
    "smollm3": row("<|im_end|>", NO_TOOLS),
    "lfm2": row("<|im_end|>", "<|tool_call_start|>[add(a=1)]<|tool_call_end|>"),
    "nemotron3": dict.fromkeys(CHATS, OPENED) | {"reasoning": ["I wonder\n</think>\nParis<|im_end|>"]},
    "granite4": row("<|end_of_text|>", "\n" + HERMES),
}
CELLS = [(name, kind) for name, cells in TABLE.items() for kind in cells]


def check(tok, messages, expected, tools=None, kwargs=None, **options):
    chat = ChatTokenizer(tok)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected.removeprefix("!")):
            chat(messages, tools=tools, template_kwargs=kwargs, **options)
        return
    made = chat(messages, tools=tools, template_kwargs=kwargs, **options)
    assert trained(tok, made) == expected and not made.warnings
    theirs = tok.apply_chat_template(messages, tools=tools, **(kwargs or {}))["input_ids"]
    added = made.input_ids.tolist()[len(theirs) :]
    assert made.input_ids.tolist()[: len(theirs)] == theirs and len(added) <= 1
    assert not added or expected[-1].endswith(tok.decode(added))
    # The last turn is what follows the prompt that the model will be given.
    asked = tok.apply_chat_template(
        messages[:-1], tools=tools, add_generation_prompt=True, tokenize=False, **(kwargs or {})
    )
    whole = tok.decode(made.input_ids)
    assert whole.startswith(asked) and whole[len(asked) :].lstrip("\n").startswith(expected[-1].lstrip("\n"))


@pytest.mark.parametrize(("name", "kind"), CELLS, ids=[f"{name}-{kind}" for name, kind in CELLS])
def test_stock_templates(name, kind):
    tok = made(name)
    tools = TOOLS if kind in ("tools", "tool result") else None
    messages = [dict(message) for message in CHATS[kind]]
    if tools and name in ("gpt-oss", "glm4.5"):  # which write null as words, or fail
        messages[1]["content"] = ""
    check(tok, messages, TABLE[name][kind], tools)


@pytest.mark.parametrize("name", STOCK)
def test_an_empty_answer_is_refused(name):
    with pytest.raises(ValueError, match="the assistant's turn is empty"):
        Encoder(made(name))({"messages": [USER, answer("")]})


@pytest.mark.parametrize("kind", ["plain", "multi-turn", "system", "tools", "tool result"])
@pytest.mark.parametrize("name", ["qwen3.5", "nemotron3"])
def test_turns_without_thoughts_follow_a_prompt_with_an_empty_one(name, kind):
    expected = row("<|im_end|>", XML)[kind]
    check(made(name), CHATS[kind], expected, TOOLS if "tool" in kind else None, NO_THOUGHT)


def test_a_thought_does_not_follow_a_prompt_with_an_empty_one():
    for name in ("qwen3", "qwen3.5", "nemotron3"):
        check(made(name), CHATS["reasoning"], "!prompts for (this turn|one) with .*</think>", kwargs=NO_THOUGHT)


def test_a_system_message_that_changes_the_prompt_changes_the_mask():
    messages = [{"role": "system", "content": "/no_think"}, *CHATS["multi-turn"]]
    check(made("smollm3"), messages, ["Paris<|im_end|>", "Rome<|im_end|>"])


@pytest.mark.parametrize("name", ["deepseek-v3", "r1-distill", "gemma4"])
def test_turns_after_a_tool_result_are_trained(name):
    """Where the prompt for them is not that for an answer to a user."""
    tok = made(name)
    chat = ChatTokenizer(tok)([*CHATS["tool result"], USER, answer("Paris")], weights=[0, 0, 0, 1, 0, 0])
    assert trained(tok, chat) == ["Rome" + ("<turn|>" if name == "gemma4" else "<|end_of_sentence|>")]


def test_a_call_of_a_built_in_tool_ends_a_step():
    call = '{"name": "add", "parameters": {"a": 1}}<|eom_id|>'
    expected = [call, "Rome<|eot_id|>"]
    check(made("llama3.1"), CHATS["tool result"], expected, kwargs={"builtin_tools": ["add"]})


IN_WORDS = [
    USER,
    answer('<tool_call>\n{"name": "add"}\n</tool_call>'),
    {"role": "tool", "content": "seven"},
    answer("Rome"),
]


@pytest.mark.parametrize(
    ("name", "before", "ends"),
    [
        ("qwen2.5", "", ("<|im_end|>", "<|im_end|>")),
        ("llama3.2", "", ("<|eot_id|>", "<|eot_id|>")),
        ("mistral3", "", ("</s>", "</s>")),
        ("glm4.5", GLM, ("<|observation|>", "<|user|>")),
        ("gemma4", "", "!writes nothing for a message of the role 'tool'"),
    ],
)
def test_calls_in_words_are_words(name, before, ends):
    """As Hermes' data writes them, with results of a tool behind."""
    texts = [IN_WORDS[1]["content"], "Rome"]
    cell = ends if isinstance(ends, str) else [before + text + end for text, end in zip(texts, ends, strict=True)]
    check(made(name), IN_WORDS, cell)


@pytest.mark.parametrize("system", [[], CHATS["system"][:1]], ids=["", "system"])
@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("qwen2.5", ("Paris<|im_end|>", "Rome<|im_end|>")),
        ("gemma4", ("Paris<turn|>", "Rome<turn|>")),
        ("glm4.5", (f"{GLM}Paris<|user|>", f"{GLM}Rome<|user|>")),
        ("gpt-oss", ("<|channel|>final<|message|>Paris<|end|>", "<|channel|>final<|message|>Rome<|return|>")),
        ("nemotron3", OPENED),
        ("gemma3", "!refuses the conversation: Conversation roles must alternate"),
    ],
)
def test_the_assistant_may_speak_first(name, ends, system):
    messages = [*system, answer("Paris"), USER, answer("Rome")]
    check(made(name), messages, ends if isinstance(ends, str) else list(ends))
    if not isinstance(ends, str):
        split = Encoder(made(name), split_turns=True)({"messages": messages})
        assert len(split.items) == 2


def test_several_calls_end_as_one_does():
    tok = made("deepseek-v3")
    twice = ChatTokenizer(tok)([USER, CALLING | {"tool_calls": [CALL, CALL]}])
    (run,) = trained(tok, twice)
    assert run.count("<|tool_call_begin|>") == 2 and run.endswith("<|tool_calls_end|><|end_of_sentence|>")
    # R1's template leaves the turn open: a call's last token ends the call and not the turn.
    tok = made("r1-distill")
    (run,) = trained(tok, ChatTokenizer(tok)([USER, CALLING], thoughts="accept"))
    assert run.endswith("<|tool_call_end|><|tool_outputs_begin|>")


PHI3 = (  # as TRL marks it: the end of the text, which is written once, in a mark of its own
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>\n' + m.content + '<|end|>\n' }}{% else %}"
    "{{ '<|assistant|>\n' }}{% generation %}{{ m.content + '<|end|>\n' }}{% endgeneration %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{% generation %}{{ eos_token }}"
    "{% endgeneration %}{% endif %}"
)


def test_marks_behind_the_loop_do_not_lengthen_a_turn_that_has_ended():
    tok = tokenizer(PHI3, tokens=("<|user|>", "<|assistant|>", "<|end|>"), eos_token="</s>")
    assert trained(tok, ChatTokenizer(tok)(CHATS["multi-turn"])) == ["Paris<|end|>", "Rome<|end|>"]
    open_turns = PHI3.replace("m.content + '<|end|>\n' }}{% endg", "m.content }}{% endg")
    tok = tokenizer(open_turns, tokens=("<|user|>", "<|assistant|>", "<|end|>"), eos_token="</s>")
    assert trained(tok, ChatTokenizer(tok)(CHATS["plain"])) == ["Paris</s>"]


def test_marks_do_not_hide_a_thought_behind_a_prompt_with_an_empty_one():
    empty, header = "<think>\n\n</think>\n\n", "<|im_start|>assistant\n"
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
        "{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' + m.content + '<|im_end|>\n' }}"
        "{% endgeneration %}{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    ) + f"{{% if add_generation_prompt %}}{{{{ {header + empty!r} }}}}{{% endif %}}"
    tok = tokenizer(template, eos_token="<|im_end|>")
    check(tok, CHATS["plain"], ["Paris<|im_end|>"])
    check(tok, CHATS["reasoning"], "!prompts for this turn .* holds an empty thought and the turn has one")
    chat = ChatTokenizer(tok)(CHATS["reasoning"], thoughts="accept")
    assert trained(tok, chat) == ["<think>\nI wonder\n</think>\n\nParis<|im_end|>"]


def test_content_that_is_written_behind_the_results_is_refused():
    chat = [USER, CALLING | {"content": "Let me see."}, RESULT, answer("Rome")]
    with pytest.raises(ValueError, match=r"messages\[1\]: .* writes the words of this turn behind the results"):
        ChatTokenizer(made("gemma4"))(chat)


def test_reasoning_beside_a_call_is_trained():
    tok = made("gpt-oss")
    chat = ChatTokenizer(tok)([USER, CALLING | {"reasoning_content": "I wonder"}])
    assert trained(tok, chat) == [
        "<|channel|>analysis<|message|>I wonder<|end|><|start|>assistant to=functions.add<|channel|>commentary "
        'json<|message|>{"a": 1}<|call|>'
    ]


@pytest.mark.parametrize("template", [VICUNA, ALPACA], ids=["vicuna", "alpaca"])
def test_the_last_turn_is_ended_where_the_template_does_not(template):
    tok = tokenizer(template)
    first, last = trained(tok, ChatTokenizer(tok)(CHATS["multi-turn"]))
    assert first.lstrip() == "Paris" and last.replace(" ", "") == "Rome</s>"
    alone = ChatTokenizer(tok)(CHATS["multi-turn"], weights=[0, 1, 0, 0])
    assert alone.input_ids[-1] != tok.eos_token_id


def test_the_end_of_a_thought_ends_no_turn():
    tok = made("glm4.5")
    (run,) = trained(tok, ChatTokenizer(tok)([USER, answer("<think>hm</think>")]))
    assert run.endswith("</think><|user|>")


def test_words_of_the_next_turn_are_not_trained():
    """Where no token ends a turn, the next one may begin in a token with the space between the two."""
    template = VICUNA.replace("USER: ", "capital: ")
    tok = tokenizer(template)
    chat = ChatTokenizer(tok)(CHATS["multi-turn"])
    assert " capital" in [tok.decode([token]) for token in chat.input_ids]
    assert trained(tok, chat)[0].lstrip() == "Paris"


MARKS_WITHOUT_END = GENERATION.replace(
    "+ '<|im_end|>' }}{% endgeneration %}{{ '", "}}{% endgeneration %}{{ '<|im_end|>"
)


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (ALPACA, CHATS["multi-turn"], r"writes none where others follow: data\.split_turns=true"),
        (MARKS_WITHOUT_END, CHATS["plain"], "put the token inside the marks"),
        (CHATML, [USER, answer("Paris<|im_end|>")], r"contain '<\|im_end\|>', which ends its turns"),
    ],
    ids=["none between turns", "outside of the marks", "in the words"],
)
def test_turns_that_end_in_a_doubtful_way_are_warned_of_once(template, messages, message):
    tok = tokenizer(template, eos_token="<|im_end|>")
    encode = Encoder(tok)
    with pytest.warns(UserWarning, match=message) as warned:
        encode({"messages": messages})
        encode({"messages": messages})
    assert len(warned) == 1
    assert not ChatTokenizer(tok)(messages, loss_on="all").warnings


def test_split_turns_are_all_ended():
    tok = tokenizer(ALPACA)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = Encoder(tok, split_turns=True)({"messages": CHATS["multi-turn"]})
    assert [each.input_ids[-1] for each in made.items] == [tok.eos_token_id] * 2


def test_no_word_is_lost_behind_a_prompt_that_ends_with_a_space():
    tok = tokenizer(VICUNA)
    messages = [USER, answer("the capital")]  # a separate token with its space
    (run,) = trained(tok, ChatTokenizer(tok)(messages))
    assert run == " the capital </s>"


def test_without_any_end_the_row_is_an_error():
    tok = tokenizer(ALPACA)
    tok.eos_token = None
    with pytest.raises(ValueError, match="never learn to stop"):
        ChatTokenizer(tok)(CHATS["plain"])


def test_marks_do_not_reach_into_the_prompt_or_behind_the_end():
    tok = tokenizer(
        GENERATION.replace(
            "{{ '<|im_start|>assistant\\n' }}{% generation %}", "{% generation %}{{ '<|im_start|>assistant\\n' }}"
        ).replace("{% endgeneration %}{{ '\\n' }}", "{{ '\\n' }}{% endgeneration %}")
    )
    assert trained(tok, ChatTokenizer(tok)(CHATS["multi-turn"])) == ["Paris<|im_end|>", "Rome<|im_end|>"]
    assert trained(tok, ChatTokenizer(tok)(CHATS["multi-turn"], weights=[0, 0, 0, 1])) == ["Rome<|im_end|>"]


def test_ids_are_those_of_the_template_alone():
    tok = tokenizer(CHATML)
    assert ChatTokenizer(tok)(CHATS["plain"]).input_ids.tolist() == tok.apply_chat_template(CHATS["plain"])["input_ids"]


@pytest.mark.parametrize("name", STOCK)
def test_what_came_before_does_not_change_what_is_found(name):
    """The beginnings of turns are held from one conversation to the next: a tokenizer that has seen all of them, in
    either order, finds what a new one does."""
    tok = made(name)
    switch = [USER | {"content": "What? /no_think"}, answer("Paris")]
    chats = [*CHATS.values(), switch, [{"role": "system", "content": "/no_think"}, *CHATS["multi-turn"]]]

    def found(chat, messages):
        try:
            encoded = chat(messages, tools=TOOLS if any("tool_calls" in each for each in messages) else None)
        except ValueError as error:
            return str(error)
        return encoded.input_ids.tolist(), encoded.loss_weights.tolist()

    expected = [found(ChatTokenizer(tok, date="2026-01-31"), messages) for messages in chats]
    used = ChatTokenizer(tok, date="2026-01-31")
    order = [*range(len(chats)), *reversed(range(len(chats)))]
    assert [found(used, chats[at]) for at in order] == [expected[at] for at in order]
