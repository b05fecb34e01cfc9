"""Rows of preferences: which prompt and answers they are, and the signals of their examples."""

import chat_templates
import numpy as np
import pytest
from tokenizers import processors

from converters.tokenizer import load_tokenizer, write_byte_tokenizer
from jaxtrain.config import DataSection, SourceSection
from jaxtrain.data.formats import Encoder
from jaxtrain.data.packing import RowExamples
from jaxtrain.data.pairs import LabelEncoder, PairEncoder, split_pair
from jaxtrain.data.pipeline import TrainStream
from jaxtrain.data.shards import Reader
from jaxtrain.data.sources import Source
from jaxtrain.types import MISMATCHED

USER, GOOD, BAD = (
    {"role": role, "content": text} for role, text in (("user", "Hi?"), *[("assistant", t) for t in ("Yes", "No!")])
)
PAIR = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(folder)
    return load_tokenizer(folder)


def data(**changes):
    return DataSection(train=SourceSection(rows=[PAIR]), max_length=64, **changes)


def encoder(tokenizer, kind=PairEncoder, plain=False, section=None, **options):
    encode = Encoder(tokenizer, prompt_format="plain" if plain else "chat")
    return kind(encode, section or data(), **options)


@pytest.mark.parametrize(
    "row",
    [
        PAIR,
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},  # implicit prompt
        {"prompt": "Hi?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},  # UltraFeedback's
        {"prompt": "Hi?", "chosen": "Yes", "rejected": "No!"},
        {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"messages": [USER], "chosen": GOOD, "rejected": BAD},
        {
            "conversations": [{"from": "human", "value": "Hi?"}],
            "chosen": {"from": "gpt", "value": "Yes"},
            "rejected": BAD,
        },
        {"instruction": "Hi?", "chosen": "Yes", "rejected": "No!"},
        {
            "chosen": '[{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes"}]',
            "rejected": [USER, BAD],
        },
    ],
    ids=range(9),
)
def test_all_ways_to_write_a_pair_give_the_same_examples(tokenizer, row):
    encode = encoder(tokenizer)
    chosen, rejected = encode(row)
    for example, answer, sign in ((chosen, GOOD, 1), (rejected, BAD, -1)):
        expected = Encoder(tokenizer)({"messages": [USER, answer]})
        np.testing.assert_array_equal(example.input_ids, expected.input_ids)
        np.testing.assert_array_equal(example.loss_weights, expected.loss_weights)
        assert (example.signals["sign"] == sign).all() and list(example.signals) == ["sign"]


def test_answers_of_several_turns_are_trained_and_earlier_ones_of_the_prompt_are_not(tokenizer):
    prompt = [USER, {"role": "assistant", "content": "What?"}, {"role": "user", "content": "Well"}]
    chosen, _ = encoder(tokenizer)({"chosen": [*prompt, GOOD], "rejected": [*prompt, BAD]})
    assert tokenizer.decode(chosen.input_ids[chosen.loss_weights > 0]).strip().startswith("Yes")


def test_strings_without_a_prompt_have_their_common_beginning(tokenizer):
    row = {"chosen": "Q: 1+1? A: 2", "rejected": "Q: 1+1? A: 3"}
    sides = split_pair(row, plain=True)
    assert sides.chosen == {"prompt": "Q: 1+1? A:", "completion": " 2"}
    with pytest.raises(ValueError, match=r"data\.prompt_format=plain"):
        encoder(tokenizer)(row)
    chosen, rejected = encoder(tokenizer, plain=True)(row)
    assert tokenizer.decode(chosen.input_ids[:-1]) == row["chosen"]
    assert chosen.loss_weights.sum() == rejected.loss_weights.sum() == 3  # " 2" and the end


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Hi?", "chosen": "Yes"}, "no 'rejected' answer: this row has the columns 'prompt', 'chosen'"),
        (PAIR | {"rejected": "No!"}, "both be strings or both be messages"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "there is no prompt"),
        ({"prompt": "Bye", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "`prompt` is not the last message"),
        (PAIR | {"margin": "large"}, "margin must be true, false or a finite number"),
        (PAIR | {"ref_chosen_logps": [0.5]}, "ref_chosen_logps: 1 log-probabilities for"),
        (PAIR | {"weight": 0.5}, "must be 0 or 1 here"),
        (PAIR | {"chosen": []}, "chosen must be a string or a list of messages that is not empty"),
    ],
)
def test_what_is_no_pair_is_refused(tokenizer, row, message):
    with pytest.raises(ValueError, match=message):
        encoder(tokenizer)(row)


