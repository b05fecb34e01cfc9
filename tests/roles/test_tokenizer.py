import json

import chat_templates
import pytest
import tiny

from jaxtrain.config import ModelSection
from jaxtrain.config.model import AddTokensSection
from jaxtrain.data.fingerprints import tokenizer_fingerprint
from jaxtrain.roles.tokenizer import make_tokenizer, stop_ids


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    chat_templates.tokenizer(chat_templates.GENERATION).save_pretrained(folder)
    return folder


def section(**changes):
    return ModelSection(config=tiny.HF_CONFIG, **changes)


def test_without_a_tokenizer_there_is_none_and_a_key_that_needs_one_is_refused(tmp_path):
    assert make_tokenizer(section()) is None and tokenizer_fingerprint(None) == ""
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages }}")
    with pytest.raises(ValueError, match=r"model\.chat_template needs a tokenizer"):
        make_tokenizer(section(chat_template=str(template)))


def test_tokens_are_added_and_the_template_is_replaced(folder, tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages }}")
    plain = make_tokenizer(section(tokenizer=str(folder)))
    added = AddTokensSection(names=["<new>", "<|im_end|>"])
    changed = make_tokenizer(section(tokenizer=str(folder), add_tokens=added, chat_template=str(template)))
    assert len(changed) == len(plain) + 1  # one of them was there
    assert changed.encode("<new>", add_special_tokens=False) == [len(plain)]
    assert changed.chat_template == "{{ messages }}"
    with pytest.raises(ValueError, match=r"model\.chat_template: the file .* does not exist"):
        make_tokenizer(section(tokenizer=str(folder), chat_template=str(tmp_path / "none")))


def test_the_fingerprint_follows_ids_and_template_and_not_padding(folder):
    tokenizer = make_tokenizer(section(tokenizer=str(folder)))
    before = tokenizer_fingerprint(tokenizer)
    tokenizer("a text", padding="max_length", max_length=40, truncation=True)
    assert tokenizer_fingerprint(tokenizer) == before
    tokenizer.chat_template += " "
    assert tokenizer_fingerprint(tokenizer) != before


def test_stop_ids_are_those_of_all_files_and_of_the_template(folder, tmp_path):
    tokenizer = make_tokenizer(section(tokenizer=str(folder)))
    end_of_turn, end_of_text = tokenizer.convert_tokens_to_ids(["<|im_end|>", "</s>"])
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 3]}))
    found = stop_ids(section(tokenizer=str(tmp_path)), {"eos_token_id": 5}, tokenizer)
    assert found == sorted({3, 5, 7, end_of_turn, end_of_text})
    assert stop_ids(section(), {}, None) == []
