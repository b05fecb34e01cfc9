"""Privileged prompts: more of the row, in place of the user's last message."""

from types import SimpleNamespace

import numpy as np
import pytest

from converters.tokenizer import load_tokenizer, write_byte_tokenizer
from jaxtrain.config import TeacherSection
from jaxtrain.data.formats import Encoder
from jaxtrain.rl.privileged import PrivilegedPrompts, privileged_prompts
from jaxtrain.rl.rollouts import Prompt

TEMPLATE = "{prompt}\nA solution: {worked}\nNow solve {{it}}."
FILLED = "2 + 3?\nA solution: 5, since 2 + 3 = 5\nNow solve {it}."
WORKED = {"worked": "5, since 2 + 3 = 5"}


@pytest.fixture(scope="module")
def encode(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(folder)
    return Encoder(load_tokenizer(folder))


def asked(content):
    return {"role": "user", "content": content}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "2 + 3?"}, {"prompt": FILLED}),
        ({"prompt": [asked("2 + 3?")]}, {"prompt": [asked(FILLED)]}),
        (
            {"prompt": [asked("hi"), {"role": "assistant", "content": "{yes}?"}, asked("2 + 3?")], "system": "Count."},
            {"prompt": [asked("hi"), {"role": "assistant", "content": "{yes}?"}, asked(FILLED)], "system": "Count."},
        ),
    ],
    ids=["string", "message", "conversation"],
)
def test_the_teacher_reads_the_filled_template_in_place_of_the_last_message(encode, row, expected):
    ids, columns = encode.question(row | WORKED)
    prompt = Prompt(3, ids, columns)
    found = PrivilegedPrompts(TEMPLATE, encode)(prompt)
    np.testing.assert_array_equal(found.ids, encode.question(expected)[0])
    assert found.number == 3 and found.ids.dtype == np.int32 and len(found.ids) > len(ids)
    np.testing.assert_array_equal(PrivilegedPrompts("{prompt}", encode)(prompt).ids, ids)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "2?"}, "reads the column 'worked', which is missing: this row has 'prompt'"),
        ({"prompt": "2?", "worked": None}, "'worked', which is NoneType, and not text or a number"),
        ({"prompt": [{"role": "system", "content": "Count."}], "worked": 5}, "this prompt has none"),
    ],
)
def test_a_row_that_does_not_fill_it_is_refused(encode, row, message):
    with pytest.raises(ValueError, match=message):
        PrivilegedPrompts(TEMPLATE, encode).row(row)


def test_there_are_none_without_the_key(encode):
    session = SimpleNamespace(config=SimpleNamespace(teacher=None), encoder=lambda role: encode)
    assert privileged_prompts(session, None) is None
    session.config.teacher = TeacherSection(path="x")
    assert privileged_prompts(session, None) is None
    session.config.teacher = TeacherSection(privileged_prompt=TEMPLATE)
    found = privileged_prompts(session, None)
    assert found is not None and found.row({"prompt": "2 + 3?", **WORKED})["prompt"] == FILLED
