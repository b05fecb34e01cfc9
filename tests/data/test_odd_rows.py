"""Rows of random odd values: each makes an example, or a ValueError that names the row."""

import json
import random

import pytest
from chat_templates import CHATML, QWEN25, tokenizer

from jaxtrain.config import SourceSection
from jaxtrain.data.columns import COLUMNS, UNSUPPORTED_COLUMNS
from jaxtrain.data.formats import Encoder
from jaxtrain.data.sources import DataError, Source
from jaxtrain.types import Example

ROLES = ["user", "assistant", "system", "tool", "developer", "human", "gpt", "function_call", "observation", "function"]
KEYS = [
    *("role", "from", "content", "value", "weight", "train", "loss", "loss_scale", "train_detail", "name"),
    *("tool_calls", "function_call", "reasoning_content", "thinking", "function", "arguments", "parameters"),
]
NAMES = [
    *COLUMNS,
    "conversations",
    "answer",
    "reward_model",
    "id",
    *(n for each in UNSUPPORTED_COLUMNS.values() for n in each),
]


class Odd:
    """Draws values that are mostly right and often odd."""

    def __init__(self, seed):
        self.random = random.Random(seed)

    def pick(self, *makers):
        return self.random.choice(makers)()

    def value(self, depth=0):
        random = self.random
        leaves = [
            None,
            "",
            " ",
            "x",
            "[",
            "{}",
            "[1]",
            '"s"',
            0,
            1,
            -1,
            0.5,
            1e400,
            10**400,
            True,
            False,
            -100,
            "\ud800",
        ]
        if depth > 2 or random.random() < 0.6:
            return random.choice(leaves)
        inner = [self.value(depth + 1) for _ in range(random.randint(0, 3))]
        return inner if random.random() < 0.5 else dict(zip(random.sample(KEYS, len(inner)), inner, strict=True))

    def text(self):
        return self.random.choice(["What", "Paris is", '[{"role": "user"}]', "[" * 3000, ""])

    def call(self):
        arguments = self.pick(dict, lambda: "{}", lambda: '{"a": 1}', self.value)
        bare = {"name": self.pick(lambda: "f", self.value), "arguments": arguments}
        return self.pick(
            lambda: bare, lambda: {"type": "function", "function": bare}, lambda: json.dumps(bare), self.value
        )

    def message(self, role):
        message = {"role": role, "content": self.text()}
        if role in ("gpt", "human", "observation", "function_call"):
            message = {"from": role, "value": self.text()}
        if role == "function_call" or self.random.random() < 0.1:
            message |= {self.random.choice(["value", "content", "tool_calls", "function_call"]): self.call()}
        if self.random.random() < 0.3:
            message |= {self.random.choice(KEYS): self.value()}
        return message if self.random.random() < 0.97 else self.value()

    def messages(self):
        if self.random.random() < 0.5:
            roles = ["user", "assistant"] * self.random.randint(1, 2)
        else:
            roles = [self.random.choice(ROLES) for _ in range(self.random.randint(0, 4))]
        found = [self.message(role) for role in roles]
        return self.pick(lambda: found, lambda: found, lambda: json.dumps(found), self.value)

    def column(self, name):
        if name in ("messages", "conversations"):
            return self.messages()
        if name in ("prompt", "completion"):
            return self.pick(self.messages, self.text)
        if name in ("input_ids", "labels") or name.endswith(("mask", "masks")):
            return self.pick(lambda: [1, 0, 1], lambda: [1, 1, 1], self.value)
        if name == "tools":
            return self.pick(lambda: [{"name": "f"}], lambda: '[{"name": "f"}]', lambda: ['{"name": "f"}'], self.value)
        if name == "history":
            return self.pick(lambda: [["a", "b"]], list, self.value)
        return self.pick(self.text, self.value)

    def row(self):
        kind = self.random.choice(
            [
                ["messages"],
                ["conversations"],
                ["prompt", "completion"],
                ["instruction", "output"],
                ["text"],
                ["input_ids"],
            ]
        )
        names = [*kind, *self.random.sample(NAMES, self.random.choice([0, 0, 1, 3]))]
        return {name: self.column(name) for name in names}


@pytest.mark.parametrize("template", [CHATML, QWEN25], ids=["CHATML", "QWEN25"])
@pytest.mark.parametrize(
    "options",
    [{}, {"merge": ["turns", "system"]}, {"loss_on": "last", "prompt_format": "plain"}, {"loss_on": "all"}],
    ids=["default", "merge", "last", "all"],
)
def test_odd_rows_make_examples_or_errors_that_name_them(tmp_path, options, template):
    odd = Odd(f"{options} {len(template)}")
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(odd.row()) + "\n" for _ in range(300)))
    source, encode = Source(SourceSection(path=str(path))), Encoder(tokenizer(template), **options)
    made = 0
    for number in range(len(source)):
        for function in (encode, encode.prompt, encode.question):
            try:
                made += isinstance(source.make(number, function), Example)
            except DataError as error:
                assert str(error).startswith(f"{path}:{number + 1}: ")
    assert 20 < made < 250
