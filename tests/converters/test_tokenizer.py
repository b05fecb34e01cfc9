import subprocess
import sys

import pytest
from chat_templates import QWEN3, tokenizer
from transformers import AutoTokenizer

from converters.tokenizer import load_tokenizer, save_tokenizer, write_byte_tokenizer
from jaxtrain.data.chat import ChatTokenizer

CHAT = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "日本 🙂\n 4"}]


def test_the_byte_tokenizer_writes_any_text_and_reads_it_back(tmp_path):
    tok = write_byte_tokenizer(tmp_path)
    text = "".join(map(chr, range(32, 700))) + " \n\t日本🙂  x"
    ids = tok(text).input_ids
    assert tok.decode(ids) == text and len(ids) == len(text.encode()) and max(ids) < 256
    assert len(tok) == 259


@pytest.mark.parametrize("load", [load_tokenizer, AutoTokenizer.from_pretrained])
def test_the_byte_tokenizer_is_a_folder_that_transformers_loads(tmp_path, load):
    write_byte_tokenizer(tmp_path)
    tok = load(tmp_path)
    chat = ChatTokenizer(tok)(CHAT)
    assert tok.decode(chat.input_ids) == (
        "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n日本 🙂\n 4<|im_end|>\n"
    )
    assert tok.decode(chat.input_ids[chat.loss_weights > 0]) == "日本 🙂\n 4<|im_end|>"
    assert tok.eos_token_id == chat.input_ids[chat.loss_weights > 0][-1] != tok.pad_token_id


def test_a_tokenizer_survives_saving_with_its_template(tmp_path):
    original = tokenizer(QWEN3)
    save_tokenizer(original, tmp_path / "new")
    loaded = load_tokenizer(tmp_path / "new")
    assert loaded.chat_template == QWEN3
    assert loaded.apply_chat_template(CHAT) == original.apply_chat_template(CHAT)
    assert (loaded.eos_token, loaded.pad_token) == ("</s>", "</s>")


def test_a_tokenizer_without_padding_pads_with_its_end_of_sequence(tmp_path):
    save_tokenizer(tokenizer(None, pad_token=None), tmp_path)
    assert load_tokenizer(tmp_path).pad_token == "</s>"


def test_loading_needs_no_torch(tmp_path):
    write_byte_tokenizer(tmp_path)
    code = (
        "import sys; from converters.tokenizer import load_tokenizer; from jaxtrain.data.formats import Encoder; "
        f"Encoder(load_tokenizer({str(tmp_path)!r}))({{'prompt': 'a', 'completion': 'b'}}); "
        "assert 'torch' not in sys.modules and 'jax' not in sys.modules, 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_tokenizers_that_cannot_be_loaded_are_reported(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer folder .* does not exist"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(ValueError, match=r"has no tokenizer\.json; set model\.tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(ValueError, match="sentencepiece"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        load_tokenizer(tmp_path)