def test_tools_and_margins_and_references_reach_the_examples(tokenizer):
    chosen, rejected = encoder(tokenizer)(PAIR | {"margin": 2, "ref_chosen_logps": -3.5, "ref_rejected_logps": -7})
    assert (chosen.signals["margin"] == 2).all() and (rejected.signals["margin"] == 2).all()
    for example, total in ((chosen, -3.5), (rejected, -7)):
        assert example.signals["ref_logps"] @ example.loss_weights == total
    with pytest.raises(ValueError, match=r"tools"):
        encoder(tokenizer)(PAIR | {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]})


def test_equal_answers_are_counted(tokenizer):
    assert encoder(tokenizer)(PAIR | {"rejected": [GOOD]}) == RowExamples([], ("equal_pairs",))


def test_logps_of_each_token_follow_the_cut(tokenizer):
    row = PAIR | {"prompt": [USER | {"content": "Hi? " * 20}], "chosen": [GOOD | {"content": "Yes " * 20}]}
    ids = encoder(tokenizer)(row)[0].input_ids
    tokens = len(ids)
    for overlong, length, place in (("truncate", 64, slice(0, 64)), ("keep_completion", 50, slice(tokens - 50, None))):
        given = row | {"ref_chosen_logps": list(range(1, length + 1)), "ref_rejected_logps": [0.0]}
        section = data(overlong=overlong)
        if overlong == "truncate":
            given |= {"ref_rejected_logps": None}
        values = encoder(tokenizer, section=section)(given)[0].signals["ref_logps"]
        assert len(values) == tokens and (values[place] == np.arange(1, length + 1)).all()
        assert values.sum() == sum(range(1, length + 1))


def test_a_reward_model_is_read_at_the_last_token(tokenizer):
    for example in encoder(tokenizer, score_last=True)(PAIR):
        assert np.flatnonzero(example.loss_weights).tolist() == [len(example.input_ids) - 1]


def test_labels(tokenizer):
    encode = encoder(tokenizer, LabelEncoder, binary=True)
    row = {"prompt": [USER], "completion": [GOOD], "label": True}
    assert (encode(row).signals["label"] == 1).all()
    assert (encode(row | {"label": False}).signals["label"] == 0).all()
    assert (encode(row | {"label": "True"}).signals["label"] == 1).all()  # of a CSV file
    assert (encode(row | {"label": "0"}).signals["label"] == 0).all()
    with pytest.raises(ValueError, match=r"label must be true or false, not 0\.5"):
        encode(row | {"label": 0.5})
    with pytest.raises(ValueError, match="there is no `label`"):
        encode({"prompt": [USER], "completion": [GOOD]})
    pair = encode(PAIR)
    assert [example.signals["label"][0] for example in pair.items] == [1, 0]


def test_steps_are_scored_at_their_ends(tokenizer):
    encode = encoder(tokenizer, LabelEncoder, plain=True, score_last=True)
    example = encode({"prompt": "Q:", "completions": ["ab", "c", "d"], "labels": [True, None, False]})
    scored = np.flatnonzero(example.loss_weights)
    text = [tokenizer.decode(example.input_ids[: end + 1]) for end in scored]
    assert text == ["Q:ab\n", "Q:ab\nc\nd\n"]
    assert example.signals["label"][scored].tolist() == [1, 0]


def test_a_token_that_the_tokenizer_adds_ends_no_step():
    tok = chat_templates.tokenizer(None)
    tok.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tok.eos_token_id)]
    )
    encode = encoder(tok, LabelEncoder, plain=True, score_last=True)
    example = encode({"prompt": "Q:", "completions": ["ab", "é"], "labels": [True, False]})
    scored = np.flatnonzero(example.loss_weights)
    assert [tok.decode(example.input_ids[: end + 1]) for end in scored] == ["Q:ab\n", "Q:ab\né\n"]
    assert example.input_ids[-1] == tok.eos_token_id


def stream(rows, tokenizer, **changes):
    section = DataSection(train=SourceSection(rows=rows, epochs=1), max_length=64, shuffle=False, **changes)
    encode = LabelEncoder(Encoder(tokenizer), section, binary=True, mismatched=True)
    return TrainStream(
        section.train_sources, section, encode, rows=2, seed=0, shards=[0, 1], num_shards=2, bundle_size=2
    )


