"""Turns with thoughts: each a separate example, or all at once under a template that keeps the thoughts."""

import itertools
import json

import pytest
from chat_templates import QWEN3, tokenizer
from stock_templates import made

from jaxtrain.config import DataSection, ModelSection, SourceSection
from jaxtrain.data.chat import ChatTokenizer
from jaxtrain.data.formats import Encoder
from jaxtrain.data.packing import RowExamples
from jaxtrain.data.pipeline import TrainStream
from jaxtrain.roles.tokenizer import template_text

USER = {"role": "user", "content": "What?"}


def thoughtful(thought, answer):
    return {"role": "assistant", "content": answer, "reasoning_content": thought}


TALK = [USER, thoughtful("I wonder", "Paris"), USER, thoughtful("Now what", "Rome")]
INLINE = [USER, {"role": "assistant", "content": "<think>\nI wonder\n</think>\n\nParis"}, *TALK[2:]]


def split(tok, messages, **options):
    """The examples of a row as (what is not trained, what is)."""
    row = Encoder(tok, split_turns=True, **options)({"messages": messages})
    examples = row.items if isinstance(row, RowExamples) else [row]
    return [
        (tok.decode(e.input_ids[e.loss_weights == 0]), tok.decode(e.input_ids[e.loss_weights > 0])) for e in examples
    ]


@pytest.mark.parametrize("messages", [TALK, INLINE], ids=["key", "inline"])
@pytest.mark.parametrize("name", ["qwen3", "qwen3.5", "glm4.5", "nemotron3", "deepseek-r1", "r1-distill"])
def test_every_turn_follows_its_prompt_with_its_thought(name, messages):
    tok = made(name)
    first, second = split(tok, messages)
    for (prompt, turn), number in ((first, 1), (second, 3)):
        asked = tok.decode(ChatTokenizer(tok).prompt(messages[:number]))
        assert prompt.rstrip("\n") == asked.rstrip("\n")
        assert ("I wonder" in turn, "Now what" in turn) == (number == 1, number == 3)
    assert "I wonder" not in second[0] and "Paris" in second[0]


def test_a_thought_that_the_template_cuts_stands_behind_the_one_that_its_prompt_opens():
    end = "<|end_of_sentence|>"
    expected = [f"I wonder\n</think>\n\nParis{end}", f"Now what\n</think>\n\nRome{end}"]
    assert [turn for _, turn in split(made("r1-distill"), TALK)] == expected
    assert [turn for _, turn in split(made("r1-distill"), INLINE)] == expected


def test_calls_with_thoughts_are_trained_turn_by_turn():
    function = {"name": "add", "arguments": {"a": 1}}
    calling = {"role": "assistant", "content": "", "reasoning_content": "I add", "tool_calls": [{"function": function}]}
    chat = [USER, calling, {"role": "tool", "content": "seven"}, thoughtful("Now what", "Rome")]
    (_, call), (prompt, last) = split(made("gpt-oss"), chat)
    assert call.startswith("<|channel|>analysis<|message|>I add<|end|>") and call.endswith("<|call|>")
    # As the model is prompted after the call, though the template leaves out the thought once an answer follows.
    assert prompt == made("gpt-oss").decode(ChatTokenizer(made("gpt-oss")).prompt(chat[:3]))
    assert "I add" in prompt and "Now what" in last


CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
STEPS = [
    USER,
    thoughtful("I add", "") | {"tool_calls": [CALL]},
    {"role": "tool", "content": "seven", "tool_call_id": "abcdefghi"},
    thoughtful("Now what", "Rome"),
]


@pytest.mark.parametrize("how", ["last", "weight", "completion"])
@pytest.mark.parametrize("name", ["gpt-oss", "qwen3", "qwen3.5", "glm4.5", "gemma4", "nemotron3"])
def test_a_last_turn_that_is_trained_alone_follows_its_prompt_too(name, how):
    tok, row = made(name), {"messages": STEPS}
    if how == "weight":
        row = {"messages": [STEPS[0], STEPS[1] | {"weight": 0}, *STEPS[2:]]}
    elif how == "completion":
        row = {"prompt": STEPS[:3], "completion": STEPS[3:]}
    example = Encoder(tok, loss_on="last" if how == "last" else "assistant")(row)
    prompt = tok.decode(example.input_ids[: example.loss_weights.tolist().index(1)])
    # Also under GPT-OSS's, which leaves out the thought of the call once an answer follows.
    assert prompt == tok.decode(ChatTokenizer(tok).prompt(STEPS[:3])) and "I add" in prompt
    assert "Now what" in tok.decode(example.input_ids[example.loss_weights > 0])


