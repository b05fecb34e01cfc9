import pytest
from pydantic import ValidationError

from jaxtrain.config.model import AddTokensSection, ModelSection


@pytest.mark.parametrize(
    ("section", "keys", "message"),
    [
        (AddTokensSection, {}, "give `names`, or `prefix` and `count`"),
        (AddTokensSection, {"prefix": "<s"}, "`prefix` and `count` belong together"),
        (AddTokensSection, {"names": ["<s1>"], "prefix": "<s", "count": 2}, "a token is named twice"),
        (ModelSection, {"path": "a", "quantize": "int8"}, "quantize=int8 needs `lora` or `add_tokens.alone`"),
        (ModelSection, {"config": {}, "add_tokens": {"names": ["x"]}}, "add_tokens needs `tokenizer`"),
    ],
)
def test_values_that_cannot_be_meant_are_refused(section, keys, message):
    with pytest.raises(ValidationError, match=message):
        section(**keys)


def test_new_tokens_are_the_names_and_the_numbered_ones():
    assert AddTokensSection(names=["<a>"], prefix="<sid_", count=2).tokens == ["<a>", "<sid_0>", "<sid_1>"]