@pytest.mark.parametrize(
    ("prompts", "others"),
    [((0, 1, 2), (2, 0, 1)), ((0, 0, 1, 1, 1), (4, 4, 1, 1, 1))],  # several answers to one prompt follow each other
)
def test_mismatched_answers_are_of_the_last_row_before_with_another_prompt(tokenizer, prompts, others):
    texts = ["one", "two", "three", "four", "five"][: len(prompts)]
    rows = [
        {"prompt": f"Q{asked}", "completion": text, "label": True} for asked, text in zip(prompts, texts, strict=True)
    ]
    found = set()
    with stream(rows, tokenizer) as batches:
        for batch in batches:
            for row in range(len(batch.tokens)):
                for segment in range(1, batch.segment_ids[row].max() + 1):
                    at = batch.segment_ids[row] == segment
                    words = tokenizer.decode(
                        batch.tokens[row][at & (batch.loss_weights[row] > 0)], skip_special_tokens=True
                    )
                    prompt = tokenizer.decode(batch.tokens[row][at])
                    number = next(n for n in range(3) if f"Q{n}" in prompt)
                    found.add((number, words.strip(), batch.signals["label"][row][at][0] == MISMATCHED))
    expected = {(asked, text, False) for asked, text in zip(prompts, texts, strict=True)}
    expected |= {(asked, texts[other], True) for asked, other in zip(prompts, others, strict=True)}
    assert found == expected


def test_a_single_row_has_no_answer_of_another(tokenizer):
    with pytest.raises(ValueError, match=r"objective\.loss=apo_zero"):
        stream([{"prompt": "Q", "completion": "a", "label": True}], tokenizer)
    same = [{"prompt": "Q", "completion": text, "label": True} for text in "ab"]
    with (
        pytest.raises(ValueError, match=r"the same one: use objective\.loss=apo_zero"),
        stream(same, tokenizer) as batches,
    ):
        next(batches)


def test_unknown_columns_are_reported(tokenizer, caplog):
    section = DataSection(train=SourceSection(rows=[PAIR | {"source": "x"}], epochs=1), max_length=64)
    encode = PairEncoder(Encoder(tokenizer), section)
    with TrainStream(section.train_sources, section, encode, rows=1, seed=0, shards=[0], num_shards=1, bundle_size=2):
        assert "columns ignored: source" in caplog.text


@pytest.mark.parametrize("kind", [PairEncoder, LabelEncoder])
def test_keys_of_messages_that_nothing_reads_are_reported(tokenizer, caplog, kind):
    pair = {"prompt": [USER | {"lang": "en"}], "chosen": [GOOD | {"score": 1}], "rejected": [BAD]}
    section = DataSection(train=SourceSection(rows=[pair], epochs=1), max_length=64)
    Reader([Source(section.train)], section, encode := kind(Encoder(tokenizer), section), encode.bundle_size)
    assert "columns ignored: messages[].lang (user), messages[].score (assistant)" in caplog.text


def test_columns_are_mapped(tokenizer):
    rows = [{"q": "Hi?", "good": "Yes", "bad": "No!", "margin": 1.0}]
    section = DataSection(
        train=SourceSection(rows=rows, columns={"prompt": "q", "chosen": "good", "rejected": "bad"}), max_length=64
    )
    encode = PairEncoder(Encoder(tokenizer), section)
    with TrainStream(
        section.train_sources, section, encode, rows=1, seed=0, shards=[0], num_shards=1, bundle_size=2
    ) as batches:
        batch = next(batches)
    assert batch.signals["margin"].max() == 1 and batch.bundle_ids.max() >= 1


def test_two_sources_of_one_file_have_their_own_references(tokenizer, tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "Hi?", "chosen": "Yes", "rejected": "No!"}\n')
    same = SourceSection(path=str(tmp_path / "pairs.jsonl"))
    turned = same.model_copy(update={"columns": {"chosen": "rejected", "rejected": "chosen"}})
    encode = encoder(tokenizer)
    encode.references = {same.rows_key: [{"ref_chosen_logps": -1}], turned.rows_key: [{"ref_chosen_logps": -2}]}
    assert [encode.more_columns(Source(each), 0)["ref_chosen_logps"] for each in (same, turned)] == [-1, -2]
    assert same.model_copy(update={"epochs": 1, "weight": 2.0}).rows_key == same.rows_key