@pytest.mark.parametrize("where", [1, 3])
def test_a_thought_that_a_later_turn_is_prompted_with_is_not_left_out(where):
    oslo, rome = ({"role": "assistant", "content": content} for content in ("Oslo", "Rome"))
    steps, tok = [*STEPS[:3], rome], made("gpt-oss")
    talk = [*steps, USER, oslo] if where == 1 else [USER, oslo, *steps]
    weights = [float(message in (oslo, rome)) for message in talk]
    message = rf"messages\[{where}\]: .* leaves out the thought .* prompted with it for messages\[{where + 2}\]"
    with pytest.raises(ValueError, match=message):
        ChatTokenizer(tok)(talk, weights=weights)
    assert ChatTokenizer(tok)(talk, weights=weights, thoughts="accept").thoughts_left_out
    rows = split(tok, [message | ({"weight": 0} if "tool_calls" in message else {}) for message in talk])
    assert ["I add" in prompt for prompt, _ in rows] == [where == 1, where == 3]


def test_only_turns_with_a_weight_make_examples():
    ((_, turn),) = split(made("qwen3"), [*TALK[:1], TALK[1] | {"weight": 0}, *TALK[2:]])
    assert turn.startswith("<think>\nNow what")


def test_by_default_dropped_thoughts_are_an_error_and_false_accepts_them():
    tok = made("qwen3")
    with pytest.raises(ValueError, match=r"data\.split_turns=false accepts it"):
        Encoder(tok)({"messages": TALK})
    with pytest.warns(UserWarning, match="counted as thoughts_left_out"):
        row = Encoder(tok, split_turns=False)({"messages": TALK})
    assert row.events == ("thoughts_left_out",) and len(row.items) == 1
    with pytest.raises(ValueError, match=r"data\.split_turns=true .*data\.loss_on"):
        Encoder(tok, split_turns=True, loss_on="all")


def stream(path, split_turns):
    section = SourceSection(path=str(path), epochs=1)
    data = DataSection(train=section, max_length=64, packing_bins=2, split_turns=split_turns)
    encode = Encoder.configured(tokenizer(QWEN3), data, vocab_size=1000)
    return TrainStream([section], data, encode, rows=1, seed=0, shards=[0], num_shards=1)


def test_the_examples_of_a_row_are_packed_counted_and_resumed(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"messages": TALK}) + "\n" for _ in range(7)))
    with stream(path, True) as whole:
        batches = list(whole)
        assert whole.stats["examples"] == 14
    for taken in range(1, len(batches)):
        with stream(path, True) as before:
            list(itertools.islice(before, taken))
            state = json.loads(json.dumps(before.get_state()))
        with stream(path, True) as after:
            after.set_state(state)
            rest = list(after)
        assert [b.tokens.tolist() for b in rest] == [b.tokens.tolist() for b in batches[taken:]]
    with stream(path, False) as accepted:
        list(accepted)
        assert accepted.stats["thoughts_left_out"] == 7 and accepted.stats["examples"] == 7


def test_a_state_from_before_a_counter_is_known_goes_on(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"messages": TALK}) + "\n" for _ in range(4)))
    with stream(path, True) as first:
        next(first)
        state = first.get_state()
    del state["0"]["next"]["thoughts_left_out"]
    with stream(path, True) as after:
        after.set_state(state)
        assert list(after) and after.stats["thoughts_left_out"] == 0


def test_the_builtin_template_trains_all_turns_with_their_thoughts():
    tok = tokenizer(template_text("builtin:qwen3-thinking"))
    chat = ChatTokenizer(tok)(TALK)
    text = tok.decode(chat.input_ids[chat.loss_weights > 0])
    assert text == "<think>\nI wonder\n</think>\n\nParis<|im_end|><think>\nNow what\n</think>\n\nRome<|im_end|>"
    assert tok.decode(ChatTokenizer(tok)(INLINE).input_ids) == tok.decode(chat.input_ids)
    # A conversation that goes on begins with what it was.
    shorter = ChatTokenizer(tok)(TALK[:2]).input_ids
    assert chat.input_ids[: len(shorter)].tolist() == shorter.tolist()


@pytest.mark.parametrize("tools", [None, [{"type": "function", "function": {"name": "add"}}]], ids=["bare", "tools"])
def test_the_builtin_template_writes_the_last_turn_as_qwen3_does(tools):
    """The shape in the tests has a shorter text before its tools."""
    calling = {
        "role": "assistant",
        "content": "I look.",
        "tool_calls": [{"function": {"name": "add", "arguments": {}}}],
    }
    chat = [{"role": "system", "content": "Be kind."}, USER, calling, {"role": "tool", "content": "7"}, TALK[1]]
    for messages in (chat[:2], chat[:3], chat[:4], chat):
        prompt = messages[-1]["role"] != "assistant"
        ours, theirs = (
            tokenizer(template).apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=prompt)
            for template in (template_text("builtin:qwen3-thinking"), QWEN3)
        )
        assert ours.rpartition("<|im_start|>")[2] == theirs.rpartition("<|im_start|>")[2]


def test_an_unknown_builtin_template_is_named():
    with pytest.raises(ValueError, match=r"no builtin:qwen4; known: builtin:qwen3-thinking"):
        template_text("builtin:qwen4")
    assert ModelSection(config={}, chat_template="builtin:qwen3-thinking").chat_template
